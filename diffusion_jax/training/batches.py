"""Checks the batches that a train step gets, and converts them to `Examples`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax import data, models
from diffusion_jax.config import is_continuous
from diffusion_jax.images import to_model_range

_KINDS = {  # {name in messages: (accepted dtypes, dtype of the batches from the program's data pipeline)}
    "bool": (jnp.bool_, np.bool_),
    "uint8": (jnp.uint8, np.uint8),
    "int": (jnp.integer, np.int32),
    "float": (jnp.floating, np.float32),
}


class Examples(NamedTuple):
    """x_0: float32 [B, *spatial, C]. y: int [B], or None. condition: float32 [B, D] or [B, *spatial, K], or None.

    Rows of NaN in `condition` are null conditions.
    """

    x_0: jax.Array
    y: jax.Array | None = None
    condition: jax.Array | None = None


def condition_shape(config: Mapping[str, Any]) -> tuple[int, ...] | None:
    """Returns the shape of a condition: (D,) for a vector, (*spatial, K) for an array; None without conditions."""
    return models.condition_shape(config["model"], data.example_shape(config["data"])[:-1])


def _expected(config: Mapping[str, Any], name: str) -> dict[str, tuple[str, tuple[int, ...], str]]:
    """Returns {name of an array: (kind of numbers, shape of an example, why it is needed)}. name: "image" or "x"."""
    shape, classifies = data.example_shape(config["data"]), config["diffusion"]["loss"] == "classify"
    reason = "data.image_size and data.channels "
    if name == "image":
        arrays = {name: ("uint8", shape, reason + '(float data, standardized to about [-1, 1], are given as "x")')}
    else:
        arrays = {name: ("float", shape, reason + '(gray levels 0 to 255 are given as "image")')}
    if config["model"]["num_classes"] or classifies:
        arrays["label"] = "int", (), "model.num_classes or diffusion.loss=classify"
    if (condition := condition_shape(config)) is not None:
        arrays["condition"] = "float", condition, "model.condition_features or model.condition_channels"
    return arrays


def abstract_batch(config: Mapping[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes and dtypes of the batches that the program reads."""
    rows = config["training"]["batch_size"]
    expected = _expected(config, "x" if is_continuous(config) else "image")
    return {name: jax.ShapeDtypeStruct((rows, *shape), _KINDS[kind][1]) for name, (kind, shape, _) in expected.items()}


def read_batch(batch: Mapping[str, Any], config: Mapping[str, Any]) -> Examples:
    """Checks a batch against a complete config, and converts it to `Examples`.

    Only names, shapes and dtypes are checked, so the function works under jit. batch: has "image", uint8 [B, *spatial, C],
    which is scaled to [-1, 1], or "x", float [B, *spatial, C], which is not. "label", int [B], is read only for a network
    with classes or a classifier. "condition", float [B, D] or [B, *spatial, K], and the optional "condition_missing", bool
    [B], True for examples without a condition, are read only for a conditional network. If the condition of any other
    example has a NaN, the x_0 of the example becomes NaN, and thus the loss, because traced values cannot raise an error.
    Raises: ValueError for any other batch, and for settings that contradict the batch.
    """
    names = list(batch) if isinstance(batch, Mapping) else [type(batch).__name__]
    if len(given := [name for name in ("image", "x") if name in names]) != 1:
        found = ", ".join(map(repr, names)) or "nothing"
        raise ValueError(
            f'a batch must be a dictionary with either "image" (uint8) or "x" (float, standardized); got {found}'
        )
    (name,) = given
    num_rows, steps = (*jnp.shape(batch[name]), 0)[0], config["training"]["accumulation_steps"]
    if num_rows < 1 or num_rows % steps:
        raise ValueError(
            f"a batch must hold at least one example, and a multiple of training.accumulation_steps={steps}; got {num_rows}"
        )
    arrays = {each: _read(batch, each, num_rows, *expected) for each, expected in _expected(config, name).items()}
    levels, loss, mirrors = config["data"]["levels"], config["diffusion"]["loss"], config["data"]["random_flip"]
    is_float, bounds = name == "x", loss in ("vlb", "hybrid")
    problems = {  # `config.check` does not know whether a batch has uint8 images or float data
        'data.levels=None is for continuous data ("x"): use data.levels=256': not is_float and levels is None,
        "data.random_flip=True mirrors only uint8 images: use data.random_flip=False": is_float and mirrors,
        f'data.levels={levels}: the loss {loss} on "x" is a bound for continuous data; use data.levels=None, or give uint8 '
        'images as "image"': is_float and bounds and levels is not None,
    }
    if broken := [problem for problem, is_broken in problems.items() if is_broken]:
        raise ValueError(broken[0])
    x_0 = to_model_range(arrays["image"]) if name == "image" else arrays["x"].astype(jnp.float32)
    condition = arrays.get("condition")
    if condition is not None:
        condition = condition.astype(jnp.float32)
        is_nan = jnp.isnan(condition).any(axis=range(1, condition.ndim))
        if "condition_missing" in batch:
            if not config["model"]["condition_dropout"]:
                raise ValueError(
                    '"condition_missing" in a batch needs a network that learns to do without a condition: set '
                    "model.condition_dropout above 0, or leave it out"
                )
            missing = _read(batch, "condition_missing", num_rows, "bool", (), "examples without a condition")
            is_nan, condition = is_nan & ~missing, models.mark_missing(condition, missing)
        x_0 = jnp.where(jnp.expand_dims(is_nan, range(1, x_0.ndim)), jnp.nan, x_0)
    return Examples(x_0, arrays.get("label"), condition)


def _read(
    batch: Mapping[str, Any], name: str, num_rows: int, kind: str, shape: tuple[int, ...], reason: str
) -> jax.Array:
    """Returns the array `name`, which must be [num_rows, *shape] with a dtype of `_KINDS[kind]`. Raises: ValueError."""
    found = ", ".join(map(repr, batch))
    if name in batch:
        value = batch[name]
        found = f"a {type(value).__name__}"
        if hasattr(value, "dtype"):
            dtype = jnp.result_type(value)
            if jnp.issubdtype(dtype, _KINDS[kind][0]) and jnp.shape(value) == (num_rows, *shape):
                return value
            found = f"{dtype} {list(jnp.shape(value))}"
    expected = ", ".join(map(str, (num_rows, *shape)))
    raise ValueError(f'a batch must have "{name}", {kind} [{expected}], for {reason}; got {found}')


def random_flip(key: jax.Array, examples: Examples) -> Examples:
    """Flips images x_0 [B, H, W, C] left to right, each with probability 1/2; array conditions flip with their image."""
    x_0, y, condition = examples
    flipped = jax.random.bernoulli(key, shape=(x_0.shape[0], 1, 1, 1))
    if condition is not None and condition.ndim == x_0.ndim:
        condition = jnp.where(flipped, condition[:, :, ::-1], condition)
    return Examples(jnp.where(flipped, x_0[:, :, ::-1], x_0), y, condition)
