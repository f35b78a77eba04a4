"""Images of digits in files, for tests of metrics."""

import numpy as np

from diffusion_jax import data
from diffusion_jax.distributed import sharding


def all_digits(split="train"):
    source = data.Digits(split, (8, 8), 1)
    return source.read(np.arange(len(source)))["image"]


def save(path, array, **more):
    np.savez(path, array, **more)
    return str(path)


def single_mesh():
    return sharding.make_mesh({"data": -1, "fsdp": 1})
