"""3x3 convolutions as matrix products: what is fast on CPUs that multiply bfloat16 matrices (AMX, AVX512-BF16).

XLA's CPU backend computes a bfloat16 convolution in float32, but hands a bfloat16 matrix product with float32 sums to such
instructions. Here the three columns that a kernel sees are laid beside one another, one product gives what each row of the
kernel adds, and the rows are added. Operands are rounded to bfloat16 and sums are kept in float32, as TPUs do by default.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


@jax.custom_vjp
def conv3x3(x, kernel) -> jax.Array:
    """Stride 1, zero padding 1. x: [B, H, W, C]; kernel: [3, 3, C, K]; returns float32 [B, H, W, K].

    Gradients come in the dtypes of x and of kernel. There is no forward-mode derivative.
    """
    return _products(x, kernel.astype(x.dtype))


def _forward(x, kernel):
    return conv3x3(x, kernel), (x, kernel)


def _backward(residuals, g):
    x, kernel = residuals
    g, flipped = g.astype(x.dtype), kernel[::-1, ::-1].astype(x.dtype).swapaxes(2, 3)
    return _products(g, flipped).astype(x.dtype), _kernel_gradient(x, g).astype(kernel.dtype)


conv3x3.defvjp(_forward, _backward)


def dense(x, kernel, dimensions, precision=None) -> jax.Array:
    """`lax.dot_general` with a float32 result: XLA's CPU backend is slow where the result is to be bfloat16."""
    return jax.lax.dot_general(x, kernel, dimensions, precision=precision, preferred_element_type=jnp.float32)


# What is laid out for a product is laid out once, as a whole; left to itself, XLA does it inside of every product.
_laid_out = jax.lax.optimization_barrier


def _dot(a, b):
    return jax.lax.dot(a, b, preferred_element_type=jnp.float32)


def _products(x, kernel):
    width, features = x.shape[2], kernel.shape[-1]
    x = jnp.pad(x, ((0, 0), (0, 0), (1, 1), (0, 0)))
    beside = _laid_out(jnp.concatenate([x[:, :, j : j + width] for j in range(3)], axis=-1))  # [B, H, W, (j, C)]
    kernel = _laid_out(kernel.transpose(1, 2, 0, 3).reshape(-1, 3 * features))  # [(j, C), (i, K)]
    y = _dot(beside.reshape(-1, beside.shape[-1]), kernel).reshape(*beside.shape[:3], 3, features)
    y = jnp.pad(y, ((0, 0), (1, 1), (0, 0), (0, 0), (0, 0)))
    return y[:, :-2, :, 0] + y[:, 1:-1, :, 1] + y[:, 2:, :, 2]


def _kernel_gradient(x, g):
    """sum over b, h, w of x[b, h + i - 1, w + j - 1, c] g[b, h, w, k], float32 [3, 3, C, K]."""
    height, width, channels = x.shape[1:]
    # [C, H, B, W]: contracted axes last, and rows before images, so that a row's shift is a run of memory.
    x = _laid_out(_laid_out(x.swapaxes(0, 1)).transpose(3, 0, 1, 2))
    x = jnp.pad(x, ((0, 0), (1, 1), (0, 0), (1, 1)))
    beside = _laid_out(jnp.stack([x[..., j : j + width] for j in range(3)]))  # [j, C, H + 2, B, W]
    g = _laid_out(g.swapaxes(0, 1).reshape(-1, g.shape[-1]))
    rows = [_dot(beside[:, :, i : i + height].reshape(3 * channels, -1), g) for i in range(3)]
    return jnp.stack(rows).reshape(3, 3, channels, -1)
