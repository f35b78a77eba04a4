"""Experiment trackers, the real packages in their offline modes: what they hold, and that they never end a run."""

import importlib
import json
import time
from unittest import mock

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
    for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "TRACKIO_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    (tmp_path / "my_run").mkdir()
    return tmp_path / "my_run"


def tracked_points(name, workdir):
    """[(step, loss)] of the run of a tracker."""
    run = json.loads((workdir / "trackers.json").read_text())[name]
    if name == "mlflow":
        history = importlib.import_module("mlflow").MlflowClient().get_metric_history(run, "loss")
        return [(point.step, point.value) for point in history]
    logs = importlib.import_module("trackio").SQLiteStorage.get_logs(PROJECT, f"my_run-{run}")
    return [(line["step"], line["loss"]) for line in logs if "loss" in line]


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
        assert sorted(tracked_points(name, offline)) == [(2, 1 / 2), (4, 1 / 4), (4, 1 / 4), (6, 1 / 6)]


@pytest.mark.parametrize("method", ["open", "write_scalars", "write_image", "close"])
def test_a_tracker_that_fails_is_dropped_with_one_line(method, tmp_path, monkeypatch, capsys):
    failing, other = mock.Mock(), mock.Mock()
    broken = failing if method == "open" else getattr(failing.return_value, method)
    broken.side_effect = ConnectionError("no route\nto host")
    monkeypatch.setattr(logging, "TRACKERS", {"wandb": failing, "mlflow": other})
    opened = Trackers(["wandb", "mlflow"], RunDir(tmp_path), PROJECT, {})
    for step in (1, 2):
        opened.write_scalars(step, {"loss": 1.0})
        opened.write_image(step, "samples", PICTURE, "Samples")
    opened.close()
    line = "Note: wandb failed (ConnectionError: no route to host): the run continues without it.\n"
    assert capsys.readouterr().out == line and broken.call_count == 1
    called = [name for name, *_ in other.return_value.method_calls]
    assert called == ["write_scalars", "write_image", "write_scalars", "write_image", "close"]


def test_a_tracker_that_is_not_installed_is_refused_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    config = array_config("vectors", "", **{"logging.writers": ("tensorboard", "mlflow")})
    with pytest.raises(errors.UserError, match=r"has 'mlflow', which is not installed: pip install '.\[trackers\]'"):
        logging.check_writers(config)
