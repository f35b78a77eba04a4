"""Data: sources of images, and batches as a pure function of (seed, step)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import numpy as np

from diffusion_jax.config import LEAVES, resolve
from diffusion_jax.data.pipeline import Batches, example_indices, stream
from diffusion_jax.data.preparation import prepare
from diffusion_jax.data.source import Source
from diffusion_jax.data.sources import Digits, Folder, InMemory, Tfds, fit, make_builder, natural_shape
from diffusion_jax.errors import DataError, UnreadableError

__all__ = [
    "Batches",
    "DataError",
    "Digits",
    "Folder",
    "InMemory",
    "Source",
    "Tfds",
    "UnreadableError",
    "check_levels",
    "describe",
    "example_indices",
    "fit",
    "image_shape",
    "load",
    "natural_shape",
    "stream",
]


def image_shape(config: Mapping) -> tuple[int, int, int]:
    """(H, W, C) of `config.data`, whose `image_size` is a number or (height, width).

    Raises: DataError for a size or a number of channels that its leaf does not allow.
    """
    for name in ("image_size", "channels"):
        kind = LEAVES[f"data.{name}"].kind
        try:
            kind.check(config[name])
        except ValueError:
            raise DataError(f"data.{name}={config[name]!r} must be {kind.allowed}") from None
    size = config["image_size"]
    height, width = size if isinstance(size, tuple | list) else (size, size)
    return height, width, config["channels"]


def check_levels(images: np.ndarray, levels: int) -> None:
    """Raises: DataError for uint8 images with other values than `levels` even gray levels, which a likelihood assumes."""
    grid = np.arange(256) * ((levels - 1) / 255)
    is_between = np.abs(grid - np.round(grid)) * (255 / (levels - 1)) > 0.5  # gray levels may be rounded to integers
    wrong = images[is_between[images]]
    if wrong.size:
        raise DataError(
            f"data.levels={levels}, but the images contain the value {wrong[0]}, which is not one of {levels} even gray "
            "levels (resized images have others); use data.levels=256, in a new --workdir"
        )


def describe(source: Source) -> str:
    """The numbers of images and classes of a source, with the names of up to 12 classes."""
    images, names = f"{len(source):,} image{'s' * (len(source) != 1)}", source.class_names
    if not names:
        return f"{images} without classes"
    classes = f"{images} of {len(names):,} class{'es' * (len(names) != 1)}"
    if all(name == str(i) for i, name in enumerate(names)):
        return classes
    labeled = [f"{i} {name}" for i, name in enumerate(names)]
    if len(labeled) > 12:
        labeled = [*labeled[:6], "...", labeled[-1]]
    return f"{classes}: {', '.join(labeled)}"


def load(
    config: Mapping,
    progress: Callable[[Iterable[int], int], Iterable] = lambda sizes, total: sizes,
    log: Callable[[str], None] = lambda line: None,
) -> Source:
    """The source of `config.data`, in memory if it fits into `data.memory_mb`.

    config: the leaves of the group `data`, which may be partial; the others have their defaults. A missing TFDS data set is
    downloaded and prepared first, if `data.download` is true.
    progress: as for `InMemory`, while the images are decoded. log: called with lines about the images.
    Raises: ConfigError for a value that its leaf does not allow; DataError with one line of advice.
    """
    config = resolve({"data": config})["data"]
    height, width, channels = image_shape(config)
    source = _open_source(config, (height, width), channels)
    log(f"{describe(source)}.")
    megabytes = len(source) * height * width * channels / 2**20
    try:
        return InMemory(source, progress) if megabytes <= config["memory_mb"] else source
    finally:  # also if corrupted images raise an error
        for note in source.notes() if isinstance(source, Folder) else ():
            log(note)


def _open_source(config: Mapping, image_size: tuple[int, int], channels: int) -> Source:
    if config["dataset"] == "digits":
        return Digits(config["split"], image_size, channels)
    if config["dataset"] == "folder":
        return Folder(config["data_dir"] or "", image_size, channels)
    name, data_dir = config["dataset"], config["data_dir"] or None
    if config["download"]:
        prepare(name, lambda: make_builder(name, data_dir), data_dir)
    return Tfds(name, config["split"], data_dir, image_size, channels)
