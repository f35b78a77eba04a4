"""Feature extractors for metrics of samples: FID's Inception, a small classifier of digits, or a function of the user."""

from __future__ import annotations

import hashlib
import importlib
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.distributed import compiler, sharding
from diffusion_jax.evaluation import digits_classifier
from diffusion_jax.models.inception import IMAGE_SIZE, Activations, Inception
from diffusion_jax.pretrained.inception import DOWNLOAD_SOURCES, load_inception

__all__ = [
    "RESIZES",
    "BatchFeatures",
    "FeatureExtractor",
    "compile_extractor",
    "digits",
    "feature_dimension",
    "from_function",
    "from_name",
    "inception",
    "to_inception",
]

RESIZES = ("tf1", "pytorch", "clean")


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
    """The features of a small classifier of scikit-learn's digits, which is part of this package; for 8x8 gray images."""
    params, digest = digits_classifier.load()

    def function(params, images):
        output = digits_classifier.DigitsNetwork().apply({"params": params}, images)
        assert isinstance(output, digits_classifier.ClassifierOutput)
        return BatchFeatures(output.features)

    return FeatureExtractor("digits", digest, function, params)


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
    module_name, colon, function_name = name.partition(":")
    if not colon:
        raise ValueError(f"features={name!r} is unknown; known: inception, digits, module:function")
    try:
        module = importlib.import_module(module_name)
        function = getattr(module, function_name)
        assert module.__file__ is not None  # only namespace packages, which have no attributes, have no file
        with open(module.__file__, "rb") as file:  # the file approximates the function's identity
            content = hashlib.file_digest(file, "sha256").hexdigest()
    except (ImportError, AttributeError, SyntaxError) as error:
        raise ValueError(f"features={name!r} cannot be imported: {error}") from None
    if not callable(function):
        raise ValueError(f"features={name!r} must be a function, not a {type(function).__name__}")
    return from_function(function, name, f"{content}_{name}")


def feature_dimension(extractor: FeatureExtractor, image_shape: tuple[int, ...]) -> int | None:
    """D, the number of features, or None if only a call determines it.

    Raises: ValueError for images that the extractor does not support.
    """
    if not extractor.compiles:
        return None
    image = jax.ShapeDtypeStruct((1, *image_shape), jnp.uint8)
    return jax.eval_shape(extractor.function, extractor.params, image).pool.shape[1]


def compile_extractor(extractor: FeatureExtractor, mesh) -> Callable[[Any], BatchFeatures]:
    """A function of images uint8 [B, H, W, C] that returns BatchFeatures; the batch is sharded if the extractor compiles."""
    if not extractor.compiles:
        return lambda images: extractor.function(None, images)
    replicated, rows = sharding.replicated(mesh), sharding.batch_sharding(mesh)
    params = jax.device_put(extractor.params, replicated)
    options = compiler.options()
    program = jax.jit(extractor.function, in_shardings=(replicated, rows), out_shardings=rows, compiler_options=options)
    return lambda images: program(params, images)
