"""Example sets to compare: a file with samples or arrays, a folder, a run, a data set, or feature statistics."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
import pathlib
import zipfile
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from diffusion_jax import data
from diffusion_jax.data.sources import batch_examples, read_in_order
from diffusion_jax.errors import DataError
from diffusion_jax.images import is_of_images
from diffusion_jax.metrics import MAX_EXAMPLES
from diffusion_jax.metrics.of_arrays import LazyExamples, even_indices
from diffusion_jax.metrics.of_features import Moments
from diffusion_jax.run_dir import ChunkStore
from diffusion_jax.storage.downloads import local_path
from diffusion_jax.untrusted import leads_out, open_npz

__all__ = [
    "ExampleSet",
    "SetFeatures",
    "open_file",
    "open_set",
    "read_all",
    "read_examples",
    "sample_files",
    "value_digest",
]

_MAX_BYTES_IN_MEMORY = 2**30
_BLOCK = 1024


class SetFeatures(NamedTuple):
    """An example set's features.

    pool: float32 [N, D], features of the first 50,000 examples; None for sets that have only statistics. moments: feature
    moments over all examples. spatial: moments of Inception's spatial features, or None. digest: hash of the examples or
    statistics. chunks: the cached features.
    """

    pool: np.ndarray | None
    moments: Moments
    spatial: Moments | None
    digest: str
    chunks: ChunkStore | None = None


@dataclasses.dataclass(frozen=True)
class ExampleSet:
    """A set of examples, or feature statistics, which may come from more examples than the file has.

    statistics: ADM's (mu, sigma, mu_s, sigma_s) or pytorch-fid's (mu, sigma). Statistics files do not store the number of
    examples, so `count` is 0.
    """

    name: str
    examples: data.Source | None = None
    statistics: SetFeatures | None = None

    @property
    def source(self) -> data.Source:
        """The examples, if the set has more than statistics."""
        assert self.examples is not None
        return self.examples

    @functools.cached_property
    def first(self) -> np.ndarray:
        """The first example [1, *spatial, C]."""
        return read_examples(self.source, np.arange(1))

    @property
    def is_of_images(self) -> bool:
        """Whether the examples are images, also for statistics, which always describe images."""
        return self.examples is None or is_of_images(self.first)

    @functools.cached_property
    def conditions(self) -> dict[str, np.ndarray]:
        """The "label", integers [n], and the "condition" in data units, [n, D] or [n, *spatial, K], that the examples have.

        n is at most 50,000, evenly spread over the set. An example without a condition has NaN.
        """
        names = self.source.read(np.arange(1)).keys() & {"label", "condition", "condition_missing"}
        batches = read_in_order(self.limit(MAX_EXAMPLES).source, _BLOCK)
        rows = [{name: batch[name] for name in names} for batch in batches]
        found = {name: np.concatenate([each[name] for each in rows]) for name in names}
        if (missing := found.pop("condition_missing", None)) is not None:
            condition = found["condition"]
            found["condition"] = np.where(missing.reshape(-1, *[1] * (condition.ndim - 1)), np.nan, condition)
        return found

    def limit(self, count: int) -> ExampleSet:
        """Returns at most `count` examples, evenly spread, because neighbors may be similar."""
        chosen = even_indices(len(self.source), count)
        return dataclasses.replace(self, examples=data.SelectedExamples(self.source, chosen))


def sample_files(workdir: pathlib.Path, pattern: str = "samples/*.npz") -> list[pathlib.Path]:
    """Returns a run's files of samples, newest first, without unfinished files and without links out of the run."""
    paths = [path for path in workdir.glob(pattern) if ".partial." not in path.name and not leads_out(path, workdir)]
    return sorted(paths, key=lambda path: (-_modified_time(path), path.name))


def _modified_time(path: pathlib.Path) -> float:
    """Returns when a file was last written; 0 if the file was removed meanwhile."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def open_set(location: str, data_dir: str = "", image_size: int | None = None) -> ExampleSet:
    """Opens a set of images or other arrays.

    location: a file of arrays as `data.ArrayFiles` takes it, or with samples (arr_0) or statistics (mu, sigma); a folder,
    whose images are read in color; a work directory (newest samples); or a data set and split ("cifar10:train",
    "digits:test"). image_size: images of a folder or data set are resized to cover this size, as in training; required if
    images differ in size.
    Raises: ValueError, DataError, OSError, each with a one-line message.
    """
    path = local_path(location)
    if path.is_dir() and path.suffix != ".zarr":
        files = sample_files(path)
        if files:
            return open_file(files[0], str(files[0]))
        if (path / "config.json").is_file():
            raise ValueError(f"{path} is a run without samples; draw some with --mode=sample")
        size = (image_size, image_size) if image_size else None  # an implicit resize would change the metrics
        return ExampleSet(location, data.Folder(str(path), size, 3))
    if path.exists():
        return open_file(path, location)
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


def open_file(path: pathlib.Path, name: str) -> ExampleSet:
    """Opens the examples and statistics in a file, for samples with their labels (arr_1). Raises: ValueError."""
    statistics, labels, has_examples = None, None, True
    if path.is_file() and zipfile.is_zipfile(path):
        try:
            with open_npz(path, limit=math.inf) as arrays:
                pairs = [
                    (arrays[mean].astype(np.float64), arrays[covariance].astype(np.float64)) if mean in arrays else None
                    for mean, covariance in (("mu", "sigma"), ("mu_s", "sigma_s"))
                ]
                has_examples = any(name in arrays for name in ("arr_0", "x", "image"))
                labels = arrays["arr_1"] if "arr_1" in arrays else None
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} cannot be read as .npz: {error}") from None
        moments, spatial = (pair and Moments(*pair, 0) for pair in pairs)
        if moments:
            digest = hashlib.sha256(b"".join(array.tobytes() for pair in pairs for array in pair or ()))
            statistics = SetFeatures(None, moments, spatial, digest.hexdigest())
    if statistics and not has_examples:
        return ExampleSet(name, None, statistics)
    try:
        examples = data.ArrayFiles(str(path))
    except DataError as error:
        raise ValueError(str(error).replace("data.data_dir=", "")) from error
    if not len(examples):
        raise ValueError(f"{path} has no examples")
    if labels is not None and labels.shape == (len(examples),) and labels.dtype.kind in "iu":
        examples.arrays.setdefault("label", labels)
    return ExampleSet(name, examples, statistics)


def read_examples(source: data.Source, indices: np.ndarray) -> np.ndarray:
    """Reads examples of a source: uint8 images, or float32 arrays in data units."""
    return _as_stored(batch_examples(source.read(indices)))


def _as_stored(x: np.ndarray) -> np.ndarray:
    return x if x.dtype == np.uint8 else np.asarray(x, np.float32)


def value_digest(source: data.Source, progress: Callable[[int], None] = lambda done: None) -> str:
    """Returns the SHA-256 of a source's values. progress: called with the number of examples read so far."""
    digest, done = hashlib.sha256(), 0
    for batch in read_in_order(source, _BLOCK):
        values = _as_stored(batch_examples(batch))
        digest.update(repr(values.shape[1:]).encode())
        digest.update(np.ascontiguousarray(values).data)
        done += len(values)
        progress(done)
    return digest.hexdigest()


def read_all(
    source: data.Source, normalization: data.Normalization | None, in_data_units: bool = False
) -> np.ndarray | LazyExamples:
    """Returns all examples, standardized, float32 [n, *spatial, C]: in memory up to 1 GiB, otherwise read when needed.

    normalization: None leaves the values unchanged. in_data_units: not standardized, as `normalization.data_dtype`.
    """

    def read(batch: Mapping[str, np.ndarray]) -> np.ndarray:
        x = batch_examples(batch)
        if in_data_units and normalization is not None:
            return x.astype(normalization.data_dtype)
        return data.to_model_units(x, normalization)

    first = read(source.read([0]))
    if len(source) * first.nbytes > _MAX_BYTES_IN_MEMORY:
        return LazyExamples(lambda indices: read(source.read(indices)), (len(source), *first.shape[1:]))
    return np.concatenate([read(batch) for batch in read_in_order(source, _BLOCK)])
