"""Python values from those of NumPy, JAX and other libraries."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import Any

__all__ = ["to_float", "to_integer", "to_items", "to_scalar"]


def to_scalar(value: Any) -> Any:
    """A NumPy or JAX array without dimensions as the Python value that it holds; anything else unchanged."""
    return value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else value


def to_items(value: Any) -> tuple:
    """The items of a tuple, a list, another sequence or a one-dimensional array. Raises: ValueError."""
    if getattr(value, "ndim", None) == 1 and hasattr(value, "tolist"):
        return tuple(value.tolist())
    if isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray | memoryview):
        return tuple(value)
    raise ValueError


def to_integer(value: Any) -> int:
    """A whole number of any type, but no bool. Raises: ValueError."""
    value = to_scalar(value)
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise ValueError
    return int(value)


def to_float(value: Any) -> float:
    """A real number of any type, but no bool. Raises: ValueError."""
    value = to_scalar(value)
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise ValueError
    return float(value)
