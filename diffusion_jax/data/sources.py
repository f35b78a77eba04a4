"""Where images come from: TFDS by name, a folder of the user's own, or the digits that ship with scikit-learn.

A source has a length, `num_classes` (0 where there are no labels) and `read(indices) -> (images uint8 [n, H, W, C], labels
int32 [n])`, random access from any process. It is picklable; files are opened where they are read.
"""

from __future__ import annotations

import functools
import importlib.util
import io
import pathlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image, ImageOps

_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


class DataError(Exception):
    """Data that is missing, unreadable or of the wrong kind: one line that says what, where, and what to do."""


def fit(image: Image.Image, image_size: tuple[int, int], channels: int) -> np.ndarray:
    """An image as uint8 [H, W, C] of the wanted size: resized to cover it (antialiased, bicubic) and centre-cropped."""
    if image.mode.startswith("I"):  # 16 bits of grey, which PIL would clip, not scale
        image = Image.fromarray(np.round(np.asarray(image) / 257).astype(np.uint8))
    image = image.convert("L" if channels == 1 else "RGB")
    height, width = image_size
    if image.size != (width, height):
        image = ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)
    return np.asarray(image).reshape(height, width, channels)


class Digits:
    """scikit-learn's 1,797 handwritten digits, 8x8 with 17 levels of grey. Every sixth is held out as "test"."""

    num_classes = 10

    def __init__(self, split: str, image_size: tuple[int, int], channels: int):
        if split not in ("train", "test"):
            raise DataError(f"data.split={split!r}: the digits have 'train' and 'test'")
        sklearn = importlib.util.find_spec("sklearn")  # only found, for its import would take most of a second
        if sklearn is None:
            raise DataError("the digits are scikit-learn's: pip install scikit-learn")
        table = np.loadtxt(pathlib.Path(sklearn.origin).parent / "datasets" / "data" / "digits.csv.gz", delimiter=",")
        table = table[(np.arange(len(table)) % 6 == 5) == (split == "test")]
        grey = np.round(table[:, :64].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
        self._images = np.stack([fit(Image.fromarray(image), image_size, channels) for image in grey])
        self._labels = table[:, 64].astype(np.int32)

    def __len__(self) -> int:
        return len(self._labels)

    def read(self, indices: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        return self._images[indices], self._labels[indices]


class Folder:
    """Every image file below a folder, in order of its path; where all stand in subfolders, each subfolder is a class.

    Hidden files and folders are left out; transparency is dropped.
    """

    def __init__(self, directory: str, image_size: tuple[int, int], channels: int):
        root = pathlib.Path(directory).expanduser()
        if not directory or not root.is_dir():
            raise DataError(f"data.data_dir={directory!r} is no folder; give the one that holds your images")
        self._root, self._size, self._channels = root, image_size, channels
        found = [p.relative_to(root) for p in root.rglob("*") if p.suffix.lower() in _SUFFIXES and p.is_file()]
        files = sorted(p for p in found if not any(part.startswith(".") for part in p.parts))
        if not files:
            raise DataError(f"no images below {directory!r}; looked for {', '.join(sorted(_SUFFIXES))}")
        classes = sorted({p.parts[0] for p in files}) if all(len(p.parts) > 1 for p in files) else []
        self._files = [str(p) for p in files]
        self._class_index = {name: i for i, name in enumerate(classes)}
        self.num_classes = len(classes)

    def __len__(self) -> int:
        return len(self._files)

    def read(self, indices: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        files = [self._files[i] for i in indices]
        labels = [self._class_index.get(pathlib.PurePath(file).parts[0], 0) for file in files]
        return np.stack([self._image(self._root / file) for file in files]), np.array(labels, np.int32)

    def _image(self, path: pathlib.Path) -> np.ndarray:
        try:
            with Image.open(path) as image:
                return self._fit(path, ImageOps.exif_transpose(image))
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:  # SyntaxError: some damaged PNGs
            raise DataError(f"cannot read the image {path}: {error}; repair or remove it") from None

    def _fit(self, path: pathlib.Path, image: Image.Image) -> np.ndarray:
        return fit(image, self._size, self._channels)


def _prepare_command(name: str, data_dir: str | None) -> str:
    return (
        'python -c "import tensorflow_datasets as tfds; '
        f"tfds.builder('{name}', data_dir={data_dir!r}, file_format='array_record').download_and_prepare()\""
    )


def _builder(name: str, data_dir: str | None):
    import tensorflow_datasets as tfds  # half a second, and only this source needs it

    try:
        return tfds.builder(name, data_dir=data_dir)
    except (tfds.core.DatasetNotFoundError, ValueError, AssertionError) as error:
        reason = "" if isinstance(error, tfds.core.DatasetNotFoundError) else f": {error}"
        raise DataError(
            f"data.dataset={name!r} is neither a TFDS data set nor 'digits' nor 'folder' (with data.data_dir){reason}"
        ) from None


def natural_shape(name: str, data_dir: str | None) -> tuple[tuple[int, int] | None, int]:
    """((H, W), channels) of a TFDS data set's images, (None, channels) where they differ in size. Raises: DataError."""
    features = _builder(name, data_dir).info.features
    if "image" not in features:
        raise DataError(f"the data set {name!r} has no feature 'image', only {', '.join(features)}")
    height, width, channels = features["image"].shape
    return (height, width) if height and width else None, channels or 3


class Tfds:
    """A TFDS data set in array_record format (random access, no TensorFlow at run time)."""

    def __init__(self, name: str, split: str, data_dir: str | None, image_size: tuple[int, int], channels: int):
        self._name, self._split, self._data_dir = name, split, data_dir
        self._size, self._channels = image_size, channels
        builder = _builder(name, data_dir)
        where = f"in {builder.data_path.parent}"
        if not builder.is_prepared():
            how = _prepare_command(name, data_dir)
            raise DataError(f"the data set {name!r} is not {where}; set data.data_dir, or prepare it with: {how}")
        if builder.info.file_format.value != "array_record":
            found = builder.info.file_format.value
            other = f"{data_dir or '~/tensorflow_datasets'}_array_record"  # TFDS keeps one format in a directory
            raise DataError(
                f"the data set {name!r} {where} is in {found} format, not array_record; prepare it with: "
                f"{_prepare_command(name, other)} and set data.data_dir={other}"
            )
        try:
            self._length = builder.info.splits[split].num_examples
        except (KeyError, ValueError):
            raise DataError(f"data.split={split!r}: {name!r} has {', '.join(builder.info.splits)}") from None
        features = builder.info.features
        if "image" not in features:
            raise DataError(f"the data set {name!r} has no feature 'image', only {', '.join(features)}")
        self._has_label = "label" in features
        self.num_classes = getattr(features["label"], "num_classes", 0) or 0 if self._has_label else 0

    def __len__(self) -> int:
        return self._length

    def __getstate__(self):
        return {key: value for key, value in self.__dict__.items() if key != "_records"}

    @functools.cached_property
    def _records(self):
        import tensorflow_datasets as tfds

        return tfds.data_source(
            self._name, split=self._split, data_dir=self._data_dir, decoders={"image": tfds.decode.SkipDecoding()}
        )

    def read(self, indices: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        try:
            records = self._records.__getitems__([int(i) for i in indices])
            images = [fit(Image.open(io.BytesIO(r["image"])), self._size, self._channels) for r in records]
        except (OSError, SyntaxError, ValueError) as error:
            where = f"examples {indices[0]} ... {indices[-1]}"
            raise DataError(f"cannot read {where} of {self._name!r} {self._split!r}: {error}") from None
        labels = [record["label"] for record in records] if self._has_label else np.zeros(len(indices))
        return np.stack(images), np.array(labels, np.int32)


class Memory:
    """Any source, decoded once: images uint8 [N, H, W, C] and labels int32 [N]."""

    def __init__(self, source, progress: Callable[[Iterable[int], int], Iterable] = lambda sizes, total: sizes):
        """progress: (sizes of the decoded chunks, number of images) -> sizes, to show how many images are decoded."""
        self.num_classes = source.num_classes
        n = len(source)
        first, _ = source.read([0])
        self.images, self.labels = np.empty((n, *first.shape[1:]), np.uint8), np.empty(n, np.int32)

        def decode(chunk):
            self.images[chunk], self.labels[chunk] = source.read(chunk)
            return len(chunk)

        chunks = np.array_split(np.arange(n), -(-n // 256))
        with ThreadPoolExecutor() as pool:  # decoding PNG and JPEG releases the interpreter's lock
            for _ in progress(pool.map(decode, chunks), n):
                pass

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, indices: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        return self.images[indices], self.labels[indices]
