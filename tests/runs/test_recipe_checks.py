"""Settings with which a run cannot give good results are named at launch, with what to type."""

import re

import pytest

from diffusion_jax import data
from diffusion_jax.config import default, default_classifier, experiment, experiment_names, override, resolve
from diffusion_jax.runs import recipe_checks
from helpers.configs import tiny_config


def changed(base, **leaves):
    return override(base, {name: str(value) for name, value in leaves.items()})


@pytest.mark.parametrize("name", experiment_names())
def test_shipped_configs_have_no_notes(name):
    assert recipe_checks.notes(resolve(experiment(name))) == []


LONG = {"training.num_steps": 2000, "optimizer.warmup_steps": 100, "ema.warmup": True}
CONTINUOUS = {"data.levels": None, "data.random_flip": False}

# Leaves that are changed from the defaults, and the start of the note.
NOTES = [
    (
        LONG | {"optimizer.warmup_steps": 5000},
        "optimizer.warmup_steps=5000 is not below training.num_steps=2000, so the learning rate never reaches 0.0002; ",
    ),
    (
        LONG | {"ema.warmup": False},
        # 0.9999**2000 = 0.819, and 0.9999**23025 is the first power below 0.1
        "at training.num_steps=2000 the EMA (ema.decay=0.9999) still holds 82% of the random initial weights",
    ),
    (
        LONG | CONTINUOUS,
        "diffusion.prediction=eps of continuous data (data.levels=None) without a clip amplifies the errors",
    ),
    (
        LONG | {"diffusion.num_timesteps": 10},
        # the product of 1 - beta is 0.904
        "diffusion.num_timesteps=10 with the schedule linear ends at alpha_bar=0.9 instead of nearly 0",
    ),
]


@pytest.mark.parametrize(("leaves", "start"), NOTES)
def test_each_problem_has_one_line_with_a_remedy_that_removes_it(leaves, start):
    config = changed(default(), **leaves)
    (note,) = recipe_checks.notes(config)
    assert note.startswith(start) and "use --config." in note
    for name, value in re.findall(r"--config\.(\S+)=(\w+)", note):
        assert recipe_checks.notes(changed(config, **{name: value})) == [], name


@pytest.mark.parametrize(
    "leaves",
    [
        {"training.num_steps": 20},  # a trial
        LONG | {"optimizer.warmup_steps": 1999},
        LONG | {"ema.warmup": False, "training.num_steps": 23_025},
        LONG | CONTINUOUS | {"sampling.clip": True},
        LONG | CONTINUOUS | {"diffusion.prediction": "x_0"},
        LONG | {"diffusion.num_timesteps": 500},  # alpha_bar 0.006
    ],
)
def test_what_works_has_no_note(leaves):
    assert recipe_checks.notes(changed(default(), **leaves)) == []


def test_classifiers_may_have_any_schedule():
    assert recipe_checks.notes(changed(default_classifier(), **LONG, **{"diffusion.num_timesteps": 10})) == []


def digits(**leaves):
    config = tiny_config(**leaves)
    return config, data.load(config.data)


def test_a_batch_that_repeats_examples_has_a_note():
    config, source = digits()
    config.training.batch_size = len(source)
    assert recipe_checks.notes(config, source) == []
    config.training.batch_size = len(source) + 1
    (note,) = recipe_checks.notes(config, source)
    assert note.endswith("every batch repeats some; use --config.training.batch_size=1024")


def test_other_gray_levels_than_those_of_the_images_have_a_note():
    assert recipe_checks.notes(*digits(**{"data.levels": 17})) == []
    (note,) = recipe_checks.notes(*digits(**{"data.levels": 16}))
    assert re.match(r"data.levels=16, but the images contain the value \d+, .*; use data.levels=256", note)
