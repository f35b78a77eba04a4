"""A classifier of noisy images: what classifier guidance takes its gradients from (ADM, Dhariwal & Nichol 2021, section 4).

The way down of the U-Net, told the noise level as the U-Net is, and an attention pooling over what is left of the image.
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffusion_jax.models.unet import Encoder, _Layers, split_heads


class AttentionPool(nn.Module):
    """[B, H, W, C] -> [B, features]: what the mean of all positions finds among them and itself, as in CLIP.

    The mean stands before the H W positions, each of the H W + 1 tokens has a learned embedding of its place, and one
    attention layer with the mean as its only query is projected to `features`.
    """

    features: int
    num_heads: int
    head_channels: int | None
    layers: _Layers

    @nn.compact
    def __call__(self, x):
        b, height, width, c = x.shape
        heads, tokens = split_heads(c, self.num_heads, self.head_channels), height * width + 1
        if self.has_variable("params", "position") and self.get_variable("params", "position").shape[0] != tokens:
            known = self.get_variable("params", "position").shape[0] - 1
            raise ValueError(
                f"this classifier was made for images that end in {known} positions, not {height}x{width}: its embedding "
                "of places fixes the image size"
            )
        position = self.param("position", nn.initializers.normal(c**-0.5), (tokens, c), jnp.float32)
        x = x.reshape(b, height * width, c)
        x = jnp.concatenate([x.mean(axis=1, keepdims=True), x], axis=1) + position
        q, k, v = (
            self.layers.dense(c, name)(part).reshape(b, -1, heads, c // heads)
            for name, part in (("q", x[:, :1]), ("k", x), ("v", x))
        )
        return self.layers.dense(self.features, "proj")(jax.nn.dot_product_attention(q, k, v).reshape(b, c))


class Classifier(Encoder):
    """Logits of an image's class from x_t and its network time; the defaults are ADM's classifier of 128x128 ImageNet.

    `Classifier(...).apply({"params": params}, x_t, time, train=False)` -> [B, num_classes] float32, unnormalized log
    probabilities. The height and width at initialization are the only ones it takes. Fields: `Encoder`'s, and

    num_classes: how many classes it tells apart.
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
        """x_t: [B, H, W, C]; time: float [B]; train: whether dropout acts.

        Raises: ValueError for a height or width that 2^(levels - 1) does not divide, or that it was not initialized with.
        """
        self.check(x_t)
        if self.num_classes < 2:
            raise ValueError(f"num_classes={self.num_classes}: a classifier needs at least 2 classes")
        h, _ = self.encode(x_t, self.embed(time), train)
        exact = dataclasses.replace(self.layers, dtype=jnp.dtype("float32"))
        h = nn.silu(exact.norm("norm_out")(h))
        return AttentionPool(self.num_classes, self.num_heads, self.head_channels, exact, name="pool")(h)
