"""Convolutions of stride 1: of doubled images with fewer products, and as matrix products for CPUs in bfloat16.

XLA's CPU backend computes a bfloat16 convolution in float32, but hands a bfloat16 matrix product with float32 sums to the
instructions made for it (AMX, AVX512-BF16). In `products` the columns that a kernel sees are laid beside one another,
one product gives what each row of the kernel adds, and the rows are added. Operands are rounded to bfloat16 and sums are kept
in float32, as TPUs do by default.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

ONE = ((1, 1), (1, 1))  # padding: zeros before and after, in height and width


def xla(x, kernel, padding=ONE) -> jax.Array:
    """The convolution as XLA knows it. x: [B, H, W, C]; kernel: [h, w, C, K]; returns [B, H', W', K] in x's dtype."""
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))


def doubled(convolve: Callable, x, kernel) -> jax.Array:
    """convolve(double(x), kernel), where `double` repeats each pixel in height and width; [B, 2 H, 2 W, K].

    convolve: `xla` or `products`. kernel: [3, 3, C, K]. The nine pixels that a copy of a pixel sees are copies of four, two
    in each direction: with the kernel's rows and columns added accordingly, 4 products stand for 9. Sums are of the
    kernel as it comes, float32 parameters, and rounded to x's dtype afterward.
    """

    def halves(kernel, axis):
        """Of the first and of the second copy."""
        first, middle, last = jnp.split(kernel, 3, axis)
        return jnp.concatenate([first, middle + last], axis), jnp.concatenate([first + middle, last], axis)

    copies = [
        [convolve(x, part.astype(x.dtype), ((1 - i, i), (1 - j, j))) for j, part in enumerate(halves(rows, 1))]
        for i, rows in enumerate(halves(kernel, 0))
    ]
    batch, height, width, _ = x.shape
    y = jnp.stack([jnp.stack(row, axis=3) for row in copies], axis=2)  # [B, H, 2, W, 2, K]
    return y.reshape(batch, 2 * height, 2 * width, -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def products(x, kernel, padding=ONE) -> jax.Array:
    """The convolution, float32, as matrix products. x: [B, H, W, C]; kernel: [h, w, C, K]; returns [B, H', W', K].

    padding: in each direction less than the kernel's size.
    Gradients come in the dtypes of x and of kernel. There is no forward-mode derivative.
    """
    return _products(x, kernel.astype(x.dtype), padding)


def _forward(x, kernel, padding):
    return products(x, kernel, padding), (x, kernel)


def _backward(padding, residuals, g):
    x, kernel = residuals
    g, flipped = g.astype(x.dtype), kernel[::-1, ::-1].astype(x.dtype).swapaxes(2, 3)
    around = tuple(
        (size - 1 - before, size - 1 - after) for size, (before, after) in zip(kernel.shape[:2], padding, strict=True)
    )
    return _products(g, flipped, around).astype(x.dtype), _kernel_gradient(x, g, padding).astype(kernel.dtype)


products.defvjp(_forward, _backward)


def dense(x, kernel, dimensions, precision=None) -> jax.Array:
    """`lax.dot_general` with a float32 result: XLA's CPU backend is slow where the result is to be bfloat16."""
    return jax.lax.dot_general(x, kernel, dimensions, precision=precision, preferred_element_type=jnp.float32)


# What is laid out for a product is laid out once, as a whole; left to itself, XLA does it inside of every product.
_laid_out = jax.lax.optimization_barrier


def _dot(a, b):
    return jax.lax.dot(a, b, preferred_element_type=jnp.float32)


def _products(x, kernel, padding):
    rows, columns, _, features = kernel.shape
    x = jnp.pad(x, ((0, 0), (0, 0), padding[1], (0, 0)))
    width = x.shape[2] - columns + 1
    beside = _laid_out(jnp.concatenate([x[:, :, j : j + width] for j in range(columns)], axis=-1))  # [B, H, W', (j, C)]
    kernel = _laid_out(kernel.transpose(1, 2, 0, 3).reshape(-1, rows * features))  # [(j, C), (i, K)]
    y = _dot(beside.reshape(-1, beside.shape[-1]), kernel).reshape(*beside.shape[:3], rows, features)
    y = jnp.pad(y, ((0, 0), padding[0], (0, 0), (0, 0), (0, 0)))
    height = y.shape[1] - rows + 1
    return sum(y[:, i : i + height, :, i] for i in range(rows))


def _kernel_gradient(x, g, padding):
    """sum over b, h, w of x[b, h + i, w + j, c] g[b, h, w, k], x being padded; float32 [rows, columns, C, K]."""
    _, height, width, features = g.shape
    # [C, H, B, W]: contracted axes last, and rows before images, so that a row's shift is a run of memory.
    x = _laid_out(_laid_out(x.swapaxes(0, 1)).transpose(3, 0, 1, 2))
    x = jnp.pad(x, ((0, 0), padding[0], (0, 0), padding[1]))
    channels, rows, columns = x.shape[0], x.shape[1] - height + 1, x.shape[3] - width + 1
    beside = _laid_out(jnp.stack([x[..., j : j + width] for j in range(columns)]))  # [j, C, H, B, W']
    g = _laid_out(g.swapaxes(0, 1).reshape(-1, features))
    by_row = [_dot(beside[:, :, i : i + height].reshape(columns * channels, -1), g) for i in range(rows)]
    return jnp.stack(by_row).reshape(rows, columns, channels, features)
