"""The U-Net of the DDPM family, as one Flax Linen module.

Its defaults are Ho et al.'s network (DDPM appendix B): residual blocks of GroupNorm, SiLU and 3x3 convolution with the
time embedding added between the two halves, self-attention at chosen levels, and skip connections. Other fields give
OpenAI's (Improved DDPM, ADM). It contains no diffusion mathematics: it maps (x_t, network time) to an output of the same
height and width.

Layers are named by level (0 is full resolution) and place: `down_1_block_0`, `mid_attn`, `up_3_upsample`.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffusion_jax import labels
from diffusion_jax.models.blocks import upsample_2x
from diffusion_jax.models.encoder import Encoder

__all__ = ["UNet"]


class UNet(Encoder):
    """The U-Net; its defaults are Ho et al.'s.

    `UNet(...).apply({"params": params}, x_t, time, y, train)` -> [B, H, W, out_channels] float32. Fields: `Encoder`'s, and

    num_classes: 0 for an unconditional network, else y int [B] in 0 ... num_classes - 1 is embedded and added to the
      time embedding. A label outside raises an error, or makes its example NaN if y is traced.
    label_dropout: probability with which training replaces an example's label by `null_label`, an embedding of its own for
      no class, as classifier-free guidance needs (Ho & Salimans 2022). At 0 there is no such label.
    num_heads_up: heads of the attention layers of the upsampling path; None for `num_heads`.
    out_channels: channels of the output; None for as many as x_t has, twice that for a learned variance.
    """

    num_classes: int = 0
    label_dropout: float = 0.0
    num_heads_up: int | None = None
    out_channels: int | None = None

    @property
    def null_label(self) -> int | None:
        """The label for no class; None if the network has none."""
        return self.num_classes if self.num_classes and self.label_dropout else None

    @property
    def _num_labels(self) -> int:
        """The number of classes and the null label."""
        return self.num_classes + (1 if self.label_dropout else 0)

    @nn.compact
    def __call__(self, x_t, time, y=None, train: bool = False) -> jax.Array:
        """x_t: [B, H, W, C]; time: float [B]; y: int [B] for a conditional network; train: whether dropout is active.

        Raises: ValueError for images that are not float, a height or width that 2^(levels - 1) does not divide, labels for
        a network without classes (and the reverse), or labels that are not int or not in the range.
        """
        self.check_input(x_t)
        y = self._check_labels(y)
        embedding = self.embed_time(time)
        if y is not None:
            embedding += self._embed_labels(y, train)
        h, skips = self.encode(x_t, embedding, train)
        h = self._decode(h, skips, embedding, train)
        h = nn.silu(self.layers.norm("norm_out")(h))
        out_channels = self.out_channels or x_t.shape[-1]
        return self.layers.conv(out_channels, "conv_out", last=True)(h).astype(jnp.float32)

    def _embed_labels(self, y, train: bool) -> jax.Array:
        """The embedding [B, 4 channels] of labels y int [B]."""
        if self.null_label is not None and train:
            kept = nn.Dropout(self.label_dropout, deterministic=False, name="label_dropout")(jnp.ones(jnp.shape(y)))
            y = jnp.where(kept > 0, y, self.null_label)
        embedding = self.layers.embed(self._num_labels, 4 * self.channels, "class")(y)
        if self._num_labels == 1:  # Flax returns the only row for every y
            embedding = jnp.where(jnp.reshape(y, (-1, 1)) == 0, embedding, jnp.nan)
        return embedding

    def _decode(self, h, skips: list[jax.Array], embedding, train: bool) -> jax.Array:
        """The upsampling path: from the middle's output to [B, H, W, channels]."""
        for level in reversed(range(len(self.channel_multipliers))):
            for j in range(self.num_res_blocks + 1):
                h = jnp.concatenate([h, skips.pop()], axis=-1)
                h = self.residual_block(h, embedding, level, f"up_{level}_block_{j}", train)
                if level in self.attention_levels:
                    h = self.attention(h, f"up_{level}_attn_{j}", self.num_heads_up)
            if level > 0:
                name = f"up_{level}_upsample"
                if self.resample_blocks:
                    h = self.residual_block(h, embedding, level, name, train, upsample_2x)
                else:
                    h = self.layers.conv(h.shape[-1], name, upsample=True)(h)
        return h

    def _check_labels(self, y) -> jax.Array | None:
        """y as int, with traced labels outside the range replaced by one beyond the embedding. Raises: ValueError."""
        if not 0 <= self.label_dropout < 1:
            raise ValueError(f"label_dropout must lie in [0, 1), got {self.label_dropout}")
        if self.label_dropout and not self.num_classes:
            raise ValueError(f"label_dropout={self.label_dropout} needs labels to drop; give num_classes, or use 0")
        if self.num_classes and y is None:
            raise ValueError(f"a network of {self.num_classes} classes needs y, the labels")
        if not self.num_classes and y is not None:
            raise ValueError("labels were given to a network without classes (num_classes=0)")
        return None if y is None else labels.in_range(y, self._num_labels, null_label=bool(self.label_dropout))
