"""The data sources: a data set of TFDS, a folder of images, and the digits of scikit-learn.

All of them implement `data.Source`.
"""

from __future__ import annotations

import collections
import functools
import importlib.util
import io
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from diffusion_jax.data.preparation import preparation_command
from diffusion_jax.data.tfrecords import TfRecords
from diffusion_jax.errors import DataError, UnreadableFilesError, list_names
from diffusion_jax.storage.downloads import local_path

__all__ = [
    "Digits",
    "Folder",
    "Source",
    "Tfds",
    "find_folder",
    "fit",
    "local_data_dir",
    "make_builder",
    "make_prepared_builder",
    "natural_shape",
    "read_class_names",
    "read_num_classes",
]

_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


@runtime_checkable
class Source(Protocol):
    """Examples with labels or conditions, read by index from any process.

    A source is picklable, because worker processes read from copies of it; files are opened when they are read. Any object
    with these members is a source and can be passed to `data.Batches` or `data.InMemory`:

        class Stripes:
            num_classes, class_names = 2, ("horizontal", "vertical")

            def __len__(self):
                return 1000

            def read(self, indices):
                labels = np.asarray(indices, np.int32) % 2
                images = np.zeros((len(labels), 8, 8, 1), np.uint8)
                images[labels == 0, ::2] = 255
                images[labels == 1, :, ::2] = 255
                return {"image": images, "label": labels}

    `runs.train.run` takes one as `source`. To name one on a command line, write a function of `config.data` that returns it,
    in a module that Python can import: `--config.data.dataset=module:function`.

    Two attributes are optional: num_classes, 0 if it is missing, for no labels; class_names, () if it is missing, for unknown
    names. `read_num_classes` and `read_class_names` return them.
    """

    def __len__(self) -> int:
        """The number of examples."""
        ...

    def read(self, indices: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
        """The arrays of n examples, at these indices, by name. Raises: DataError.

        Either "image", uint8 [n, *spatial, C]; or "x", real numbers [n, *spatial, C] in the units of the data, which
        `data.Normalized` standardizes. There are 0 to 3 spatial axes: none for vectors, one for series, two for images, three
        for volumes. "label", int32 [n], is optional, and so is "condition", real numbers [n, D] or [n, *spatial, K].
        """
        ...


def read_num_classes(source: Source) -> int:
    """The number of classes of a source; 0 if there are no labels."""
    return getattr(source, "num_classes", 0)


def read_class_names(source: Source) -> tuple[str, ...]:
    """The name of each class of a source; () if they are unknown."""
    return tuple(getattr(source, "class_names", ()))


def fit(image: Image.Image, image_size: tuple[int, int], channels: int) -> np.ndarray:
    """An image as uint8 [H, W, C] of size (H, W): resized to cover it (antialiased, bicubic) and center-cropped."""
    if image.mode.startswith("I"):  # 16-bit gray, which PIL would clip instead of scaling
        image = Image.fromarray(np.round(np.asarray(image) / 257).astype(np.uint8))
    image = image.convert("L" if channels == 1 else "RGB")
    height, width = image_size
    if image.size != (width, height):
        image = ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)
    return np.asarray(image).reshape(height, width, channels)


class Digits:
    """scikit-learn's 1,797 handwritten digits, 8x8 with 17 gray levels. Every sixth is held out as "test"."""

    num_classes, class_names = 10, tuple("0123456789")

    def __init__(self, split: str, image_size: tuple[int, int], channels: int):
        if split not in ("train", "test"):
            raise DataError(f"data.split={split!r}: the digits have 'train' and 'test'")
        sklearn = importlib.util.find_spec("sklearn")  # not imported, because that would take most of a second
        if sklearn is None or sklearn.origin is None:
            raise DataError("data.dataset='digits' needs scikit-learn: pip install scikit-learn")
        table = np.loadtxt(pathlib.Path(sklearn.origin).parent / "datasets" / "data" / "digits.csv.gz", delimiter=",")
        table = table[(np.arange(len(table)) % 6 == 5) == (split == "test")]
        gray = np.round(table[:, :64].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
        self._images = np.stack([fit(Image.fromarray(image), image_size, channels) for image in gray])
        self._labels = table[:, 64].astype(np.int32)

    def __len__(self) -> int:
        return len(self._labels)

    def read(self, indices: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
        return {"image": self._images[indices], "label": self._labels[indices]}


def find_folder(directory: str) -> pathlib.Path:
    """The local path of a folder of images. Raises: DataError if there is none."""
    root = local_path(directory)
    if not directory or not root.is_dir():
        raise DataError(f"data.data_dir={directory!r} is not a folder; give the folder of your images")
    return root


class Folder:
    """All image files below a folder, in order of their paths; if all are in subfolders, each subfolder is a class.

    Hidden files and folders are skipped; transparency is dropped, and only the first frame of an animation is read.
    images_outside: the images that are not in a subfolder although others are, so that there are no classes.
    """

    def __init__(self, directory: str, image_size: tuple[int, int], channels: int):
        root = find_folder(directory)
        self._root, self._size, self._channels = root, image_size, channels
        paths = [p.relative_to(root) for p in root.rglob("*") if p.is_file()]
        paths = [p for p in paths if not any(part.startswith(".") for part in p.parts)]
        files = sorted(p for p in paths if p.suffix.lower() in _SUFFIXES)
        self._skipped: collections.Counter = collections.Counter(
            p.suffix.lower() for p in paths if p.suffix.lower() not in _SUFFIXES
        )
        if not files:
            skipped = f"; it has only {self._skipped_files()}" if self._skipped else ""
            raise DataError(f"no images below {directory!r}; known: {', '.join(sorted(_SUFFIXES))}{skipped}")
        outside = [str(p) for p in files if len(p.parts) == 1]
        self.class_names = () if outside else tuple(sorted({p.parts[0] for p in files}))
        self.images_outside = outside if len(outside) < len(files) else []
        self._files = [str(p) for p in files]
        self._class_index = {name: i for i, name in enumerate(self.class_names)}
        self.num_classes = len(self.class_names)
        self._transparent: set[str] = set()
        self._animated: set[str] = set()

    def __len__(self) -> int:
        return len(self._files)

    def _skipped_files(self) -> str:
        reasons = {".gif": ".gif (may be animated: convert them to PNG)", "": "without a suffix"}
        counts = sorted(self._skipped.items(), key=lambda item: (-item[1], item[0]))
        return ", ".join(f"{n:,} {reasons.get(suffix, suffix)}" for suffix, n in counts)

    def encoded_files(self) -> list[tuple[str, pathlib.Path]]:
        """The names and paths of all files that examples are decoded from."""
        return [(file, self._root / file) for file in self._files]

    @property
    def findings(self) -> dict[str, list[str]]:
        """What reading has found for `notes`, as JSON values."""
        return {"transparent": sorted(self._transparent), "animated": sorted(self._animated)}

    @findings.setter
    def findings(self, values: dict[str, list[str]]) -> None:
        self._transparent, self._animated = set(values["transparent"]), set(values["animated"])

    def notes(self) -> list[str]:
        """Lines about skipped files and, for the images that were read, dropped transparency and frames."""
        notes = [f"Skipped other files: {self._skipped_files()}."] if self._skipped else []
        if self.images_outside:
            notes.append(f"No classes: {self.no_labels_reason}.")
        if self._transparent:
            notes.append(f"Dropped the transparency of {list_names(sorted(self._transparent), 3)}.")
        if self._animated:
            notes.append(f"Read only the first frame of {list_names(sorted(self._animated), 3)}.")
        return notes

    @property
    def no_labels_reason(self) -> str:
        """The reason why there are no classes, with advice; "" if there are classes."""
        if self.class_names:
            return ""
        if not self.images_outside:
            return f"{self._root} has no subfolders; put the images of each class into a subfolder"
        verb = "is" if len(self.images_outside) == 1 else "are"
        names = list_names(sorted(self.images_outside), 3)
        return f"{names} {verb} outside the subfolders; move every image into the subfolder of its class"

    def read(self, indices: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
        """Raises: UnreadableFilesError with every image that cannot be read."""
        files = [self._files[i] for i in indices]
        images, failures = [], []
        for file in files:
            try:
                images.append(self._read_image(file))
            except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # SyntaxError: some PNGs
                reason = "not an image, or corrupted" if isinstance(error, UnidentifiedImageError) else str(error)
                failures.append((str(self._root / file), reason))
        if failures:
            raise UnreadableFilesError(failures)
        batch = {"image": np.stack(images)}
        if self.num_classes:
            labels = [self._class_index[pathlib.PurePath(file).parts[0]] for file in files]
            batch["label"] = np.array(labels, np.int32)
        return batch

    def _read_image(self, file: str) -> np.ndarray:
        with Image.open(self._root / file) as image:
            if image.has_transparency_data:
                self._transparent.add(file)
            if getattr(image, "is_animated", False):
                self._animated.add(file)
            return self._resize(self._root / file, ImageOps.exif_transpose(image))

    def _resize(self, path: pathlib.Path, image: Image.Image) -> np.ndarray:
        return fit(image, self._size, self._channels)


def make_builder(name: str, data_dir: str | None) -> Any:
    """TFDS's builder of a data set. Raises: DataError for an unknown name, or without TFDS."""
    if importlib.util.find_spec("tensorflow_datasets") is None:
        raise DataError(
            f"data.dataset={name!r} is a data set of TFDS, and tensorflow_datasets is not installed: pip install '.[tfds]'; "
            "'digits', 'folder' and 'arrays' do not need it"
        )
    import tensorflow_datasets as tfds  # takes half a second, and only this source needs it

    try:
        return tfds.builder(name, data_dir=data_dir)
    except (tfds.core.DatasetNotFoundError, ValueError, AssertionError) as error:
        reason = "" if isinstance(error, tfds.core.DatasetNotFoundError) else f": {str(error).partition(chr(10))[0]}"
        raise DataError(
            f"data.dataset={name!r} must be a TFDS data set, 'digits', or 'folder' (with data.data_dir){reason}"
        ) from None


def make_prepared_builder(name: str, data_dir: str | None) -> Any:
    """As `make_builder`. Raises: DataError also for a data set that is not in the directory."""
    builder = make_builder(name, data_dir)
    if not builder.is_prepared():
        command = preparation_command(name, data_dir)
        raise DataError(
            f"the data set {name!r} is not in {builder.data_path.parent}; set data.data_dir, or prepare it with: {command}"
        )
    return builder


def local_data_dir(name: str, data_dir: str | None) -> str | None:
    """The directory of TFDS; of one in a bucket, a copy of the part that belongs to a data set."""
    return str(local_path(data_dir, below=f"{name.split('/')[0].split(':')[0]}/")) if data_dir else None


def natural_shape(name: str, data_dir: str | None) -> tuple[tuple[int, int] | None, int]:
    """((H, W), channels) of a TFDS data set's images, (None, channels) if they differ in size. Raises: DataError."""
    features = make_builder(name, local_data_dir(name, data_dir)).info.features
    _check_has_images(name, features)
    height, width, channels = features["image"].shape
    return (height, width) if height and width else None, channels or 3


def _check_has_images(name: str, features: Iterable[str]) -> None:
    if "image" not in features:
        raise DataError(f"the data set {name!r} has no feature 'image', only {', '.join(features)}")


class Tfds:
    """A TFDS data set in array_record or tfrecord format (random access, no TensorFlow at run time)."""

    def __init__(self, name: str, split: str, data_dir: str | None, image_size: tuple[int, int], channels: int):
        self._name, self._split, self._data_dir = name, split, data_dir
        self._size, self._channels = image_size, channels
        builder = make_prepared_builder(name, data_dir)
        directory = builder.data_path.parent
        file_format = builder.info.file_format.value
        if file_format not in ("array_record", "tfrecord"):
            other = f"{data_dir or '~/tensorflow_datasets'}_array_record"  # TFDS keeps one format in a directory
            raise DataError(
                f"the data set {name!r} in {directory} is in {file_format} format, not array_record or tfrecord; "
                f"prepare it with: {preparation_command(name, other)} and set data.data_dir={other}"
            )
        try:
            info = builder.info.splits[split]
            self._length, instructions = info.num_examples, info.file_instructions
        except (KeyError, ValueError):
            raise DataError(f"data.split={split!r}: {name!r} has {', '.join(builder.info.splits)}") from None
        features = builder.info.features
        _check_has_images(name, features)
        self.num_classes = getattr(features["label"], "num_classes", 0) or 0 if "label" in features else 0
        self.class_names = tuple(features["label"].names) if self.num_classes else ()
        self._tfrecords = TfRecords(instructions) if file_format == "tfrecord" else None
        shards = {pathlib.Path(instruction.filename) for instruction in instructions}
        self._files = sorted(shards | set(pathlib.Path(builder.data_path).glob("*.json")))
        self.findings: dict[str, list[str]] = {}  # as those of a `Folder`

    def encoded_files(self) -> list[tuple[str, pathlib.Path]]:
        """The names and paths of all files that examples are decoded from."""
        return [(path.name, path) for path in self._files]

    def __len__(self) -> int:
        return self._length

    def __getstate__(self):
        return {key: value for key, value in self.__dict__.items() if key not in ("_records", "_features")}

    @functools.cached_property
    def _records(self) -> Any:
        import tensorflow_datasets as tfds

        return tfds.data_source(
            self._name,
            split=self._split,
            data_dir=self._data_dir,
            decoders={"image": tfds.decode.SkipDecoding()},
        )

    @functools.cached_property
    def _features(self) -> Any:
        return make_builder(self._name, self._data_dir).info.features

    def _examples(self, indices: list[int]) -> Sequence[dict]:
        if self._tfrecords is None:
            return self._records.__getitems__(indices)
        import tensorflow_datasets as tfds

        raw = {"image": tfds.decode.SkipDecoding()}
        return [self._features.deserialize_example_np(self._tfrecords[i], decoders=raw) for i in indices]

    def read(self, indices: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
        try:
            records = self._examples([int(i) for i in indices])
            images = [fit(Image.open(io.BytesIO(r["image"])), self._size, self._channels) for r in records]
        except (OSError, SyntaxError, ValueError) as error:
            examples = f"examples {indices[0]} ... {indices[-1]}"
            raise DataError(f"cannot read {examples} of {self._name!r} {self._split!r}: {error}") from None
        batch = {"image": np.stack(images)}
        if self.num_classes:
            batch["label"] = np.array([record["label"] for record in records], np.int32)
        return batch
