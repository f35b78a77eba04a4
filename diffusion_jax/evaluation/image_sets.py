"""Sets of images to compare (an .npz of samples, a folder, a data set), or files of statistics of such a set."""

from __future__ import annotations

import hashlib
import pathlib
import zipfile
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

from diffusion_jax import data
from diffusion_jax.data.array_rows import map_array
from diffusion_jax.errors import DataError
from diffusion_jax.evaluation.metrics import Moments
from diffusion_jax.storage.downloads import local_path

__all__ = [
    "ImageSet",
    "NpzImages",
    "Statistics",
    "UnresizedFolder",
    "is_of_samples",
    "open_image_set",
    "pixel_digest",
    "read_examples",
]


class Statistics(NamedTuple):
    """Moments of Inception's features from a file, ADM's (mu, sigma, mu_s, sigma_s) or pytorch-fid's (mu, sigma).

    Such a file does not contain the number of images, so `count` is 0.
    """

    moments: Moments
    spatial: Moments | None


class NpzImages:
    """`arr_0` of an .npz, uint8 [N, H, W, C], as --mode=sample and ADM's scripts write it; read from the disk when needed.

    channels: 1 or 3 converts the images to gray or to three channels; None leaves them unchanged.
    """

    def __init__(self, path: pathlib.Path, channels: int | None = None):
        self._channels = channels
        try:
            self._images = map_array(path, "arr_0")
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path} contains neither images (arr_0) nor statistics (mu, sigma): {error}") from None
        _check_images(path, self._images)

    def __len__(self) -> int:
        return len(self._images)

    def read(self, indices: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
        images = np.asarray(self._images[indices])
        if self._channels == 3:
            images = np.broadcast_to(images, (*images.shape[:3], 3))
        elif self._channels == 1 and images.shape[3] == 3:  # the conversion of folders
            images = np.stack([np.asarray(Image.fromarray(image).convert("L")) for image in images])[..., None]
        return {"image": images}


def is_of_samples(path: pathlib.Path) -> bool:
    """Whether the name of an .npz of a run is one of samples: not of edits, of a trajectory or of an unfinished file."""
    return not (path.name.startswith("edit_") or path.stem.endswith("_trajectory") or ".partial." in path.name)


def _check_images(path: pathlib.Path, images: np.ndarray) -> None:
    where = f"{path}: arr_0"
    if images.dtype.kind == "f" and images.size:
        low, high = float(np.min(images)), float(np.max(images))
        if not np.isfinite([low, high]).all():
            raise ValueError(f"{where} contains values that are not finite; sample again")
        conversion = "round((x + 1) * 127.5)" if low < 0 else "round(x * 255)" if high <= 1 else "round(x)"
        raise ValueError(
            f"{where} contains {images.dtype} from {low:.3g} to {high:.3g}, not uint8 from 0 to 255; "
            f"save {conversion} as uint8"
        )
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3):
        raise ValueError(f"{where} is {images.dtype} {list(images.shape)}, not uint8 [N, H, W, 1 or 3]")
    if not len(images):
        raise ValueError(f"{where} contains no images")


class UnresizedFolder(data.Folder):
    """A folder's images, in color if any of them is, or with `channels` (1 or 3).

    Images of different sizes raise an error, because a resize would change the metrics; `image_size` resizes all of them.
    """

    def __init__(self, path: pathlib.Path, image_size: int | None, channels: int | None = None):
        super().__init__(str(path), (1, 1), 3)
        with Image.open(path / self._files[0]) as image:
            self._size = ImageOps.exif_transpose(image).size[::-1]
        self._require_one_size = image_size is None
        if image_size is not None:
            self._size = (image_size, image_size)
        self._channels = channels or (3 if any(_has_color(path / file) for file in self._files) else 1)

    def _resize(self, path: pathlib.Path, image: Image.Image) -> np.ndarray:
        if self._require_one_size and image.size != self._size[::-1]:
            raise DataError(
                f"{path} is {image.size[0]}x{image.size[1]}, but the first image is {self._size[1]}x{self._size[0]}; "
                "resize them to one size, or use image_size"
            )
        return super()._resize(path, image)


def _has_color(path: pathlib.Path) -> bool:
    """Whether a file's header declares color; False for a corrupted file, which `read` reports."""
    try:
        with Image.open(path) as image:
            return image.mode not in ("1", "L", "LA", "I", "I;16")
    except (OSError, SyntaxError, Image.DecompressionBombError):
        return False


class ImageSet(NamedTuple):
    """A set of images, or statistics of one.

    name: for reports. images: None for a file of statistics only. statistics: None if the file has none; they may be of more
    images than the file contains, as in ADM's reference batches.
    """

    name: str
    images: data.Source | None = None
    statistics: Statistics | None = None


def open_image_set(
    location: str, data_dir: str = "", image_size: int | None = None, channels: int | None = None
) -> ImageSet:
    """A set of images.

    location: an .npz, a folder, a run's directory (its newest samples), or a data set and its split ("cifar10:train",
    "digits:test"). image_size: resizes a folder's or data set's images to cover it, as training does; required for images of
    different sizes. channels: 1 or 3 converts all images to gray or to three channels; None leaves them unchanged.
    Raises: ValueError, DataError, OSError: one line.
    """
    path = local_path(location)
    if path.is_dir():
        files = [p for p in (path / "samples").glob("*.npz") if is_of_samples(p)]
        if files:
            newest = max(files, key=lambda p: p.stat().st_mtime)
            return ImageSet(str(newest), NpzImages(newest, channels))
        if (path / "config.json").is_file():
            raise ValueError(f"{path} is a run without samples; draw some with --mode=sample")
        return ImageSet(location, UnresizedFolder(path, image_size, channels))
    if path.is_file():
        statistics, has_images = _read_statistics(path)
        return ImageSet(location, NpzImages(path, channels) if has_images or not statistics else None, statistics)
    name, _, split = location.partition(":")
    if path.suffix:
        raise ValueError(f"{location}: no such file")
    try:
        size, natural = ((8, 8), 1) if name == "digits" else data.natural_shape(name, data_dir or None)
    except DataError as error:
        raise ValueError(f"{location}: no such file or folder, and as a data set: {error}") from None
    if not image_size and not size:
        raise ValueError(f"the images of {name!r} have different sizes; give image_size, the pixels to resize them to")
    config = {"dataset": name, "split": split or "train", "data_dir": data_dir, "memory_mb": 0}
    config["channels"] = channels or natural
    return ImageSet(f"{name}:{config['split']}", data.load(config | {"image_size": image_size or size}))


def _read_statistics(path: pathlib.Path) -> tuple[Statistics | None, bool]:
    """(the statistics in an .npz or None, whether it contains images)."""
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is not an .npz, an archive of arrays as numpy.savez writes it")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            names = [name for name in ("mu", "sigma", "mu_s", "sigma_s") if name in arrays]
            values, has_images = {name: np.asarray(arrays[name], np.float64) for name in names}, "arr_0" in arrays
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} cannot be read as .npz: {error}") from None
    for mean, covariance in (("mu", "sigma"), ("mu_s", "sigma_s")):
        if mean in values and (
            values[mean].ndim != 1 or values.get(covariance, values[mean]).shape != values[mean].shape * 2
        ):
            raise ValueError(f"{path}: {mean} and {covariance} are not [D] and [D, D]")
    if not all(np.isfinite(value).all() for value in values.values()):
        raise ValueError(f"{path}: its statistics are not finite")
    if "mu" not in values:
        return None, has_images
    spatial = Moments(values["mu_s"], values["sigma_s"], 0) if "mu_s" in values else None
    return Statistics(Moments(values["mu"], values["sigma"], 0), spatial), has_images


def read_examples(source: data.Source, indices: np.ndarray) -> np.ndarray:
    """The examples of a source: images uint8, or arrays float32 in the units of the data."""
    batch = source.read(indices)
    return batch["image"] if "image" in batch else np.asarray(batch["x"], np.float32)


def pixel_digest(source: data.Source, chunk: int, progress: Callable[[int], None]) -> str:
    """SHA-256 of the values of a source, read `chunk` examples at a time. progress: called with the number of read ones."""
    digest = hashlib.sha256()
    for start in range(0, len(source), chunk):
        images = read_examples(source, np.arange(start, min(start + chunk, len(source))))
        digest.update(repr(images.shape[1:]).encode())
        digest.update(np.ascontiguousarray(images).data)
        progress(start + len(images))
    return digest.hexdigest()
