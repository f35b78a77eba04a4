"""Samples in files: which are reused, and which are sampled again."""

import json

import numpy as np
import pytest

from diffusion_jax.runs import sample, trained_model
from diffusion_jax.runs.sample import read_settings
from helpers.configs import FEW_DRAWN, tiny_config
from helpers.work_directories import reuse_or_draw

pytestmark = pytest.mark.usefixtures("own_cache")


def store_settings(path, change):
    """Rewrites the settings beside the samples of a file; change(dict)."""
    with np.load(path) as arrays:
        stored, images = json.loads(str(arrays["settings"])), arrays["arr_0"]
    change(stored["settings"])
    np.savez(path, images, settings=np.array(json.dumps(stored)))


def test_samples_of_the_same_settings_are_reused(run, drawn, capsys):
    reuse_or_draw(tiny_config(**FEW_DRAWN), run)
    assert len(drawn) == 3
    for free in ({}, {"sampling.trajectory": 3, "sampling.preview_steps": 7}):
        reuse_or_draw(tiny_config(**FEW_DRAWN | free), run)
    assert len(drawn) == 3 and "Sampling again" not in capsys.readouterr().out
    sample.run(tiny_config(**FEW_DRAWN), run)  # --mode=sample draws whatever is there
    assert len(drawn) == 6


def test_samples_with_other_settings_are_sampled_again(run, drawn, capsys):
    """Though their files have one name."""
    one = reuse_or_draw(tiny_config(**{"sampling.batch_size": 3}), run)
    other = reuse_or_draw(tiny_config(**{"sampling.batch_size": 2}), run)
    assert other.path == one.path and len(drawn) == 1 + 2
    told = f"Sampling again: {one.path} was drawn with other settings (batch_size=3, now 2)."
    assert told in capsys.readouterr().out and read_settings(one.path)["settings"]["batch_size"] == 2


def test_samples_with_other_weights_are_sampled_again(run, drawn, capsys):
    config = tiny_config(**FEW_DRAWN)
    path = reuse_or_draw(config, run).path
    store_settings(path, lambda settings: settings.update(classifier_digest="0" * 64))
    reuse_or_draw(config, run)
    assert len(drawn) == 6
    assert "other settings (classifier_digest=000" in capsys.readouterr().out
    # The same step of a run that was begun again with another seed.
    store_settings(path, lambda settings: settings.update(weights_digest="1" * 64))
    reuse_or_draw(config, run)
    assert len(drawn) == 9 and "weights_digest=" in capsys.readouterr().out


def test_a_damaged_file_of_samples_is_sampled_again(run, drawn, capsys):
    config = tiny_config(**FEW_DRAWN)
    path = reuse_or_draw(config, run).path
    path.write_bytes(b"PK\x03\x04 torn")
    reuse_or_draw(config, run)
    assert "does not store the settings" in capsys.readouterr().out and len(drawn) == 6
    with np.load(path) as arrays:
        assert arrays["arr_0"].max() == 2


def test_the_digest_of_parameters_depends_on_names_shapes_types_and_values():
    tree = {"a": {"kernel": np.arange(6.0).reshape(2, 3)}, "b": np.float32(3)}
    same = {"b": np.float32(3), "a": {"kernel": np.arange(6.0).reshape(2, 3)}}
    assert trained_model.params_digest(tree) == trained_model.params_digest(same)
    for other in (
        {**tree, "b": np.float32(4)},
        {**tree, "b": np.float64(3)},
        {"a": {"kernel": np.arange(6.0).reshape(3, 2)}, "b": np.float32(3)},
        {"a": {"scale": np.arange(6.0).reshape(2, 3)}, "b": np.float32(3)},
    ):
        assert trained_model.params_digest(other) != trained_model.params_digest(tree)
