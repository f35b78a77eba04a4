"""Without the extra `tfds`, a data set of TFDS is refused with the command that installs it."""

import importlib.util

import pytest

from diffusion_jax import data
from diffusion_jax.errors import DataError


def hide(monkeypatch, module):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None if name == module else find_spec(name, *_))


def test_a_set_of_tfds_without_tfds(monkeypatch):
    hide(monkeypatch, "tensorflow_datasets")
    with pytest.raises(DataError, match=r"'cifar10' .* is not installed: pip install '\.\[tfds\]'"):
        data.check_location({"dataset": "cifar10"})
    data.check_location({"dataset": "digits"})


def test_only_preparing_a_set_needs_tensorflow(monkeypatch, tmp_path):
    hide(monkeypatch, "tensorflow")
    with pytest.raises(DataError, match=r"needs TensorFlow to prepare it: pip install '\.\[tfds\]'"):
        data.load({"dataset": "cifar10", "data_dir": str(tmp_path)})
    assert not list(tmp_path.iterdir())
