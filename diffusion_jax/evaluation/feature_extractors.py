"""From images to the features that metrics compare: FID's Inception, a small network of the embedded digits, or a function of
yours.
"""

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
from diffusion_jax.evaluation import digits
from diffusion_jax.models.inception import IMAGE_SIZE, Inception
from diffusion_jax.pretrained.inception import WHERE, load_inception

RESIZES = ("tf1", "pytorch", "clean")


class Extracted(NamedTuple):
    """pool: [B, D], what most metrics are of. spatial: [B, S], of sFID, or None."""

    pool: Any
    spatial: Any = None


class Extractor(NamedTuple):
    """A way from images to features.

    function: (params, images uint8 [B, H, W, C]) -> Extracted, which is compiled where `compiles`. head: [D, classes], from
    features to logits, or None. name, digest: what is reported of it; the digest stands for everything that changes features.
    published: whether its Frechet distance may be called FID, and `resize` how it then enlarged images.
    """

    name: str
    digest: str
    function: Callable
    params: Any = None
    head: np.ndarray | None = None
    resize: str | None = None
    published: bool = False
    compiles: bool = True


def inception(path: str | os.PathLike, resize: str = "tf1") -> Extractor:
    """FID's Inception, with the weights of a file as `pretrained.inception` takes it.

    resize: how images come to 299x299: "tf1", bilinear as TensorFlow 1 did it, which FID is defined by; "pytorch",
    pytorch-fid's, with half-pixel centers; "clean", clean-fid's antialiased bicubic one. Gray ones get three channels.
    Raises: PretrainedError; ValueError for another resize.
    """
    if resize not in RESIZES:
        raise ValueError(f"resize={resize!r} is unknown; known: {', '.join(RESIZES)}")
    weights = load_inception(path)

    def function(params, images):
        images = jnp.broadcast_to(images, (*images.shape[:3], 3)).astype(jnp.float32)
        found = Inception().apply({"params": params}, to_inception(images, resize))
        return Extracted(found.pool, found.spatial)

    head = np.asarray(weights.params["fc"]["kernel"])
    name, digest = "inception", f"{weights.digest}_{resize}"
    return Extractor(name, digest, function, weights.params, head, resize, weights.published)


def to_inception(images, resize: str):
    """Images float32 [B, H, W, 3] in 0 ... 255 as Inception takes them: [B, 299, 299, 3], in about [-1, 1]."""
    if resize == "clean":
        # Keys' cubic with a = -1/2, its support stretched where it shrinks: what Pillow calls BICUBIC.
        shape = (len(images), IMAGE_SIZE, IMAGE_SIZE, 3)
        images = jax.image.resize(images, shape, "cubic", antialias=True, precision=jax.lax.Precision.HIGHEST)
        return (jnp.clip(images, 0, 255) - 128) / 128
    center = 0.5 if resize == "pytorch" else 0.0
    for axis in (2, 1):
        images = _linear(images, axis, center)
    return images / 127.5 - 1 if resize == "pytorch" else (images - 128) / 128


def _linear(x, axis: int, center: float):
    """One axis enlarged to 299 by linear interpolation. center: of a pixel, 0 in TensorFlow 1 (its left edge) or 0.5."""
    size = x.shape[axis]
    place = (np.arange(IMAGE_SIZE, dtype=np.float32) + np.float32(center)) * np.float32(size / IMAGE_SIZE) - np.float32(
        center
    )
    place = np.maximum(place, 0)
    low = place.astype(np.int32)
    weight = jnp.expand_dims(place - low, tuple(i for i in range(x.ndim) if i != axis))
    first, second = jnp.take(x, low, axis), jnp.take(x, np.minimum(low + 1, size - 1), axis)
    return first + (second - first) * weight


def digits_network() -> Extractor:
    """The features of a small classifier of scikit-learn's digits, which ships with this package; for 8x8 gray images."""
    params, digest = digits.load()

    def function(params, images):
        return Extracted(digits.DigitsNetwork().apply({"params": params}, images).features)

    return Extractor("digits", digest, function, params)


def of_function(function: Callable, name: str, digest: str) -> Extractor:
    """Your own: images uint8 [B, H, W, C] -> features [B, D], a plain call. digest: changes whenever its features would."""
    return Extractor(name, digest, lambda _, images: Extracted(function(images)), compiles=False)


def named(name: str, inception_path: str = "", resize: str = "tf1") -> Extractor:
    """The extractor called "inception" (whose weights `inception_path` names), "digits", or "module:function", imported.

    Raises: ValueError for a name that is none of these; PretrainedError.
    """
    if name == "inception":
        if not inception_path:
            raise ValueError(f"the weights of FID's Inception are not named: {WHERE}")
        return inception(inception_path, resize)
    if name == "digits":
        return digits_network()
    path, colon, function = name.partition(":")
    if not colon:
        raise ValueError(f"features={name!r} is unknown; known: inception, digits, module:function")
    try:
        module = importlib.import_module(path)
        found = getattr(module, function)
        with open(module.__file__, "rb") as file:  # as near as one comes to what it computes
            content = hashlib.file_digest(file, "sha256").hexdigest()
    except (ImportError, AttributeError, SyntaxError) as error:
        raise ValueError(f"features={name!r} cannot be imported: {error}") from None
    if not callable(found):
        raise ValueError(f"features={name!r} is no function, but a {type(found).__name__}")
    return of_function(found, name, f"{content}_{name}")


def check(extractor: Extractor, image_shape: tuple[int, int, int]) -> int | None:
    """D, the number of its features, where that can be known without computing. Raises: ValueError for images that it does
    not take.
    """
    if not extractor.compiles:
        return None
    image = jax.ShapeDtypeStruct((1, *image_shape), jnp.uint8)
    return jax.eval_shape(extractor.function, extractor.params, image).pool.shape[1]


def compiled(extractor: Extractor, mesh) -> Callable[[Any], Extracted]:
    """images uint8 [B, H, W, C] -> Extracted, the batch spread over the mesh where the extractor compiles."""
    if not extractor.compiles:
        return lambda images: extractor.function(None, images)
    whole, rows = sharding.replicated(mesh), sharding.batch_sharding(mesh)
    params = jax.device_put(extractor.params, whole)
    options = compiler.options()
    run = jax.jit(extractor.function, in_shardings=(whole, rows), out_shardings=rows, compiler_options=options)
    return lambda images: run(params, images)
