"""Example sets to compare, and their features from FID's Inception, a small digits classifier, or a user's function.

A set is a file with samples or arrays, a folder, a run, a data set, or statistics of features. Features are cached in chunks,
so that an interrupted launch can resume, and the features of a reference are computed once for all comparisons.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
import os
import pathlib
import sys
import zipfile
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from diffusion_jax import data
from diffusion_jax.console import ProgressBar
from diffusion_jax.data.sources import batch_examples, read_in_order, readable
from diffusion_jax.distributed.processes import broadcast_from_process_0
from diffusion_jax.distributed.sharding import BatchFunction
from diffusion_jax.errors import DataError, require_known
from diffusion_jax.evaluation.inception import DOWNLOAD_SOURCES, RESIZES, Inception, load_inception, to_inception
from diffusion_jax.files import user_cache
from diffusion_jax.functions import find_function
from diffusion_jax.images import is_of_images, to_model_range
from diffusion_jax.metrics import MAX_EXAMPLES
from diffusion_jax.metrics.of_arrays import LazyExamples, subset_indices
from diffusion_jax.metrics.of_features import Moments, moments_of_chunks
from diffusion_jax.run_dir import ChunkStore, RunDir
from diffusion_jax.storage.downloads import local_path
from diffusion_jax.untrusted import leads_out, open_npz, read_header

__all__ = ["ExampleSet", "FeatureExtractor", "FeaturePipeline", "from_name", "open_file", "open_set", "sample_files"]

CHUNK = 1024  # examples; sums run over chunks, so that metrics do not depend on the batch size
NEEDS_INCEPTION = (
    f"these metrics need inception=PATH, the weights of FID's Inception ({DOWNLOAD_SOURCES}); or features=digits, or "
    "features=module:function"
)
DIGITS_PATH = pathlib.Path(__file__).with_name("digits.safetensors")
_MAX_BYTES_IN_MEMORY = 2**30


# ---- Sets


class SetFeatures(NamedTuple):
    """An example set's features.

    pool: float32 [N, D], features of the examples `subset_indices`, at most 50,000; None for sets with only statistics.
    moments: feature moments over all examples. spatial: moments of Inception's spatial features, or None. digest: hash of the
    examples or statistics. chunks: the cached features.
    """

    pool: np.ndarray | None
    moments: Moments
    spatial: Moments | None
    digest: str
    chunks: ChunkStore | None = None


@dataclasses.dataclass(frozen=True)
class ExampleSet:
    """A set of examples, feature statistics, or both; the statistics may come from more examples than the file has.

    statistics: ADM's (mu, sigma, mu_s, sigma_s) or pytorch-fid's (mu, sigma). Statistics files do not store the number of
    examples, so `Moments.count` is 0.
    """

    name: str
    examples: data.Source | None = None
    statistics: SetFeatures | None = None

    @property
    def source(self) -> data.Source:
        """The examples of a set that does not only have statistics."""
        assert self.examples is not None
        return self.examples

    @functools.cached_property
    def first(self) -> np.ndarray:
        """The first example [1, *spatial, C]."""
        return read_examples(self.source, np.arange(1))

    @property
    def is_of_images(self) -> bool:
        """Whether the examples are images; True for statistics, which always describe images."""
        return self.examples is None or is_of_images(self.first)

    @functools.cached_property
    def conditions(self) -> dict[str, np.ndarray]:
        """The arrays of `data.Source.read` besides the examples: "label", "condition" in data units, "condition_missing"."""
        batches = read_in_order(self.source, CHUNK)
        rows = [{name: batch[name] for name in batch if name not in ("x", "image")} for batch in batches]
        return {name: np.concatenate([each[name] for each in rows]) for name in rows[0]}

    def limit(self, count: int) -> ExampleSet:
        """Returns the set with at most `count` examples, by `subset_indices`, because neighboring examples may be similar."""
        chosen = subset_indices(len(self.source), count)
        return dataclasses.replace(self, examples=data.SelectedExamples(self.source, chosen))


def sample_files(workdir: pathlib.Path, pattern: str = "samples/*.npz") -> list[pathlib.Path]:
    """Returns a run's files of samples, newest first, without unfinished files and without links out of the run."""
    paths = [path for path in workdir.glob(pattern) if ".partial." not in path.name and not leads_out(path, workdir)]
    return sorted(paths, key=lambda path: (-_modified_time(path), path.name))


def _modified_time(path: pathlib.Path) -> float:
    """Returns when a file was last written; 0 for a file that was removed meanwhile, or a broken link."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def open_set(location: str, data_dir: str = "", image_size: int | None = None) -> ExampleSet:
    """Opens a set of images or other arrays.

    location: a file of arrays as `data.ArrayFiles` takes it, or with samples (arr_0) or statistics (mu, sigma); a folder,
    whose images are read in color; a run's directory, for its newest samples; or a data set and split ("cifar10:train",
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
    """Opens the examples and statistics in a file; samples include their labels (arr_1). Raises: ValueError, DataError."""
    statistics, has_examples = None, True
    if is_npz := path.is_file() and zipfile.is_zipfile(path):
        with readable(path), open_npz(path, limit=math.inf) as arrays:
            pairs = [
                (arrays[mean].astype(np.float64), arrays[covariance].astype(np.float64)) if mean in arrays else None
                for mean, covariance in (("mu", "sigma"), ("mu_s", "sigma_s"))
            ]
            has_examples = any(name in arrays for name in ("arr_0", "x", "image"))
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
    if is_npz and (labels := _read_labels(path, len(examples))) is not None:
        examples.arrays.setdefault("label", labels)
    return ExampleSet(name, examples, statistics)


def _read_labels(path: pathlib.Path, count: int) -> np.ndarray | None:
    """Returns the labels in an .npz of samples, the array arr_1; None if arr_1 is not `count` integers."""
    with zipfile.ZipFile(path) as archive:
        if "arr_1.npy" not in archive.namelist():
            return None
        with archive.open("arr_1.npy") as file:  # reads only the header, because the array may be large
            shape, _, dtype = read_header(file, archive.getinfo("arr_1.npy").file_size)
    if shape != (count,) or dtype.kind not in "iu":
        return None
    with open_npz(path, limit=math.inf) as arrays:
        return arrays["arr_1"]


def read_examples(source: data.Source, indices: np.ndarray) -> np.ndarray:
    """Reads examples of a source: uint8 images, or float32 arrays in data units."""
    x = batch_examples(source.read(indices))
    return x if x.dtype == np.uint8 else np.asarray(x, np.float32)


def value_digest(source: data.Source, progress: Callable[[int], None] = lambda done: None) -> str:
    """Returns the SHA-256 of a source's values. progress: called with the number of examples read so far."""
    digest = hashlib.sha256()
    for start in range(0, len(source), CHUNK):
        stop = min(start + CHUNK, len(source))
        values = read_examples(source, np.arange(start, stop))
        digest.update(repr(values.shape[1:]).encode())
        digest.update(np.ascontiguousarray(values).data)
        progress(stop)
    return digest.hexdigest()


def read_all(
    source: data.Source, normalization: data.Normalization | None, in_data_units: bool = False
) -> np.ndarray | LazyExamples:
    """Returns all examples, standardized, float32 [n, *spatial, C]: in memory up to 1 GiB, otherwise read when needed.

    normalization: None leaves the values unchanged. in_data_units: whether to return data units, in the dtype
    `normalization.data_dtype`.
    """

    def read(indices: np.ndarray) -> np.ndarray:
        x = batch_examples(source.read(indices))
        if in_data_units and normalization is not None:
            return x.astype(normalization.data_dtype)
        return data.to_model_units(x, normalization)

    first = read(np.arange(1))
    examples = LazyExamples(read, (len(source), *first.shape[1:]), first.dtype)
    if len(source) * first.nbytes > _MAX_BYTES_IN_MEMORY:
        return examples
    starts = range(0, len(source), CHUNK)  # a block at a time, because reading may need more memory than the result
    return np.concatenate([read(np.arange(start, min(start + CHUNK, len(source)))) for start in starts])


# ---- Extractors


class FeatureExtractor(NamedTuple):
    """A function from images to features, with its parameters.

    name: the name in reports. digest: a hash that changes with everything that changes the features. function: (params, uint8
    images [B, H, W, C]) -> {"pool": [B, D]}, and "spatial" [B, S] for sFID; compiled unless params is None. head: [D,
    classes], from features to logits, or None. resize: a name in RESIZES, how images are resized for Inception. published:
    whether the Frechet distance may be called FID.
    """

    name: str
    digest: str
    function: Callable
    params: Any = None
    head: np.ndarray | None = None
    resize: str | None = None
    published: bool = False


def inception(path: str | os.PathLike, resize: str = "tf1") -> FeatureExtractor:
    """Returns FID's Inception with the weights at `path`, as `inception.load_inception` takes it.

    resize: how images are resized to 299x299: "tf1", bilinear as in TensorFlow 1, which defines the FID; "pytorch", bilinear
    with half-pixel centers as in pytorch-fid; "clean", antialiased bicubic as in clean-fid. Gray images are repeated to three
    channels. Raises: PretrainedError; ValueError for another resize.
    """
    require_known("resize", resize, RESIZES)
    params, digest, published = load_inception(path)

    def function(params, images):
        images = jnp.broadcast_to(images, (*images.shape[:3], 3)).astype(jnp.float32)
        return Inception().apply({"params": params}, to_inception(images, resize))

    head = np.asarray(params["fc"]["kernel"])
    return FeatureExtractor("inception", f"{digest}_{resize}", function, params, head, resize, published)


def digits() -> FeatureExtractor:
    """Returns this package's small classifier of scikit-learn's digits, for 8x8 gray images.

    With these features, metrics can only compare sets of generated digits with each other, because
    `benchmarks/digits_features.py` trained the classifier on the reference images.
    """
    content = DIGITS_PATH.read_bytes()
    flat = {tuple(name.split(".")): jnp.asarray(value) for name, value in safetensors.numpy.load(content).items()}

    def function(params, images):
        features, _ = cast(tuple, DigitsNetwork().apply({"params": params}, images))
        return {"pool": features}

    params = flax.traverse_util.unflatten_dict(flat)
    return FeatureExtractor("digits", hashlib.sha256(content).hexdigest(), function, params)


def default_name(dataset: str, of_images: bool) -> str:
    """Returns the default extractor's name, "digits" or "inception", for images; "" (no extractor) for other data."""
    return ("digits" if dataset == "digits" else "inception") if of_images else ""


def from_name(name: str, inception_path: str = "", resize: str = "tf1", of_images: bool = True) -> FeatureExtractor:
    """Returns the extractor "inception" (with the weights at `inception_path`), "digits", or an imported "module:function".

    A user's function maps uint8 images [B, H, W, C], or continuous data, float32 [B, *spatial, C] in data units, to features
    [B, D], and is not compiled.
    Raises: ValueError for another name, for missing weights, or for image features if the examples are not images;
      PretrainedError.
    """
    if not of_images and ":" not in name:
        raise ValueError(
            f"features={name!r} needs images; use module:function, which gets arrays [N, *spatial, C], or "
            '"" for the metrics that need no features'
        )
    if name == "inception":
        if not inception_path:
            raise ValueError(NEEDS_INCEPTION)
        return inception(inception_path, resize)
    if name == "digits":
        return digits()
    if ":" not in name:
        raise ValueError(f"features={name!r} is unknown; known: inception, digits, module:function")
    function = find_function(name, "features")
    source = pathlib.Path(str(sys.modules[function.__module__].__file__))
    content = hashlib.sha256(source.read_bytes()).hexdigest()  # the file's hash stands for the function
    return FeatureExtractor(name, f"{content}_{name}", lambda _, images: {"pool": function(images)})


# ---- The classifier of digits


class DigitsNetwork(nn.Module):
    """The digits classifier."""

    @nn.compact
    def __call__(self, images) -> tuple[jax.Array, jax.Array]:
        """Computes (features [B, 64], logits [B, 10]) of uint8 images [B, 8, 8, C], after averaging the channels.

        Raises: ValueError for other sizes and dtypes.
        """
        if images.shape[1:3] != (8, 8):
            raise ValueError(
                f"the digits' network takes images of 8x8 pixels, not {'x'.join(map(str, images.shape[1:]))}; "
                "--image_size=8 resizes folders (diffusion-jax compare)"
            )
        x = to_model_range(images).mean(axis=-1, keepdims=True)
        x = nn.relu(nn.Conv(32, (3, 3), name="conv_0")(x))
        x = nn.relu(nn.Conv(64, (3, 3), strides=2, name="conv_1")(x))
        features = nn.relu(nn.Dense(64, name="dense")(x.reshape(len(x), -1)))
        return features, nn.Dense(10, name="logits")(features)


# ---- Features of sets


class FeaturePipeline:
    """Computes features with an extractor, in batches of `batch_size` over a mesh.

    workdir: holds the cache for several processes, because all must read the features; one process uses the user's cache.
    """

    def __init__(self, extractor: FeatureExtractor, mesh: Mesh, batch_size: int, workdir: RunDir | None = None):
        self.extractor, self._batch_size = extractor, batch_size
        self._cache, self._compute = RunDir(user_cache() / "features"), None
        if workdir is not None and jax.process_count() > 1:
            self._cache = workdir.subdirectory(".features")
        if extractor.params is not None:
            self._compute = BatchFunction(extractor.function, extractor.params, mesh, batch_size)
            self._batch_size = self._compute.batch_size

    def __call__(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """Computes "pool" [N, D], and with Inception "spatial" [N, S], equal on every process.

        images: uint8 [N, H, W, C], or float32 arrays [N, *spatial, C].
        Raises: ValueError for features that are not finite, or not [N, D].
        """
        return self._extract(images.__getitem__, len(images))

    def _extract(self, read: Callable[[np.ndarray], np.ndarray], count: int) -> dict[str, np.ndarray]:
        """Computes features of `count` images. read: (indices) -> images."""
        batches = []
        for start in range(0, count, self._batch_size):
            if self._compute:
                out = self._compute(read, start, count)
            else:  # the last batch is padded, too
                out = self.extractor.function(None, read(np.minimum(start + np.arange(self._batch_size), count - 1)))
                shape = np.shape(out["pool"])
                if len(shape) != 2 or shape[0] != self._batch_size:
                    raise ValueError(
                        f"{self.extractor.name} returns features of shape {shape} for {self._batch_size} images, not "
                        f"[{self._batch_size}, D]"
                    )
            batches.append(jax.tree.map(lambda rows, start=start: np.asarray(rows, np.float32)[: count - start], out))
        features = jax.tree.map(lambda *rows: np.concatenate(rows), *batches)
        if not all(np.isfinite(rows).all() for rows in jax.tree.leaves(features)):
            raise ValueError(f"the features of {self.extractor.name} are not finite")
        return features

    def extract_set(self, examples: ExampleSet, folder: str = "references") -> SetFeatures:
        """Computes a set's features, stored in the cache folder "references" or "samples".

        Statistics in the set's file take precedence, because they may come from more examples than the file has.
        """
        source, name, statistics = examples.examples, pathlib.Path(examples.name).name, examples.statistics
        if source is None:
            assert statistics is not None
            return statistics
        count = len(source)
        with ProgressBar(f"Reading {name}", count) as bar:
            digest = broadcast_from_process_0(lambda: value_digest(source, bar.update))
        key = (digest, self.extractor.digest, CHUNK, jax.default_backend())
        name_of_chunks = hashlib.sha256(repr(key).encode()).hexdigest()[:16]
        # Another command may compute the features of the same reference.
        chunks = ChunkStore(self._cache.subdirectory(folder).subdirectory(name_of_chunks), exclusive=False)

        def compute(i: int) -> dict[str, np.ndarray]:
            first = i * CHUNK
            return self._extract(lambda rows: read_examples(source, first + rows), min(CHUNK, count - first))

        num_chunks = chunks.fill(f"Features of {name}", count, CHUNK, compute)
        rows = subset_indices(count, MAX_EXAMPLES)
        pool = np.concatenate([chunks.load(i)["pool"][rows[rows // CHUNK == i] % CHUNK] for i in range(num_chunks)])
        if statistics is not None:
            multihost_utils.sync_global_devices("features read")
            return statistics._replace(pool=pool, chunks=chunks)
        moments = moments_of_chunks(chunks.load(i)["pool"] for i in range(num_chunks))
        spatial = None
        if self.extractor.name == "inception":
            spatial = moments_of_chunks(chunks.load(i)["spatial"] for i in range(num_chunks))
        multihost_utils.sync_global_devices("features read")
        return SetFeatures(pool, moments, spatial, digest, chunks)
