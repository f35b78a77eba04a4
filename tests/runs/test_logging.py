"""Metric writers: lines, TensorBoard events, and trackers (the real packages in offline mode)."""

import importlib
import json
import os
import time
import tracemalloc
from unittest import mock

import numpy as np
import pytest
from tensorboard.backend.event_processing import event_accumulator
from tensorboard.util import tensor_util

from diffusion_jax import errors
from diffusion_jax.run_dir import RunDir
from diffusion_jax.runs import logging
from diffusion_jax.runs.logging import RunMetrics
from helpers.array_configs import array_config
from helpers.configs import convolutions_config
from helpers.work_directories import lines


def read_events(directory):
    events = event_accumulator.EventAccumulator(str(directory))
    events.Reload()
    return events


@pytest.mark.whole
def test_numbers_are_in_groups_beside_the_config_and_pictures(tmp_path):
    scalars = {"loss": 1.0, "loss_q1": 2.0, "compute": 0.5, "grad_norm": 3.0, "frechet_distance": 4.0}
    picture = np.arange(8 * 6 * 3, dtype=np.uint8).reshape(8, 6, 3)
    with RunMetrics(convolutions_config(), RunDir(tmp_path), step=0) as metrics:
        metrics.write_scalars(2, scalars)
        metrics.write_image(2, "samples", picture, "Samples after 2 steps")
    events = read_events(tmp_path)
    groups = ("loss/loss", "loss/loss_q1", "time/compute", "optimizer/grad_norm", "metrics/frechet_distance")
    assert {tag: events.Scalars(tag)[0].value for tag in events.Tags()["scalars"]} == dict(
        zip(groups, scalars.values(), strict=True)
    )
    assert lines(tmp_path, without=()) == [{"step": 2, **scalars}]
    (config,) = events.Tensors("config")
    assert '"num_steps": 4' in tensor_util.make_ndarray(config.tensor_proto).item().decode()
    (image,) = events.Images("samples")
    assert (image.step, image.height, image.width) == (2, 8, 6)


def test_a_relaunch_replaces_what_is_beyond_its_step(tmp_path):
    """The first launch is killed in the middle of a line and an event."""
    for step in (0, 4):
        metrics = RunMetrics(convolutions_config(), RunDir(tmp_path), step)
        for later in (3, 5, 7) if step == 0 else (5, 6):
            metrics.write_scalars(later, {"loss": float(step)})
        metrics.flush()
        if step == 0:
            for path in tmp_path.iterdir():
                path.write_bytes(path.read_bytes()[:-3])
    assert [(line["step"], line["loss"]) for line in lines(tmp_path)] == [(3, 0.0), (5, 4.0), (6, 4.0)]
    assert [(event.step, event.value) for event in read_events(tmp_path).Scalars("loss/loss")] == [
        (3, 0.0),
        (5, 4.0),
        (6, 4.0),
    ]


def test_a_log_is_read_in_bounded_memory(tmp_path, monkeypatch, capsys):
    """A line without an end, and lines that are too many, as in a stranger's file of holes or repetitions."""
    path = tmp_path / "metrics.jsonl"
    with path.open("wb") as file:
        file.write(b'{"step": 1}\n')
        file.truncate(50 * 2**20)
        file.seek(0, os.SEEK_END)
        file.write(b'\n{"step": 2}\n{"step": 3, "loss": 0.5')
    tracemalloc.start()
    assert logging.read_metrics(tmp_path) == [{"step": 1}, {"step": 2}]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5 * 2**20 and capsys.readouterr().out.count("1 lines above 65,536 bytes") == 1
    with open_metrics((), tmp_path, step=2) as metrics:
        metrics.write_scalars(3, {"loss": 0.25})
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3, "loss": 0.25}\n'
    path.write_text("".join(f'{{"step": {step}}}\n' for step in range(1000)))
    capsys.readouterr()
    monkeypatch.setattr(logging, "_LINES_BYTES", 412 * 500)
    steps = [line["step"] for line in logging.read_metrics(tmp_path)]
    assert 250 <= len(steps) <= 501 and steps == list(range(0, 1000, steps[1]))
    assert f"one of {steps[1]} lines is used" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["pipe", "hard link"])
def test_lines_are_not_written_into_another_file(kind, tmp_path):
    """Also where links are allowed, so that the directory was not checked."""
    run, other = tmp_path / "run", tmp_path / "other.jsonl"
    run.mkdir()
    other.write_text('{"step": 1, "loss": 0.5}\n')
    if kind == "pipe":
        os.mkfifo(run / "metrics.jsonl")
    else:
        os.link(other, run / "metrics.jsonl")
    with pytest.raises(errors.UserError, match=r"metrics.jsonl is .*type: (rm|cp) "):
        RunMetrics(convolutions_config(), RunDir(run), 1)
    assert lines(run) == [{"step": 1, "loss": 0.5}] if kind == "hard link" else not (run / "events").exists()


def test_events_are_a_new_file(tmp_path, monkeypatch):
    monkeypatch.setattr("time.time", lambda: 1.0)
    monkeypatch.setattr("os.getpid", lambda: 7)
    with open_metrics(("tensorboard",), tmp_path):
        pass
    (events,) = tmp_path.glob("events*")
    events.write_bytes(b"kept")
    with open_metrics(("tensorboard",), tmp_path):
        pass
    assert events.read_bytes() == b"kept"


def test_results_are_beside_the_events_of_training(tmp_path):
    """At the checkpoint's step; later events of the training launch stay."""
    config = convolutions_config()
    with RunMetrics(config, RunDir(tmp_path), step=0) as metrics:
        metrics.write_scalars(3, {"loss": 1.0})
        logging.write_evaluation(config, RunDir(tmp_path), 2, {"recall": 0.5})
        metrics.write_scalars(4, {"loss": 2.0})
    assert [event.step for event in read_events(tmp_path).Scalars("loss/loss")] == [3, 4]
    (event,) = read_events(tmp_path / "evaluation").Scalars("evaluation/recall")
    assert (event.step, event.value) == (2, 0.5)
    assert [line["step"] for line in lines(tmp_path)] == [3, 4]


# ---- Trackers

PROJECT = "a_project"
PICTURE = np.zeros((4, 6, 3), np.uint8)


def open_metrics(names, workdir, step=0):
    return RunMetrics(
        array_config("vectors", "", **{"logging.writers": names, "logging.project": PROJECT}), RunDir(workdir), step
    )


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """A work directory, and variables that keep the trackers on this machine."""
    for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "TRACKIO_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    (tmp_path / "my_run").mkdir()
    return tmp_path / "my_run"


def tracked_points(name, workdir, metric="loss"):
    """[(step, value)] from a tracker's run."""
    run = json.loads((workdir / "trackers.json").read_text())[name]
    if name == "mlflow":
        history = importlib.import_module("mlflow").MlflowClient().get_metric_history(run, metric)
        return [(point.step, point.value) for point in history]
    logs = importlib.import_module("trackio").SQLiteStorage.get_logs(PROJECT, f"my_run-{run}")
    return [(line["step"], line[metric]) for line in logs if metric in line]


def append_slowly(path, text):
    """A file is empty for a while, as on a busy machine, so that a reader in another thread sees it."""
    with open(path, "a") as file:
        time.sleep(0.5)
        file.write(text)


@pytest.mark.whole
@pytest.mark.parametrize("name", [name for name in logging.WRITERS if name != "tensorboard"])
def test_a_relaunch_and_results_continue_the_tracked_run(name, offline, monkeypatch, capsys):
    """The first launch is killed after it logged step 4; the second starts from the checkpoint of step 2."""
    pytest.importorskip(name)
    if name == "mlflow":
        monkeypatch.setattr("mlflow.store.tracking.file_store.append_to", append_slowly)
    for steps in ((2, 4), (4, 6)):
        tracker = open_metrics((name,), offline)
        for step in steps:
            tracker.write_scalars(step, {"loss": 1 / step, "grad_norm": 2.0})
            time.sleep(0.1)  # MLflow's thread has opened a file
            tracker.write_image(step, "samples", PICTURE, "Samples")
        tracker.close()
        time.sleep(1.1)  # W&B names a launch's folder by the second
    config = array_config("vectors", "", **{"logging.writers": (name,), "logging.project": PROJECT})
    logging.write_evaluation(config, RunDir(offline), 2, {"recall": 0.5})
    assert [line for line in capsys.readouterr().out.splitlines() if "continues without it" in line] == []
    if name == "wandb":  # the tracker's files are not documented
        run_id = json.loads((offline / "trackers.json").read_text())["wandb"]
        assert len(list(offline.glob(f"wandb/offline-run-*-{run_id}/run-{run_id}.wandb"))) == 3
    else:
        assert sorted(tracked_points(name, offline)) == [(2, 1 / 2), (4, 1 / 4), (4, 1 / 4), (6, 1 / 6)]
        assert tracked_points(name, offline, "evaluation/recall") == [(2, 0.5)]


@pytest.mark.parametrize("method", ["open", "write_scalars", "write_image", "flush", "close"])
def test_a_tracker_that_fails_is_dropped_with_one_line(method, tmp_path, monkeypatch, capsys):
    failing, other = mock.Mock(), mock.Mock()
    broken = failing if method == "open" else getattr(failing.return_value, method)
    broken.side_effect = ConnectionError("no route\nto host")
    monkeypatch.setattr(logging, "WRITERS", {"wandb": failing, "mlflow": other})
    opened = open_metrics(("wandb", "mlflow"), tmp_path)
    for step in (1, 2):
        opened.write_scalars(step, {"loss": 1.0})
        opened.write_image(step, "samples", PICTURE, "Samples")
    opened.close()
    line = "Note: wandb failed (ConnectionError: no route to host): the run continues without it.\n"
    assert capsys.readouterr().out == line and broken.call_count == 1
    called = [name for name, *_ in other.return_value.method_calls]
    assert called == ["write_scalars", "write_image", "write_scalars", "write_image", "flush", "close"]


def test_a_tracker_of_the_user(tmp_path, capsys):
    """It needs no other method than write_scalars; one without that method is dropped with a note."""
    for name in ("Lines", "WithoutMethods"):
        with open_metrics((f"helpers.own_networks:{name}",), tmp_path, step=2) as metrics:
            metrics.write_scalars(3, {"loss": 0.5})
            metrics.write_image(3, "samples", PICTURE, "a caption")
    assert (tmp_path / "from_2.txt").read_text() == "3 0.5\n"
    out = capsys.readouterr().out
    assert (
        out.startswith("Note: helpers.own_networks:WithoutMethods failed (AttributeError: ") and out.count("Note") == 1
    )


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("helpers.own_networks:absent", "cannot be imported"),
        ("mlflow", r"which is not installed: pip install '.\[trackers\]'"),
    ],
)
def test_a_writer_that_cannot_be_imported_is_refused(name, words, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name != "mlflow" or None)
    with pytest.raises(errors.UserError, match=f"logging.writers.*{name}.*{words}"):
        logging.check_writers(array_config("vectors", "", **{"logging.writers": ("tensorboard", name)}))
