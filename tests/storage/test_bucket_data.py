"""Data sets in buckets, named by URL: TFDS directories, image folders and arrays."""

import numpy as np
import pytest
from etils import epath
from PIL import Image

from diffusion_jax import data
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
