"""Image sources: scikit-learn's digits, a folder of image files, and a cache for decoded images.

The cache is in the user's cache directory, so that a data set is decoded once and not at every launch. A cache file
is named by the SHA-256 of the encoded files (names and contents) and the decoding settings: changed files are decoded again.
"""

from __future__ import annotations

import abc
import collections
import contextlib
import hashlib
import importlib.util
import json
import pathlib
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import PIL
from PIL import Image, ImageOps

from diffusion_jax.data.sources import (
    InMemory,
    NamedSource,
    Progress,
    Source,
    classes_of_files,
    find_files,
    read_classes,
    size_and_channels,
)
from diffusion_jax.errors import DataError, UnreadableFilesError, list_names
from diffusion_jax.files import map_array, save_npz, user_cache
from diffusion_jax.storage.downloads import local_path
from diffusion_jax.untrusted import read_image

_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
_VERSION = 2  # increase if sources decode the same files to other arrays


def fit(image: Image.Image, image_size: tuple[int, int], channels: int) -> np.ndarray:
    """Converts an image to uint8 [H, W, C]: resized to cover (H, W) (antialiased, bicubic) and center-cropped."""
    if image.mode.startswith("I"):  # 16-bit gray; PIL would clip instead of scaling
        image = Image.fromarray(np.round(np.asarray(image) / 257).astype(np.uint8))
    image = image.convert("L" if channels == 1 else "RGB")
    height, width = image_size
    if image.size != (width, height):
        image = ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)
    return np.asarray(image).reshape(height, width, channels)


class Digits(InMemory, NamedSource):
    """scikit-learn's 1,797 handwritten digits, 8x8 with 17 gray levels. Every sixth digit is held out as "test"."""

    @classmethod
    def from_config(cls, config: Mapping) -> Digits:
        return cls(config["split"], *size_and_channels(config))

    def __init__(self, split: str, image_size: tuple[int, int], channels: int):
        if split not in ("train", "test"):
            raise DataError(f"data.split={split!r}: the digits have 'train' and 'test'")
        sklearn = importlib.util.find_spec("sklearn")  # not imported, because the import takes almost a second
        if sklearn is None or sklearn.origin is None:
            raise DataError("data.dataset='digits' needs scikit-learn: pip install scikit-learn")
        table = np.loadtxt(pathlib.Path(sklearn.origin).parent / "datasets" / "data" / "digits.csv.gz", delimiter=",")
        table = table[(np.arange(len(table)) % 6 == 5) == (split == "test")]
        gray = np.round(table[:, :64].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
        images = np.stack([fit(Image.fromarray(image), image_size, channels) for image in gray])
        super().__init__({"image": images, "label": table[:, 64].astype(np.int32)}, 10, "0123456789")


class EncodedImages(NamedSource):
    """A source of images that are decoded on reading."""

    @abc.abstractmethod
    def encoded_files(self) -> list[tuple[str, pathlib.Path]]:
        """Lists the names and paths of all files that examples are decoded from."""


class Folder(EncodedImages):
    """All image files below a folder, in path order; if every image is in a subfolder, each subfolder is a class.

    Hidden files and folders are skipped; transparency is dropped, and only the first frame of an animation is read.
    image_size: None for images with equal sizes, which are not resized.
    """

    of_files = True

    @classmethod
    def from_config(cls, config: Mapping) -> Folder:
        return cls(config["data_dir"], *size_and_channels(config))

    def __init__(self, directory: str, image_size: tuple[int, int] | None, channels: int):
        root = find_folder(directory)
        self._root, self._resizes, self._channels = root, image_size is not None, channels
        paths, self._link_notes = find_files(root)
        files = [p for p in paths if p.suffix.lower() in _SUFFIXES]
        self._skipped = collections.Counter(suffix for p in paths if (suffix := p.suffix.lower()) not in _SUFFIXES)
        if not files:
            skipped = f"; it has only {self._skipped_files()}" if self._skipped else ""
            known = ", ".join(sorted(_SUFFIXES))
            raise DataError(" ".join([f"no images below {directory!r}; known: {known}{skipped}", *self._link_notes]))
        self.class_names, self._labels = classes_of_files(files)
        self.num_classes = len(self.class_names)
        outside = [str(p) for p in files if len(p.parts) == 1]
        self._outside = outside if len(outside) < len(files) else []
        self._files = [str(p) for p in files]
        if image_size is None:
            width, height = read_image(root / files[0], upright=True).size
            image_size = height, width
        self._size = image_size
        self._transparent: set[str] = set()
        self._animated: set[str] = set()

    def __len__(self) -> int:
        return len(self._files)

    def _skipped_files(self) -> str:
        reasons = {".gif": ".gif (may be animated: convert them to PNG)", "": "without a suffix"}
        counts = sorted(self._skipped.items(), key=lambda item: (-item[1], item[0]))
        return ", ".join(f"{n:,} {reasons.get(suffix, suffix)}" for suffix, n in counts)

    def encoded_files(self) -> list[tuple[str, pathlib.Path]]:
        return [(file, self._root / file) for file in self._files]

    def holdout_keys(self, loaded: Source) -> Iterable[bytes]:
        """Returns each image's path below the folder as its key, so that no image is read."""
        return (name.replace("\\", "/").encode() for name in self._files)

    def notes(self) -> list[str]:
        """Returns lines about skipped files, and about transparency and frames dropped by `read` (not for cached images)."""
        notes = [f"Skipped other files: {self._skipped_files()}."] * bool(self._skipped) + self._link_notes
        if self._outside:
            are = "is" if len(self._outside) == 1 else "are"
            advice = "move every image into the subfolder of its class"
            notes.append(f"No classes: {list_names(self._outside, 3)} {are} outside the subfolders; {advice}.")
        if self._transparent:
            notes.append(f"Dropped the transparency of {list_names(sorted(self._transparent), 3)}.")
        if self._animated:
            notes.append(f"Read only the first frame of {list_names(sorted(self._animated), 3)}.")
        return notes

    def read(self, indices: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
        """Raises: UnreadableFilesError with all unreadable images; DataError for unequal sizes if `image_size` is None."""
        images, failures = [], []
        for file in (self._files[i] for i in indices):
            try:
                images.append(self._read_image(file))
            except (OSError, ValueError) as error:
                failures.append((str(self._root / file), str(error)))
        if failures:
            raise UnreadableFilesError(failures)
        batch = {"image": np.stack(images)}
        if self._labels is not None:
            batch["label"] = self._labels[indices]
        return batch

    def _read_image(self, file: str) -> np.ndarray:
        image = read_image(self._root / file, upright=True)
        if image.has_transparency_data:
            self._transparent.add(file)
        if getattr(image, "is_animated", False):
            self._animated.add(file)
        if not self._resizes and image.size != self._size[::-1]:
            raise DataError(
                f"{self._root / file} is {image.size[0]}x{image.size[1]}, but the first image is "
                f"{self._size[1]}x{self._size[0]}; resize all images to one size, or use image_size"
            )
        return fit(image, self._size, self._channels)


def find_folder(directory: str) -> pathlib.Path:
    """Returns the local path of an image folder. Raises: DataError if it does not exist."""
    root = local_path(directory)
    if not directory or not root.is_dir():
        raise DataError(f"data.data_dir={directory!r} is not a folder; give the folder of your images")
    return root


def decode_once(source: EncodedImages, config: Mapping, progress: Progress, log: Callable[[str], None]) -> InMemory:
    """Returns the source in memory: memory-mapped from the cache, or decoded and written to the cache.

    config: a complete `config.data`. A corrupted cache file, found by the .npz checksums, is replaced; if
    the cache cannot be written, a line is logged.
    Raises: UnreadableFilesError with all corrupted images; DataError.
    """
    settings = {name: config[name] for name in ("dataset", "image_size", "channels")}
    settings["split"] = "train" if source.of_files else config["split"]  # a folder is decoded as a whole
    directory = user_cache() / "decoded"
    try:
        path = directory / f"{_source_digest(source, settings)}.npz"
    except OSError:  # a file is unreadable; the source raises a better message
        return InMemory.load(source, progress)
    with contextlib.suppress(OSError, ValueError, EOFError, zipfile.BadZipFile):  # no cache file, or corrupted
        with zipfile.ZipFile(path) as archive:
            names = [name.removesuffix(".npy") for name in archive.namelist()]
            is_whole = archive.testzip() is None
        if is_whole:
            return InMemory({name: map_array(path, name).view(np.ndarray) for name in names}, *read_classes(source))
    loaded = InMemory.load(source, progress)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        save_npz(path, loaded.arrays)  # several processes may write the same file
    except OSError as error:
        reason = error.strerror or str(error)
        log(f"Note: the decoded images are not kept in {directory} ({reason}); the next launch decodes them again.")
    return loaded


def _source_digest(source: EncodedImages, settings: Mapping[str, object]) -> str:
    """Returns the SHA-256 of a source's files (names and contents), the settings and the versions that decode them."""

    def file_digest(path: pathlib.Path) -> str:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    names, paths = zip(*source.encoded_files(), strict=True)
    with ThreadPoolExecutor() as pool:  # hashing releases the interpreter's lock
        files = list(zip(names, pool.map(file_digest, paths), strict=True))
    made_with = {"version": _VERSION, "pillow": PIL.__version__, "source": type(source).__name__}
    text = json.dumps([made_with, dict(settings), files], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()
