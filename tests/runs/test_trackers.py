"""Experiment trackers, the real packages in their offline modes: what they hold, and that they never end a run."""

import importlib
import json
import time

import numpy as np
import pytest

from diffusion_jax import errors
from diffusion_jax.run_dir import RunDir
from diffusion_jax.runs import logging
from diffusion_jax.runs.logging import Trackers
from helpers.array_configs import array_config

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


def points_of_mlflow(workdir):
    run = json.loads((workdir / "trackers.json").read_text())["mlflow"]
    history = importlib.import_module("mlflow").MlflowClient().get_metric_history(run, "loss")
    return [(point.step, point.value) for point in history]


def points_of_trackio(workdir):
    trackio = importlib.import_module("trackio")
    run = json.loads((workdir / "trackers.json").read_text())["trackio"]
    logs = trackio.SQLiteStorage.get_logs(PROJECT, f"my_run-{run}")
    return [(line["step"], line["loss"]) for line in logs if "loss" in line]


POINTS = {"mlflow": points_of_mlflow, "trackio": points_of_trackio}


@pytest.mark.whole
@pytest.mark.parametrize("name", list(logging.TRACKERS))
def test_a_relaunch_continues_the_tracked_run(name, offline, capsys):
    """The first launch is killed after it logged step 4; the second starts from the checkpoint of step 2."""
    pytest.importorskip(name)
    for steps in ((2, 4), (4, 6)):
        tracker = Trackers([name], RunDir(offline), PROJECT, {"seed": 0, "model": {"channels": 8}})
        for step in steps:
            tracker.write_scalars(step, {"loss": 1 / step, "grad_norm": 2.0})
            tracker.write_image(step, "samples", PICTURE, "Samples")
        tracker.close()
        time.sleep(1.1)  # W&B names the folder of a launch by the second
    assert "continues without it" not in capsys.readouterr().out
    if name == "wandb":  # whose files are not documented
        run_id = json.loads((offline / "trackers.json").read_text())["wandb"]
        assert len(list(offline.glob(f"wandb/offline-run-*-{run_id}/run-{run_id}.wandb"))) == 2
    else:
        assert sorted(POINTS[name](offline)) == [(2, 1 / 2), (4, 1 / 4), (4, 1 / 4), (6, 1 / 6)]


class Failing:
    """A tracker whose method of this name fails."""

    def __init__(self, method):
        self.method, self.calls = method, []

    def __call__(self, *_):
        self._call("open")
        return self

    def _call(self, name):
        self.calls.append(name)
        if name == self.method:
            raise ConnectionError("no route\nto host")

    def write_scalars(self, step, scalars):
        self._call("scalars")

    def write_image(self, step, name, image, caption):
        self._call("image")

    def close(self):
        self._call("close")


@pytest.mark.parametrize("method", ["open", "scalars", "image", "close"])
def test_a_tracker_that_fails_is_dropped_with_one_line(method, tmp_path, monkeypatch, capsys):
    failing, other = Failing(method), Failing("")
    monkeypatch.setattr(logging, "TRACKERS", {"wandb": failing, "mlflow": other})
    opened = Trackers(["wandb", "mlflow"], RunDir(tmp_path), PROJECT, {})
    for step in (1, 2):
        opened.write_scalars(step, {"loss": 1.0})
        opened.write_image(step, "samples", PICTURE, "Samples")
    opened.close()
    line = "Note: wandb failed (ConnectionError: no route to host): the run continues without it.\n"
    assert capsys.readouterr().out == line
    assert failing.calls[-1] == method and failing.calls.count(method) == 1
    assert other.calls == ["open", "scalars", "image", "scalars", "image", "close"]


def test_a_tracker_that_is_not_installed_is_refused_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    config = array_config("vectors", "", **{"logging.writers": ("tensorboard", "mlflow")})
    with pytest.raises(errors.UserError, match=r"has 'mlflow', which is not installed: pip install '.\[trackers\]'"):
        logging.check_writers(config)
