"""Arrays of one float dtype, and a schedule's tables at an index."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Shaped

from diffusion_jax.schedules import Schedule, cast_table
from diffusion_jax.types import Index

__all__ = ["as_batch", "as_float", "check_same_shape", "lookup", "network_time", "promote"]


def as_float(name: str, x: Shaped[ArrayLike, "*shape"]) -> Float[Array, "*shape"]:
    """x as a jax array of float32, or of float64 if it is float64 and x64 is on: lower precisions are promoted.

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


def as_batch(name: str, x: Shaped[ArrayLike, "..."]) -> Float[Array, "B *shape"]:
    """x as `as_float`. Raises: ValueError as `as_float`, and for a number or one vector."""
    x = as_float(name, x)
    if x.ndim < 2:
        raise ValueError(
            f"{name} must have a batch axis, vectors [B, C] or arrays [B, ..., C]; got shape {x.shape}; give one example as "
            f"{name}[None]"
        )
    return x


def promote(**arrays: Shaped[ArrayLike, "..."]) -> tuple[Float[Array, "..."], ...]:
    """The arrays in their common dtype, float32 at least. Raises: ValueError as `as_float`."""
    floats = [as_float(name, x) for name, x in arrays.items()]
    dtype = jnp.result_type(*floats)
    return tuple(x.astype(dtype) for x in floats)


def check_same_shape(
    name: str, value: Shaped[ArrayLike, "..."], other_name: str, other: Shaped[ArrayLike, "..."]
) -> None:
    """Raises ValueError if the two arrays differ in shape; the names are those of the error message."""
    if jnp.shape(value) != jnp.shape(other):
        raise ValueError(
            f"{name} has shape {jnp.shape(value)} but {other_name} has {jnp.shape(other)}; they must be equal"
        )


def lookup(
    table: Float[ArrayLike, "T"], t: Shaped[ArrayLike, "..."], like: Shaped[ArrayLike, "..."]
) -> Float[Array, "..."]:
    """A schedule's table at index t, shaped to multiply `like`: [B, 1, ..., 1] for t [B] and like [B, ...].

    The dtype is that of a float `like`, float32 at least; with an int `like` it is float32, or float64 under x64. NaN where t
    lies outside the table. Raises: ValueError for a t that is not int, or whose shape does not begin that of `like`.
    """
    t = jnp.asarray(t)
    shape, dtype = jnp.shape(like), jnp.result_type(like)
    if not jnp.issubdtype(t.dtype, jnp.integer):
        raise ValueError(f"t must be int, an index of the schedule; got {t.dtype}")
    if t.shape != shape[: t.ndim]:
        raise ValueError(
            f"t has shape {t.shape} but x has {shape}; t must be one index, or one for each row of x: {shape[:1]}"
        )
    dtype = jnp.promote_types(dtype, jnp.float32) if jnp.issubdtype(dtype, jnp.floating) else jnp.result_type(float)
    values = (
        jnp.asarray(cast_table(table, dtype)).at[t].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
    )
    return values.reshape(t.shape + (1,) * (len(shape) - t.ndim))


def network_time(
    schedule: Schedule, t: Index, x_t: Float[ArrayLike, "B *shape"]
) -> Float[Array, "B"] | Float[Array, ""]:
    """The network time of index t, in the shape of t and the dtype of x_t, float32 at least: the input of a `denoise_fn`."""
    return lookup(schedule.timesteps, t, as_float("x_t", x_t)).reshape(jnp.shape(t))
