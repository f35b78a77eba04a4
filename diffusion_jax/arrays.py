"""Conversions and checks that the functions of the core apply to their array arguments."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Shaped

from diffusion_jax.types import Batch


def as_float(name: str, x: Shaped[ArrayLike, "*shape"]) -> Float[Array, "*shape"]:
    """Converts x to a float32 jax array, or to float64 if x is float64 and x64 is on; lower precisions are promoted.

    name: the name of x in the error message. Raises: ValueError for a dtype that is not float, such as uint8 images, and for
    a tuple, a dict or None, which a network may return by mistake.
    """
    if x is None or isinstance(x, tuple | dict | str):  # jnp.asarray stacks a tuple
        raise ValueError(f"{name} must be one float array; got {type(x).__name__}")
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        advice = "; images are float in [-1, 1]: convert with x / 127.5 - 1" if x.dtype == jnp.uint8 else ""
        raise ValueError(f"{name} must be float; got {x.dtype}{advice}")
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def as_array(name: str, x: Shaped[ArrayLike, "*shape"]) -> Shaped[Array, "*shape"]:
    """Returns `jnp.asarray(x)`. Raises: ValueError for NumPy or Python integers beyond int32, which JAX may wrap."""
    if not any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(x)):
        values = np.asarray(x)
        if values.dtype.kind in "iuO" and (beyond := values[(values < -(2**31)) | (values >= 2**31)]).size:
            raise ValueError(f"{name} must fit into int32, -2**31 ... 2**31 - 1, got {beyond[0]}")
    return jnp.asarray(x)


def as_batch(name: str, x: Shaped[ArrayLike, "..."]) -> Batch:
    """Returns `as_float(name, x)`. Raises: ValueError as `as_float`, and for an x without a batch axis."""
    x = as_float(name, x)
    if x.ndim < 2:
        raise ValueError(
            f"{name} must have a batch axis, vectors [B, C] or arrays [B, ..., C]; got shape {x.shape}; give one example as "
            f"{name}[None]"
        )
    return x


def promote(**arrays: Shaped[ArrayLike, "..."]) -> tuple[Float[Array, "..."], ...]:
    """Converts the arrays to their common dtype, at least float32. Raises: ValueError as `as_float`."""
    floats = [as_float(name, x) for name, x in arrays.items()]
    dtype = jnp.result_type(*floats)
    return tuple(x.astype(dtype) for x in floats)


def check_same_shape(
    name: str, value: Shaped[ArrayLike, "..."], other_name: str, other: Shaped[ArrayLike, "..."]
) -> None:
    """Raises ValueError, whose message has both names, if the two arrays differ in shape."""
    if jnp.shape(value) != jnp.shape(other):
        raise ValueError(
            f"{name} has shape {jnp.shape(value)} but {other_name} has {jnp.shape(other)}; they must be equal"
        )


def broadcasts_to(shape: tuple[int, ...], target: tuple[int, ...]) -> bool:
    """Returns whether an array with `shape` broadcasts to `target` without enlarging `target`."""
    sizes = zip(shape[::-1], target[::-1], strict=False)
    return len(shape) <= len(target) and all(size in (1, other) for size, other in sizes)
