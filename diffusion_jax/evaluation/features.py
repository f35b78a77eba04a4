"""Features of examples: FID's Inception, a small classifier of digits, or a function of the user, computed on all devices.

Features of a set are cached in chunks, so that an interrupted run resumes, and those of a reference are computed once for all
comparisons.
"""

from __future__ import annotations

import hashlib
import os
import pathlib
import sys
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from diffusion_jax.config.values import import_function
from diffusion_jax.distributed import devices, sharding
from diffusion_jax.distributed.processes import broadcast_from_process_0
from diffusion_jax.evaluation.example_sets import ExampleSet, SetFeatures, read_examples, value_digest
from diffusion_jax.files import save_npz, user_cache
from diffusion_jax.images import to_model_range
from diffusion_jax.metrics import MAX_EXAMPLES
from diffusion_jax.metrics.of_features import moments_of_chunks
from diffusion_jax.models.inception import IMAGE_SIZE, Activations, Inception
from diffusion_jax.pretrained.inception import DOWNLOAD_SOURCES, load_inception
from diffusion_jax.run_dir import RunDir

__all__ = [
    "CHUNK",
    "DIGITS_PATH",
    "RESIZES",
    "BatchFeatures",
    "DigitsNetwork",
    "FeatureExtractor",
    "FeaturePipeline",
    "cache_directory",
    "digits",
    "feature_dimension",
    "from_function",
    "from_name",
    "inception",
    "to_inception",
]

CHUNK = 1024  # examples; sums are over chunks, so that no metric depends on the batch size
RESIZES = ("tf1", "pytorch", "clean")
DIGITS_PATH = pathlib.Path(__file__).with_name("digits.safetensors")


# ---- Extractors


class BatchFeatures(NamedTuple):
    """Features of a batch. pool: [B, D], for most metrics. spatial: [B, S], for sFID, or None."""

    pool: Any
    spatial: Any = None


class FeatureExtractor(NamedTuple):
    """A function from images to features, with its parameters.

    name: for reports. digest: changes with everything that changes the features. function: (params, images uint8
    [B, H, W, C]) -> BatchFeatures, compiled if `compiles`. head: [D, classes], from features to logits, or None. resize: of
    Inception's images, one of RESIZES. published: whether its Frechet distance may be called FID.
    """

    name: str
    digest: str
    function: Callable
    params: Any = None
    head: np.ndarray | None = None
    resize: str | None = None
    published: bool = False
    compiles: bool = True


def inception(path: str | os.PathLike, resize: str = "tf1") -> FeatureExtractor:
    """FID's Inception, with the weights of a file for `pretrained.inception.load_inception`.

    resize: of images to 299x299: "tf1", bilinear as in TensorFlow 1, which the FID is defined by; "pytorch", pytorch-fid's,
    with half-pixel centers; "clean", clean-fid's antialiased bicubic one. Gray images are repeated to three channels.
    Raises: PretrainedError; ValueError for another resize.
    """
    if resize not in RESIZES:
        raise ValueError(f"resize={resize!r} is unknown; known: {', '.join(RESIZES)}")
    weights = load_inception(path)

    def function(params, images):
        images = jnp.broadcast_to(images, (*images.shape[:3], 3)).astype(jnp.float32)
        activations = Inception().apply({"params": params}, to_inception(images, resize))
        assert isinstance(activations, Activations)
        return BatchFeatures(activations.pool, activations.spatial)

    head = np.asarray(weights.params["fc"]["kernel"])
    name, digest = "inception", f"{weights.digest}_{resize}"
    return FeatureExtractor(name, digest, function, weights.params, head, resize, weights.published)


def to_inception(images, resize: str) -> jax.Array:
    """Inception's input [B, 299, 299, 3], in about [-1, 1], of images float32 [B, H, W, 3] in 0 ... 255."""
    if resize == "clean":
        # Keys' cubic with a = -1/2, its support scaled when it shrinks images, as Pillow's BICUBIC.
        shape = (len(images), IMAGE_SIZE, IMAGE_SIZE, 3)
        images = jax.image.resize(images, shape, "cubic", antialias=True, precision=jax.lax.Precision.HIGHEST)
        return (jnp.clip(images, 0, 255) - 128) / 128
    center = 0.5 if resize == "pytorch" else 0.0
    for axis in (2, 1):
        images = _resize_linear(images, axis, center)
    return images / 127.5 - 1 if resize == "pytorch" else (images - 128) / 128


def _resize_linear(x, axis: int, center: float) -> jax.Array:
    """x with one axis resized to 299 by linear interpolation. center: of a pixel, 0 (TensorFlow 1) or 0.5."""
    size = x.shape[axis]
    output_positions = np.arange(IMAGE_SIZE, dtype=np.float32) + np.float32(center)
    position = output_positions * np.float32(size / IMAGE_SIZE) - np.float32(center)
    position = np.maximum(position, 0)
    low = position.astype(np.int32)
    weight = jnp.expand_dims(position - low, tuple(i for i in range(x.ndim) if i != axis))
    first, second = jnp.take(x, low, axis), jnp.take(x, np.minimum(low + 1, size - 1), axis)
    return first + (second - first) * weight


def digits() -> FeatureExtractor:
    """The features of a small classifier of scikit-learn's digits, which is part of this package; for 8x8 gray images.

    Its metrics compare samples of digits with one another only. `benchmarks/digits_features.py` trained it, on the images
    that samples are compared with.
    """
    from safetensors.numpy import load

    content = DIGITS_PATH.read_bytes()
    flat = {tuple(name.split(".")): jnp.asarray(value) for name, value in load(content).items()}

    def function(params, images):
        features, _ = cast(tuple, DigitsNetwork().apply({"params": params}, images))
        return BatchFeatures(features)

    params = flax.traverse_util.unflatten_dict(flat)
    return FeatureExtractor("digits", hashlib.sha256(content).hexdigest(), function, params)


def from_function(function: Callable, name: str, digest: str) -> FeatureExtractor:
    """An extractor of a function examples -> features [B, D], which is not compiled.

    function: takes images uint8 [B, H, W, C], or continuous data float32 [B, *spatial, C] in the units of the data.
    digest: must change whenever the features would.
    """
    return FeatureExtractor(name, digest, lambda _, images: BatchFeatures(function(images)), compiles=False)


def from_name(name: str, inception_path: str = "", resize: str = "tf1") -> FeatureExtractor:
    """The extractor "inception" (with the weights at `inception_path`), "digits", or an imported "module:function".

    Raises: ValueError for another name; PretrainedError.
    """
    if name == "inception":
        if not inception_path:
            raise ValueError(f"features='inception' needs the path of its weights: {DOWNLOAD_SOURCES}")
        return inception(inception_path, resize)
    if name == "digits":
        return digits()
    if ":" not in name:
        raise ValueError(f"features={name!r} is unknown; known: inception, digits, module:function")
    try:
        function = import_function(name)
    except ValueError as error:
        raise ValueError(f"features={name!r} {error}") from None
    path = sys.modules[name.partition(":")[0]].__file__
    assert path is not None  # only namespace packages, which have no attributes, have no file
    with open(path, "rb") as file:  # the file approximates the function's identity
        content = hashlib.file_digest(file, "sha256").hexdigest()
    return from_function(function, name, f"{content}_{name}")


def feature_dimension(extractor: FeatureExtractor, image_shape: tuple[int, ...]) -> int | None:
    """D, the number of features, or None if only a call determines it.

    Raises: ValueError for images that the extractor does not support.
    """
    if not extractor.compiles:
        return None
    image = jax.ShapeDtypeStruct((1, *image_shape), jnp.uint8)
    return jax.eval_shape(extractor.function, extractor.params, image).pool.shape[1]


# ---- The classifier of digits


class DigitsNetwork(nn.Module):
    """The classifier of digits."""

    @nn.compact
    def __call__(self, images) -> tuple[jax.Array, jax.Array]:
        """(features [B, 64], logits [B, 10]) of images uint8 [B, 8, 8, C], whose channels are averaged.

        Raises: ValueError for other sizes and dtypes.
        """
        if images.shape[1:3] != (8, 8):
            raise ValueError(
                f"the digits' network takes images of 8x8 pixels, not {'x'.join(map(str, images.shape[1:]))}; "
                "--image_size=8 resizes folders (python -m diffusion_jax.evaluation)"
            )
        x = to_model_range(images).mean(axis=-1, keepdims=True)
        x = nn.relu(nn.Conv(32, (3, 3), name="conv_0")(x))
        x = nn.relu(nn.Conv(64, (3, 3), strides=2, name="conv_1")(x))
        features = nn.relu(nn.Dense(64, name="dense")(x.reshape(len(x), -1)))
        return features, nn.Dense(10, name="logits")(features)


# ---- Sets


def cache_directory() -> pathlib.Path:
    """The user's cache directory of features; it is safe to delete."""
    return user_cache() / "features"


class FeaturePipeline:
    """Computes features with an extractor, in batches of `batch_size` over a mesh.

    progress_bar: (title, total, done) -> a context manager whose `update(done)` shows progress.
    """

    def __init__(self, extractor: FeatureExtractor, mesh, batch_size: int, progress_bar: Callable):
        self.extractor, self._mesh, self._progress_bar = extractor, mesh, progress_bar
        self._batch_size = -(-batch_size // mesh.size) * mesh.size
        self._params, self._compute = None, extractor.function
        if extractor.compiles:
            replicated, rows = sharding.replicated(mesh), sharding.batch_sharding(mesh)
            self._params, options = jax.device_put(extractor.params, replicated), devices.compiler_options()
            self._compute = jax.jit(
                extractor.function, in_shardings=(replicated, rows), out_shardings=rows, compiler_options=options
            )

    def __call__(self, images: np.ndarray) -> BatchFeatures:
        """Features of images uint8 [N, H, W, C], or arrays float32 [N, *spatial, C], which every process has.

        Raises: ValueError for features that are not finite, or not [N, D].
        """
        return self._extract(images.__getitem__, len(images), lambda done: None)

    def _extract(
        self, read: Callable[[np.ndarray], np.ndarray], count: int, progress: Callable[[int], None]
    ) -> BatchFeatures:
        """Features of `count` images, of which each process reads the rows of its devices.

        progress: called with the number of finished images.
        """
        size, rows = self._batch_size, sharding.batch_sharding(self._mesh)
        compiles = self.extractor.compiles
        own_rows = sharding.process_rows(size, self._mesh) if compiles else np.arange(size)
        batches = []
        for start in range(0, count, size):
            # The last batch is padded with copies of the last image, which are removed below.
            batch = read(np.minimum(start + own_rows, count - 1))
            if compiles:
                batch = jax.make_array_from_process_local_data(rows, batch)
            out: Any = self._compute(self._params, batch)
            out = multihost_utils.process_allgather(out, tiled=True) if compiles else out
            out = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), out)
            if out.pool.ndim != 2 or len(out.pool) != size:
                raise ValueError(
                    f"{self.extractor.name} returns features of shape {out.pool.shape} for {size} images, not [{size}, D]"
                )
            batches.append(jax.tree.map(lambda leaf, start=start: leaf[: count - start], out))
            progress(min(start + size, count))
        features: BatchFeatures = jax.tree.map(lambda *leaves: np.concatenate(leaves), *batches)
        if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(features)):
            raise ValueError(f"the features of {self.extractor.name} are not finite")
        return features

    def extract_set(self, examples: ExampleSet, cache: RunDir) -> SetFeatures:
        """Features of a set, cached below `cache`.

        Statistics that its file holds replace those of its examples, which may be fewer.
        """
        source, name, statistics = examples.examples, pathlib.Path(examples.name).name, examples.statistics
        if source is None:
            assert statistics is not None
            return statistics
        count, num_chunks = len(source), -(-len(source) // CHUNK)
        with self._progress_bar(f"Reading {name}", count, 0) as bar:
            digest = broadcast_from_process_0(lambda: value_digest(source, bar.update))
        key = (digest, self.extractor.digest, CHUNK, jax.default_backend())
        cache = cache.subdirectory(hashlib.sha256(repr(key).encode()).hexdigest()[:16])
        broadcast_from_process_0(lambda: cache.path.mkdir(parents=True, exist_ok=True))
        stored = broadcast_from_process_0(lambda: [int(p.stem) for p in cache.path.glob("*.npz") if p.stem.isdecimal()])
        with self._progress_bar(f"Features of {name}", count, min(len(stored) * CHUNK, count)) as bar:
            for i in range(num_chunks):
                if i in stored:
                    continue
                first, size = i * CHUNK, min(CHUNK, count - i * CHUNK)

                def read(rows, first=first):
                    return read_examples(source, first + rows)

                features = self._extract(read, size, lambda done, first=first: bar.update(first + done))
                if jax.process_index() == 0:
                    arrays = {kind: leaf for kind, leaf in features._asdict().items() if leaf is not None}
                    save_npz(cache / f"{i}.npz", arrays)
                    cache.upload(cache / f"{i}.npz")
        multihost_utils.sync_global_devices("features written")

        def load(kind: str, i: int) -> np.ndarray:
            with np.load(cache.fetch(cache / f"{i}.npz")) as arrays:
                return arrays[kind]

        pool = np.concatenate([load("pool", i) for i in range(min(num_chunks, -(-MAX_EXAMPLES // CHUNK)))])[
            :MAX_EXAMPLES
        ]
        if statistics is not None:
            return statistics._replace(pool=pool, cache=cache)
        moments = moments_of_chunks(load("pool", i) for i in range(num_chunks))
        spatial = None
        if self.extractor.name == "inception":
            spatial = moments_of_chunks(load("spatial", i) for i in range(num_chunks))
        multihost_utils.sync_global_devices("features read")
        return SetFeatures(pool, moments, spatial, digest, cache)
