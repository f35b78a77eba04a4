"""Sets of examples to compare: an .npz of samples, a folder, a data set, a file of statistics; and arrays read in blocks.

A set of float examples [n, *spatial, C] may be a memory map that is larger than memory, or `LazyExamples`: only a block at a
time is converted to float64.
"""

from __future__ import annotations

import hashlib
import math
import pathlib
import zipfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, cast

import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageOps

from diffusion_jax import data
from diffusion_jax.errors import DataError
from diffusion_jax.evaluation.metrics import Moments
from diffusion_jax.files import map_array
from diffusion_jax.storage.downloads import local_path

__all__ = [
    "MAX_EXAMPLES",
    "EvenRows",
    "ExampleSet",
    "LazyExamples",
    "NpzExamples",
    "Statistics",
    "as_example_pair",
    "as_examples",
    "even_indices",
    "modified_time",
    "open_image_set",
    "read_blocks",
    "read_examples",
    "sample_files",
    "select",
    "standardize",
    "value_digest",
]

MAX_EXAMPLES = 50_000  # of a set of arrays, as the metrics of images have it
_MAX_BYTES_IN_MEMORY = 2**30
_MAX_BLOCK_BYTES = 2**26
_BLOCK = 1024


# ---- Sets


class Statistics(NamedTuple):
    """Moments of Inception's features from a file, ADM's (mu, sigma, mu_s, sigma_s) or pytorch-fid's (mu, sigma).

    Such a file does not contain the number of images, so `count` is 0.
    """

    moments: Moments
    spatial: Moments | None


class NpzExamples:
    """`arr_0` of an .npz, [N, *spatial, C], as --mode=sample and ADM's scripts write it; read from the disk when needed."""

    def __init__(self, path: pathlib.Path):
        """Raises: ValueError."""
        try:
            self.values = map_array(path, "arr_0")
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path} contains neither samples (arr_0) nor statistics (mu, sigma): {error}") from None

    def __len__(self) -> int:
        return len(self.values)

    def read(self, indices: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
        values = np.asarray(self.values[indices])
        return {"image" if values.dtype == np.uint8 else "x": values}


def sample_files(workdir: pathlib.Path) -> list[pathlib.Path]:
    """The .npz files of a run's samples, the newest first, without unfinished files."""
    paths = [path for path in (workdir / "samples").glob("*.npz") if ".partial." not in path.name]
    return sorted(paths, key=modified_time, reverse=True)


def modified_time(path: pathlib.Path) -> float:
    """When a file was last written, 0 if it was removed meanwhile."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _open_images(path: pathlib.Path) -> NpzExamples:
    """An .npz of images. Raises: ValueError."""
    examples = NpzExamples(path)
    images = examples.values
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3) or not len(images):
        raise ValueError(
            f"{path}: arr_0 is {images.dtype} {list(images.shape)}, not uint8 [N, H, W, 1 or 3]; save floats x in [-1, 1] as "
            "round((x + 1) * 127.5)"
        )
    return examples


class _UnresizedFolder(data.Folder):
    """Images of one size in color. Other sizes raise an error, because a resize would change the metrics."""

    def __init__(self, path: pathlib.Path):
        super().__init__(str(path), (1, 1), 3)
        with Image.open(path / self._files[0]) as image:
            self._size = ImageOps.exif_transpose(image).size[::-1]

    def _resize(self, path: pathlib.Path, image: Image.Image) -> np.ndarray:
        if image.size != self._size[::-1]:
            raise DataError(
                f"{path} is {image.size[0]}x{image.size[1]}, but the first image is {self._size[1]}x{self._size[0]}; "
                "resize them to one size, or use image_size"
            )
        return super()._resize(path, image)


class ExampleSet(NamedTuple):
    """A set of examples, or statistics of images, perhaps of more images than the file has, as ADM's reference batches."""

    name: str
    examples: data.Source | None = None
    statistics: Statistics | None = None


def open_image_set(location: str, data_dir: str = "", image_size: int | None = None) -> ExampleSet:
    """A set of images.

    location: an .npz, a folder, whose images are read in color, a run's directory (its newest samples), or a data set and its
    split ("cifar10:train", "digits:test"). image_size: resizes a folder's or data set's images to cover it, as training does;
    required for images of different sizes.
    Raises: ValueError, DataError, OSError: one line.
    """
    path = local_path(location)
    if path.is_dir():
        files = sample_files(path)
        if files:
            return ExampleSet(str(files[0]), _open_images(files[0]))
        if (path / "config.json").is_file():
            raise ValueError(f"{path} is a run without samples; draw some with --mode=sample")
        folder = data.Folder(str(path), (image_size, image_size), 3) if image_size else _UnresizedFolder(path)
        return ExampleSet(location, folder)
    if path.is_file():
        statistics, has_images = _read_statistics(path)
        return ExampleSet(location, _open_images(path) if has_images or not statistics else None, statistics)
    if path.suffix:
        raise ValueError(f"{location}: no such file")
    name, _, split = location.partition(":")
    try:
        size, channels = ((8, 8), 1) if name == "digits" else data.natural_shape(name, data_dir or None)
    except DataError as error:
        raise ValueError(f"{location}: no such file or folder, and as a data set: {error}") from None
    if not image_size and not size:
        raise ValueError(f"the images of {name!r} have different sizes; give image_size, the pixels to resize them to")
    config = {"dataset": name, "split": split or "train", "data_dir": data_dir, "memory_mb": 0, "channels": channels}
    return ExampleSet(f"{name}:{config['split']}", data.load(config | {"image_size": image_size or size}))


def _read_statistics(path: pathlib.Path) -> tuple[Statistics | None, bool]:
    """(the statistics in an .npz or None, whether it contains images)."""
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is not an .npz, an archive of arrays as numpy.savez writes it")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            moments, spatial = (
                Moments(arrays[mean].astype(np.float64), arrays[covariance].astype(np.float64), 0)
                if mean in arrays
                else None
                for mean, covariance in (("mu", "sigma"), ("mu_s", "sigma_s"))
            )
            has_images = "arr_0" in arrays
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} cannot be read as .npz: {error}") from None
    return Statistics(moments, spatial) if moments else None, has_images


def read_examples(source: data.Source, indices: np.ndarray) -> np.ndarray:
    """The examples of a source: images uint8, or arrays float32 in the units of the data."""
    batch = source.read(indices)
    return batch["image"] if "image" in batch else np.asarray(batch["x"], np.float32)


def value_digest(source: data.Source, progress: Callable[[int], None] = lambda done: None) -> str:
    """SHA-256 of the values of a source. progress: called with the number of examples that are read."""
    digest = hashlib.sha256()
    for start in range(0, len(source), _BLOCK):
        values = read_examples(source, np.arange(start, min(start + _BLOCK, len(source))))
        digest.update(repr(values.shape[1:]).encode())
        digest.update(np.ascontiguousarray(values).data)
        progress(start + len(values))
    return digest.hexdigest()


# ---- Arrays


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
        return data.to_model_units(batch["image"] if "image" in batch else batch["x"], normalization)

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
    size = min(max(_MAX_BLOCK_BYTES // (8 * width), 1), _BLOCK)
    for start in range(0, len(x), size):
        block = np.asarray(x[start : start + size], np.float64)
        finite = np.isfinite(block).reshape(len(block), -1).all(axis=1)
        if not finite.all():
            raise ValueError(f"example {start + finite.argmin()} has values that are not finite; remove or repair it")
        yield start, block
