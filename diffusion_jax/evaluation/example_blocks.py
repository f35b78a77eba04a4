"""Sets of float examples [n, *spatial, C], read in blocks that fit into memory.

A set may be a memory map that is larger than memory, or `LazyExamples`: only a block at a time is converted to float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, cast

import jax.numpy as jnp
import numpy as np

__all__ = ["LazyExamples", "as_example_pair", "as_examples", "read_blocks"]

_MAX_BLOCK_BYTES = 2**26
_MAX_BLOCK_EXAMPLES = 1024


class LazyExamples:
    """Examples [n, *spatial, C] that are read when they are indexed; the metrics of this package take them as an array.

    read: (indices int [b]) -> examples float32 [b, *spatial, C]. shape: of the whole set.
    """

    dtype = np.dtype(np.float32)

    def __init__(self, read: Callable[[np.ndarray], np.ndarray], shape: tuple[int, ...]):
        self._read, self.shape, self.ndim = read, shape, len(shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: int | slice | np.ndarray) -> np.ndarray:
        indices = np.arange(len(self))[key]
        return self._read(indices) if indices.ndim else self._read(indices[None])[0]


def as_examples(name: str, x: Any, minimum: int) -> np.ndarray:
    """x as an array [n, *spatial, C] of at least `minimum` examples, without a copy of a NumPy array.

    name: the name of x in the error message. Raises: ValueError for another shape, complex numbers, or fewer examples.
    """
    x = x if isinstance(x, LazyExamples) else np.asarray(x)
    if x.ndim < 2 or not all(x.shape[1:]):
        raise ValueError(f"{name} has shape {x.shape}; it must be [n, *spatial, C], vectors for instance [n, C]")
    if not (jnp.issubdtype(x.dtype, jnp.floating) or jnp.issubdtype(x.dtype, jnp.integer)):
        raise ValueError(f"{name} is {x.dtype}; it must have real numbers, float32 for instance")
    if len(x) < minimum:
        raise ValueError(f"{name} has {len(x)} examples; this needs at least {minimum}")
    return cast(np.ndarray, x)


def as_example_pair(reference: Any, samples: Any, minimum: int) -> tuple[np.ndarray, np.ndarray]:
    """Two sets of examples of one shape. Raises: ValueError as `as_examples`, and for examples of different shapes."""
    reference, samples = as_examples("reference", reference, minimum), as_examples("samples", samples, minimum)
    if reference.shape[1:] != samples.shape[1:]:
        raise ValueError(
            f"reference has examples of shape {reference.shape[1:]} and samples of {samples.shape[1:]}; "
            "they must be equal"
        )
    return reference, samples


def read_blocks(x: Any, floats_per_example: int | None = None) -> Iterator[tuple[int, np.ndarray]]:
    """(index of the first example, examples float64 [b, *spatial, C]) of consecutive blocks.

    floats_per_example: what the caller computes from each example, if that is more than the example itself; it limits b.
    Raises: ValueError for values that are not finite.
    """
    width = max(math.prod(x.shape[1:]), floats_per_example or 0)
    size = min(max(_MAX_BLOCK_BYTES // (8 * width), 1), _MAX_BLOCK_EXAMPLES)
    for start in range(0, len(x), size):
        block = np.asarray(x[start : start + size], np.float64)
        finite = np.isfinite(block).reshape(len(block), -1).all(axis=1)
        if not finite.all():
            raise ValueError(f"example {start + finite.argmin()} has values that are not finite; remove or repair it")
        yield start, block
