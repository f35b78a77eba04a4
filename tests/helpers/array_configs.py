"""Tiny configs for data that are not images, and the configs' data files."""

import numpy as np
from ml_collections import ConfigDict

from diffusion_jax.config import default
from helpers.configs import small_run

SHAPES = {"vectors": (3,), "series": (8, 2), "field": (6, 8, 5), "volume": (4, 4, 4, 1)}


def array_config(kind, data_dir, **overrides) -> ConfigDict:
    """A tiny config for continuous data with a shape from `SHAPES`, which `write_arrays` writes to `data_dir`."""
    config, shape = default(), SHAPES[kind]
    config.data.update(dataset="arrays", data_dir=str(data_dir), image_size=shape[:-1], channels=shape[-1])
    config.data.update(levels=None, random_flip=False)
    if kind == "vectors":
        config.model.update(kind="mlp", channels=8, num_res_blocks=1)
    else:
        config.model.update(channels=8, channel_multipliers=(1,), num_res_blocks=1, num_groups=4)
        config.model.attention_levels = ()
    return small_run(config, **overrides)


def examples(kind, count=24, seed=0):
    """Float examples [count, *spatial, C] in units far from 0 and 1, with different units in each channel."""
    shape = SHAPES[kind]
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((count, *shape)) * np.arange(1, shape[-1] + 1) * 10 + 300).astype(np.float32)


def array_batch(kind, batch_size=8, key=0):
    """A batch of standardized examples, as a train step takes it."""
    shape = (batch_size, *SHAPES[kind])
    return {"x": np.random.default_rng(key).standard_normal(shape).astype(np.float32)}


def write_arrays(kind, path, count=24, **more):
    """Writes `examples` with further arrays, such as condition [count, D], to an .npz."""
    np.savez(path, x=examples(kind, count), **more)
    return path
