"""Messages name the setting, file or array that is wrong, and what to type; a closed output ends the program quietly."""

import subprocess
import sys

import numpy as np
import pytest

from diffusion_jax import cli, training
from diffusion_jax.data import load as load_data
from diffusion_jax.errors import UserError
from diffusion_jax.runs.sampling_conditions import read_conditions
from diffusion_jax.runs.sampling_setup import SamplingSetup
from diffusion_jax.runs.workdir import check_source
from helpers.array_configs import array_config, examples
from helpers.configs import tiny_config
from helpers.paths import ROOT


@pytest.mark.parametrize(
    ("misnamed", "setting", "words"),
    [
        ("cond", "model.condition_features", r"no conditions \(an array 'condition'\), but model.condition_features=1"),
        ("labels", "model.num_classes", r"no labels \(an array 'label', or a subfolder .*\); use model.num_classes=0"),
    ],
)
def test_misnamed_arrays_are_named(misnamed, setting, words, tmp_path):
    x, path, lines = examples("series"), tmp_path / "a.npz", []
    np.savez(path, x=x, **{misnamed: np.zeros((len(x), 1))})
    config = array_config("series", path, **{setting: 1})
    source = load_data(config.data, log=lines.append)
    with pytest.raises(UserError, match=words):
        check_source(config, source)
    assert f"Ignored arrays: '{misnamed}'; arrays are x or image, label, and condition." in lines


def test_misnamed_conditions_of_samples_are_named(tmp_path):
    np.savez(tmp_path / "wanted.npz", cond=np.zeros((3, 1)), x=np.zeros(3))
    leaves = {"model.condition_features": 1, "sampling.conditions": str(tmp_path / "wanted.npz")}
    with pytest.raises(
        UserError, match=r"wanted.npz' has no array 'condition', only 'cond', 'x'; save it under that name"
    ):
        read_conditions(array_config("series", "", **leaves))


@pytest.mark.parametrize("steps", [1001, (10, 2000)])
def test_too_many_steps_name_the_setting(steps):
    config = tiny_config(**{"sampling.steps": steps})
    model, schedule = training.model_from_config(config), training.schedule_from_config(config.diffusion)
    with pytest.raises(ValueError, match=rf"^sampling.steps={str(steps).replace('(', '.').replace(')', '.')}: "):
        SamplingSetup(config, model, schedule, None)


@pytest.mark.parametrize(
    ("leaves", "words"),
    [
        ({"num_groups": 3}, r"^model.num_groups=3 does not divide a layer of 8 channels; use num_groups=1, or other"),
        ({"num_heads": 3}, "^model.num_heads=3 does not divide an attention layer of 16 channels"),
    ],
)
def test_fields_of_the_network_that_do_not_fit_are_named_as_settings(leaves, words):
    with pytest.raises(ValueError, match=words):
        training.create(tiny_config(**{f"model.{name}": value for name, value in leaves.items()}))


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


@pytest.mark.parametrize(
    "program",
    [
        ["main.py", "--help"],
        ["main.py", "--config=digits", "--workdir={}", "--mode=status"],
    ],
    ids=["help", "status"],
)
def test_a_closed_output_ends_the_program_quietly(program, tmp_path):
    process = subprocess.Popen(
        [sys.executable, *(argument.format(tmp_path) for argument in program)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    process.stdout.close()  # before anything is written, as `| true` would
    error = process.stderr.read()
    assert process.wait(timeout=120) in ((0, 141) if "--help" in program else (141,))  # argparse ignores a broken pipe
    assert not [line for line in error.splitlines() if "Warning" not in line], error
