"""Without the extra `tfds`, a data set of TFDS is refused with the command that installs it."""

import importlib.util

import pytest

from diffusion_jax import data
from diffusion_jax.errors import DataError


@pytest.mark.parametrize("missing", ["tensorflow_datasets", "tensorflow"])
def test_a_tfds_set_without_tfds(monkeypatch, missing):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else find_spec(name))
    with pytest.raises(DataError, match=rf"'cifar10' .* {missing} is not installed: pip install '\.\[tfds\]'"):
        data.check_location({"dataset": "cifar10"})
    data.check_location({"dataset": "digits"})
