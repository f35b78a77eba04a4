"""The U-Net of the DDPM family, as one Flax Linen module, for series, images and volumes.

Its defaults are Ho et al.'s network (DDPM appendix B): residual blocks of GroupNorm, SiLU and 3x3 convolution with the
time embedding added between the two halves, self-attention at chosen levels, and skip connections. Other fields give
OpenAI's (Improved DDPM, ADM). It contains no diffusion mathematics: it maps (x_t, network time) to an output of the same
spatial shape.

Layers are named by level (0 is full resolution) and place: `down_1_block_0`, `mid_attn`, `up_3_upsample`.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from diffusion_jax.models.blocks import upsample_2x
from diffusion_jax.models.conditions import Conditional
from diffusion_jax.models.encoder import KEPT_BETWEEN, Encoder

__all__ = ["UNet"]


class UNet(Encoder, Conditional):
    """The U-Net; its defaults are Ho et al.'s.

    `UNet(...).apply({"params": params}, x_t, time, y, train, condition)` -> [B, *spatial, out_channels] float32. An axis may
    have any size: where 2^(levels - 1) does not divide it, x_t and an array condition are padded inside with zeros at the end
    to the next multiple, and the output is cropped. The padded positions take part in attention and in the statistics of
    norms. Fields: `Encoder`'s, `Conditional`'s, and

    num_heads_up: heads of the attention layers of the upsampling path; None for `num_heads`.
    out_channels: channels of the output; None for as many as x_t has, twice that for a learned variance.
    """

    num_heads_up: int | None = None
    out_channels: int | None = None

    @nn.compact
    def __call__(self, x_t, time, y=None, train: bool = False, condition=None) -> jax.Array:
        """x_t: [B, *spatial, C]; time: float [B]; train: whether dropout is active.

        y: int [B] for a network of classes. condition: float [B, D] for a network with condition_features, or
        [B, *spatial, K] for one with condition_channels; None, with condition_dropout, for no conditions.

        Raises: ValueError for arrays that are not float or have another number of axes than `spatial_dims` gives, sizes not
        divisible by 2^(levels - 1) if the padding is periodic, labels or conditions for a network without (and the
        reverse), labels that are not int or not in the range, or a condition of another shape.
        """
        self.check_input(x_t)
        y = self.check_labels(y)
        condition = self.check_condition(condition, x_t)
        if train:
            y, condition = self.drop(y, condition)
        embedding = self.embed_time(time)
        if y is not None:
            embedding += self.embed_labels(self.layers, y, 4 * self.channels)
        h = x_t
        if condition is not None and self.condition_features:
            embedding += self.embed_condition(self.layers, condition, 4 * self.channels)
        elif condition is not None:
            h = self.concatenate_condition(h, condition)
        h, skips = self.encode(self._pad(h), embedding, train)
        h = self._decode(h, skips, embedding, train)
        h = nn.silu(self.layers.norm("norm_out")(h))
        out_channels = self.out_channels or x_t.shape[-1]
        h = checkpoint_name(self.layers.conv(out_channels, "conv_out", last=True)(h), KEPT_BETWEEN).astype(jnp.float32)
        return h if h.shape[:-1] == x_t.shape[:-1] else h[tuple(map(slice, x_t.shape[:-1]))]

    def _pad(self, x) -> jax.Array:
        """x [B, *spatial, C] with zeros at the end of each axis whose size 2^(levels - 1) does not divide."""
        missing = [-size % self.divisor for size in x.shape[1:-1]]
        if not any(missing):
            return x
        if self.padding == "periodic":
            self.check_divisible(x, "with padding='periodic' they are the period")
        return jnp.pad(x, ((0, 0), *((0, size) for size in missing), (0, 0)))

    def _decode(self, h, skips: list[jax.Array], embedding, train: bool) -> jax.Array:
        """The upsampling path: from the middle's output to [B, *spatial, channels]."""
        for level in reversed(range(len(self.channel_multipliers))):
            for j in range(self.num_res_blocks + 1):
                # Without a barrier XLA computes it again for the backward pass, from the same bytes.
                h = jax.lax.optimization_barrier(jnp.concatenate([h, skips.pop()], axis=-1))
                h = self.residual_block(h, embedding, level, f"up_{level}_block_{j}", train)
                if level in self.attention_levels:
                    h = self.attention(h, level, f"up_{level}_attn_{j}", self.num_heads_up)
            if level > 0:
                name = f"up_{level}_upsample"
                if self.resample_blocks:
                    h = self.residual_block(h, embedding, level, name, train, upsample_2x)
                else:
                    h = checkpoint_name(self.layers.conv(h.shape[-1], name, upsample=True)(h), KEPT_BETWEEN)
        return h
