"""What is measured: sets of images (an .npz of samples, a folder, a data set by its name), or statistics of such a set that
others have computed.
"""

from __future__ import annotations

import hashlib
import pathlib
import zipfile
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps

from diffusion_jax import data
from diffusion_jax.evaluation.metrics import Moments


class Statistics(NamedTuple):
    """Moments of Inception's features as files keep them, ADM's (mu, sigma, mu_s, sigma_s) or pytorch-fid's (mu, sigma).

    Such a file does not say of how many images: their `count` is 0.
    """

    moments: Moments
    spatial: Moments | None


class Npz:
    """`arr_0` of an .npz, uint8 [N, H, W, C], as --mode=sample and ADM's scripts write it; read from the disk when needed.

    channels: 1 or 3 makes them gray or gives them three channels; None leaves them as they are.
    """

    num_classes = 0

    def __init__(self, path: pathlib.Path, channels: int | None = None):
        self._channels = channels
        try:
            self._images = _mapped(path, "arr_0")
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path} holds neither images (arr_0) nor statistics (mu, sigma): {error}") from None
        _check_images(path, self._images)

    def __len__(self) -> int:
        return len(self._images)

    def read(self, indices: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        images = np.asarray(self._images[indices])
        if self._channels == 3:
            images = np.broadcast_to(images, (*images.shape[:3], 3))
        elif self._channels == 1 and images.shape[3] == 3:  # as folders are made gray
            images = np.stack([np.asarray(Image.fromarray(image).convert("L")) for image in images])[..., None]
        return images, np.zeros(len(indices), np.int32)


def _mapped(path: pathlib.Path, name: str) -> np.ndarray:
    """An array of an .npz: where it is not compressed, a view of the file, so that it takes no memory of its own."""
    with zipfile.ZipFile(path) as archive:
        member = archive.getinfo(f"{name}.npy")
        with archive.open(member) as file:
            version = np.lib.format.read_magic(file)
            read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
            shape, fortran, dtype = read_header[version](file)
            start = file.tell()
    if member.compress_type != zipfile.ZIP_STORED or fortran or dtype.hasobject:
        with np.load(path, allow_pickle=False) as arrays:
            return arrays[name]
    with path.open("rb") as file:
        file.seek(member.header_offset + 26)  # of the local header: the lengths of the name and of what follows it
        start += member.header_offset + 30 + sum(np.frombuffer(file.read(4), "<u2").tolist())
    return np.memmap(path, dtype, "r", start, shape)


def _check_images(path: pathlib.Path, images: np.ndarray) -> None:
    where = f"{path}: arr_0"
    if images.dtype.kind == "f" and images.size:
        low, high = float(np.min(images)), float(np.max(images))
        if not np.isfinite([low, high]).all():
            raise ValueError(f"{where} holds numbers that are not finite; what drew these images has failed")
        to = "round((x + 1) * 127.5)" if low < 0 else "round(x * 255)" if high <= 1 else "round(x)"
        raise ValueError(
            f"{where} holds {images.dtype} from {low:.3g} to {high:.3g}, not uint8 from 0 to 255; save {to} as uint8"
        )
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3):
        raise ValueError(f"{where} is {images.dtype} {list(images.shape)}, not uint8 [N, H, W, 1 or 3]")
    if not len(images):
        raise ValueError(f"{where} holds no images")


class FolderAsItIs(data.Folder):
    """A folder's images, in color if any of them is, unless `channels` (1 or 3) decides.

    One of another size is refused, for a resize would be measured, too, unless `image_size` asks for it.
    """

    def __init__(self, path: pathlib.Path, image_size: int | None, channels: int | None = None):
        super().__init__(str(path), (1, 1), 3)
        with Image.open(path / self._files[0]) as image:
            self._size = ImageOps.exif_transpose(image).size[::-1]
        self._one_size = image_size is None
        if image_size is not None:
            self._size = (image_size, image_size)
        self._channels = channels or (3 if any(_has_color(path / file) for file in self._files) else 1)

    def _fit(self, path: pathlib.Path, image: Image.Image) -> np.ndarray:
        if self._one_size and image.size != self._size[::-1]:
            raise data.DataError(
                f"{path} is {image.size[0]}x{image.size[1]}, and the first image {self._size[1]}x{self._size[0]}; resize "
                "them to one size, or let image_size do it"
            )
        return super()._fit(path, image)


def _has_color(path: pathlib.Path) -> bool:
    """Whether a file's header says so; a damaged file is left to what reads it."""
    try:
        with Image.open(path) as image:
            return image.mode not in ("1", "L", "LA", "I", "I;16")
    except (OSError, SyntaxError, Image.DecompressionBombError):
        return False


class ImageSet(NamedTuple):
    """name: what was asked for. images: a source, as those of `data`; None of a file with statistics alone. statistics: where
    the file has them; they may be of more images than are beside them, as in ADM's reference batches.
    """

    name: str
    images: Any = None
    statistics: Statistics | None = None


def open_set(what: str, data_dir: str = "", image_size: int | None = None, channels: int | None = None) -> ImageSet:
    """A set of images by its name: an .npz, a folder, a run's directory (its newest samples), or a data set and its split
    ("cifar10:train", "digits:test").

    image_size: resizes a folder's or data set's images to cover it, as training does; needed where they have no one size.
    channels: 1 or 3 makes all images gray or gives them three channels; unless given, they stay as they are.
    Raises: ValueError, data.DataError, OSError: one line.
    """
    path = pathlib.Path(what).expanduser()
    if path.is_dir():
        found = [
            p for p in (path / "samples").glob("*.npz") if not p.name.startswith("edit_") and ".partial." not in p.name
        ]
        if found:
            newest = max(found, key=lambda p: p.stat().st_mtime)
            return ImageSet(str(newest), Npz(newest, channels))
        if (path / "config.json").is_file():
            raise ValueError(f"{path} is a run without samples; draw some with --mode=sample")
        return ImageSet(what, FolderAsItIs(path, image_size, channels))
    if path.is_file():
        statistics, has_images = _read_statistics(path)
        return ImageSet(what, Npz(path, channels) if has_images or not statistics else None, statistics)
    name, _, split = what.partition(":")
    if path.suffix:
        raise ValueError(f"{what}: no such file")
    try:
        size, natural = ((8, 8), 1) if name == "digits" else data.natural_shape(name, data_dir or None)
    except data.DataError as error:
        raise ValueError(f"{what}: no such file or folder, and as a data set: {error}") from None
    if not image_size and not size:
        raise ValueError(f"the images of {name!r} have no one size; give image_size, the pixels to resize them to")
    config = {"dataset": name, "split": split or "train", "data_dir": data_dir, "memory_mb": 0}
    config["channels"] = channels or natural
    return ImageSet(f"{name}:{config['split']}", data.load(config | {"image_size": image_size or size}))


def _read_statistics(path: pathlib.Path) -> tuple[Statistics | None, bool]:
    """(what an .npz has of them, whether it has images)."""
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is no .npz, an archive of arrays as numpy.savez writes it")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            named = [name for name in ("mu", "sigma", "mu_s", "sigma_s") if name in arrays]
            found, has_images = {name: np.asarray(arrays[name], np.float64) for name in named}, "arr_0" in arrays
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} cannot be read as .npz: {error}") from None
    for mean, covariance in (("mu", "sigma"), ("mu_s", "sigma_s")):
        if mean in found and (
            found[mean].ndim != 1 or found.get(covariance, found[mean]).shape != found[mean].shape * 2
        ):
            raise ValueError(f"{path}: {mean} and {covariance} are not [D] and [D, D]")
    if not all(np.isfinite(values).all() for values in found.values()):
        raise ValueError(f"{path}: its statistics are not finite")
    if "mu" not in found:
        return None, has_images
    spatial = Moments(found["mu_s"], found["sigma_s"], 0) if "mu_s" in found else None
    return Statistics(Moments(found["mu"], found["sigma"], 0), spatial), has_images


def digest(source, chunk: int, progress: Callable[[int], None]) -> str:
    """SHA-256 of every pixel of a source, in order, read `chunk` images at a time; progress is told how many are read."""
    found = hashlib.sha256()
    for start in range(0, len(source), chunk):
        images, _ = source.read(np.arange(start, min(start + chunk, len(source))))
        found.update(repr(images.shape[1:]).encode())
        found.update(np.ascontiguousarray(images))
        progress(start + len(images))
    return found.hexdigest()
