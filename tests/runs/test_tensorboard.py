"""TensorBoard's events: groups of numbers, the config as text and hyperparameters, pictures with captions."""

import subprocess
import sys

import numpy as np
import pytest
from tensorboard.backend.event_processing import event_accumulator
from tensorboard.util import tensor_util

from diffusion_jax.runs.metrics_files import TensorBoardWriter, tensorboard_tag
from diffusion_jax.runs.metrics_writer import RunMetrics
from diffusion_jax.training.state import metric_names
from helpers.configs import tiny_config
from helpers.paths import ROOT
from helpers.work_directories import lines


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("run")
    with RunMetrics(tiny_config(**{"data.data_dir": "a|`b`"}), directory, step=0) as metrics:
        metrics.write_scalars(
            2, {"loss": 1.0, "loss_q1": 2.0, "compute": 0.5, "grad_norm": 3.0, "frechet_distance": 4.0}
        )
        metrics.write_image(2, "samples", np.zeros((8, 8, 3), np.uint8), "Samples after 2 steps")
    return directory


@pytest.fixture(scope="module")
def events(directory):
    events = event_accumulator.EventAccumulator(str(directory), size_guidance={"tensors": 0})
    events.Reload()
    return events


def test_numbers_are_in_groups_and_lines_keep_their_names(directory, events):
    found = {tag for tag in events.Tags()["tensors"] if "/" in tag and not tag.startswith("_")}
    assert found == {"loss/loss", "loss/loss_q1", "time/compute", "optimizer/grad_norm", "metrics/frechet_distance"}
    assert lines(directory, without=()) == [
        {"step": 2, "loss": 1.0, "loss_q1": 2.0, "compute": 0.5, "grad_norm": 3.0, "frechet_distance": 4.0}
    ]


@pytest.mark.parametrize("loss", ["simple", "hybrid", "classify"])
def test_every_metric_of_training_has_a_group(loss):
    groups = {tensorboard_tag(name).partition("/")[0] for name in metric_names(loss)}
    assert groups == {"loss", "optimizer"}


def test_the_config_is_a_text_and_hyperparameters(events):
    (event,) = events.Tensors("config")
    text = tensor_util.make_ndarray(event.tensor_proto).item().decode()
    assert "| model.channels | `8` |" in text and "| data.data_dir | `a\\|'b'` |" in text
    content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    assert b"model.channels" in content and b"model.channel_multipliers" in content


def test_a_picture_has_its_caption(events):
    assert events.SummaryMetadata("samples").summary_description == "Samples after 2 steps"


def test_a_relaunch_writes_its_config_at_its_step_once(tmp_path):
    """Also if an earlier launch started at this step, and was killed before it saved another checkpoint."""
    leaves = {"training.num_steps": 5, "data.levels": None}
    for step in (0, 0, 4, 4):
        TensorBoardWriter(tmp_path, step, leaves).close()
    events = event_accumulator.EventAccumulator(str(tmp_path), size_guidance={"tensors": 0})
    events.Reload()
    assert [event.step for event in events.Tensors("config")] == [0, 4]
    assert len(events.Tensors("_hparams_/session_start_info")) == 1


def test_events_are_written_without_tensorflow():
    code = "import sys; from diffusion_jax.runs import event_files; print('tensorflow' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert out.split() == ["False"]


def test_an_incomplete_last_event_is_removed(tmp_path):
    for step in (0, 4):
        writer = TensorBoardWriter(tmp_path, step)
        writer.write_scalars(3, {"loss": 1.0})
        writer.write_scalars(5, {"loss": 2.0})
        writer.close()
        if step == 0:
            (path,) = tmp_path.iterdir()
            path.write_bytes(path.read_bytes()[:-3])
    events = event_accumulator.EventAccumulator(str(tmp_path), size_guidance={"tensors": 0})
    events.Reload()
    assert [event.step for event in events.Tensors("loss/loss")] == [3, 3, 5]
