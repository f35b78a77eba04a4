"""The Inception network of the FID: the InceptionV3 of 2015-12-05, for inference.

It is not torchvision's: average pools exclude the padding from their means, the last block uses max pooling, and there are
1008 classes. Layers are named as in its PyTorch port; `pretrained.inception` loads that and the original TensorFlow graph.
"""

from __future__ import annotations

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

__all__ = ["IMAGE_SIZE", "Activations", "Inception"]

IMAGE_SIZE = 299  # pixels in height and width
_SPATIAL_BLOCK = "Mixed_6d"  # TensorFlow's mixed_6
_SPATIAL_CHANNELS = 7
_PRECISION = jax.lax.Precision.HIGHEST  # float32 also on accelerators whose default for products is lower


class Activations(NamedTuple):
    """The activations from which metrics are computed.

    pool: [B, 2048], TensorFlow's pool_3. spatial: [B, 2023], the first 7 channels of its mixed_6/conv at 17x17 positions.
    logits: [B, 1008]; logits_unbiased: the same without the last layer's bias, as Inception Scores use them.
    """

    pool: jax.Array
    spatial: jax.Array
    logits: jax.Array
    logits_unbiased: jax.Array


class Conv(nn.Module):
    """A convolution, batch normalization by stored statistics, ReLU. The norm is folded into the kernel at each call."""

    features: int
    kernel: tuple[int, int]
    strides: int = 1
    padding: str = "SAME"

    @nn.compact
    def __call__(self, x) -> jax.Array:
        ones, zeros, c = nn.initializers.ones, nn.initializers.zeros, self.features
        kernel = self.param("kernel", nn.initializers.he_normal(), (*self.kernel, x.shape[-1], c))
        scale, bias = self.param("scale", ones, (c,)), self.param("bias", zeros, (c,))
        mean, var = self.param("mean", zeros, (c,)), self.param("var", ones, (c,))
        factor = scale * jax.lax.rsqrt(var + 1e-3)
        options = {"dimension_numbers": ("NHWC", "HWIO", "NHWC"), "precision": _PRECISION}
        x = jax.lax.conv_general_dilated(x, kernel * factor, (self.strides,) * 2, self.padding, **options)
        return nn.relu(x + (bias - mean * factor))


def _chain(name: str, x, *layers) -> jax.Array:
    """x after convolutions, (features, kernel, strides and padding if others than 1 and "SAME") each.

    They are named `name` with _1, _2, ... if there are several.
    """
    for number, layer in enumerate(layers, start=1):
        x = Conv(*layer, name=f"{name}_{number}" if len(layers) > 1 else name)(x)
    return x


def _average_pool(x):
    return nn.avg_pool(x, (3, 3), (1, 1), "SAME", count_include_pad=False)


def _max_pool(x, strides: int, padding: str):
    return nn.max_pool(x, (3, 3), (strides, strides), padding)


class BlockA(nn.Module):
    """35x35: branches of 1x1, 5x5, two 3x3, and a pool with `pool_features` channels."""

    pool_features: int

    @nn.compact
    def __call__(self, x) -> jax.Array:
        one = _chain("branch1x1", x, (64, (1, 1)))
        five = _chain("branch5x5", x, (48, (1, 1)), (64, (5, 5)))
        twice = _chain("branch3x3dbl", x, (64, (1, 1)), (96, (3, 3)), (96, (3, 3)))
        pool = _chain("branch_pool", _average_pool(x), (self.pool_features, (1, 1)))
        return jnp.concatenate([one, five, twice, pool], axis=-1)


class BlockB(nn.Module):
    """35x35 to 17x17 positions."""

    @nn.compact
    def __call__(self, x) -> jax.Array:
        three = _chain("branch3x3", x, (384, (3, 3), 2, "VALID"))
        twice = _chain("branch3x3dbl", x, (64, (1, 1)), (96, (3, 3)), (96, (3, 3), 2, "VALID"))
        return jnp.concatenate([three, twice, _max_pool(x, 2, "VALID")], axis=-1)


class BlockC(nn.Module):
    """17x17: branches of 1x1, 7x7 as 1x7 and 7x1, two such 7x7, and a pool. `width`: channels inside the branches."""

    width: int

    @nn.compact
    def __call__(self, x) -> jax.Array:
        width, row, column = self.width, (1, 7), (7, 1)
        one = _chain("branch1x1", x, (192, (1, 1)))
        seven = _chain("branch7x7", x, (width, (1, 1)), (width, row), (192, column))
        twice = _chain("branch7x7dbl", x, (width, (1, 1)), (width, column), (width, row), (width, column), (192, row))
        pool = _chain("branch_pool", _average_pool(x), (192, (1, 1)))
        return jnp.concatenate([one, seven, twice, pool], axis=-1)


class BlockD(nn.Module):
    """17x17 to 8x8 positions."""

    @nn.compact
    def __call__(self, x) -> jax.Array:
        three = _chain("branch3x3", x, (192, (1, 1)), (320, (3, 3), 2, "VALID"))
        seven = _chain("branch7x7x3", x, (192, (1, 1)), (192, (1, 7)), (192, (7, 1)), (192, (3, 3), 2, "VALID"))
        return jnp.concatenate([three, seven, _max_pool(x, 2, "VALID")], axis=-1)


class BlockE(nn.Module):
    """8x8: branches that fork at their end. max_pool: whether the last branch uses max pooling, as in the last block."""

    max_pool: bool

    @nn.compact
    def __call__(self, x) -> jax.Array:
        one = _chain("branch1x1", x, (320, (1, 1)))
        three = _chain("branch3x3_1", x, (384, (1, 1)))
        twice = _chain("branch3x3dbl", x, (448, (1, 1)), (384, (3, 3)))
        kernels = {"a": (1, 3), "b": (3, 1)}
        forks = [Conv(384, kernel, name=f"branch3x3_2{end}")(three) for end, kernel in kernels.items()]
        forks += [Conv(384, kernel, name=f"branch3x3dbl_3{end}")(twice) for end, kernel in kernels.items()]
        pool = _chain("branch_pool", _max_pool(x, 1, "SAME") if self.max_pool else _average_pool(x), (192, (1, 1)))
        return jnp.concatenate([one, *forks, pool], axis=-1)


class Inception(nn.Module):
    """Images [B, 299, 299, 3], scaled to about [-1, 1], to their `Activations`."""

    @nn.compact
    def __call__(self, x) -> Activations:
        """x: float32 [B, 299, 299, 3]."""
        x = Conv(32, (3, 3), 2, "VALID", name="Conv2d_1a_3x3")(x)
        x = Conv(32, (3, 3), 1, "VALID", name="Conv2d_2a_3x3")(x)
        x = _max_pool(Conv(64, (3, 3), name="Conv2d_2b_3x3")(x), 2, "VALID")
        x = Conv(80, (1, 1), name="Conv2d_3b_1x1")(x)
        x = _max_pool(Conv(192, (3, 3), 1, "VALID", name="Conv2d_4a_3x3")(x), 2, "VALID")
        blocks = {
            "Mixed_5b": BlockA(32, name="Mixed_5b"),
            "Mixed_5c": BlockA(64, name="Mixed_5c"),
            "Mixed_5d": BlockA(64, name="Mixed_5d"),
            "Mixed_6a": BlockB(name="Mixed_6a"),
            "Mixed_6b": BlockC(128, name="Mixed_6b"),
            "Mixed_6c": BlockC(160, name="Mixed_6c"),
            "Mixed_6d": BlockC(160, name="Mixed_6d"),
            "Mixed_6e": BlockC(192, name="Mixed_6e"),
            "Mixed_7a": BlockD(name="Mixed_7a"),
            "Mixed_7b": BlockE(False, name="Mixed_7b"),
            "Mixed_7c": BlockE(True, name="Mixed_7c"),
        }
        outputs = {}
        for name, block in blocks.items():
            x = outputs[name] = block(x)
        spatial = outputs[_SPATIAL_BLOCK][..., :_SPATIAL_CHANNELS].reshape(len(x), -1)
        pool = x.mean(axis=(1, 2))
        unbiased = nn.Dense(1008, use_bias=False, precision=_PRECISION, name="fc")(pool)
        return Activations(pool, spatial, unbiased + self.param("fc_bias", nn.initializers.zeros, (1008,)), unbiased)
