"""Data sets in buckets, named by URL: TFDS directories, image folders and arrays."""

import os
import pickle
import shutil
import time

import numpy as np
import pytest
import tensorflow_datasets as tfds
from etils import epath
from PIL import Image

from diffusion_jax import data
from diffusion_jax.errors import StorageError, UserError
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


def test_a_tfds_directory_above_the_disk_limit_is_read_file_by_file(bucket_url, tmp_path, own_cache, monkeypatch):
    """The examples equal those of a local copy, also of a split that begins inside a file, and a file is copied when one of
    its examples is read."""
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
    assert len([path for path in objects.iterdir() if path.is_file()]) == 1
    for indices in ([0], [11, 3, 3, 7], range(12)):
        read, expected = (each.read(list(indices)) for each in (pickle.loads(pickle.dumps(source)), local))
        for name in ("image", "label"):
            np.testing.assert_array_equal(read[name], expected[name])
    np.testing.assert_array_equal(first["image"], local.read([0])["image"])
    split = options(
        dataset="bucket_fruit", data_dir=f"{bucket_url}/tfds", split="train[1:5]+train[10:]", memory_mb=0, disk_mb=0
    )
    np.testing.assert_array_equal(data.load(split).read(range(6))["image"], local.read([1, 2, 3, 4, 10, 11])["image"])
    files = [path for path in objects.iterdir() if path.is_file()]
    assert len(files) == 4 and len(source._shards._opened[2]) == 1
    for path in files:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(data.DataError, match=r"gs://.*array_record-0000.-of-00004 is corrupted: .*; copy the data set"):
        pickle.loads(pickle.dumps(source)).read(range(12))
    assert len([path for path in objects.iterdir() if path.is_file()]) == 3


def write_three(url):
    """A store with the objects a, b and c of 100 bytes, and a function that returns the copy of an object."""
    store = open_store(f"{url}/files")
    for name in "abc":
        store.write(name, name.encode() * 100)
    objects = store.list()

    def copy(name, max_bytes=250):
        return cached_files(store, {name: objects[name]}, max_bytes)[0]

    return store, copy


def make_older(path, seconds):
    os.utime(path, (time.time() - seconds, time.time() - seconds))


def test_the_least_recently_used_copies_are_deleted_unless_they_were_just_used(bucket_url, own_cache):
    _, copy = write_three(bucket_url)
    a, b = copy("a"), copy("b")
    assert (a.read_bytes(), b.read_bytes()) == (b"a" * 100, b"b" * 100)
    make_older(a, 300), make_older(b, 200)
    copy("a")  # used again, so b is the oldest
    c = copy("c")
    assert a.exists() and c.exists() and not b.exists()
    copy("b")  # a and c were used in the last minute
    assert a.exists() and c.exists() and b.exists()


def test_a_copy_that_another_process_deletes_during_a_download_is_downloaded_again(bucket_url, own_cache, monkeypatch):
    store, copy = write_three(bucket_url)
    a, download = copy("a"), type(store).download_all

    monkeypatch.setattr(
        type(store), "download_all", lambda self, files: ("b" in files and a.unlink(), download(self, files))
    )
    paths = cached_files(store, {name: store.list()[name] for name in "ab"}, 1e9)
    assert [path.read_bytes()[:1] for path in paths] == [b"a", b"b"]


def test_an_object_that_changes_after_it_was_listed_is_refused(bucket_url, own_cache):
    store, copy = write_three(bucket_url)
    store.write("a", b"4" * 100)
    with pytest.raises(StorageError, match="files/a changed while it was in use"):
        copy("a")
    assert cached_files(store, {"a": store.list()["a"]}, 1e9)[0].read_bytes() == b"4" * 100


def test_a_full_disk_is_one_line(bucket_url, own_cache, monkeypatch):
    _, copy = write_three(bucket_url)
    a = copy("a")
    make_older(a, 300)
    usage = type(shutil.disk_usage("."))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1000, 950, 50 + 100 * (not a.exists())))
    copy("b", 1e9)
    assert not a.exists()  # deleted because of the free space, not of the limit
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1000, 950, 50))
    with pytest.raises(UserError, match="a batch needs 0.0 GB, and .* has 0.0 GB left; set XDG_CACHE_HOME"):
        copy("c", 1e9)
