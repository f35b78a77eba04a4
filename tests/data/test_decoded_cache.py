"""Decoded images in the user's cache: the same examples, never another source's examples, and no error without a disk."""

import os

import numpy as np
import pytest
from PIL import Image

from diffusion_jax import data
from diffusion_jax.files import user_cache

pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return user_cache() / "decoded"


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("cats", "dogs"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(3):
            pixels = rng.integers(0, 255, (9, 12, 4 if i == 0 else 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{i}.png")
    return tmp_path / "images"


def load(folder, log=lambda line: None, **settings):
    """(the examples, whether they were decoded)."""
    decoded = []

    def progress(sizes, total):
        decoded.append(total)
        return sizes

    config = {"dataset": "folder", "data_dir": str(folder), "image_size": 8, **settings}
    source = data.load(config, progress, log)
    assert (source.num_classes, source.class_names) == (2, ("cats", "dogs"))
    return source.read(np.arange(len(source))), bool(decoded)


def assert_decoded_as_without_cache(folder, expected=True, **settings):
    plain, _ = load(folder, cache_decoded=False, **settings)
    found, decoded = load(folder, **settings)
    assert decoded == expected and plain.keys() == found.keys()
    for name in plain:
        assert plain[name].dtype == found[name].dtype and type(found[name]) is np.ndarray
        np.testing.assert_array_equal(plain[name], found[name])


def test_the_second_launch_reads_the_same_examples_without_decoding(folder, cache):
    load(folder, cache_decoded=False)
    assert not cache.exists()
    assert_decoded_as_without_cache(folder)
    assert len(list(cache.iterdir())) == 1
    assert_decoded_as_without_cache(folder, expected=False)


def test_a_changed_source_is_decoded_again(folder):
    load(folder)
    path = folder / "cats" / "1.png"
    before, stat = path.read_bytes(), path.stat()  # other content of the same size and time
    path.write_bytes((folder / "dogs" / "1.png").read_bytes()[: len(before)].ljust(len(before), b"\0"))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert_decoded_as_without_cache(folder)
    path.rename(folder / "dogs" / "9.png")
    assert_decoded_as_without_cache(folder)
    assert_decoded_as_without_cache(folder, image_size=6)


@pytest.mark.parametrize("damage", ["flipped", "truncated"])
def test_a_damaged_file_is_made_again(folder, cache, damage):
    images = load(folder, image_size=64)[0]["image"]
    (path,) = cache.iterdir()
    content = bytearray(path.read_bytes())
    content[content.index(images.tobytes()) + 60_000] ^= 1
    path.write_bytes(content if damage == "flipped" else content[:-9])
    assert_decoded_as_without_cache(folder, image_size=64)
    assert not load(folder, image_size=64)[1]


def test_a_cache_that_cannot_be_written_costs_a_line(folder, cache):
    cache.parent.mkdir(parents=True)
    cache.write_text("a file in place of the directory")
    log = []
    assert load(folder, log.append)[1]
    (line,) = [line for line in log if "decoded images are not kept" in line]
    assert str(cache) in line
