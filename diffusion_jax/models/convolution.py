"""Convolutions of arrays with 1, 2 or 3 spatial axes: of upsampled arrays, and as matrix products for CPUs in bfloat16.

Arrays are [B, *spatial, C] and kernels [*kernel size, C, K]; a padding has (before, after) for each spatial axis.

XLA's CPU backend computes a bfloat16 convolution in float32, but computes a bfloat16 matrix product with float32 sums by
the instructions made for it (AMX, AVX512-BF16). `convolve_matmul` concatenates the shifted columns that a kernel row covers,
computes the contribution of every kernel row in one product, and adds the rows. Operands are rounded to bfloat16 and sums are
float32, as TPUs do by default.

Measured with the CIFAR-10 network of 35.7M parameters in bfloat16 (batch 8, two cores of an AMD EPYC with AVX512-BF16, paired
calls, medians): XLA's convolutions take 1.40 times the CPU time of the matrix products in a call.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

__all__ = [
    "PADDING_1",
    "convolve_matmul",
    "convolve_matmul_nd",
    "convolve_periodic",
    "convolve_upsampled",
    "convolve_xla",
    "dot_general_float32",
]

PADDING_1 = ((1, 1), (1, 1))  # zeros before and after, in height and width


def convolve_xla(x, kernel, padding=PADDING_1, stride: int = 1, precision: str | None = None) -> jax.Array:
    """XLA's convolution. x: [B, *spatial, C]; kernel: [*size, C, K]; returns [B, *spatial', K] in x's dtype."""
    axes = "DHW"[5 - x.ndim :]
    numbers = (f"N{axes}C", f"{axes}IO", f"N{axes}C")
    return jax.lax.conv_general_dilated(
        x, kernel, (stride,) * len(axes), padding, dimension_numbers=numbers, precision=precision
    )


def convolve_periodic(convolve: Callable, x, kernel, padding, **options) -> jax.Array:
    """convolve(x, kernel, ...) of an array that repeats beyond its ends, instead of zeros."""
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)), mode="wrap")
    return convolve(x, kernel, ((0, 0),) * len(padding), **options)


def convolve_upsampled(convolve: Callable, x, kernel) -> jax.Array:
    """convolve(upsample_2x(x), kernel), where `upsample_2x` repeats each position along every axis; [B, *2 spatial, K].

    convolve: a function of (x, kernel, padding) such as `convolve_xla`. kernel: [3, ..., 3, C, K]. In an image the nine
    pixels that a copy of a pixel sees are copies of four, two in each direction: if the kernel's rows and columns are added
    accordingly, 4 products replace 9 (2 replace 3 in a series, 8 replace 27 in a volume). The kernel is summed in its own
    dtype, float32, and then rounded to x's dtype.
    """
    batch, *spatial, _ = x.shape

    def sum_taps(kernel, axis):
        """The two taps of the first copy and of the second."""
        first, middle, last = jnp.split(kernel, 3, axis)
        return jnp.concatenate([first, middle + last], axis), jnp.concatenate([first + middle, last], axis)

    def convolve_copies(kernel, padding) -> list[jax.Array]:
        """The results [B, *spatial, K] for each copy of a position, the copies along the last axis next to each other."""
        axis = len(padding)
        if axis == len(spatial):
            return [convolve(x, kernel.astype(x.dtype), padding)]
        taps = enumerate(sum_taps(kernel, axis))
        return [y for i, part in taps for y in convolve_copies(part, (*padding, (1 - i, i)))]

    copies = convolve_copies(kernel, ())
    for axis in reversed(range(2, len(spatial) + 2)):  # in the end [B, H, 2, W, 2, K] of an image
        copies = [jnp.stack(copies[i : i + 2], axis=axis) for i in range(0, len(copies), 2)]
    return copies[0].reshape(batch, *(2 * size for size in spatial), -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def convolve_matmul(x, kernel, padding=PADDING_1, precision: str | None = None) -> jax.Array:
    """The convolution, float32, as matrix products. x: [B, H, W, C]; kernel: [h, w, C, K]; returns [B, H', W', K].

    padding: in each direction less than the kernel's size. precision: of the products, as `jax.lax.dot` takes it.
    Gradients have the dtypes of x and of kernel. There is no forward-mode derivative.
    """
    return _convolve_matmul(x, kernel.astype(x.dtype), padding, precision)


def _forward(x, kernel, padding, precision):
    return convolve_matmul(x, kernel, padding, precision), (x, kernel)


def _backward(padding, precision, residuals, g):
    x, kernel = residuals
    g, flipped = g.astype(x.dtype), kernel[::-1, ::-1].astype(x.dtype).swapaxes(2, 3)
    transposed_padding = tuple(
        (size - 1 - before, size - 1 - after) for size, (before, after) in zip(kernel.shape[:2], padding, strict=True)
    )
    x_gradient = _convolve_matmul(g, flipped, transposed_padding, precision).astype(x.dtype)
    return x_gradient, _kernel_gradient(x, g, padding, precision).astype(kernel.dtype)


convolve_matmul.defvjp(_forward, _backward)


def convolve_matmul_nd(x, kernel, padding, precision: str | None = None) -> jax.Array:
    """`convolve_matmul` of arrays with 1, 2 or 3 spatial axes: a series is an image of height 1, a volume a stack of images.

    The convolution of a volume is the sum of the products for each slice of its kernel.
    """
    if len(padding) == 2:
        return convolve_matmul(x, kernel, padding, precision)
    if len(padding) == 1:
        return jnp.asarray(convolve_matmul(x[:, None], kernel[None], ((0, 0), *padding), precision))[:, 0]
    x = jnp.pad(x, ((0, 0), padding[0], (0, 0), (0, 0), (0, 0)))
    batch, depth = x.shape[0], x.shape[1] - kernel.shape[0] + 1
    slices = [
        jnp.asarray(
            convolve_matmul(x[:, i : i + depth].reshape(batch * depth, *x.shape[2:]), part, padding[1:], precision)
        )
        for i, part in enumerate(kernel)
    ]
    y = functools.reduce(jnp.add, slices)
    return y.reshape(batch, depth, *y.shape[1:])


def dot_general_float32(x, kernel, dimensions, precision=None) -> jax.Array:
    """`lax.dot_general` with a float32 result, because XLA's CPU backend is slow if the result is bfloat16."""
    return jax.lax.dot_general(x, kernel, dimensions, precision=precision, preferred_element_type=jnp.float32)


# Makes XLA lay out an operand once; without it, XLA does so inside of every product.
_materialize = jax.lax.optimization_barrier


def _dot(a, b, precision) -> jax.Array:
    return jax.lax.dot(a, b, precision=precision, preferred_element_type=jnp.float32)


def _convolve_matmul(x, kernel, padding, precision) -> jax.Array:
    num_rows, num_columns, _, features = kernel.shape
    x = jnp.pad(x, ((0, 0), (0, 0), padding[1], (0, 0)))
    width = x.shape[2] - num_columns + 1
    columns = _materialize(
        jnp.concatenate([x[:, :, j : j + width] for j in range(num_columns)], axis=-1)
    )  # [B, H, W', (j, C)]
    kernel = _materialize(kernel.transpose(1, 2, 0, 3).reshape(-1, num_rows * features))  # [(j, C), (i, K)]
    y = _dot(columns.reshape(-1, columns.shape[-1]), kernel, precision)
    y = y.reshape(*columns.shape[:3], num_rows, features)
    y = jnp.pad(y, ((0, 0), padding[0], (0, 0), (0, 0), (0, 0)))
    height = y.shape[1] - num_rows + 1
    return jnp.asarray(sum(y[:, i : i + height, :, i] for i in range(num_rows)))


def _kernel_gradient(x, g, padding, precision) -> jax.Array:
    """sum over b, h, w of x[b, h + i, w + j, c] g[b, h, w, k], for padded x; float32 [rows, columns, C, K]."""
    _, height, width, features = g.shape
    # [C, H, B, W]: contracted axes last, and rows before images, so that a shift by a row is a contiguous slice.
    x = _materialize(_materialize(x.swapaxes(0, 1)).transpose(3, 0, 1, 2))
    x = jnp.pad(x, ((0, 0), padding[0], (0, 0), padding[1]))
    channels, num_rows, num_columns = x.shape[0], x.shape[1] - height + 1, x.shape[3] - width + 1
    columns = _materialize(jnp.stack([x[..., j : j + width] for j in range(num_columns)]))  # [j, C, H, B, W']
    g = _materialize(g.swapaxes(0, 1).reshape(-1, features))
    by_row = [
        _dot(columns[:, :, i : i + height].reshape(num_columns * channels, -1), g, precision) for i in range(num_rows)
    ]
    return jnp.stack(by_row).reshape(num_rows, num_columns, channels, features)
