"""Runs on data that are not images: training, resuming and sampling, in data units."""

import json

import numpy as np
import pytest

from diffusion_jax import data, errors, pretrained
from diffusion_jax.provenance import params_digest
from diffusion_jax.runs import sample, train
from diffusion_jax.runs.sampling_setup import resolve_sampling
from helpers.array_configs import SHAPES, array_config, examples, write_arrays
from helpers.work_directories import take_arrays, untrained

CONDITIONS = np.linspace(-3, 5, 24)[:, None]
MISSING = np.arange(24) % 5 == 0
CONDITIONAL = {"model.condition_features": 1, "model.condition_dropout": 0.25}


@pytest.mark.parametrize(
    "kind", ["vectors", pytest.param("series", marks=pytest.mark.whole), pytest.param("volume", marks=pytest.mark.slow)]
)
def test_a_run_trains_resumes_to_the_bit_and_samples(kind, tmp_path):
    given = np.where(MISSING[:, None], np.nan, CONDITIONS)
    file = write_arrays(kind, tmp_path / "data.npz", condition=given, condition_missing=MISSING)
    np.savez(tmp_path / "conditions.npz", condition=np.array([[1.0], [4.0]]), condition_missing=np.array([False, True]))
    overrides = {
        **CONDITIONAL,
        "training.sample_every": 4,
        "sampling.trajectory": 2,
        "sampling.conditions": str(tmp_path / "conditions.npz"),
        "sampling.guidance_scale": 2.0,
    }
    config = array_config(kind, file, **overrides)
    train.run(config, tmp_path / "whole")
    for num_steps in (2, 4):
        train.run(array_config(kind, file, **overrides, **{"training.num_steps": num_steps}), tmp_path / "parts")
    digests = [params_digest(pretrained.load(tmp_path / name).params) for name in ("whole", "parts")]
    assert digests[0] == digests[1]
    given = [dict(np.load(tmp_path / name / "examples.npz")) for name in ("whole", "parts")]
    assert given[0]["x"].shape == (24, *SHAPES[kind]) and given[0]["condition"].ndim == 2
    assert all(np.array_equal(given[0][name], given[1][name], name == "condition") for name in given[0])
    assert (tmp_path / "whole" / "samples" / "train_step00000004.png").stat().st_size > 1000
    sample.run(config, tmp_path / "whole")
    arrays = take_arrays(tmp_path / "whole" / "samples")
    assert arrays["arr_0"].shape == (3, *SHAPES[kind]) and arrays["arr_0"].dtype == np.float32
    assert arrays["condition"].tolist() == [[1.0], [4.0], [1.0]]
    assert arrays["condition_missing"].tolist() == [False, True, False]
    assert len(list((tmp_path / "whole" / "samples").rglob("*.png"))) == 4


@pytest.mark.whole
def test_a_relaunch_uses_the_stored_normalization_and_refuses_other_data(tmp_path):
    file, run = write_arrays("vectors", tmp_path / "data.npz"), tmp_path / "run"
    train.run(array_config("vectors", file, **{"training.num_steps": 2}), run)
    stored = json.loads((run / "data.json").read_text())
    np.savez(file, x=examples("vectors", 24, seed=1))
    with pytest.raises(errors.UserError, match="the data differ from .*--pretrained=.*run --workdir=NEW$"):
        train.run(array_config("vectors", file), run)
    assert json.loads((run / "data.json").read_text()) == stored
    with pytest.raises(errors.UserError, match="data.normalization: 'auto' there, 'none' here"):
        train.run(array_config("vectors", file, **{"data.normalization": "none"}), run)
    (run / "data.json").unlink()
    for mode in (sample, train):
        with pytest.raises(errors.CheckpointError, match="data.json is missing; to restore it: cp "):
            mode.run(array_config("vectors", file), run)
    (run / "data.json").write_text("{")
    with pytest.raises(errors.CheckpointError, match=r"data.json cannot be used \(Expecting .*\); restore it: cp "):
        sample.run(array_config("vectors", file), run)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            {},
            r"data has conditions of shape \[1\], but .* take none; use --config.model.condition_features=1",
        ),
        (
            {**CONDITIONAL, "model.condition_dropout": 0.0},
            "without a condition .*; use --config.model.condition_dropout=0.1",
        ),
        ({**CONDITIONAL, "model.num_classes": 3}, "data has no labels"),
        ({**CONDITIONAL, "data.channels": 4}, r"use --config.data.image_size=\(\) --config.data.channels=3"),
    ],
)
def test_data_that_do_not_fit_the_network_are_refused_before_training(overrides, words, tmp_path):
    file = write_arrays("vectors", tmp_path / "data.npz", condition=CONDITIONS, condition_missing=MISSING)
    with pytest.raises(errors.DiffusionJaxError, match=words) as error:
        train.run(array_config("vectors", file, **overrides), tmp_path / "run")
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"model.condition_dropout": 0.0}, r"set sampling.conditions=FILE.npy, numbers \[N, 1\] in data units"),
        ({"sampling.conditions": "misnamed.npz"}, "has only 'cond', 'x'"),
        ({"model.condition_features": 0, "model.condition_dropout": 0.0, "sampling.conditions": "wide.npy"}, "takes no cond"),
    ],
)  # fmt: skip
def test_conditions_of_samples_that_do_not_fit_are_refused(overrides, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save("wide.npy", np.zeros((3, 2)))
    np.savez("misnamed.npz", cond=np.zeros((3, 1)), x=np.zeros(3))
    config = array_config("vectors", "", **{**CONDITIONAL, **overrides})
    with pytest.raises(errors.UserError, match=words):
        resolve_sampling(config, pretrained.from_config(config))


def test_a_file_with_one_condition_is_for_all_samples(tmp_path):
    np.save(tmp_path / "c.npy", np.array([4.0, 5.0]))
    conditions = {"model.condition_features": 2, "sampling.conditions": str(tmp_path / "c.npy")}
    config = array_config("vectors", "", **conditions)
    setup = resolve_sampling(config, pretrained.from_config(config))
    np.testing.assert_array_equal(setup.rows(np.arange(3))["condition"], [[4.0, 5.0]] * 3)


@pytest.mark.whole
def test_conditions_outside_the_range_of_the_run_get_a_note(tmp_path, capsys):
    low, high = np.array([10.0, -1.0]), np.array([20.0, 1.0])
    file = write_arrays("vectors", tmp_path / "x.npz", condition=np.linspace(low, high, 24))
    np.save(tmp_path / "c.npy", [[12.0, 0.0], [20.9, -1.15], [15.0, 80.0]])  # row 1: within a tenth of the range
    conditions = {"model.condition_features": 2, "sampling.conditions": str(tmp_path / "c.npy")}
    config = array_config("vectors", file, **conditions)
    sample.SampleFile(config, untrained(tmp_path / "run", config, data.load(config.data)))
    assert "Note: 1 of 3 conditions are far outside the training data; " in capsys.readouterr().out


def test_uint8_arrays_of_any_shape_have_gray_levels_and_are_clipped(tmp_path):
    x = np.random.default_rng(0).integers(0, 256, (24, 4, 4, 4, 2), dtype=np.uint8)
    np.save(tmp_path / "x.npy", x)
    config = array_config("volume", tmp_path / "x.npy", **{"data.levels": 256, "data.channels": 2})
    source = data.load(config.data)
    np.testing.assert_array_equal(source.read([5, 2])["image"], x[[5, 2]])
    assert data.find_normalizations(config.data, source) == {}
    assert resolve_sampling(config, pretrained.from_config(config)).options["clip"] is True
