r"""A transformer for images, series and volumes, as a Flax Linen module (DiT, Peebles & Xie 2023, arXiv 2212.09748).

    python main.py --config=digits --workdir=runs/transformer \
        --config.model.kind=examples/transformer.py:transformer --config.model.options.depth=4

x_t is cut into patches, which are the tokens. The embeddings of the time, the label and a vector condition are added, and
scale, shift and gate the layers of every block (adaLN-Zero): the gates start at 0, so each block starts as the identity, and
the network starts at 0. An array condition is concatenated to the channels of x_t.
"""

import functools
import math

import flax.linen as nn
import jax.numpy as jnp

from diffusion_jax.models import Shapes, timestep_embedding

Dense = functools.partial(nn.Dense, kernel_init=nn.initializers.xavier_uniform())
ZeroDense = functools.partial(nn.Dense, kernel_init=nn.initializers.zeros)
Norm = functools.partial(nn.LayerNorm, epsilon=1e-6, use_bias=False, use_scale=False)


def transformer(
    shapes: Shapes, *, width: int = 128, depth: int = 4, patch: int = 2, heads: int = 4, dropout: float = 0.0
) -> nn.Module:
    """Makes the network.

    width: features of a token. depth: number of blocks. patch: size of a patch along each spatial axis, which divides the
    sizes of the data. heads: of the attention, which divide the width. dropout: rate after attention and MLP.
    """
    spatial = shapes.data[:-1]
    if not spatial or any(size % patch for size in spatial):
        raise ValueError(
            f"patch={patch} must divide the spatial sizes {list(spatial)}; use --config.model.options.patch"
        )
    if width % heads or width < 4 * len(spatial):
        raise ValueError(f"width={width} must be a multiple of heads={heads}, and at least {4 * len(spatial)}")
    return Transformer(shapes, width, depth, patch, heads, dropout)


class Transformer(nn.Module):
    """The network; its fields are the arguments of `transformer`."""

    shapes: Shapes
    width: int
    depth: int
    patch: int
    heads: int
    dropout: float
    null_condition = 0.0  # training replaces conditions by this value with probability model.condition_dropout

    @nn.compact
    def __call__(self, x_t, time, y=None, condition=None, train=False):
        """x_t: [B, *spatial, C]; time: float [B]; y: int [B]; condition: float [B, D] or [B, *spatial, K]."""
        spatial, dtype = x_t.shape[1:-1], x_t.dtype
        embedding = timestep_embedding(time, 2 * (self.width // 2)).astype(dtype)
        embedding = Dense(self.width, name="time_1")(nn.silu(Dense(self.width, name="time_0")(embedding)))
        if y is not None:
            embedding += nn.Embed(self.shapes.num_labels, self.width, name="label")(y)
        if condition is not None and condition.ndim == 2:
            vector = nn.silu(Dense(self.width, name="condition_0")(condition))
            embedding += Dense(self.width, name="condition_1")(vector)
        elif condition is not None:
            x_t = jnp.concatenate([x_t, condition.astype(dtype)], axis=-1)
        embedding = nn.silu(embedding)

        h = Dense(self.width, name="patches")(to_patches(x_t, self.patch))
        h += positions([size // self.patch for size in spatial], self.width).astype(dtype)
        for i in range(self.depth):
            h = Block(self.heads, self.dropout, name=f"block_{i}")(h, embedding, train)
        shift, scale = jnp.split(ZeroDense(2 * self.width, name="modulation")(embedding)[:, None], 2, axis=-1)
        h = Norm()(h) * (1 + scale) + shift
        h = ZeroDense(self.patch ** len(spatial) * self.shapes.output[-1], name="out")(h)
        return from_patches(h, spatial, self.patch)


class Block(nn.Module):
    """Attention and an MLP, each after a norm with scale and shift, and before a gate."""

    heads: int
    dropout: float

    @nn.compact
    def __call__(self, h, embedding, train):
        """h: [B, tokens, width]; embedding: [B, width]."""
        width = h.shape[-1]
        modulation = ZeroDense(6 * width, name="modulation")(embedding)[:, None]
        shift_0, scale_0, gate_0, shift_1, scale_1, gate_1 = jnp.split(modulation, 6, axis=-1)
        drop = nn.Dropout(self.dropout, deterministic=not train)
        attention = nn.MultiHeadDotProductAttention(self.heads, kernel_init=nn.initializers.xavier_uniform())
        h += gate_0 * drop(attention(Norm()(h) * (1 + scale_0) + shift_0))
        hidden = nn.gelu(Dense(4 * width, name="mlp_0")(Norm()(h) * (1 + scale_1) + shift_1))
        return h + gate_1 * drop(Dense(width, name="mlp_1")(hidden))


def to_patches(x, patch):
    """[B, *spatial, C] -> [B, tokens, patch^n C], for n spatial axes."""
    spatial, n = x.shape[1:-1], x.ndim - 2
    pairs = [size for axis in spatial for size in (axis // patch, patch)]
    x = x.reshape(len(x), *pairs, x.shape[-1])
    x = x.transpose(0, *range(1, 2 * n, 2), *range(2, 2 * n + 1, 2), 2 * n + 1)
    return x.reshape(len(x), math.prod(pairs[::2]), -1)


def from_patches(h, spatial, patch):
    """The inverse of `to_patches`: [B, tokens, patch^n C] -> [B, *spatial, C]."""
    n = len(spatial)
    x = h.reshape(len(h), *[size // patch for size in spatial], *[patch] * n, -1)
    x = x.transpose(0, *[axis for i in range(1, n + 1) for axis in (i, n + i)], 2 * n + 1)
    return x.reshape(len(h), *spatial, -1)


def positions(grid, width):
    """Sines and cosines of each coordinate in equal shares of the width, [tokens, width], with zeros at the end."""
    share = 2 * (width // (2 * len(grid)))
    coordinates = jnp.meshgrid(*map(jnp.arange, grid), indexing="ij")
    parts = [timestep_embedding(each.reshape(-1), share, freq_shift=0.0) for each in coordinates]
    table = jnp.concatenate(parts, axis=-1)
    return jnp.pad(table, ((0, 0), (0, width - table.shape[-1])))
