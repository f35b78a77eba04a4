"""Checks and conversions of the batches that a train step gets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from diffusion_jax import data, models
from diffusion_jax.images import to_model_range

__all__ = ["Examples", "check_settings", "condition_shape", "random_flip", "read_batch"]


_KINDS = {"bool": jnp.bool_, "uint8": jnp.uint8, "int": jnp.integer, "float": jnp.floating}
_FORMATS = {
    "image": 'data.image_size and data.channels (float data, standardized to about [-1, 1], are given as "x")',
    "x": 'data.image_size and data.channels (gray levels 0 to 255 are given as "image")',
}


class Examples(NamedTuple):
    """x_0: float32 [B, *spatial, C]. y: int [B], and condition: float32 [B, D] or [B, *spatial, K]; None if not needed.

    Rows of the condition that are NaN are null conditions.
    """

    x_0: jax.Array
    y: jax.Array | None = None
    condition: jax.Array | None = None


def condition_shape(config: Mapping[str, Any]) -> tuple[int, ...] | None:
    """Returns the shape of a condition: (D,) for a vector, (*spatial, K) for an array; None without conditions."""
    return models.condition_shape(config["model"], data.example_shape(config["data"])[:-1])


def read_batch(
    batch: Mapping[str, Any],
    shape: tuple[int, ...],
    takes_labels: bool,
    num_microbatches: int = 1,
    condition_shape: tuple[int, ...] | None = None,
) -> Examples:
    """Checks a batch and converts it to `Examples`. Only shapes and dtypes are checked, so this works under jit.

    batch: "image", uint8 [B, *spatial, C], is scaled to [-1, 1]; or "x", float [B, *spatial, C], is not scaled. "label", int
    [B], is read only if `takes_labels`; "condition", float [B, *condition_shape], and the optional "condition_missing",
    bool [B], True for examples without a condition, only if `condition_shape` is not None. For NaN in the condition of any
    other example, x_0 and thus the loss become NaN, because traced values cannot be refused.
    shape: (*spatial, C). num_microbatches: must divide B.
    Raises: ValueError for any other batch.
    """
    if not isinstance(batch, Mapping):
        raise ValueError(f'a batch must be a dictionary with "image" or "x"; got {type(batch).__name__}')
    given = [name for name in ("image", "x") if name in batch]
    if len(given) != 1:
        names = ", ".join(map(repr, batch)) or "nothing"
        raise ValueError(f'a batch must have either "image" (uint8) or "x" (float, standardized); got {names}')
    (name,) = given
    batch_size = (*jnp.shape(batch[name]), 0)[0]
    values = _read(batch, name, "uint8" if name == "image" else "float", (batch_size, *shape), _FORMATS[name])
    if batch_size < 1:
        raise ValueError("a batch must hold at least one example; got none")
    if batch_size % num_microbatches:
        raise ValueError(
            f"a batch of {batch_size} must be a multiple of training.accumulation_steps={num_microbatches}"
        )
    x_0 = to_model_range(values) if name == "image" else values.astype(jnp.float32)
    y = condition = None
    if takes_labels:
        y = _read(batch, "label", "int", (batch_size,), "model.num_classes or diffusion.loss=classify")
    if condition_shape is not None:
        reason = "model.condition_features or model.condition_channels"
        condition = _read(batch, "condition", "float", (batch_size, *condition_shape), reason).astype(jnp.float32)
        is_nan = jnp.isnan(condition).any(axis=range(1, condition.ndim))
        if "condition_missing" in batch:
            missing = _read(batch, "condition_missing", "bool", (batch_size,), "examples without a condition")
            is_nan, condition = is_nan & ~missing, models.mark_missing(condition, missing)
        x_0 = jnp.where(jnp.expand_dims(is_nan, range(1, x_0.ndim)), jnp.nan, x_0)
    return Examples(x_0, y, condition)


def check_settings(batch: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Raises: ValueError if settings of a complete config contradict the batch, as `read_batch` takes it."""
    levels, loss = config["data"]["levels"], config["diffusion"]["loss"]
    if contradiction := data.find_contradiction(config["data"], "image" if "image" in batch else "x"):
        raise ValueError(contradiction)
    if "x" in batch and levels is not None and loss in ("vlb", "hybrid"):
        raise ValueError(
            f'data.levels={levels}: the loss {loss} on "x" in a batch is a bound for continuous data; use '
            'data.levels=None, or give uint8 images as "image"'
        )
    if "condition_missing" in batch and condition_shape(config) and not config["model"]["condition_dropout"]:
        raise ValueError(
            '"condition_missing" in a batch needs a network that learns to do without a condition: set '
            "model.condition_dropout above 0, or leave it out"
        )


def _read(batch: Mapping[str, Any], name: str, kind: str, shape: tuple[int, ...], reason: str) -> jax.Array:
    """Returns the array `name`, checked to have `shape` and the kind of numbers: "uint8", "int" or "float".

    reason: why the array is needed, for the message.
    """
    expected = ", ".join(map(str, shape))
    if name not in batch:
        raise ValueError(
            f'a batch must have "{name}", {kind} [{expected}], for {reason}; got {", ".join(map(repr, batch))}'
        )
    value = batch[name]
    if not hasattr(value, "dtype"):
        raise ValueError(f'batch["{name}"] must be an array; got {type(value).__name__}')
    dtype = jnp.result_type(value)
    if not jnp.issubdtype(dtype, _KINDS[kind]) or jnp.shape(value) != shape:
        got = f"{dtype} {list(jnp.shape(value))}"
        raise ValueError(f'batch["{name}"] must be {kind} of shape [{expected}], for {reason}; got {got}')
    return value


def random_flip(key: jax.Array, examples: Examples) -> Examples:
    """Flips images x_0 [B, H, W, C] left to right, each with probability 1/2; array conditions flip with their image."""
    x_0, y, condition = examples
    flipped = jax.random.bernoulli(key, shape=(x_0.shape[0], 1, 1, 1))
    if condition is not None and condition.ndim == x_0.ndim:
        condition = jnp.where(flipped, condition[:, :, ::-1], condition)
    return Examples(jnp.where(flipped, x_0[:, :, ::-1], x_0), y, condition)
