"""Decoded images in the user's cache: the same examples, never those of another source, and no error without a disk."""

import errno
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


def load(folder, log=lambda line: None, **leaves):
    decoded = []

    def progress(sizes, total):
        decoded.append(total)
        return sizes

    config = {"dataset": "folder", "data_dir": str(folder), "image_size": 8, **leaves}
    return data.load(config, progress, log), bool(decoded)


def examples(source):
    return source.read(np.arange(len(source)))


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and type(b[name]) is np.ndarray
        np.testing.assert_array_equal(a[name], b[name])


def test_the_second_launch_reads_the_same_examples_without_decoding(folder, cache):
    plain, _ = load(folder, cache_decoded=False)
    assert not cache.exists()
    first, decoded = load(folder)
    assert decoded and len(list(cache.iterdir())) == 1
    second, decoded = load(folder)
    assert not decoded and second.class_names == ("cats", "dogs") and second.num_classes == 2
    assert isinstance(second.arrays["image"].base, np.memmap)
    for source in (first, second):
        assert_equal(examples(plain), examples(source))


@pytest.mark.parametrize("change", ["content", "name", "size", "channels"])
def test_a_changed_source_is_decoded_again(folder, change):
    load(folder)
    path, leaves = folder / "cats" / "1.png", {}
    if change == "content":  # of the same size and time
        before, stat = path.read_bytes(), path.stat()
        path.write_bytes((folder / "dogs" / "1.png").read_bytes()[: len(before)].ljust(len(before), b"\0"))
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    elif change == "name":
        path.rename(folder / "dogs" / "9.png")
    else:
        leaves = {"size": {"image_size": 6}, "channels": {"channels": 1}}[change]
    source, decoded = load(folder, **leaves)
    assert decoded
    assert_equal(examples(load(folder, cache_decoded=False, **leaves)[0]), examples(source))


@pytest.mark.parametrize("damage", ["flipped", "truncated", "empty"])
def test_a_damaged_file_is_made_again(folder, cache, damage):
    expected = examples(load(folder, image_size=64)[0])
    (path,) = cache.iterdir()
    content = bytearray(path.read_bytes())
    content[content.index(expected["image"].tobytes()) + 60_000] ^= 1
    path.write_bytes({"flipped": content, "truncated": content[:-9], "empty": b""}[damage])
    source, decoded = load(folder, image_size=64)
    assert decoded
    assert_equal(expected, examples(source))
    assert not load(folder, image_size=64)[1]


@pytest.mark.parametrize("broken", ["full", "read-only"])
def test_a_disk_that_cannot_be_written_costs_a_line(folder, cache, monkeypatch, broken):
    def fail(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if broken == "full":
        monkeypatch.setattr(np, "savez", fail)
    else:
        cache.parent.mkdir(parents=True)
        cache.write_text("a file in place of the directory")
    log = []
    source, decoded = load(folder, log.append)
    (line,) = [line for line in log if "decoded images are not kept" in line]
    assert decoded and len(source) == 6 and str(cache) in line
    assert broken == "read-only" or not list(cache.iterdir())
