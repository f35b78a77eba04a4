"""Data: sources of images, and batches as a pure function of (seed, step)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import numpy as np

from diffusion_jax.data.pipeline import Batches, example_indices, stream
from diffusion_jax.data.preparation import prepare
from diffusion_jax.data.sources import Digits, Folder, Memory, Tfds, fit, make_builder, natural_shape
from diffusion_jax.errors import DataError, UnreadableError

__all__ = [
    "Batches",
    "DataError",
    "Digits",
    "Folder",
    "Memory",
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
    """(H, W, C) of `config.data`, whose `image_size` is a number or (height, width). Raises: DataError."""
    size = config["image_size"]
    size = tuple(size) if isinstance(size, tuple | list) else (size, size)
    if len(size) != 2 or not all(isinstance(side, int) and side >= 1 for side in size):
        raise DataError(f"data.image_size={config['image_size']} must be a number of pixels, or (height, width)")
    if config["channels"] not in (1, 3):
        raise DataError(f"data.channels={config['channels']} must be 1 (gray) or 3 (color)")
    return (*size, config["channels"])


def check_levels(images: np.ndarray, levels: int) -> None:
    """Raises: DataError for uint8 images that do not lie on `levels` even gray levels, of which a likelihood would be."""
    grid = np.arange(256) * ((levels - 1) / 255)
    off = np.abs(grid - np.round(grid)) * (255 / (levels - 1)) > 0.5  # rounded to whole numbers is all they may be
    wrong = images[off[images]]
    if wrong.size:
        raise DataError(
            f"data.levels={levels}, but the images have gray {wrong[0]}, which is none of {levels} even levels (were they "
            "resized?); use data.levels=256, in a new --workdir"
        )


def describe(source) -> str:
    """How many images of how many classes a source has, with the classes' names; of many classes only some."""
    images, names = f"{len(source):,} image{'s' * (len(source) != 1)}", source.class_names
    if not names:
        return f"{images} without classes"
    named = [f"{i} {name}" for i, name in enumerate(names)]
    if len(named) > 12:
        named = [*named[:6], "...", named[-1]]
    numbered = all(name == str(i) for i, name in enumerate(names))  # their names say nothing more
    classes = f"{images} of {len(names):,} class{'es' * (len(names) != 1)}"
    return classes if numbered else f"{classes}: {', '.join(named)}"


def load(
    config: Mapping,
    progress: Callable[[Iterable[int], int], Iterable] = lambda sizes, total: sizes,
    say: Callable[[str], None] = lambda line: None,
):
    """The source that `config.data` names, in memory where it fits into `data.memory_mb`.

    A TFDS data set that is missing is downloaded and prepared first, if `data.download` is there and true.
    progress: as `Memory`, while the images are decoded. say: called with lines about the images.
    Raises: DataError with one line of advice.
    """
    *size, channels = image_shape(config)
    size = tuple(size)
    if config["dataset"] == "digits":
        source = Digits(config["split"], size, channels)
    elif config["dataset"] == "folder":
        source = Folder(config["data_dir"] or "", size, channels)
    else:
        name, data_dir = config["dataset"], config["data_dir"] or None
        if config.get("download", False):
            prepare(name, lambda: make_builder(name, data_dir), data_dir)
        source = Tfds(name, config["split"], data_dir, size, channels)
    say(f"{describe(source)}.")
    megabytes = len(source) * size[0] * size[1] * channels / 2**20
    try:
        return Memory(source, progress) if megabytes <= config["memory_mb"] else source
    finally:  # also before a refusal of damaged images
        for note in source.notes():
            say(note)
