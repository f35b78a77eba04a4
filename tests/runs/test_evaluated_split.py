"""Evaluation names the examples that it measures: training data, or those that `data.holdout` left out."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from diffusion_jax import data, pictures, report
from diffusion_jax.run_dir import RunDir
from diffusion_jax.runs import measure_likelihood, sample_metrics, workdir
from diffusion_jax.runs.measure_likelihood import LikelihoodRun
from helpers.array_configs import array_config, examples, write_arrays
from helpers.configs import tiny_config
from helpers.work_directories import untrained

COUNT = 40


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder of 40 images of 17 gray levels."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for i in range(COUNT):
        pixels = np.round(rng.integers(0, 17, (8, 8)) * 255 / 16).astype(np.uint8)
        Image.fromarray(pixels).save(root / f"{i}.png")
    return root


def folder_config(images, **overrides):
    small = {"diffusion.num_timesteps": 4, "evaluation.num_examples": 4, "evaluation.batch_size": 4}
    return tiny_config(
        **{"data.dataset": "folder", "data.data_dir": str(images), "data.cache_decoded": False, **small, **overrides}
    )


@pytest.fixture(scope="module")
def whole_folder(images, tmp_path_factory):
    """A run on all images of the folder."""
    return untrained(tmp_path_factory.mktemp("runs") / "run", folder_config(images))


def copy_of(run, directory, config):
    """A copy of a run that says it was trained with another config."""
    shutil.copytree(run, directory)
    workdir.write_config(config, directory)
    return directory


def test_training_images_are_called_train(images, whole_folder, tmp_path, capsys, monkeypatch):
    """In the record, the page, the plots and the command, and with a note."""
    config, drawn = folder_config(images), []
    for name in ("draw_bound_terms", "draw_rate_distortion"):
        draw = getattr(pictures, name)
        monkeypatch.setattr(pictures, name, lambda *inputs, draw=draw: drawn.append(str(inputs)) or draw(*inputs))
    run = copy_of(whole_folder, tmp_path / "run", config)
    measure_likelihood.run(config, run)
    assert "Note: these are the images that the model was trained on (split 'train')" in capsys.readouterr().out
    assert json.loads((run / "likelihood.json").read_text())["split"] == "train"
    assert len(drawn) == 2 and all("'folder train, step " in inputs for inputs in drawn)
    page = report.write_report(run).read_text()
    assert "4 examples of folder train" in page and "folder test" not in page


def test_images_of_another_folder_have_no_split(images, whole_folder, tmp_path, capsys):
    other = tmp_path / "other"
    other.mkdir()
    for i in range(5):
        (other / f"{i}.png").write_bytes((images / f"{i}.png").read_bytes())
    for directory, split, count in ((other, None, 5), (f"{images}/../{images.name}", "train", COUNT)):
        found = LikelihoodRun(folder_config(images, **{"evaluation.data_dir": str(directory)}), whole_folder)
        assert found.split == split and len(found.source) == count
        assert ("trained on" in capsys.readouterr().out) == (split == "train")


def test_other_weights_were_not_trained_on_the_folder(images, whole_folder, tmp_path, capsys):
    found = LikelihoodRun(folder_config(images, init_from=str(whole_folder)), tmp_path / "run")
    assert found.split is None and "trained on" not in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["folder", "arrays"])
def test_held_out_examples_are_the_test_split(kind, images, whole_folder, tmp_path, capsys):
    if kind == "folder":
        config = folder_config(images, **{"data.holdout": 0.25})
        run = copy_of(whole_folder, tmp_path / "run", config)
    else:
        file = write_arrays("vectors", tmp_path / "x.npz", COUNT)
        config = array_config("vectors", file, **{"data.holdout": 0.25})
        run = untrained(tmp_path / "run", config)
    trained_on = data.load(config.data)
    workdir.check_data(trained_on, RunDir(run), data.find_normalizations(config.data, trained_on))
    found, name = LikelihoodRun(config, run), "image" if kind == "folder" else "x"
    assert found.split == "test" and "trained on" not in capsys.readouterr().out

    def rows(source):
        return {row.tobytes() for row in source.read(np.arange(len(source)))[name]}

    normalized = data.Normalized(trained_on, found.trained.normalizations) if name == "x" else trained_on
    assert not rows(found.source) & rows(normalized) and len(rows(found.source) | rows(normalized)) == COUNT
    # Samples are compared with the split that was trained on, or with the other.
    reference = sample_metrics.load_reference(config)
    assert reference.name.endswith(":train") and rows(reference.examples) == rows(trained_on)
    config.evaluation.reference_split = "test"
    assert len(sample_metrics.load_reference(config).examples) == COUNT - len(trained_on)
    config.evaluation.split = "train"
    assert LikelihoodRun(config, run).split == "train" and "(split 'train')" in capsys.readouterr().out
    # Examples of another place are measured as a whole, and so are those of a caller.
    if kind == "arrays":
        np.save(tmp_path / "other.npy", examples("vectors", 7, seed=1))
        config.evaluation.data_dir = str(tmp_path / "other.npy")
        assert len(LikelihoodRun(config, run).source) == 7
    assert len(LikelihoodRun(config, run, trained_on).source) == len(trained_on)
