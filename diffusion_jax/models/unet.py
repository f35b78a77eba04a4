"""The U-Net of the DDPM family, as one Flax Linen module.

Its defaults are Ho et al.'s network (DDPM appendix B): residual blocks of GroupNorm, SiLU and 3x3 convolution with the
time embedding added between the two halves, self-attention at chosen levels, and skip connections. It knows nothing of
diffusion: it maps (x_t, network time) to an output of the same height and width.

Layers are named by level (0 is full resolution) and place: `down_1_block_0`, `mid_attn`, `up_3_upsample`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


def timestep_embedding(time, dim: int, max_period: float = 10_000.0) -> jax.Array:
    """[sin(time w_i), cos(time w_i)] with w_i = max_period^(-i / (dim/2 - 1)), as in Ho et al.'s code.

    time: float [B], in the unit the network is trained on; returns float32 [B, dim]. Raises: ValueError for an odd dim.
    """
    if dim % 2 or dim < 4:
        raise ValueError(f"the embedding needs an even number of at least 4 dimensions, got {dim}")
    half = dim // 2
    frequencies = jnp.exp(-math.log(max_period) / (half - 1) * jnp.arange(half, dtype=jnp.float32))
    angles = jnp.asarray(time, jnp.float32)[:, None] * frequencies
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


def _init(scale: float = 1.0) -> Callable:
    """Ho et al.'s initialiser; layers that end a residual branch have scale 0, which is 1e-10 there."""
    return nn.initializers.variance_scaling(max(scale, 1e-10), "fan_avg", "uniform")


def _conv(features: int, dtype: Any, *, scale: float = 1.0, stride: int = 1, name: str) -> nn.Conv:
    # With stride 2 and an even size, 'SAME' pads (0, 1), as TensorFlow did for the published weights.
    return nn.Conv(features, (3, 3), stride, padding="SAME", dtype=dtype, kernel_init=_init(scale), name=name)


def _dense(features: int, dtype: Any, *, scale: float = 1.0, name: str) -> nn.Dense:
    return nn.Dense(features, dtype=dtype, kernel_init=_init(scale), name=name)


class GroupNorm(nn.Module):
    """GroupNorm with float32 statistics, whatever the network computes in."""

    num_groups: int
    dtype: Any

    @nn.compact
    def __call__(self, x):
        if x.shape[-1] % self.num_groups:
            raise ValueError(f"num_groups={self.num_groups} does not divide a layer of {x.shape[-1]} channels")
        norm = nn.GroupNorm(self.num_groups, epsilon=1e-6, dtype=self.dtype, use_fast_variance=False, name="norm")
        return norm(x)


class ResBlock(nn.Module):
    """x + conv(dropout(silu(norm(conv(silu(norm(x))) + time projection)))), with a 1x1 projection where widths differ."""

    features: int
    num_groups: int
    dropout: float
    dtype: Any

    @nn.compact
    def __call__(self, x, embedding, train: bool):
        h = nn.silu(GroupNorm(self.num_groups, self.dtype, name="norm1")(x))
        h = _conv(self.features, self.dtype, name="conv1")(h)
        h += _dense(self.features, self.dtype, name="time_proj")(nn.silu(embedding))[:, None, None, :]
        h = nn.silu(GroupNorm(self.num_groups, self.dtype, name="norm2")(h))
        h = nn.Dropout(self.dropout, deterministic=not train)(h)
        h = _conv(self.features, self.dtype, scale=0.0, name="conv2")(h)
        if x.shape[-1] != self.features:
            x = _dense(self.features, self.dtype, name="skip")(x)
        return x + h


class Attention(nn.Module):
    """x + proj(softmax(q k / sqrt(C)) v) over all positions, with a float32 softmax."""

    num_heads: int
    num_groups: int
    dtype: Any

    @nn.compact
    def __call__(self, x):
        b, height, width, c = x.shape
        if c % self.num_heads:
            raise ValueError(f"num_heads={self.num_heads} does not divide an attention layer of {c} channels")
        h = GroupNorm(self.num_groups, self.dtype, name="norm")(x)
        h = h.reshape(b, height * width, c)
        q, k, v = (
            _dense(c, self.dtype, name=n)(h).reshape(b, height * width, self.num_heads, c // self.num_heads)
            for n in ("q", "k", "v")
        )
        h = jax.nn.dot_product_attention(q, k, v).reshape(b, height, width, c)
        return x + _dense(c, self.dtype, scale=0.0, name="proj")(h)


class UNet(nn.Module):
    """Ho et al.'s U-Net. `UNet(...).apply({"params": params}, x_t, time, y, train)` -> [B, H, W, out_channels] float32.

    channels: width of the first level, a multiple of `num_groups`.
    channel_multipliers: the width of each level over `channels`; each level after the first halves the resolution.
    num_res_blocks: residual blocks of each level on the way down (one more on the way up).
    attention_levels: levels whose blocks are followed by self-attention; (1,) is 16x16 for 32-pixel images, (4,) for
      256-pixel ones. The middle always has one.
    num_heads: attention heads.
    num_groups: groups of every GroupNorm.
    dropout: rate before the second convolution of each block, in training only.
    num_classes: 0 for an unconditional network, else y int [B] in 0 ... num_classes - 1 is embedded and added to the
      time embedding.
    out_channels: channels of the output; None for as many as x_t has, twice that for a learned variance.
    dtype: "float32" or "bfloat16", what the layers compute in. Parameters, normalisation statistics, the softmax and the
      output stay float32.
    remat: recompute each block's activations in the backward pass: less memory, about a third more time.
    """

    channels: int = 128
    channel_multipliers: tuple[int, ...] = (1, 2, 2, 2)
    num_res_blocks: int = 2
    attention_levels: tuple[int, ...] = (1,)
    num_heads: int = 1
    num_groups: int = 32
    dropout: float = 0.1
    num_classes: int = 0
    out_channels: int | None = None
    dtype: str = "float32"
    remat: bool = False

    @nn.compact
    def __call__(self, x_t, time, y=None, train: bool = False) -> jax.Array:
        """x_t: [B, H, W, C]; time: float [B]; y: int [B] for a conditional network; train: whether dropout acts.

        Raises: ValueError for a height or width that 2^(levels - 1) does not divide, or labels where none are known (and
        the reverse).
        """
        dtype = jnp.dtype(self.dtype)
        levels = len(self.channel_multipliers)
        self._check(x_t, y, levels)
        block_class = nn.remat(ResBlock, static_argnums=(3,)) if self.remat else ResBlock
        attention_class = nn.remat(Attention) if self.remat else Attention

        def block(h, level, name):
            features = self.channels * self.channel_multipliers[level]
            return block_class(features, self.num_groups, self.dropout, dtype, name=name)(h, embedding, train)

        def attention(h, name):
            return attention_class(self.num_heads, self.num_groups, dtype, name=name)(h)

        embedding = timestep_embedding(time, self.channels).astype(dtype)
        embedding = nn.silu(_dense(4 * self.channels, dtype, name="time_0")(embedding))
        embedding = _dense(4 * self.channels, dtype, name="time_1")(embedding)
        if self.num_classes:
            embedding += nn.Embed(self.num_classes, 4 * self.channels, dtype=dtype, name="class")(y)

        h = _conv(self.channels, dtype, name="conv_in")(x_t.astype(dtype))
        skips = [h]
        for level in range(levels):
            for j in range(self.num_res_blocks):
                h = block(h, level, f"down_{level}_block_{j}")
                if level in self.attention_levels:
                    h = attention(h, f"down_{level}_attn_{j}")
                skips.append(h)
            if level < levels - 1:
                h = _conv(h.shape[-1], dtype, stride=2, name=f"down_{level}_downsample")(h)
                skips.append(h)

        h = block(h, levels - 1, "mid_block_0")
        h = attention(h, "mid_attn")
        h = block(h, levels - 1, "mid_block_1")

        for level in reversed(range(levels)):
            for j in range(self.num_res_blocks + 1):
                h = block(jnp.concatenate([h, skips.pop()], axis=-1), level, f"up_{level}_block_{j}")
                if level in self.attention_levels:
                    h = attention(h, f"up_{level}_attn_{j}")
            if level > 0:
                h = h.repeat(2, axis=1).repeat(2, axis=2)
                h = _conv(h.shape[-1], dtype, name=f"up_{level}_upsample")(h)

        h = nn.silu(GroupNorm(self.num_groups, dtype, name="norm_out")(h))
        out_channels = self.out_channels or x_t.shape[-1]
        return _conv(out_channels, dtype, scale=0.0, name="conv_out")(h).astype(jnp.float32)

    def _check(self, x_t, y, levels):
        if x_t.ndim != 4:
            raise ValueError(f"the U-Net needs images [B, H, W, C], got shape {x_t.shape}")
        divisor = 2 ** (levels - 1)
        if x_t.shape[1] % divisor or x_t.shape[2] % divisor:
            raise ValueError(
                f"a U-Net of {levels} levels needs a height and width that {divisor} divides, got {x_t.shape[1:3]}; resize "
                "the images or use fewer channel_multipliers"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), got {self.dropout}")
        bad = [level for level in self.attention_levels if not 0 <= level < levels]
        if bad:
            raise ValueError(f"attention_levels must lie in 0 ... {levels - 1}, got {bad[0]}")
        if self.num_classes and y is None:
            raise ValueError(f"a network of {self.num_classes} classes needs y, the labels")
        if not self.num_classes and y is not None:
            raise ValueError("labels were given to a network without classes (num_classes=0)")
