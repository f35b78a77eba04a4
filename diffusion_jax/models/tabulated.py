"""A U-Net for samplers: what it makes of the time alone is computed once, for all steps, before their loop.

The time embedding and each residual block's projection of it read no x_t. A sampler asks at the same few times, one a step,
so that a product a layer serves them all, and inside the loop stands a look-up instead of some two dozen small products.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffusion_jax.models.unet import Encoder, UNet


class _Embedding(Encoder):
    """The time embedding of a network, by itself."""

    @nn.compact
    def __call__(self, time):
        return self.embed(time)


def tabulate(model: UNet, params, times) -> Callable:
    """network(x_t, time, y=None): `model.apply` with `params` for times that are among `times`, float [T]. Pure.

    Without classes each block's projection is tabulated: T rows of as many numbers as the blocks have channels (20 kB a step
    of DDPM's CIFAR-10 network, 143 kB of ADM's at 64 pixels); with classes the embedding alone, for labels are added to it.
    The output is NaN where a time is none of `times`, to the bit. Kernels are cast to what the layers compute in, once (but
    those of upsampling layers, which are added up before they are rounded).
    """

    def cast(path, leaf):
        # Of models.convolution.doubled: the layer itself, or the first of a resampling block.
        summed_first = path[0].key.endswith("_upsample") and path[-2].key in (path[0].key, "conv1")
        return leaf.astype(model.dtype) if path[-1].key == "kernel" and not summed_first else leaf

    params = jax.tree_util.tree_map_with_path(cast, params)
    times = jnp.asarray(times, jnp.float32)
    fields = {field.name: getattr(model, field.name) for field in dataclasses.fields(Encoder)}
    embedding = _Embedding(**fields | {"parent": None, "name": None}).apply({"params": params}, times)
    tables = {((), "embed"): embedding}
    if not model.num_classes:
        for block, own in params.items():
            if "time_proj" in own:
                dense = model.layers.dense(own["time_proj"]["bias"].size, None)
                tables[(block, "time_proj"), "__call__"] = dense.apply({"params": own["time_proj"]}, nn.silu(embedding))

    def network(x_t, time, y=None):
        time = jnp.asarray(time, jnp.float32)
        found = time[:, None] == times
        row = jnp.where(found.any(axis=1), found.argmax(axis=1), len(times))  # beyond the table `take` gives NaN

        def look_up(method, args, kwargs, context):
            table = tables.get((context.module.path, context.method_name))
            return method(*args, **kwargs) if table is None else jnp.take(table, row, axis=0)

        with nn.intercept_methods(look_up):
            return model.apply({"params": params}, x_t, time, y)

    return network
