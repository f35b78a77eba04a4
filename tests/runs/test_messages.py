"""Messages name the setting, file or array that is wrong, and what to type; a closed output ends the program quietly."""

import subprocess
import sys

import numpy as np
import pytest

from diffusion_jax import cli, training
from diffusion_jax.errors import UserError
from diffusion_jax.runs.sampling_conditions import read_conditions
from diffusion_jax.runs.sampling_setup import SamplingSetup
from helpers.array_configs import array_config
from helpers.configs import tiny_config
from helpers.paths import ROOT


def test_misnamed_conditions_of_samples_are_named(tmp_path):
    np.savez(tmp_path / "wanted.npz", cond=np.zeros((3, 1)), x=np.zeros(3))
    leaves = {"model.condition_features": 1, "sampling.conditions": str(tmp_path / "wanted.npz")}
    with pytest.raises(
        UserError, match=r"wanted.npz' has no array 'condition', only 'cond', 'x'; save it under that name"
    ):
        read_conditions(array_config("series", "", **leaves))


def test_too_many_steps_name_the_setting():
    config = tiny_config(**{"sampling.steps": 1001})
    model, schedule = training.model_from_config(config), training.schedule_from_config(config.diffusion)
    with pytest.raises(ValueError, match="^sampling.steps=1001: "):
        SamplingSetup(config, model, schedule, None)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["--config=digits", "--workdir={}", "--mode=edit", "--config.sampling.num_samples=4"],
            "sampling.num_samples=4 has no effect on --mode=edit; use --config.editing.num_samples=4",
        ),
        (["--config={}/data.npz", "--workdir={}"], r"data.npz is not a Python file; give FILE.py with get_config\(\)"),
        (
            ["--config=digits", "--workdir={}/runs/digit", "--mode=status"],
            r"--workdir=\S+/runs/digit: no such directory; --mode=status reads the directory of a run",
        ),
        (["--workdir={}/runs/digit", "--mode=report"], "no such directory; --mode=report"),
    ],
)
def test_commands_without_effect_are_refused(arguments, words, tmp_path):
    np.savez(tmp_path / "data.npz", x=np.zeros(3))
    with pytest.raises(UserError, match=words):
        cli.parse([argument.format(tmp_path) for argument in arguments])


def test_a_closed_output_ends_the_program_quietly(tmp_path):
    arguments = [sys.executable, "main.py", "--config=digits", f"--workdir={tmp_path}", "--mode=status"]
    with subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()  # before anything is written, as `| true` would
        error = process.stderr.read()
    assert process.returncode == 141 and not [line for line in error.splitlines() if "Warning" not in line], error
