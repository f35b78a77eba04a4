"""Work directories for the tests of several modes."""

import pathlib
import shutil

import numpy as np
import pytest

from diffusion_jax.runs import train
from helpers.configs import (
    DRAWN,
    FEW_SAMPLES,
    T,
    classifier_config,
    conditional,
    convolutions_config,
    upsampler_config,
)
from helpers.work_directories import untrained


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run with 4 steps, which no test may change."""
    directory = tmp_path_factory.mktemp("run")
    train.run(convolutions_config(), directory)
    return directory


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Untrained networks of several kinds, each in a work directory."""
    root = tmp_path_factory.mktemp("runs")
    untrained(root / "conditional", conditional())
    untrained(root / "plain", convolutions_config(**{"diffusion.num_timesteps": T, **DRAWN}))
    untrained(root / "classifier", classifier_config(**{"diffusion.num_timesteps": T}))
    untrained(root / "other_classifier", classifier_config(**{"diffusion.num_timesteps": 2 * T}))
    untrained(root / "upsampler", upsampler_config(**DRAWN, **{"diffusion.conditioning_noise": 0.2}))
    return root


@pytest.fixture(scope="module")
def untrained_run(tmp_path_factory):
    return untrained(tmp_path_factory.mktemp("untrained") / "run", convolutions_config(**FEW_SAMPLES))


@pytest.fixture
def run(untrained_run, tmp_path):
    """An untrained run's work directory."""
    return pathlib.Path(shutil.copytree(untrained_run, tmp_path / "run"))


@pytest.fixture
def drawn(monkeypatch):
    """Records the drawn batches' seeds and numbers, instead of drawing with a network."""
    calls = []

    def draw(setup, seed, index, batch_size, wrap=None):
        calls.append((seed, index))
        return np.full((batch_size, 8, 8, 1), 10 * seed + index, np.uint8)

    monkeypatch.setattr("diffusion_jax.runs.sampling_setup.SamplingSetup.generate_batch", draw)
    return calls
