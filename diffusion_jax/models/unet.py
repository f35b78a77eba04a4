"""The U-Net of the DDPM family, as one Flax Linen module, and the half of it that classifiers share.

Its defaults are Ho et al.'s network (DDPM appendix B): residual blocks of GroupNorm, SiLU and 3x3 convolution with the
time embedding added between the two halves, self-attention at chosen levels, and skip connections. Other fields give
OpenAI's (Improved DDPM, ADM). It knows nothing of diffusion: it maps (x_t, network time) to an output of the same height
and width.

Layers are named by level (0 is full resolution) and place: `down_1_block_0`, `mid_attn`, `up_3_upsample`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from diffusion_jax import labels
from diffusion_jax.models import convolution


def timestep_embedding(
    time, dim: int, max_period: float = 10_000.0, *, cos_first: bool = False, freq_shift: float = 1.0
) -> jax.Array:
    """[sin(time w_i), cos(time w_i)] with w_i = max_period^(-i / (dim/2 - freq_shift)), as in Ho et al.'s code.

    OpenAI's is `cos_first=True, freq_shift=0`. time: float [B], in the unit the network is trained on; returns float32
    [B, dim]. Raises: ValueError for an odd dim.
    """
    if dim % 2 or dim < 4:
        raise ValueError(f"the embedding needs an even number of at least 4 dimensions, got {dim}")
    half = dim // 2
    frequencies = jnp.exp(-math.log(max_period) / (half - freq_shift) * jnp.arange(half, dtype=jnp.float32))
    angles = jnp.asarray(time, jnp.float32)[:, None] * frequencies
    sin, cos = jnp.sin(angles), jnp.cos(angles)
    return jnp.concatenate([cos, sin] if cos_first else [sin, cos], axis=-1)


class _ScaleAndBias(nn.Module):
    """One scale and one bias for each channel, float32 [C]."""

    @nn.compact
    def __call__(self, channels: int):
        return (
            self.param("scale", nn.initializers.ones, (channels,), jnp.float32),
            self.param("bias", nn.initializers.zeros, (channels,), jnp.float32),
        )


class GroupNorm(nn.Module):
    """GroupNorm with float32 statistics, whatever the network computes in.

    Sums are taken over pixels first, channel by channel, then over the few channels of a group; what is left of the norm is
    one multiplication and one addition for each element. On CPUs that takes half the time of sums over groups as such, whose
    inner loops are 4 channels long.
    """

    num_groups: int
    epsilon: float
    dtype: Any

    @nn.compact
    def __call__(self, x):
        batch, channels = x.shape[0], x.shape[-1]
        if channels % self.num_groups:
            raise ValueError(f"num_groups={self.num_groups} does not divide a layer of {channels} channels; change one")
        scale, bias = _ScaleAndBias(name="norm")(channels)

        def mean_of_group(v):  # [B, C] to [B, C]
            grouped = v.reshape(batch, self.num_groups, -1)
            return jnp.broadcast_to(grouped.mean(-1, keepdims=True), grouped.shape).reshape(batch, channels)

        pixels = x.reshape(batch, -1, channels).astype(jnp.float32)
        mean = mean_of_group(pixels.mean(axis=1))
        # Var x = E (x - c)^2 - (E x - c)^2 for every constant c. At c = E x, held fixed, that is exact and the gradient needs
        # no sum over x - E x, which would be 0.
        center = jax.lax.stop_gradient(mean)
        variance = mean_of_group(jnp.square(pixels - center[:, None]).mean(axis=1)) - jnp.square(mean - center)
        scale = scale * jax.lax.rsqrt(variance + self.epsilon)
        bias = bias - mean * scale
        return (pixels * scale[:, None] + bias[:, None]).astype(self.dtype).reshape(x.shape)


class Dropout(nn.Dropout):
    """Dropout that draws 16 random bits for an element instead of 32: drawing them is what dropout costs.

    The rate is rounded to a multiple of 2^-16, and the scale is that of the rounded rate.
    """

    def __call__(self, x, deterministic: bool):
        if deterministic or not self.rate:
            return x
        channels = x.shape[-1]
        pairs = jax.random.bits(self.make_rng("dropout"), (*x.shape[:-1], -(-channels // 2)), jnp.uint32)
        bits = jax.lax.bitcast_convert_type(pairs, jnp.uint16).reshape(*x.shape[:-1], -1)[..., :channels]
        dropped = max(1, min(round(self.rate * 2**16), 2**16 - 1))  # of the 2^16 values
        kept = x.astype(jnp.float32) * (2**16 / (2**16 - dropped))
        return jnp.where(bits >= dropped, kept, 0).astype(x.dtype)


def _all_but_the_kernel(x, kernel, bias, dtype):
    """For `convolution.doubled`, which adds parts of a kernel before they are rounded."""
    return x.astype(dtype), kernel, bias.astype(dtype)


class Conv(nn.Conv):
    """A convolution whose result is of its dtype, also where `convolution.products` made float32 of it."""

    def __call__(self, x):
        return super().__call__(x).astype(self.dtype)


class Dense(nn.Dense):
    """As `Conv`, where `convolution.dense` made float32 of it."""

    def __call__(self, x):
        return super().__call__(x).astype(self.dtype)


@dataclasses.dataclass(frozen=True)
class _Layers:
    """Makes the layers of a network: what they all share."""

    num_groups: int
    norm_epsilon: float
    initializer: str
    dtype: Any
    products: bool = False

    def _init(self, last: bool):
        """Layers that end a residual branch, and the network's last, start at 0 (at OpenAI) or next to it (at Ho et al.)."""
        if self.initializer == "openai":
            return nn.initializers.zeros if last else nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
        return nn.initializers.variance_scaling(1e-10 if last else 1.0, "fan_avg", "uniform")

    def conv(
        self, features: int, name: str, *, last: bool = False, stride: int = 1, padding=(1, 1), doubled: bool = False
    ) -> Conv:
        """3x3. padding: before and after, in height and width. doubled: of `double(x)`, with fewer products."""
        options = {"dtype": self.dtype, "kernel_init": self._init(last), "name": name}
        padding = (tuple(padding),) * 2
        convolve = convolution.products if self.products else convolution.xla
        if doubled:
            options["conv_general_dilated"] = lambda x, kernel, *_, **__: convolution.doubled(convolve, x, kernel)
            options["promote_dtype"] = _all_but_the_kernel
        elif self.products and stride == 1:
            options["conv_general_dilated"] = lambda x, kernel, *_, **__: convolve(x, kernel, padding)
        return Conv(features, (3, 3), stride, padding=padding, **options)

    def dense(self, features: int, name: str, *, last: bool = False) -> Dense:
        options = {"dtype": self.dtype, "kernel_init": self._init(last), "name": name}
        if self.products:
            options["dot_general"] = convolution.dense
        return Dense(features, **options)

    def norm(self, name: str) -> GroupNorm:
        return GroupNorm(self.num_groups, self.norm_epsilon, self.dtype, name=name)

    def embed(self, num_classes: int, features: int, name: str) -> nn.Embed:
        options = {"embedding_init": nn.initializers.normal(1.0)} if self.initializer == "openai" else {}
        return nn.Embed(num_classes, features, dtype=self.dtype, name=name, **options)


def halve(x) -> jax.Array:
    """[B, H, W, C] to [B, H / 2, W / 2, C]: the mean of each 2x2 pixels."""
    return nn.avg_pool(x, (2, 2), (2, 2))


def double(x) -> jax.Array:
    """[B, H, W, C] to [B, 2 H, 2 W, C]: each pixel four times."""
    return x.repeat(2, axis=1).repeat(2, axis=2)


class ResBlock(nn.Module):
    """x + conv(dropout(silu(norm(conv(silu(norm(x))) + time projection)))), with a 1x1 projection where widths differ.

    With `scale_shift_norm` the time projection is a scale and a shift after the second norm: norm(h) (1 + scale) + shift.
    resample: `halve` or `double`, of both branches; the residual one after its first SiLU (ADM appendix A, as BigGAN).
    """

    features: int
    dropout: float
    scale_shift_norm: bool
    layers: _Layers
    resample: Callable | None = None

    @nn.compact
    def __call__(self, x, embedding, train: bool):
        h = nn.silu(self.layers.norm("norm1")(x))
        if self.resample is not None:
            h, x = h if self.resample is double else self.resample(h), self.resample(x)
        h = self.layers.conv(self.features, "conv1", doubled=self.resample is double)(h)
        width = self.features * (2 if self.scale_shift_norm else 1)
        time = self.layers.dense(width, "time_proj")(nn.silu(embedding))[:, None, None, :]
        if self.scale_shift_norm:
            scale, shift = jnp.split(time, 2, axis=-1)
            h = self.layers.norm("norm2")(h) * (1 + scale) + shift
        else:
            h = self.layers.norm("norm2")(h + time)
        h = Dropout(self.dropout)(nn.silu(h), deterministic=not train)
        h = self.layers.conv(self.features, "conv2", last=True)(h)
        if x.shape[-1] != self.features:
            x = self.layers.dense(self.features, "skip")(x)
        return x + h


def split_heads(channels: int, num_heads: int, head_channels: int | None) -> int:
    """How many heads a layer has: C / head_channels where that is given, else num_heads. Raises: ValueError."""
    name, value = ("num_heads", num_heads) if head_channels is None else ("head_channels", head_channels)
    if value < 1 or channels % value:
        raise ValueError(f"{name}={value} does not divide an attention layer of {channels} channels")
    return num_heads if head_channels is None else channels // head_channels


class Attention(nn.Module):
    """x + proj(softmax(q k / sqrt(C / heads)) v) over all positions, with a float32 softmax."""

    num_heads: int
    head_channels: int | None
    layers: _Layers

    @nn.compact
    def __call__(self, x):
        b, height, width, c = x.shape
        heads = split_heads(c, self.num_heads, self.head_channels)
        h = self.layers.norm("norm")(x).reshape(b, height * width, c)
        q, k, v = (
            self.layers.dense(c, name)(h).reshape(b, height * width, heads, c // heads) for name in ("q", "k", "v")
        )
        h = jax.nn.dot_product_attention(q, k, v).reshape(b, height, width, c)
        return x + self.layers.dense(c, "proj", last=True)(h)


# The name, for a policy of jax.checkpoint, of what stands between blocks, which `remat` keeps for the backward pass.
REMAT_NAME = "between blocks"
_REMAT_BLOCK, _REMAT_ATTENTION = nn.remat(ResBlock, static_argnums=(3,)), nn.remat(Attention)


class Encoder(nn.Module):
    """The way down and the middle, which U-Nets and classifiers share: fields, layers and their names.

    channels: width of the first level, a multiple of `num_groups`.
    channel_multipliers: the width of each level over `channels`, fractions too (0.5 is ADM's first at 512 pixels); each level
      after the first halves the resolution.
    num_res_blocks: residual blocks of each level on the way down (one more on the way up).
    attention_levels: levels whose blocks are followed by self-attention; (1,) is 16x16 for 32-pixel images, (4,) for
      256-pixel ones. The middle always has one.
    num_heads: attention heads of every layer; head_channels: the channels of a head instead, of which wider layers have
      more (ADM's are 64).
    resample_blocks: between levels stands a residual block that averages 2x2 pixels, or repeats them, in both its branches
      (ADM), instead of a stride-2 convolution, or a repetition and a convolution.
    scale_shift_norm: the time embedding scales and shifts after the second norm of a block, instead of being added before it.
    embedding_cos_first, embedding_freq_shift: of `timestep_embedding`; OpenAI's are True and 0.
    downsample_padding: before and after each side of the stride-2 convolution; OpenAI's is (1, 1).
    num_groups, norm_epsilon: of every GroupNorm; OpenAI's epsilon is 1e-5.
    initializer: "ho" or "openai", PyTorch's default for kernels, N(0, 1) for classes (biases start at 0 in both).
    dropout: rate before the second convolution of each block, in training only.
    dtype: "float32" or "bfloat16", what the layers compute in. Parameters, normalization statistics, the softmax and the
      output stay float32.
    convolution: "products" computes convolutions of stride 1 and dense layers as `models.convolution` does; "xla" leaves them
      to XLA; "auto" is the first where a network computes in bfloat16 on one CPU device. The numbers differ by rounding.
      Give "xla" where a network is traced on a CPU for another machine, or where forward-mode derivatives are taken.
    remat: recompute each block's activations in the backward pass: less memory, about a third more time.
    """

    channels: int = 128
    channel_multipliers: tuple[float, ...] = (1, 2, 2, 2)
    num_res_blocks: int = 2
    attention_levels: tuple[int, ...] = (1,)
    num_heads: int = 1
    head_channels: int | None = None
    resample_blocks: bool = False
    scale_shift_norm: bool = False
    embedding_cos_first: bool = False
    embedding_freq_shift: float = 1.0
    downsample_padding: tuple[int, int] = (0, 1)
    num_groups: int = 32
    norm_epsilon: float = 1e-6
    initializer: str = "ho"
    dropout: float = 0.1
    dtype: str = "float32"
    convolution: str = "auto"
    remat: bool = False

    @property
    def layers(self) -> _Layers:
        """What makes the layers."""
        dtype = jnp.dtype(self.dtype)
        products = self.convolution == "products"
        if self.convolution == "auto":
            products = dtype == jnp.bfloat16 and jax.default_backend() == "cpu" and jax.device_count() == 1
        return _Layers(self.num_groups, self.norm_epsilon, self.initializer, dtype, products)

    def width(self, level: int) -> int:
        """Channels of a level."""
        return round(self.channels * self.channel_multipliers[level])

    def block(self, h, embedding, level: int, name: str, train: bool, resample: Callable | None = None):
        """A residual block as wide as its level."""
        made = _REMAT_BLOCK if self.remat else ResBlock
        width = self.width(level)
        made = made(width, self.dropout, self.scale_shift_norm, self.layers, resample, name=name)
        return checkpoint_name(made(h, embedding, train), REMAT_NAME)

    def attention(self, h, name: str, num_heads: int | None = None):
        """A self-attention layer, of `num_heads` heads where not said otherwise."""
        made = _REMAT_ATTENTION if self.remat else Attention
        made = made(num_heads or self.num_heads, self.head_channels, self.layers, name=name)
        return checkpoint_name(made(h), REMAT_NAME)

    def embed(self, time):
        """The network time [B] as [B, 4 channels]."""
        embedding = timestep_embedding(
            time, self.channels, cos_first=self.embedding_cos_first, freq_shift=self.embedding_freq_shift
        )
        embedding = nn.silu(self.layers.dense(4 * self.channels, "time_0")(embedding.astype(self.dtype)))
        return self.layers.dense(4 * self.channels, "time_1")(embedding)

    def encode(self, x, embedding, train: bool):
        """From an image [B, H, W, C] to the middle's output, and what was passed on the way, for skip connections."""
        levels = len(self.channel_multipliers)
        h = self.layers.conv(self.width(0), "conv_in")(x.astype(self.dtype))
        passed = [h]
        for level in range(levels):
            for j in range(self.num_res_blocks):
                h = self.block(h, embedding, level, f"down_{level}_block_{j}", train)
                if level in self.attention_levels:
                    h = self.attention(h, f"down_{level}_attn_{j}")
                passed.append(h)
            if level < levels - 1:
                name = f"down_{level}_downsample"
                if self.resample_blocks:
                    h = self.block(h, embedding, level, name, train, halve)
                else:
                    h = self.layers.conv(h.shape[-1], name, stride=2, padding=self.downsample_padding)(h)
                passed.append(h)
        h = self.block(h, embedding, levels - 1, "mid_block_0", train)
        h = self.attention(h, "mid_attn")
        return self.block(h, embedding, levels - 1, "mid_block_1", train), passed

    def check(self, x):
        """Raises: ValueError for fields that fit no network, or an image that does not fit this one."""
        levels = len(self.channel_multipliers)
        kind = type(self).__name__
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"the {kind} needs float images, in [-1, 1]; got {x.dtype}; convert with x / 127.5 - 1")
        if x.ndim != 4:
            raise ValueError(f"the {kind} needs images [B, H, W, C], got shape {x.shape}")
        divisor = 2 ** (levels - 1)
        if x.shape[1] % divisor or x.shape[2] % divisor:
            raise ValueError(
                f"a {kind} of {levels} levels needs a height and width that {divisor} divides, got {x.shape[1:3]}; resize "
                "the images or use fewer channel_multipliers"
            )
        if self.initializer not in ("ho", "openai"):
            raise ValueError(f"initializer={self.initializer!r} must be 'ho' or 'openai'")
        if self.convolution not in ("auto", "products", "xla"):
            raise ValueError(f"convolution={self.convolution!r} must be 'auto', 'products' or 'xla'")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), got {self.dropout}")
        bad = [level for level in self.attention_levels if not 0 <= level < levels]
        if bad:
            raise ValueError(f"attention_levels must lie in 0 ... {levels - 1}, got {bad[0]}")


class UNet(Encoder):
    """The U-Net; its defaults are Ho et al.'s.

    `UNet(...).apply({"params": params}, x_t, time, y, train)` -> [B, H, W, out_channels] float32. Fields: `Encoder`'s, and

    num_classes: 0 for an unconditional network, else y int [B] in 0 ... num_classes - 1 is embedded and added to the
      time embedding. A label outside is refused, or makes its example NaN where y is traced.
    label_dropout: probability with which training replaces an example's label by `null_label`, an embedding of its own that
      stands for no class: what classifier-free guidance needs (Ho & Salimans 2022). At 0 there is no such label.
    num_heads_up: heads of the attention layers on the way up, where not as many as elsewhere.
    out_channels: channels of the output; None for as many as x_t has, twice that for a learned variance.
    """

    num_classes: int = 0
    label_dropout: float = 0.0
    num_heads_up: int | None = None
    out_channels: int | None = None

    @property
    def null_label(self) -> int | None:
        """The label that stands for no class; None where the network has none."""
        return self.num_classes if self.num_classes and self.label_dropout else None

    @nn.compact
    def __call__(self, x_t, time, y=None, train: bool = False) -> jax.Array:
        """x_t: [B, H, W, C]; time: float [B]; y: int [B] for a conditional network; train: whether dropout acts.

        Raises: ValueError for images that are not float, a height or width that 2^(levels - 1) does not divide, labels where
        none are known (and the reverse), or labels that are not int or not in the range.
        """
        self.check(x_t)
        self._check_labels(y)
        rows = self.num_classes + (1 if self.label_dropout else 0)
        if self.num_classes:
            y = labels.in_range(y, rows, null_label=bool(self.label_dropout))
        embedding = self.embed(time)
        if self.num_classes:
            if self.label_dropout and train:
                kept = nn.Dropout(self.label_dropout, deterministic=False, name="label_dropout")(jnp.ones(jnp.shape(y)))
                y = jnp.where(kept > 0, y, self.null_label)
            embedded = self.layers.embed(rows, 4 * self.channels, "class")(y)
            if rows == 1:  # Flax gives the only row whatever y is
                embedded = jnp.where(jnp.reshape(y, (-1, 1)) == 0, embedded, jnp.nan)
            embedding += embedded

        h, skips = self.encode(x_t, embedding, train)
        for level in reversed(range(len(self.channel_multipliers))):
            for j in range(self.num_res_blocks + 1):
                h = jnp.concatenate([h, skips.pop()], axis=-1)
                h = self.block(h, embedding, level, f"up_{level}_block_{j}", train)
                if level in self.attention_levels:
                    h = self.attention(h, f"up_{level}_attn_{j}", self.num_heads_up)
            if level > 0:
                name = f"up_{level}_upsample"
                if self.resample_blocks:
                    h = self.block(h, embedding, level, name, train, double)
                else:
                    h = self.layers.conv(h.shape[-1], name, doubled=True)(h)

        h = nn.silu(self.layers.norm("norm_out")(h))
        out_channels = self.out_channels or x_t.shape[-1]
        return self.layers.conv(out_channels, "conv_out", last=True)(h).astype(jnp.float32)

    def _check_labels(self, y):
        if not 0 <= self.label_dropout < 1:
            raise ValueError(f"label_dropout must lie in [0, 1), got {self.label_dropout}")
        if self.label_dropout and not self.num_classes:
            raise ValueError(f"label_dropout={self.label_dropout} needs labels to drop; give num_classes, or use 0")
        if self.num_classes and y is None:
            raise ValueError(f"a network of {self.num_classes} classes needs y, the labels")
        if not self.num_classes and y is not None:
            raise ValueError("labels were given to a network without classes (num_classes=0)")
