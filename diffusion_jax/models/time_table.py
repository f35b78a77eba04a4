"""A network for samplers: everything that depends on the time alone is computed once, for all steps, before their loop.

The time embedding and each residual block's projection of it do not read x_t. A sampler uses the same few times, one a step,
so one product for each layer serves all steps, and the loop contains a look-up instead of some two dozen small products.
"""

from __future__ import annotations

from typing import Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffusion_jax.models.layers import LayerFactory, embed_time
from diffusion_jax.models.mlp import MLP
from diffusion_jax.models.unet import UNet

__all__ = ["Network", "precompute_time_embeddings"]


class Network(Protocol):
    """A network with its parameters."""

    def __call__(self, x_t, time, y=None, condition=None) -> jax.Array:
        """x_t: [B, *spatial, C]; time: float [B]; y: int [B] or None; condition: float [B, ...] or None.

        Returns: [B, *spatial, out_channels].
        """
        ...


class _TimeEmbedding(nn.Module):
    """The time embedding of a network, by itself."""

    layers: LayerFactory
    channels: int
    cos_first: bool
    freq_shift: float

    @nn.compact
    def __call__(self, time) -> jax.Array:
        return embed_time(self.layers, time, self.channels, cos_first=self.cos_first, freq_shift=self.freq_shift)


def precompute_time_embeddings(model: UNet | MLP, params, times) -> Network:
    """network(x_t, time, y=None, condition=None): `model.apply` with `params` for times among `times`, float [T]. Pure.

    Each block's projection is precomputed: T rows of as many numbers as the blocks have channels (20 kB a step of DDPM's
    CIFAR-10 network, 143 kB of ADM's at 64 pixels); with classes or vector conditions only the embedding, because theirs are
    added to it. The output is NaN for a time that is not bit-identical to one of `times`. Kernels and biases are cast to the
    compute dtype once, except kernels of upsampling layers, which are summed before they are rounded, and the biases that
    norms add.
    """

    def cast(path, leaf):
        # Of models.convolution.convolve_upsampled: the layer itself, or the first of a resampling block.
        summed_first = path[0].key.endswith("_upsample") and path[-2].key in (path[0].key, "conv1")
        # The second norm of a block adds the bias of the first layer, in float32.
        in_norm = path[-2].key in ("norm", "conv1", "dense1")
        once = (path[-1].key == "kernel" and not summed_first) or (path[-1].key == "bias" and not in_norm)
        return leaf.astype(model.dtype) if once else leaf

    params = jax.tree_util.tree_map_with_path(cast, {name: _join_biases(block) for name, block in params.items()})
    times = jnp.asarray(times, jnp.float32)
    embedder = _TimeEmbedding(model.layers, model.channels, model.embedding_cos_first, model.embedding_freq_shift)
    embedding = _array(embedder.apply({"params": params}, times))
    # By a layer's path and method: the results of all times, [T, features].
    tables: dict[tuple[tuple[str, ...], str], jax.Array] = {((), "embed_time"): embedding}
    if not model.num_classes and not model.condition_features:
        for block, block_params in params.items():
            if "time_proj" in block_params:
                dense = model.layers.dense(block_params["time_proj"]["bias"].size, None)
                table = dense.apply({"params": block_params["time_proj"]}, nn.silu(embedding))
                tables[(block, "time_proj"), "__call__"] = _array(table)

    def network(x_t, time, y=None, condition=None) -> jax.Array:
        time = jnp.asarray(time, jnp.float32)
        matches = time[:, None] == times
        row = jnp.where(matches.any(axis=1), matches.argmax(axis=1), len(times))  # beyond the table `take` gives NaN

        def look_up(method, args, kwargs, context):
            table = tables.get((context.module.path, context.method_name))
            return method(*args, **kwargs) if table is None else jnp.take(table, row, axis=0)

        with nn.intercept_methods(look_up):
            return _array(model.apply({"params": params}, x_t, time, y, condition=condition))

    return network


def _join_biases(block):
    """Adds the bias of a residual block's projection to that of its last convolution, so that a call adds one vector."""
    if "skip" not in block:
        return block
    bias = block["skip"]["bias"]
    joined = {"conv2": block["conv2"] | {"bias": block["conv2"]["bias"] + bias}}
    return block | joined | {"skip": block["skip"] | {"bias": jnp.zeros_like(bias)}}


def _array(output) -> jax.Array:
    assert isinstance(output, jax.Array)
    return output
