"""`data.check_location`: data that do not exist are refused without reading any."""

import pytest

from diffusion_jax import data
from diffusion_jax.errors import DataError


@pytest.mark.parametrize(
    ("leaves", "words"),
    [
        ({"dataset": "folder", "data_dir": "nowhere"}, "is not a folder"),
        ({"dataset": "no_such_set"}, "must be a TFDS data set"),
        ({"dataset": "cifar10", "data_dir": "nowhere", "download": False}, "prepare it with"),
    ],
)
def test_data_that_do_not_exist(leaves, words):
    with pytest.raises(DataError, match=words):
        data.check_location(leaves)


def test_data_that_exist_or_are_downloaded(tmp_path):
    data.check_location({"dataset": "digits"})
    data.check_location({"dataset": "folder", "data_dir": str(tmp_path)})
    data.check_location({"dataset": "cifar10", "data_dir": str(tmp_path)})
