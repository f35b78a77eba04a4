"""The blocks of a network: residual blocks, with or without resampling, and self-attention.

Arrays are [B, *spatial, C], with any number of spatial axes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from diffusion_jax.models.layers import Conv, Dense, Dropout, LayerFactory

__all__ = ["KEPT_INSIDE", "Attention", "ResBlock", "downsample_2x", "split_heads", "upsample_2x"]

# The name, for a policy of jax.checkpoint, of the results of products inside a block, from which the rest is cheap to
# recompute.
KEPT_INSIDE = "inside blocks"


def downsample_2x(x) -> jax.Array:
    """[B, H, W, C] to [B, H / 2, W / 2, C]: the mean of each 2x2 pixels, and so on along any number of axes."""
    window = (2,) * (x.ndim - 2)
    return nn.avg_pool(x, window, window)


def upsample_2x(x) -> jax.Array:
    """[B, H, W, C] to [B, 2 H, 2 W, C]: each pixel four times, and so on along any number of axes."""
    for axis in range(1, x.ndim - 1):
        x = x.repeat(2, axis=axis)
    return x


class ResBlock(nn.Module):
    """x + conv(dropout(silu(norm(conv(silu(norm(x))) + time projection)))), with a dense projection if the widths differ.

    For vectors, which `layers.spatial_dims` = 0 describes, dense layers take the place of the convolutions.

    Biases are added where that needs no pass over an image: the first in the second norm, the others as one vector.
    With `scale_shift_norm` the time projection is a scale and a shift after the second norm: norm(h) (1 + scale) + shift.
    resample: `downsample_2x` or `upsample_2x`, applied in both branches; in the residual one after its first SiLU (ADM
    appendix A, as BigGAN). keep: name the first convolution's result `KEPT_INSIDE`.
    """

    features: int
    dropout: float
    scale_shift_norm: bool
    layers: LayerFactory
    resample: Callable | None = None
    keep: bool = False

    @nn.compact
    def __call__(self, x, embedding, train: bool) -> jax.Array:
        """x: [B, *spatial, C]; embedding: [B, E], of the time; train: whether dropout is active."""
        h = nn.silu(self.layers.norm("norm1")(x))
        upsample = self.resample is upsample_2x
        if self.resample is not None:
            h, x = h if upsample else self.resample(h), self.resample(x)
        h, bias = self._mix("1", upsample=upsample).split_bias(h)
        h = checkpoint_name(h, KEPT_INSIDE) if self.keep else h
        width = self.features * (2 if self.scale_shift_norm else 1)
        time = self.layers.dense(width, "time_proj")(nn.silu(embedding)).astype(jnp.float32)
        norm = self.layers.norm("norm2")
        if self.scale_shift_norm:
            h = norm(h, jnp.broadcast_to(bias, (len(h), self.features)), jnp.split(time, 2, axis=-1))
        else:
            h = norm(h, bias + time)
        h = Dropout(self.dropout)(nn.silu(h), deterministic=not train)
        h, bias = self._mix("2", last=True).split_bias(h)
        if x.shape[-1] != self.features:
            x, skip_bias = self.layers.dense(self.features, "skip", use_bias=False).split_bias(x)
            bias = bias + skip_bias  # not in place: a parameter may be a NumPy array
        return x + (h + bias.astype(h.dtype))

    def _mix(self, number: str, *, last: bool = False, upsample: bool = False) -> Conv | Dense:
        """The first or second convolution, or dense layer of a vector, whose bias is split."""
        options: dict[str, Any] = {"last": last, "use_bias": False}
        if self.layers.spatial_dims:
            return self.layers.conv(self.features, f"conv{number}", upsample=upsample, **options)
        return self.layers.dense(self.features, f"dense{number}", **options)


def split_heads(channels: int, num_heads: int, head_channels: int | None) -> int:
    """The number of heads of a layer: channels / head_channels if that is given, else num_heads. Raises: ValueError."""
    name, value = ("num_heads", num_heads) if head_channels is None else ("head_channels", head_channels)
    if value < 1 or channels % value:
        raise ValueError(f"{name}={value} does not divide an attention layer of {channels} channels")
    return num_heads if head_channels is None else channels // head_channels


class Attention(nn.Module):
    """x + proj(softmax(q k / sqrt(C / heads)) v) over all positions, with a float32 softmax.

    keep: name q, k, v and the weighted sum of v `KEPT_INSIDE`.
    """

    num_heads: int
    head_channels: int | None
    layers: LayerFactory
    keep: bool = False

    @nn.compact
    def __call__(self, x) -> jax.Array:
        """x: [B, *spatial, C]; returns the same shape."""
        b, *spatial, c = x.shape
        positions = math.prod(spatial)
        heads = split_heads(c, self.num_heads, self.head_channels)
        h = self.layers.norm("norm")(x).reshape(b, positions, c)
        q, k, v = (self.layers.dense(c, name)(h).reshape(b, positions, heads, c // heads) for name in ("q", "k", "v"))
        if self.keep:
            q, k, v = (checkpoint_name(part, KEPT_INSIDE) for part in (q, k, v))
        h = self.layers.attend(q, k, v).reshape(x.shape)
        h = checkpoint_name(h, KEPT_INSIDE) if self.keep else h
        return x + self.layers.dense(c, "proj", last=True)(h)
