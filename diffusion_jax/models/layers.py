"""Layers and blocks of networks: convolutions, norms, residual blocks, self-attention, and the time embedding.

Arrays are [B, *spatial, C], with any number of spatial axes (convolutions: 1, 2 or 3); kernels are [*kernel size, C, K].
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero

# For jax.checkpoint policies: the name of the results of convolutions and matrix products inside a block, from which all
# other values are cheap to recompute.
KEPT_INSIDE = "inside blocks"

_PLATFORM: contextvars.ContextVar[str] = contextvars.ContextVar("platform", default="")


@contextlib.contextmanager
def compiling_for(platform: str) -> Iterator[None]:
    """A context in which layers are traced for devices of a platform, such as "tpu", which need not be present.

    A function that was traced in this context must not be called outside of it, because JAX would reuse the trace.
    """
    token = _PLATFORM.set(platform)
    try:
        yield
    finally:
        _PLATFORM.reset(token)


def platform() -> str:
    """Returns the platform for which layers are traced: "cpu", "gpu" or "tpu"."""
    return _PLATFORM.get() or jax.default_backend()


def timestep_embedding(time, dim: int, *, cos_first: bool = False, freq_shift: float = 1.0) -> jax.Array:
    """Returns [sin(time w_i), cos(time w_i)] with w_i = 10000^(-i / (dim/2 - freq_shift)), as in Ho et al.'s code.

    OpenAI's code has `cos_first=True, freq_shift=0`. time: float [B], in the same unit as in training; returns float32
    [B, dim]. Raises: ValueError for a dim that is odd or below 4.
    """
    if dim % 2 or dim < 4:
        raise ValueError(f"the embedding needs an even number of at least 4 dimensions, got {dim}")
    half = dim // 2
    frequencies = jnp.exp(-math.log(10_000.0) / (half - freq_shift) * jnp.arange(half, dtype=jnp.float32))
    angles = jnp.asarray(time, jnp.float32)[:, None] * frequencies
    sin, cos = jnp.sin(angles), jnp.cos(angles)
    return jnp.concatenate([cos, sin] if cos_first else [sin, cos], axis=-1)


class FourierEmbedding(nn.Module):
    """[sin(2 pi f_i time), cos(2 pi f_i time)], with f_i drawn from N(0, 16^2) at initialization and not trained (NCSN++)."""

    num_frequencies: int

    @nn.compact
    def __call__(self, time) -> jax.Array:
        """time: float [B], in the same unit as in training; returns float32 [B, 2 num_frequencies]."""
        draw = nn.initializers.normal(16.0)
        frequencies = jax.lax.stop_gradient(self.param("frequencies", draw, (self.num_frequencies,), jnp.float32))
        angles = jnp.asarray(time, jnp.float32)[:, None] * (2 * math.pi * frequencies)
        return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


def times_of_rows(time, x_t) -> jax.Array:
    """Returns the network time of each row of x_t [B, ...], as [B]. time: [B], or [] for all rows. Raises: ValueError."""
    shape = x_t.shape[:1]
    if jnp.shape(time) not in ((), shape):
        raise ValueError(
            f"time must be one number, or {shape[0]} numbers, one for each row of x_t; got shape {jnp.shape(time)}"
        )
    return jnp.broadcast_to(time, shape)


class _ScaleAndBias(nn.Module):
    """One scale and one bias for each channel, float32 [C]."""

    @nn.compact
    def __call__(self, channels: int) -> tuple[jax.Array, jax.Array]:
        return (
            self.param("scale", nn.initializers.ones, (channels,), jnp.float32),
            self.param("bias", nn.initializers.zeros, (channels,), jnp.float32),
        )


class GroupNorm(nn.Module):
    """GroupNorm with float32 statistics in every compute dtype.

    Sums are computed over pixels first, channel by channel, then over the few channels in a group. The rest of the norm,
    including `shift` and `scale_shift`, is one multiplication and one addition per element. So x is read twice: for the sums,
    and for the result. On CPUs these sums take half the time of sums over groups, whose inner loops are 4 channels long.
    """

    num_groups: int
    epsilon: float
    dtype: Any

    @nn.compact
    def __call__(self, x, shift=None, scale_shift=None) -> jax.Array:
        """Returns norm(x + shift) (1 + scale) + shift' in `dtype`. x: [B, ..., C].

        shift: float32 [B, C], or None. scale_shift: (scale, shift'), each float32 [B, C], or None.
        Raises: ValueError if `num_groups` does not divide C.
        """
        channels = x.shape[-1]
        if channels % self.num_groups:
            raise ValueError(
                f"num_groups={self.num_groups} does not divide a layer of {channels} channels; use "
                f"num_groups={math.gcd(self.num_groups, channels)}, or other channels"
            )
        scale, bias = _ScaleAndBias(name="norm")(channels)
        return _normalize(
            x, scale, bias, shift, scale_shift, num_groups=self.num_groups, epsilon=self.epsilon, dtype=self.dtype
        )


# `jax.jit` traces the function only once per shape: networks have about a hundred norms, but only about twenty shapes.
@functools.partial(jax.jit, static_argnames=("num_groups", "epsilon", "dtype"))
def _normalize(x, scale, bias, shift, scale_shift, *, num_groups: int, epsilon: float, dtype) -> jax.Array:
    """Computes `GroupNorm`. scale, bias: the norm's parameters, float32 [C]. Other arguments: as `GroupNorm`."""
    channels = x.shape[-1]
    pixel_axes, to_pixels = tuple(range(1, x.ndim - 1)), (slice(None), *(None,) * (x.ndim - 2))

    # Matrix products, because on TPUs plain sums over groups of few channels take up to half as long as a pass over x.
    members = jnp.arange(channels)[:, None] // (channels // num_groups) == jnp.arange(num_groups)
    members, product = members.astype(jnp.float32), functools.partial(jnp.matmul, precision="highest")

    def mean_of_group(v):  # [B, C] to [B, C]
        return product(product(v, members) / (channels // num_groups), members.T)

    shift = jnp.zeros(()) if shift is None else shift
    center = jax.lax.stop_gradient(mean_of_group(_middle_mean(x) + shift) - shift)
    change = shift - jax.lax.stop_gradient(shift)  # has the value 0 and the derivative of `shift`
    # Var x = E (x - c)^2 - (E (x - c))^2 for every constant c; this is precise if c is close to the mean.
    x = x.astype(jnp.float32)
    centered = x - center[to_pixels]
    first, second = centered.mean(pixel_axes), jnp.square(centered).mean(pixel_axes)
    mean = mean_of_group(first + change)
    variance = mean_of_group(second + change * (2 * first + change)) - jnp.square(mean)
    scale = scale * jax.lax.rsqrt(variance + epsilon)
    bias = bias + (change - center - mean) * scale
    if scale_shift is not None:
        scale, bias = scale * (1 + scale_shift[0]), bias * (1 + scale_shift[0]) + scale_shift[1]
    return (x * scale[to_pixels] + bias[to_pixels]).astype(dtype)


def _middle_mean(x) -> jax.Array:
    """Returns the mean of about sqrt(N) positions in the middle of x, which has N positions, as float32 [B, C]."""
    if x.ndim > 2:
        size, positions = x.shape[1], math.prod(x.shape[1:-1])
        rows = max(1, math.isqrt(positions) * size // positions)
        x = x[:, (size - rows) // 2 : (size - rows) // 2 + rows]
    return x.astype(jnp.float32).mean(tuple(range(1, x.ndim - 1)))


class Dropout(nn.Module):
    """Dropout that draws 16 random bits per element instead of 32, because drawing bits is most of the cost.

    The rate is rounded to a multiple of 2^-16, and the scale follows the rounded rate.
    """

    rate: float

    @nn.compact
    def __call__(self, x, deterministic: bool, rng: jax.Array | None = None) -> jax.Array:
        """x: [..., C]; the result has the same shape and dtype. rng: by default `make_rng("dropout")`, as in `nn.Dropout`.

        Raises: ValueError for a rate outside [0, 1).
        """
        if not 0 <= self.rate < 1:
            raise ValueError(f"dropout must lie in [0, 1), got {self.rate}")
        if deterministic or not self.rate:
            return x
        channels = x.shape[-1]
        rng = self.make_rng("dropout") if rng is None else rng
        half = -(-channels // 2)
        # Bits are drawn for whole rows, to fill a TPU's vectors of 128 numbers; one pixel's bits may fill only half a vector.
        shape = (*x.shape[:-2], x.shape[-2] * half) if x.ndim > 3 else (*x.shape[:-1], half)
        pairs = jax.random.bits(rng, shape, jnp.uint32)
        bits = jax.lax.bitcast_convert_type(pairs, jnp.uint16).reshape(*x.shape[:-1], 2 * half)[..., :channels]
        num_dropped = max(1, min(round(self.rate * 2**16), 2**16 - 1))  # out of 2^16 values
        scaled = x.astype(jnp.float32) * (2**16 / (2**16 - num_dropped))
        return jnp.where(bits >= num_dropped, scaled, 0).astype(x.dtype)


def convolve(x, kernel, strides, padding, *, precision=None, **options) -> jax.Array:
    """Computes `jax.lax.conv_general_dilated`; on CPUs, in a form with faster gradients.

    XLA's gradient of a convolution with three axes is slow on CPUs, so volumes [B, D, H, W, C] are convolved one slice of the
    kernel at a time: a train step of configs/volume.py takes 1.09 s without slices and 0.55 s with slices.
    """
    dilations = (options.get(name) or (1,) for name in ("lhs_dilation", "rhs_dilation"))
    is_common = options.get("feature_group_count", 1) == 1 and all(size == 1 for each in dilations for size in each)
    if platform() != "cpu" or not is_common:
        return jax.lax.conv_general_dilated(x, kernel, strides, padding, precision=precision, **options)
    if isinstance(padding, str):
        padding = jax.lax.padtype_to_pads(x.shape[1:-1], kernel.shape[:-2], strides, padding)
    strides, padding = tuple(strides), tuple(map(tuple, padding))
    if x.ndim != 5 or any(stride != 1 for stride in strides):
        return _convolve(x, kernel, strides, padding, precision)
    x = jnp.pad(x, ((0, 0), padding[0], (0, 0), (0, 0), (0, 0)))
    batch, depth = len(x), x.shape[1] - len(kernel) + 1

    def convolve_slice(i):
        images = x[:, i : i + depth].reshape(batch * depth, *x.shape[2:])
        return _convolve(images, kernel[i], (1, 1), padding[1:], precision)

    y = functools.reduce(jnp.add, map(convolve_slice, range(len(kernel))))
    return y.reshape(batch, depth, *y.shape[1:])


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3, 4))
def _convolve(x, kernel, strides, padding, precision):
    """A convolution for CPUs; its gradient for x is a convolution with the same order of kernel axes, [*spatial, in, out].

    In loops, such as samplers, XLA is 20 times slower for kernels [*spatial, out, in] than for [*spatial, in, out]. So in
    loops on CPUs, gradients are fast, and forward derivatives, which need a kernel [*spatial, out, in], are slow.
    """
    return _convolve_with_axes("IO", x, kernel, strides, padding, precision)


def _convolve_with_axes(kernel_axes, x, kernel, strides, padding, precision):
    spatial = "DHW"[5 - x.ndim :]
    numbers = (f"N{spatial}C", f"{spatial}{kernel_axes}", f"N{spatial}C")
    return jax.lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=numbers, precision=precision)


@functools.partial(_convolve.defjvp, symbolic_zeros=True)
def _convolve_jvp(strides, padding, precision, primals, tangents):
    """Uses a kernel [*spatial, out, in] for dx, because JAX exchanges its last two axes to transpose this to a gradient."""
    (x, kernel), (dx, dkernel), options = primals, tangents, (strides, padding, precision)
    y = _convolve(x, kernel, *options)
    terms = []
    if not isinstance(dx, SymbolicZero):
        terms.append(_convolve_with_axes("OI", dx, jnp.swapaxes(kernel, -1, -2), *options))
    if not isinstance(dkernel, SymbolicZero):
        terms.append(_convolve_with_axes("IO", x, dkernel, *options))
    return y, functools.reduce(jnp.add, terms)


def convolve_periodic(x, kernel, strides, padding, **options) -> jax.Array:
    """Computes `convolve` for an array that repeats beyond its ends."""
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)), mode="wrap")
    return convolve(x, kernel, strides, ((0, 0),) * len(padding), **options)


def convolve_upsampled(convolve: Callable, x, kernel, strides, _, **options) -> jax.Array:
    """Computes convolve(upsample_2x(x), kernel, ...), [B, *2 spatial, K]; `upsample_2x` repeats positions along every axis.

    convolve: `convolve` or `convolve_periodic`. kernel: [3, ..., 3, C, K]; strides: 1. In an image, the nine pixels under the
    kernel are copies of only four pixels, two in each direction. The kernel's entries for copies of one pixel are summed, so
    that 4 products replace 9 (2 replace 3 in a series, 8 replace 27 in a volume). The sums are computed in the kernel's
    dtype, float32, and then rounded to x's dtype.

    On TPUs with zero padding, one convolution computes this output: zeros are inserted between the positions of x, and the
    kernel has 4 entries along each axis. On CPUs, the gradient of such a convolution takes 25 times as long.
    """
    batch, *spatial, _ = x.shape
    if platform() == "tpu" and convolve is not convolve_periodic:
        for axis in range(len(spatial)):
            before, after = ([(0, 0)] * axis + [each] for each in ((1, 0), (0, 1)))
            rest = [(0, 0)] * (kernel.ndim - axis - 1)
            kernel = jnp.pad(kernel, before + rest) + jnp.pad(kernel, after + rest)
        options["lhs_dilation"] = (2,) * len(spatial)
        return convolve(x, kernel.astype(x.dtype), strides, ((2, 2),) * len(spatial), **options)

    def sum_taps(kernel, axis):
        """Returns (kernel for the first copy of a position, kernel for the second), each with two entries along the axis."""
        first, middle, last = jnp.split(kernel, 3, axis)
        return jnp.concatenate([first, middle + last], axis), jnp.concatenate([first + middle, last], axis)

    def convolve_copies(kernel, padding) -> list[jax.Array]:
        """Returns an output [B, *spatial, K] for each copy of a position; copies along the last axis are adjacent."""
        axis = len(padding)
        if axis == len(spatial):
            return [convolve(x, kernel.astype(x.dtype), strides, padding, **options)]
        taps = enumerate(sum_taps(kernel, axis))
        return [y for i, part in taps for y in convolve_copies(part, (*padding, (1 - i, i)))]

    copies = convolve_copies(kernel, ())
    for axis in reversed(range(2, len(spatial) + 2)):  # finally [B, H, 2, W, 2, K] for an image
        copies = [jnp.stack(copies[i : i + 2], axis=axis) for i in range(0, len(copies), 2)]
    return copies[0].reshape(batch, *(2 * size for size in spatial), -1)


def _promote_except_kernel(x, kernel, bias, dtype):
    """Casts x and the bias; `convolve_upsampled` sums the kernel's taps first, and then casts the sums itself."""
    return x.astype(dtype), kernel, None if bias is None else bias.astype(dtype)


@nn.compact
def _split_bias(self, x) -> tuple[jax.Array, jax.Array]:
    """Returns (the result without the bias, the bias float32 [features]), for a layer with use_bias=False."""
    return self(x), self.param("bias", self.bias_init, (self.features,), jnp.float32)


class Conv(nn.Conv):
    """A convolution that can return its bias separately."""

    split_bias = _split_bias


class Dense(nn.Dense):
    """A dense layer that can return its bias separately."""

    split_bias = _split_bias


@dataclasses.dataclass(frozen=True)
class LayerFactory:
    """Makes a network's layers with their common options.

    spatial_dims: the number of axes that convolutions cover; 0 for vectors, whose layers are all dense.
    periodic: whether convolutions pad an array periodically, instead of with zeros.
    precision: the precision of float32 products, "high" or "highest"; "default" follows `jax.default_matmul_precision`.
    Raises: ValueError for an unknown initializer or precision.
    """

    num_groups: int
    norm_epsilon: float
    initializer: str
    dtype: Any
    spatial_dims: int = 2
    periodic: bool = False
    precision: str = "default"

    def __post_init__(self):
        if self.initializer not in ("ho", "openai"):
            raise ValueError(f"initializer={self.initializer!r} must be 'ho' or 'openai'")
        if self.precision not in ("default", "high", "highest"):
            raise ValueError(f"precision={self.precision!r} must be 'default', 'high' or 'highest'")

    def _options(self, name: str, last: bool, use_bias: bool) -> dict[str, Any]:
        """Returns the options for a convolution or a dense layer."""
        precision = None if self.precision == "default" else self.precision
        options = {"dtype": self.dtype, "kernel_init": self._kernel_init(last), "precision": precision}
        return options | {"use_bias": use_bias, "name": name}

    def _kernel_init(self, last: bool):
        """Returns a kernel initializer: 0 (OpenAI) or close to 0 (Ho et al.) for the last layer in a branch or network."""
        if self.initializer == "openai":
            return nn.initializers.zeros if last else nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
        return nn.initializers.variance_scaling(1e-10 if last else 1.0, "fan_avg", "uniform")

    def conv(
        self,
        features: int,
        name: str,
        *,
        last: bool = False,
        stride: int = 1,
        padding=(1, 1),
        upsample: bool = False,
        use_bias: bool = True,
    ) -> Conv:
        """Makes a convolution with kernel size 3 along every axis.

        last: whether the layer ends a residual branch or the network. padding: (before, after) along every axis. upsample:
        whether to convolve `upsample_2x` of the input, with fewer multiplications.
        """
        options = self._options(name, last, use_bias)
        function: Callable = convolve_periodic if self.periodic else convolve
        if upsample:
            function, options["promote_dtype"] = functools.partial(convolve_upsampled, function), _promote_except_kernel
        padding, kernel_size = (tuple(padding),) * self.spatial_dims, (3,) * self.spatial_dims
        return Conv(features, kernel_size, stride, padding=padding, conv_general_dilated=function, **options)

    def dense(self, features: int, name: str, *, last: bool = False, use_bias: bool = True) -> Dense:
        """Makes a dense layer over the last axis. last: as in `conv`."""
        return Dense(features, **self._options(name, last, use_bias))

    def attend(self, q, k, v) -> jax.Array:
        """Computes `jax.nn.dot_product_attention` with the factory's precision, for which JAX's function has no argument."""
        if self.precision == "default":
            return jax.nn.dot_product_attention(q, k, v)
        with jax.default_matmul_precision(self.precision):
            return jax.nn.dot_product_attention(q, k, v)

    def norm(self, name: str) -> GroupNorm:
        """Makes a GroupNorm."""
        return GroupNorm(self.num_groups, self.norm_epsilon, self.dtype, name=name)

    def embed(self, num_classes: int, features: int, name: str) -> nn.Embed:
        """Makes a class embedding."""
        options: dict[str, Any] = {"dtype": self.dtype, "name": name}
        if self.initializer == "openai":
            options["embedding_init"] = nn.initializers.normal(1.0)
        return nn.Embed(num_classes, features, **options)

    def embed_time(self, waves, features: int) -> jax.Array:
        """Maps the sines and cosines of the time [B, C] to [B, features] by two dense layers."""
        embedding = nn.silu(self.dense(features, "time_0")(waves.astype(self.dtype)))
        return self.dense(features, "time_1")(embedding)


# ---- Blocks


def downsample_2x(x) -> jax.Array:
    """Averages blocks of 2x2 pixels, [B, H, W, C] to [B, H / 2, W / 2, C]; likewise for any number of axes."""
    window = (2,) * (x.ndim - 2)
    return nn.avg_pool(x, window, window)


def upsample_2x(x) -> jax.Array:
    """Repeats each pixel four times, [B, H, W, C] to [B, 2 H, 2 W, C]; likewise for any number of axes."""
    for axis in range(1, x.ndim - 1):
        x = x.repeat(2, axis=axis)
    return x


def average_2x(x) -> jax.Array:
    """Averages 4x4 pixels with weights [1, 3, 3, 1] / 8 along each axis, [B, H + 2, W + 2, C] to [B, H / 2, W / 2, C]."""
    for axis in range(1, x.ndim - 1):
        a, b, c, d = (jax.lax.slice_in_dim(x, i, x.shape[axis] - 3 + i, 2, axis) for i in range(4))
        x = (a + 3 * (b + c) + d) / 8
    return x


def downsample_smooth(x, mode: str = "constant") -> jax.Array:
    """Halves the sizes like `downsample_2x`, but with the filter [1, 3, 3, 1] / 8 along each axis. mode: `jnp.pad`'s."""
    return average_2x(jnp.pad(x, ((0, 0), *((1, 1),) * (x.ndim - 2), (0, 0)), mode))


def upsample_smooth(x, mode: str = "constant") -> jax.Array:
    """Doubles the sizes like `upsample_2x`, but with the filter [1, 3, 3, 1] / 4 along each axis. mode: `jnp.pad`'s."""
    for axis in range(1, x.ndim - 1):
        size = x.shape[axis]
        padded = jnp.pad(x, [(1, 1) if i == axis else (0, 0) for i in range(x.ndim)], mode)
        before, after = (jax.lax.slice_in_dim(padded, start, start + size, 1, axis) for start in (0, 2))
        x = jnp.stack([(before + 3 * x) / 4, (3 * x + after) / 4], axis + 1)
        x = x.reshape(*x.shape[:axis], 2 * size, *x.shape[axis + 2 :])
    return x


class ResBlock(nn.Module):
    """x + conv(dropout(silu(norm(conv(silu(norm(x))) + time projection)))), with a dense projection of x if widths differ.

    For vectors (`layers.spatial_dims` = 0), dense layers replace the convolutions.

    Biases are added where no extra pass over an image is needed: the first bias in the second norm, the other biases as one
    vector. With `scale_shift_norm` the time projection is a scale and a shift after the second norm:
    norm(h) (1 + scale) + shift.
    resample: a function such as `downsample_2x`, applied in both branches; the residual branch applies it after the first
    SiLU (ADM appendix A, as in BigGAN). keep: whether to name the first convolution's result `KEPT_INSIDE`. rescale: whether
    to use DDPM++'s form: the sum is divided by sqrt(2), and blocks that resample always have the dense projection.
    """

    features: int
    dropout: float
    scale_shift_norm: bool
    layers: LayerFactory
    resample: Callable | None = None
    keep: bool = False
    rescale: bool = False

    @nn.compact
    def __call__(self, x, embedding, train: bool) -> jax.Array:
        """x: [B, *spatial, C]; embedding: [B, E], from the time; train: whether dropout is active."""
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
        if x.shape[-1] != self.features or (self.rescale and self.resample is not None):
            x, skip_bias = self.layers.dense(self.features, "skip", use_bias=False).split_bias(x)
            bias = bias + skip_bias  # not in place: a parameter may be a NumPy array
        h = x + (h + bias.astype(h.dtype))
        return h * math.sqrt(0.5) if self.rescale else h

    def _mix(self, number: str, *, last: bool = False, upsample: bool = False) -> Conv | Dense:
        """Makes the first or second convolution (a dense layer for vectors), with a separate bias."""
        options: dict[str, Any] = {"last": last, "use_bias": False}
        if self.layers.spatial_dims:
            return self.layers.conv(self.features, f"conv{number}", upsample=upsample, **options)
        return self.layers.dense(self.features, f"dense{number}", **options)


def split_heads(channels: int, num_heads: int, head_channels: int | None) -> int:
    """Returns the number of heads in a layer: channels / head_channels, or num_heads if that is None. Raises: ValueError."""
    name, value = ("num_heads", num_heads) if head_channels is None else ("head_channels", head_channels)
    if value < 1 or channels % value:
        raise ValueError(f"{name}={value} does not divide an attention layer of {channels} channels")
    return num_heads if head_channels is None else channels // head_channels


class Attention(nn.Module):
    """x + proj(softmax(q k / sqrt(C / heads)) v) over all positions, with a float32 softmax.

    keep: whether to name q, k, v and the weighted sum of v `KEPT_INSIDE`. rescale: whether to divide the result by sqrt(2).
    """

    num_heads: int
    head_channels: int | None
    layers: LayerFactory
    keep: bool = False
    rescale: bool = False

    @nn.compact
    def __call__(self, x) -> jax.Array:
        """x: [B, *spatial, C]; the result has the same shape."""
        b, *spatial, c = x.shape
        positions = math.prod(spatial)
        heads = split_heads(c, self.num_heads, self.head_channels)
        h = self.layers.norm("norm")(x).reshape(b, positions, c)
        q, k, v = (self.layers.dense(c, name)(h).reshape(b, positions, heads, c // heads) for name in ("q", "k", "v"))
        if self.keep:
            q, k, v = (checkpoint_name(part, KEPT_INSIDE) for part in (q, k, v))
        h = self.layers.attend(q, k, v).reshape(x.shape)
        h = checkpoint_name(h, KEPT_INSIDE) if self.keep else h
        h = x + self.layers.dense(c, "proj", last=True)(h)
        return h * math.sqrt(0.5) if self.rescale else h
