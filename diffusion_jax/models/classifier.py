"""A classifier of noisy images, for the gradients of classifier guidance (ADM, Dhariwal & Nichol 2021, section 4).

It is the downsampling path of the U-Net, with the same time embedding, and attention pooling over the remaining positions.
"""

from __future__ import annotations

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffusion_jax.models.blocks import split_heads
from diffusion_jax.models.layers import LayerFactory
from diffusion_jax.models.unet import Encoder

__all__ = ["AttentionPool", "Classifier"]


class AttentionPool(nn.Module):
    """[B, *spatial, C] -> [B, features]: attention of the mean of all positions to them and to itself, as in CLIP.

    The mean precedes the N positions (H W of an image), each of the N + 1 tokens has a learned position embedding, and one
    attention layer with the mean as its only query is projected to `features`.
    """

    features: int
    num_heads: int
    head_channels: int | None
    layers: LayerFactory

    @nn.compact
    def __call__(self, x) -> jax.Array:
        """x: [B, *spatial, C]; returns [B, features]. Raises: ValueError for other sizes than at initialization."""
        b, *spatial, c = x.shape
        positions = math.prod(spatial)
        heads, tokens = split_heads(c, self.num_heads, self.head_channels), positions + 1
        if self.has_variable("params", "position") and self.get_variable("params", "position").shape[0] != tokens:
            known = self.get_variable("params", "position").shape[0] - 1
            raise ValueError(
                f"the position embedding of this classifier fixes the image size: it has {known} positions after "
                f"downsampling, and these images have {'x'.join(map(str, spatial))}; resize the images"
            )
        position = self.param("position", nn.initializers.normal(c**-0.5), (tokens, c), jnp.float32)
        x = x.reshape(b, positions, c)
        x = jnp.concatenate([x.mean(axis=1, keepdims=True), x], axis=1) + position
        q, k, v = (
            self.layers.dense(c, name)(part).reshape(b, -1, heads, c // heads)
            for name, part in (("q", x[:, :1]), ("k", x), ("v", x))
        )
        return self.layers.dense(self.features, "proj")(self.layers.attend(q, k, v).reshape(b, c))


class Classifier(Encoder):
    """Logits of an image's class from x_t and its network time; the defaults are ADM's classifier of 128x128 ImageNet.

    `Classifier(...).apply({"params": params}, x_t, time, train=False)` -> [B, num_classes] float32, unnormalized log
    probabilities. It accepts only the sizes at initialization, which 2^(levels - 1) must divide. Fields: `Encoder`'s, and

    num_classes: the number of classes.
    """

    channel_multipliers: tuple[float, ...] = (1, 1, 2, 3, 4)
    attention_levels: tuple[int, ...] = (2, 3, 4)
    head_channels: int | None = 64
    resample_blocks: bool = True
    scale_shift_norm: bool = True
    embedding_cos_first: bool = True
    embedding_freq_shift: float = 0.0
    downsample_padding: tuple[int, int] = (1, 1)
    norm_epsilon: float = 1e-5
    initializer: str = "openai"
    dropout: float = 0.0
    num_classes: int = 1000

    @nn.compact
    def __call__(self, x_t, time, train: bool = False) -> jax.Array:
        """x_t: [B, *spatial, C]; time: float [B]; train: whether dropout is active.

        Raises: ValueError for sizes not divisible by 2^(levels - 1), or other than at initialization.
        """
        self.check_input(x_t)
        self.check_divisible(x_t, "its pooling reads every position")
        if self.num_classes < 2:
            raise ValueError(f"num_classes={self.num_classes}: a classifier needs at least 2 classes")
        h, _ = self.encode(x_t, self.embed_time(time), train)
        layers = dataclasses.replace(self.layers, dtype=jnp.dtype("float32"))
        h = nn.silu(layers.norm("norm_out")(h))
        return AttentionPool(self.num_classes, self.num_heads, self.head_channels, layers, name="pool")(h)
