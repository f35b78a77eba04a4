"""Experiment trackers, the real packages in their offline modes: what they hold, and that they never hinder a run."""

import importlib
import json
import time

import numpy as np
import pytest

from diffusion_jax import errors
from diffusion_jax.runs import metrics_writer, trackers, train
from diffusion_jax.runs.trackers import BackgroundTracker, TrackerRun, open_tracker
from helpers.array_configs import array_config, write_arrays

PROJECT = "a_project"
PICTURE = np.zeros((4, 6, 3), np.uint8)


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """A work directory, and variables that keep the trackers on this machine."""
    for name, value in {
        "WANDB_MODE": "offline",
        "WANDB_DATA_DIR": str(tmp_path),
        "WANDB_CACHE_DIR": str(tmp_path),
        "WANDB_CONFIG_DIR": str(tmp_path),
        "TRACKIO_DIR": str(tmp_path / "trackio"),
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    (tmp_path / "my_run").mkdir()
    return tmp_path / "my_run"


def records_of_wandb(path):
    """The records of a .wandb file: after 7 bytes, blocks of 32 KiB with pieces (checksum 4, length 2, type 1 bytes)."""
    content, position, record = path.read_bytes(), 7, b""
    while position + 7 <= len(content):
        left = 2**15 - position % 2**15
        if left < 7:  # the rest of a block is padding
            position += left
            continue
        length, kind = int.from_bytes(content[position + 4 : position + 6], "little"), content[position + 6]
        record += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or its last piece
            yield record
            record = b""


def points_of_wandb(workdir):
    """The steps and losses of all offline files of the run."""
    messages, points = importlib.import_module("wandb.proto.wandb_internal_pb2"), []
    for path in sorted(workdir.glob("wandb/offline-run-*/*.wandb")):
        for data in records_of_wandb(path):
            record = messages.Record.FromString(data)
            items = {item.key or ".".join(item.nested_key): item.value_json for item in record.history.item}
            if "loss" in items:
                points.append((int(items["_step"]), json.loads(items["loss"])))
    return points


def points_of_mlflow(workdir):
    run = json.loads((workdir / "trackers.json").read_text())["mlflow"]["id"]
    history = importlib.import_module("mlflow").MlflowClient().get_metric_history(run, "loss")
    return [(point.step, point.value) for point in history]


def points_of_trackio(workdir):
    trackio = importlib.import_module("trackio")
    run = json.loads((workdir / "trackers.json").read_text())["trackio"]["id"]
    logs = trackio.SQLiteStorage.get_logs(PROJECT, f"my_run-{run}")
    return [(line["step"], line["loss"]) for line in logs if "loss" in line]


POINTS = {"wandb": points_of_wandb, "mlflow": points_of_mlflow, "trackio": points_of_trackio}


@pytest.mark.whole
@pytest.mark.parametrize("name", list(trackers.TRACKERS))
def test_a_relaunch_continues_the_tracked_run_without_duplicates(name, offline):
    """The first launch is killed after it logged step 4; the second starts from the checkpoint of step 2."""
    pytest.importorskip(name)
    said = []
    for steps in ((2, 4), (4, 6)):
        tracker = open_tracker(name, offline, PROJECT, {"seed": 0, "model.channels": 8}, said.append)
        for step in steps:
            tracker.write_scalars(step, {"loss": 1 / step, "grad_norm": 2.0})
            tracker.write_images(step, {"samples": PICTURE[None]}, "Samples")
        tracker.close()
        time.sleep(1.1)  # W&B names the folder of a launch by the second
    assert said == []
    assert POINTS[name](offline) == [(2, 1 / 2), (4, 1 / 4), (6, 1 / 6)]
    stored = json.loads((offline / "trackers.json").read_text())[name]
    assert stored["step"] == 6 and stored["id"]


@pytest.mark.whole
def test_a_training_run_writes_to_every_tracker(offline, tmp_path, monkeypatch, capsys):
    """Without limits of time: this run ends while the trackers still start, which takes long on a busy machine."""
    monkeypatch.setattr(trackers, "_OPEN_SECONDS", 600.0)
    monkeypatch.setattr(trackers, "_CLOSE_SECONDS", 600.0)
    for name in trackers.TRACKERS:
        pytest.importorskip(name)
    file = write_arrays("vectors", tmp_path / "data.npz")
    overrides = {"logging.writers": tuple(trackers.TRACKERS), "logging.project": PROJECT, "training.sample_every": 4}
    train.run(array_config("vectors", file, **overrides), offline)
    assert "the run continues without it" not in capsys.readouterr().out
    expected = [(line["step"], line["loss"]) for line in map(json.loads, (offline / "metrics.jsonl").open())]
    assert [step for step, _ in expected] == [2, 4]
    for name, points in POINTS.items():
        assert points(offline) == expected, name
    assert not list(offline.glob("events.out.tfevents*"))  # TensorBoard is not among the writers


class Slow:
    """A tracker that records what it gets, or fails."""

    last_step = -1

    def __init__(self, delay=0.0, error=None):
        self.delay, self.error, self.written, self.closed = delay, error, [], False

    def write_scalars(self, step, scalars):
        time.sleep(self.delay)
        if self.error:
            raise self.error
        self.written.append((step, dict(scalars)))

    def write_images(self, step, images, caption):
        pass

    def close(self):
        self.closed = True


def background(tracker, workdir, said):
    return BackgroundTracker("wandb", lambda: tracker, TrackerRun(workdir, "wandb", PROJECT, {}), said.append)


def test_a_tracker_that_fails_is_dropped_with_one_line(tmp_path):
    said = []
    tracker = background(Slow(error=ConnectionError("no route\nto host")), tmp_path, said)
    for step in range(1, 20):
        tracker.write_scalars(step, {"loss": 1.0})
        time.sleep(0.01)
    tracker.close()
    assert said == ["Note: wandb failed (ConnectionError: no route to host): the run continues without it."]

    def refuse():
        raise RuntimeError("not logged in")

    BackgroundTracker("mlflow", refuse, TrackerRun(tmp_path, "mlflow", PROJECT, {}), said.append).close()
    assert said[1:] == ["Note: mlflow failed (RuntimeError: not logged in): the run continues without it."]


def test_a_tracker_that_hangs_stops_neither_the_run_nor_its_end(tmp_path, monkeypatch):
    monkeypatch.setattr(trackers, "_CLOSE_SECONDS", 0.1)
    monkeypatch.setattr(trackers, "_MAX_WAITING", 10)
    said = []
    tracker = background(Slow(delay=1000.0), tmp_path, said)
    for step in range(1, 100):
        tracker.write_scalars(step, {"loss": 1.0})
    assert said == ["Note: wandb does not keep up: the run continues without it."]
    tracker.close()
    said.clear()
    tracker = background(Slow(delay=1000.0), tmp_path, said)
    tracker.write_scalars(1, {"loss": 1.0})
    tracker.close()
    assert said == ["Note: wandb has not ended after 0 s: the run continues without it."]


def test_everything_is_written_before_a_tracker_is_closed(tmp_path):
    inner = Slow(delay=0.01)
    tracker = background(inner, tmp_path, [])
    for step in range(1, 11):
        tracker.write_scalars(step, {"loss": float(step)})
    tracker.close()
    assert inner.written == [(step, {"loss": float(step)}) for step in range(1, 11)] and inner.closed


def test_a_tracker_that_is_not_installed_is_refused_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    config = array_config("vectors", "", **{"logging.writers": ("tensorboard", "mlflow")})
    with pytest.raises(errors.UserError, match=r"has 'mlflow', which is not installed: pip install '.\[trackers\]'"):
        metrics_writer.check_writers(config)
