"""Small arrays, and files with small arrays."""

import numpy as np
import pytest

from diffusion_jax import data
from diffusion_jax.errors import DataError

SHAPE = (3, 4, 2)
INDICES = np.array([5, 0, 5, 2, 3, 2])
X = np.random.default_rng(0).normal(size=(7, *SHAPE)).astype(np.float32)
LABEL = np.array([2, 0, 1, 4, 0, 1, 2])
CONDITION = np.random.default_rng(1).normal(size=(7, 5))


def save_npy(path, array):
    np.save(path, array)
    return str(path)


def save_store(path, **arrays):
    """The arrays as an .npz, HDF5 or Zarr store, according to the suffix; v2.zarr has format 2."""
    if path.suffix == ".npz":
        np.savez(path, **arrays)
    elif path.suffix in (".h5", ".hdf5"):
        with pytest.importorskip("h5py").File(path, "w") as file:
            for name, array in arrays.items():
                file.create_dataset(name, data=array, chunks=(2, *array.shape[1:]), compression="gzip")
    else:
        group = pytest.importorskip("zarr").open_group(path, mode="w", zarr_format=2 if "v2" in path.name else 3)
        for name, array in arrays.items():
            group.create_array(name, data=array, chunks=(2, *array.shape[1:]))
    return str(path)


def load(path, split="train", shape=SHAPE, levels=None):
    """The examples at a path, not in memory."""
    settings = {"image_size": shape[:-1], "channels": shape[-1], "levels": levels, "random_flip": False, "memory_mb": 0}
    return data.load({"dataset": "arrays", "data_dir": str(path), "split": split, **settings})


def message(path, split="train", shape=SHAPE):
    with pytest.raises(DataError) as info:
        load(path, split, shape)
    text = str(info.value)
    assert "\n" not in text
    return text
