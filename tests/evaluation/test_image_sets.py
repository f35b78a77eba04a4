"""Sets of images and statistics as they are read from files."""

import os

import numpy as np
import pytest
from PIL import Image

from diffusion_jax import data
from diffusion_jax.evaluation import example_sets
from helpers.image_files import all_digits, save

pytestmark = pytest.mark.usefixtures("own_cache")


def test_a_folder_is_read_without_resizing(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    drawn = np.random.default_rng(0).integers(0, 256, (3, 6, 9, 3), dtype=np.uint8)
    for i, image in enumerate(drawn):
        Image.fromarray(image).save(folder / f"{i}.png")
    np.testing.assert_array_equal(example_sets.open_set(str(folder)).examples.read(np.arange(3))["image"], drawn)
    Image.fromarray(drawn[0, :5]).save(folder / "z.png")
    with pytest.raises(data.DataError, match="z.png is 9x5, but the first image is 9x6"):
        example_sets.open_set(str(folder)).examples.read(np.arange(4))
    resized = example_sets.open_set(str(folder), image_size=8).examples.read(np.arange(4))["image"]
    assert resized.shape == (4, 8, 8, 3)
    turned = Image.fromarray(drawn[0])
    turned.getexif()[0x0112] = 6  # to be turned by a quarter: then it is no longer of that size
    turned.save(folder / "z.png", exif=turned.getexif())
    with pytest.raises(data.DataError, match="z.png is 6x9"):
        example_sets.open_set(str(folder)).examples.read(np.arange(4))


def test_a_work_directory_stands_for_its_newest_samples(tmp_path):
    run = tmp_path / "run" / "samples"
    run.mkdir(parents=True)
    (tmp_path / "run" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="is a run without samples"):
        example_sets.open_set(str(run.parent))
    (run / "edits").mkdir()
    for i, name in enumerate(("b.npz", "a.npz", "edits/inpaint.npz", "c.partial.npz")):
        save(run / name, all_digits()[:2])
        os.utime(run / name, (i, i))
    assert example_sets.open_set(str(run.parent)).name == str(run / "a.npz")


def test_statistics_files_are_read(tmp_path):
    x = np.random.default_rng(0).normal(size=(50, 64))
    mu, sigma = x.mean(0), np.cov(x, rowvar=False)
    np.savez(tmp_path / "alone.npz", mu=mu, sigma=sigma)
    alone = example_sets.open_set(str(tmp_path / "alone.npz"))
    assert alone.examples is None and alone.statistics.spatial is None
    np.testing.assert_array_equal(alone.statistics.moments.covariance, sigma)
    both = example_sets.open_set(save(tmp_path / "b.npz", all_digits()[:9], mu=mu, sigma=sigma, mu_s=mu, sigma_s=sigma))
    assert len(both.examples) == 9 and both.statistics.spatial is not None
