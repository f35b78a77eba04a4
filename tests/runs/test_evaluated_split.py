"""Evaluation names the examples that it measures: training data, or those that `data.holdout` left out."""

import numpy as np
import pytest
from PIL import Image

from diffusion_jax import data
from diffusion_jax.runs import sample_metrics
from diffusion_jax.runs.measure_likelihood import LikelihoodRun
from helpers.array_configs import array_config, examples, write_arrays
from helpers.configs import tiny_config
from helpers.work_directories import untrained

COUNT = 40


def write_images(folder, count):
    """Images of 17 gray levels."""
    folder.mkdir()
    for i in range(count):
        pixels = np.round(np.random.default_rng(i).integers(0, 17, (8, 8)) * 255 / 16).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


def folder_config(images, **overrides):
    folder = {"data.dataset": "folder", "data.data_dir": str(images), "data.cache_decoded": False}
    return tiny_config(**folder, **overrides)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(a folder of images, a run on all of them)."""
    root = tmp_path_factory.mktemp("runs")
    images = write_images(root / "images", COUNT)
    return images, untrained(root / "run", folder_config(images))


def test_images_of_another_folder_have_no_split(whole, tmp_path, capsys):
    images, run = whole
    other = write_images(tmp_path / "other", 5)
    for directory, split, count in ((other, None, 5), (f"{images}/../{images.name}", "train", COUNT)):
        found = LikelihoodRun(folder_config(images, **{"evaluation.data_dir": str(directory)}), run)
        assert found.split == split and len(found.source) == count
        assert ("trained on" in capsys.readouterr().out) == (split == "train")


def test_other_weights_were_not_trained_on_the_folder(whole, tmp_path, capsys):
    images, run = whole
    found = LikelihoodRun(folder_config(images, init_from=str(run)), tmp_path / "run")
    assert found.split is None and "trained on" not in capsys.readouterr().out


def test_held_out_examples_are_the_test_split(tmp_path, capsys):
    file = write_arrays("vectors", tmp_path / "x.npz", COUNT)
    config = array_config("vectors", file, **{"data.holdout": 0.25})
    trained_on = data.load(config.data)
    run = untrained(tmp_path / "run", config, trained_on)
    found = LikelihoodRun(config, run)
    assert found.split == "test" and "trained on" not in capsys.readouterr().out

    def rows(source):
        return {row.tobytes() for row in source.read(np.arange(len(source)))["x"]}

    normalized = data.Normalized(trained_on, found.trained.normalizations)
    assert not rows(found.source) & rows(normalized) and len(rows(found.source) | rows(normalized)) == COUNT
    # Samples are compared with the split that was trained on, or with the other.
    reference = sample_metrics.load_reference(config)
    assert reference.name.endswith(":train") and rows(reference.examples) == rows(trained_on)
    config.evaluation.reference_split = "test"
    assert len(sample_metrics.load_reference(config).examples) == COUNT - len(trained_on)
    config.evaluation.split = "train"
    assert LikelihoodRun(config, run).split == "train" and "(split 'train')" in capsys.readouterr().out
    # Examples of another place are measured as a whole, and so are those of a caller.
    np.save(tmp_path / "other.npy", examples("vectors", 7, seed=1))
    config.evaluation.data_dir = str(tmp_path / "other.npy")
    assert len(LikelihoodRun(config, run).source) == 7
    assert len(LikelihoodRun(config, run, trained_on).source) == len(trained_on)
