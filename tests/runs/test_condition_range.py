"""Conditions outside the range of the training data are noted where samples are drawn."""

import json

import numpy as np
import pytest

from diffusion_jax import data, pretrained
from diffusion_jax.run_dir import RunDir
from diffusion_jax.runs import workdir
from diffusion_jax.runs.sample import SampleFile
from diffusion_jax.runs.sampling_conditions import standardize_conditions
from helpers.array_configs import array_config, write_arrays
from helpers.work_directories import untrained

LOW, HIGH = np.array([10.0, -1.0]), np.array([20.0, 1.0])


def test_the_range_of_a_run_is_stored_and_its_conditions_are_checked(tmp_path, capsys):
    conditions = np.linspace(LOW, HIGH, 24)
    file, given = write_arrays("vectors", tmp_path / "x.npz", condition=conditions), tmp_path / "c.npy"
    overrides = {"model.condition_features": 2, "sampling.conditions": str(given)}
    config = array_config("vectors", file, **overrides)
    run, source = untrained(tmp_path / "run", config), data.load(config.data)
    workdir.check_data(source, RunDir(run), data.find_normalizations(config.data, source))
    stored = json.loads((run / "data.json").read_text())["normalization"]["condition"]
    assert (stored["low"], stored["high"]) == (LOW.tolist(), HIGH.tolist())

    def note():
        capsys.readouterr()
        SampleFile(config, run)
        return capsys.readouterr().out

    np.save(given, np.array([[12.0, 0.0], [20.9, -1.15], [15.0, 80.0]]))
    assert (
        "Note: 1 of 3 conditions are far outside the training data; samples may be noise: condition 2 has 80 at entry 1, "
        "and the training data have -1 to 1; use conditions in this range." in note()
    )
    np.save(given, np.array([[12.0, 0.0], [20.9, -1.15]]))  # within a tenth of the range
    assert "outside" not in note()
    with pytest.warns(UserWarning, match="condition 0 has 80 at entry 1, and the training data have -1 to 1"):
        pretrained.load(run, ema=False)._to_conditions(np.array([12.0, 80.0]), 1)


def test_channels_of_a_condition_field_have_their_own_range(capsys):
    normalization = data.Normalization((15.0, 0.0), (3.0, 0.5), tuple(LOW), tuple(HIGH))
    fields = np.tile(np.array([12.0, 0.5]), (4, 6, 8, 1))
    fields[2, 3, 4, 0] = -3.0
    standardized = standardize_conditions(fields, {"condition": normalization})
    np.testing.assert_allclose(standardized, (fields - [15, 0]) / [3, 0.5], rtol=1e-6)
    note = "1 of 4 conditions are far outside the training data; samples may be noise: condition 2 has -3 at entry 0"
    assert note in capsys.readouterr().out
    assert standardize_conditions(None, {}) is None
