"""Data sets in buckets, named by URL: TFDS directories, image folders and arrays."""

import os
import pickle
import time

import numpy as np
import pytest
import tensorflow_datasets as tfds
from etils import epath
from PIL import Image

from diffusion_jax import data
from diffusion_jax.storage.downloads import cached_files
from diffusion_jax.storage.objects import open_store
from helpers.configs import tiny_config
from helpers.fruit_dataset import NAMES, LocalFruit

pytestmark = pytest.mark.parametrize("scheme", ["gs"])  # the services differ below ObjectStore only


class BucketFruit(LocalFruit):
    """The same images, from a local folder."""

    VERSION = LocalFruit.VERSION
    folder = ""

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(epath.Path(self.folder))}


def copy_to_bucket(folder, url):
    files = [path for path in folder.rglob("*") if path.is_file()]
    open_store(url).upload_all({str(path): path.relative_to(folder).as_posix() for path in files})


def fruit(folder, count=6):
    for i in range(count):
        path = folder / NAMES[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8), 10 * i, np.uint8)).save(path)
    return folder


def options(**settings):
    return tiny_config(**{f"data.{name}": value for name, value in settings.items()}).data


def test_a_folder_of_images(bucket_url, tmp_path, own_cache):
    copy_to_bucket(fruit(tmp_path / "images"), f"{bucket_url}/images")
    source = data.load(options(dataset="folder", data_dir=f"{bucket_url}/images"))
    assert source.class_names == tuple(NAMES) and len(source) == 6
    assert sorted(source.read(range(6))["image"][:, 0, 0, 0]) == [0, 10, 20, 30, 40, 50]


@pytest.mark.whole
def test_a_tfds_directory(bucket_url, tmp_path, own_cache, monkeypatch):
    monkeypatch.setattr(BucketFruit, "folder", str(fruit(tmp_path / "images")))
    BucketFruit(data_dir=str(tmp_path / "tfds"), file_format="array_record").download_and_prepare()
    copy_to_bucket(tmp_path / "tfds", f"{bucket_url}/tfds")
    open_store(bucket_url).write("tfds/another/1.0.0/large.array_record", b"not needed")
    source = data.load(options(dataset="bucket_fruit", data_dir=f"{bucket_url}/tfds"))
    assert len(source) == 6 and source.class_names == tuple(NAMES)
    assert not list((tmp_path / "cache").rglob("large.array_record"))


@pytest.mark.whole
def test_a_tfds_directory_above_the_disk_limit_is_read_file_by_file(bucket_url, tmp_path, own_cache, monkeypatch):
    """The examples equal those of a local copy, and a file is copied when one of its examples is read."""
    monkeypatch.setattr(BucketFruit, "folder", str(fruit(tmp_path / "images", count=12)))
    options_of_tfds = tfds.download.DownloadConfig(num_shards=4)
    builder = BucketFruit(data_dir=str(tmp_path / "tfds"), file_format="array_record")
    builder.download_and_prepare(download_config=options_of_tfds)
    copy_to_bucket(tmp_path / "tfds", f"{bucket_url}/tfds")
    local = data.load(options(dataset="bucket_fruit", data_dir=str(tmp_path / "tfds"), memory_mb=0))
    source = data.load(options(dataset="bucket_fruit", data_dir=f"{bucket_url}/tfds", memory_mb=0, disk_mb=0))
    assert len(source) == 12 and list(source.block_lengths) == builder.info.splits["train"].shard_lengths
    objects = tmp_path / "cache" / "diffusion_jax" / "objects"
    assert not objects.exists() and not list((tmp_path / "cache").rglob("*array_record*"))
    first = source.read([0])
    assert len(list(objects.iterdir())) == 1
    for indices in ([0], [11, 3, 3, 7], range(12)):
        read, expected = (each.read(list(indices)) for each in (pickle.loads(pickle.dumps(source)), local))
        for name in ("image", "label"):
            np.testing.assert_array_equal(read[name], expected[name])
    np.testing.assert_array_equal(first["image"], local.read([0])["image"])
    assert len(list(objects.iterdir())) == 4


def test_copies_beyond_the_limit_are_deleted_unless_they_were_just_used(bucket_url, own_cache, monkeypatch):
    store = open_store(f"{bucket_url}/files")
    store.write("a", b"1" * 100)
    store.write("b", b"2" * 100)
    store.write("c", b"3" * 100)
    objects = store.list()
    (a,) = cached_files(store, {"a": objects["a"]}, 250)
    (b,) = cached_files(store, {"b": objects["b"]}, 250)
    assert (a.read_bytes(), b.read_bytes()) == (b"1" * 100, b"2" * 100)
    for age, path in ((300, a), (200, b)):
        os.utime(path, (time.time() - age, time.time() - age))
    cached_files(store, {"a": objects["a"]}, 250)  # used again: now b is the oldest
    (c,) = cached_files(store, {"c": objects["c"]}, 250)
    assert a.exists() and c.exists() and not b.exists()
    cached_files(store, {"b": objects["b"]}, 250)  # a and c were used in the last minute
    assert a.exists() and c.exists() and b.exists()
    store.write("a", b"4" * 100)
    (changed,) = cached_files(store, {"a": store.list()["a"]}, 1000)
    assert changed.read_bytes() == b"4" * 100  # a new version of the object has a new copy
