"""Sets of arrays [n, *spatial, C] to compare: examples of a source, and samples of an .npz, standardized when read."""

from __future__ import annotations

import math
import pathlib
import zipfile
from collections.abc import Sequence

import numpy as np

from diffusion_jax import data
from diffusion_jax.data.array_rows import map_array
from diffusion_jax.evaluation.example_blocks import LazyExamples

__all__ = ["MAX_EXAMPLES", "EvenRows", "NpzArrays", "even_indices", "select", "standardize"]

MAX_EXAMPLES = 50_000  # of a set, as the metrics of images have it
_MAX_BYTES_IN_MEMORY = 2**30
_BLOCK = 1024


class NpzArrays:
    """`arr_0` of an .npz, [N, *spatial, C] in the units of the data, as --mode=sample writes it; read when it is needed."""

    def __init__(self, path: pathlib.Path):
        """Raises: ValueError."""
        try:
            self._values = map_array(path, "arr_0")
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path} contains no samples (arr_0): {error}") from None

    def __len__(self) -> int:
        return len(self._values)

    def read(self, indices: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
        values = np.asarray(self._values[indices])
        return {"image" if values.dtype == np.uint8 else "x": values}


class EvenRows:
    """`count` examples of a source, evenly spread over it because neighbors may be alike; all of them if it has fewer."""

    def __init__(self, source: data.Source, count: int):
        self._source, self._indices = source, even_indices(len(source), count)

    def __len__(self) -> int:
        return len(self._indices)

    def read(self, indices: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
        return self._source.read(self._indices[indices])


def even_indices(total: int, count: int) -> np.ndarray:
    """`count` indices below `total`, evenly spread, or all of them if there are fewer."""
    return np.arange(total) if count >= total else np.arange(count) * total // count


def standardize(source: data.Source, normalization: data.Normalization | None) -> np.ndarray | LazyExamples:
    """The examples of a source as float32 [n, *spatial, C], standardized: in memory up to 1 GiB, otherwise read when needed.

    normalization: None leaves the values as they are.
    """

    def read(indices: np.ndarray) -> np.ndarray:
        batch = source.read(indices)
        values = batch["image"] if "image" in batch else batch["x"]
        return data.to_model_units(values, normalization)

    shape = (len(source), *read(np.arange(1)).shape[1:])
    if 4 * math.prod(shape) > _MAX_BYTES_IN_MEMORY:
        return LazyExamples(read, shape)
    starts = range(0, len(source), _BLOCK)
    return np.concatenate([read(np.arange(start, min(start + _BLOCK, len(source)))) for start in starts])


def select(x: np.ndarray | LazyExamples, count: int) -> np.ndarray | LazyExamples:
    """`count` examples, evenly spread over the set, or all of them if it has fewer."""
    indices = even_indices(len(x), count)
    if isinstance(x, LazyExamples):
        return LazyExamples(lambda rows: x[indices[rows]], (len(indices), *x.shape[1:]))
    return x if len(indices) == len(x) else x[indices]
