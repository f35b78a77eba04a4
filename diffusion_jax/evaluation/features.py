"""Computes features of examples on all devices: with FID's Inception, a small digits classifier, or a user's function.

Features are cached in chunks, so that an interrupted launch can resume, and the features of a reference are computed once for
all comparisons.
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
from jax.sharding import Mesh

from diffusion_jax.console import ProgressBar
from diffusion_jax.distributed.processes import broadcast_from_process_0
from diffusion_jax.distributed.sharding import BatchFunction
from diffusion_jax.evaluation.example_sets import ExampleSet, SetFeatures, read_examples, value_digest
from diffusion_jax.evaluation.inception import DOWNLOAD_SOURCES, RESIZES, Inception, load_inception, to_inception
from diffusion_jax.files import user_cache
from diffusion_jax.functions import find_function
from diffusion_jax.images import to_model_range
from diffusion_jax.metrics import MAX_EXAMPLES
from diffusion_jax.metrics.of_features import moments_of_chunks
from diffusion_jax.run_dir import ChunkStore, RunDir

__all__ = [
    "CHUNK",
    "DIGITS_PATH",
    "NEEDS_INCEPTION",
    "BatchFeatures",
    "DigitsNetwork",
    "FeatureExtractor",
    "FeaturePipeline",
    "check_shape",
    "default_name",
    "digits",
    "from_name",
    "inception",
]

CHUNK = 1024  # examples; sums run over chunks, so that metrics do not depend on the batch size
NEEDS_INCEPTION = (
    f"these metrics need inception=PATH, the weights of FID's Inception ({DOWNLOAD_SOURCES}); or features=digits, or "
    "features=module:function"
)
DIGITS_PATH = pathlib.Path(__file__).with_name("digits.safetensors")


# ---- Extractors


class BatchFeatures(NamedTuple):
    """Features of a batch. pool: [B, D], used by most metrics. spatial: [B, S] for sFID, or None."""

    pool: Any
    spatial: Any = None


class FeatureExtractor(NamedTuple):
    """A function from images to features, with its parameters.

    name: for reports. digest: changes with everything that changes the features. function: (params, uint8 images
    [B, H, W, C]) -> BatchFeatures, compiled unless params is None. head: [D, classes], from features to logits, or None.
    resize: Inception's resize method, one of RESIZES. published: whether the Frechet distance may be called FID.
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
    if resize not in RESIZES:
        raise ValueError(f"resize={resize!r} is unknown; known: {', '.join(RESIZES)}")
    params, digest, published = load_inception(path)

    def function(params, images):
        images = jnp.broadcast_to(images, (*images.shape[:3], 3)).astype(jnp.float32)
        return BatchFeatures(*Inception().apply({"params": params}, to_inception(images, resize)))

    head = np.asarray(params["fc"]["kernel"])
    return FeatureExtractor("inception", f"{digest}_{resize}", function, params, head, resize, published)


def digits() -> FeatureExtractor:
    """Returns this package's small classifier of scikit-learn's digits, for 8x8 gray images.

    The metrics can only compare sets of generated digits with each other. `benchmarks/digits_features.py` trained the
    classifier on the reference images.
    """
    from safetensors.numpy import load

    content = DIGITS_PATH.read_bytes()
    flat = {tuple(name.split(".")): jnp.asarray(value) for name, value in load(content).items()}

    def function(params, images):
        features, _ = cast(tuple, DigitsNetwork().apply({"params": params}, images))
        return BatchFeatures(features)

    params = flax.traverse_util.unflatten_dict(flat)
    return FeatureExtractor("digits", hashlib.sha256(content).hexdigest(), function, params)


def default_name(dataset: str, of_images: bool) -> str:
    """Returns the default extractor: "digits" or "inception" for images, "" for other data (metrics without features)."""
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
    content = hashlib.sha256(source.read_bytes()).hexdigest()  # approximates the function's identity
    return FeatureExtractor(name, f"{content}_{name}", lambda _, images: BatchFeatures(function(images)))


def check_shape(extractor: FeatureExtractor, image_shape: tuple[int, ...]) -> None:
    """Raises ValueError for images that the extractor does not support, before it computes any."""
    if extractor.params is not None:
        jax.eval_shape(extractor.function, extractor.params, jax.ShapeDtypeStruct((1, *image_shape), jnp.uint8))


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
                "--image_size=8 resizes folders (python -m diffusion_jax.evaluation)"
            )
        x = to_model_range(images).mean(axis=-1, keepdims=True)
        x = nn.relu(nn.Conv(32, (3, 3), name="conv_0")(x))
        x = nn.relu(nn.Conv(64, (3, 3), strides=2, name="conv_1")(x))
        features = nn.relu(nn.Dense(64, name="dense")(x.reshape(len(x), -1)))
        return features, nn.Dense(10, name="logits")(features)


# ---- Sets


class FeaturePipeline:
    """Computes features with an extractor, in batches of `batch_size` over a mesh.

    workdir: the cache for several processes, because each process must see the features; one process uses the user's cache.
    """

    def __init__(self, extractor: FeatureExtractor, mesh: Mesh, batch_size: int, workdir: RunDir | None = None):
        self.extractor, self._batch_size = extractor, batch_size
        self._cache, self._compute = RunDir(user_cache() / "features"), None
        if workdir is not None and jax.process_count() > 1:
            self._cache = workdir.subdirectory(".features")
        if extractor.params is not None:
            self._compute = BatchFunction(extractor.function, extractor.params, mesh, batch_size)
            self._batch_size = self._compute.batch_size

    def __call__(self, images: np.ndarray) -> BatchFeatures:
        """Computes features of uint8 images [N, H, W, C] or float32 arrays [N, *spatial, C], equal on every process.

        Raises: ValueError for features that are not finite, or not [N, D].
        """
        return self._extract(images.__getitem__, len(images))

    def _extract(self, read: Callable[[np.ndarray], np.ndarray], count: int) -> BatchFeatures:
        """Computes features of `count` images. read: (indices) -> images."""
        batches: list[BatchFeatures] = []
        for start in range(0, count, self._batch_size):
            if self._compute:
                out = self._compute(read, start, count)
            else:  # the last batch is padded, too
                out = self.extractor.function(None, read(np.minimum(start + np.arange(self._batch_size), count - 1)))
                shape = np.shape(out.pool)
                if len(shape) != 2 or shape[0] != self._batch_size:
                    raise ValueError(
                        f"{self.extractor.name} returns features of shape {shape} for {self._batch_size} images, not "
                        f"[{self._batch_size}, D]"
                    )
            batches.append(jax.tree.map(lambda rows, start=start: np.asarray(rows, np.float32)[: count - start], out))
        features: BatchFeatures = jax.tree.map(lambda *rows: np.concatenate(rows), *batches)
        if not all(np.isfinite(rows).all() for rows in jax.tree.leaves(features)):
            raise ValueError(f"the features of {self.extractor.name} are not finite")
        return features

    def extract_set(self, examples: ExampleSet, folder: str = "references") -> SetFeatures:
        """Computes a set's features, stored in the cache folder "references" or "samples".

        Statistics in the set's file take precedence over the examples, which may be fewer.
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
            features = self._extract(lambda rows: read_examples(source, first + rows), min(CHUNK, count - first))
            return {kind: rows for kind, rows in features._asdict().items() if rows is not None}

        num_chunks = chunks.fill(f"Features of {name}", count, CHUNK, compute)
        num_in_pool = min(num_chunks, -(-MAX_EXAMPLES // CHUNK))
        pool = np.concatenate([chunks.load(i)["pool"] for i in range(num_in_pool)])[:MAX_EXAMPLES]
        if statistics is not None:
            return statistics._replace(pool=pool, chunks=chunks)
        moments = moments_of_chunks(chunks.load(i)["pool"] for i in range(num_chunks))
        spatial = None
        if self.extractor.name == "inception":
            spatial = moments_of_chunks(chunks.load(i)["spatial"] for i in range(num_chunks))
        multihost_utils.sync_global_devices("features read")
        return SetFeatures(pool, moments, spatial, digest, chunks)
