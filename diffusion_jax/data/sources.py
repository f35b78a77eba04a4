"""Sources of examples: protocol, arrays in memory, derived sources, checks and splits."""

from __future__ import annotations

import abc
import contextlib
import hashlib
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, runtime_checkable

import numpy as np

from diffusion_jax.errors import DataError, DiffusionJaxError, UnreadableFilesError, describe_exception, shorten
from diffusion_jax.functions import import_function
from diffusion_jax.images import is_image_shape
from diffusion_jax.untrusted import leads_out

_BLOCK_BYTES = 2**24
_NUM_CHECKED = 4
_ARRAYS = ("x", "image", "label", "condition", "condition_missing")

# Shows progress: a function (the chunks' sizes, yielded as chunks are read; number of all examples) -> the same sizes.
Progress = Callable[[Iterable[int], int], Iterable[int]]


@runtime_checkable
class Source(Protocol):
    """Examples with labels or conditions, read by index from any process.

    A source is picklable, because worker processes read from copies; files are opened on reading. Any object with these
    members is a source and can be passed to `data.Batches` or `data.InMemory.load`:

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

    Pass a source to `runs.train.run` as `source`. To use a source on a command line, write a function `config.data` -> source
    in an importable module: `--config.data.dataset=module:function`.

    Three attributes are optional: num_classes, by default 0 (no labels); class_names, by default () (unknown names); and
    block_lengths, the numbers of consecutive examples that are cheapest to read together, in order. Training shuffles the
    blocks, and the examples within a few blocks; by default, all examples are one block.
    """

    def __len__(self) -> int:
        """The number of examples."""
        ...

    def read(self, indices: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
        """Returns the arrays of n examples, at these indices, by name. Raises: DataError.

        Either "image", uint8 [n, *spatial, C]; or "x", real numbers [n, *spatial, C] in data units, which
        `data.Normalized` standardizes. There are 0 to 3 spatial axes: 0 for vectors, 1 for series, 2 for images, 3 for
        volumes. Optional: "label", int32 [n]; "condition", real numbers [n, D] or [n, *spatial, K]; and
        "condition_missing", bool [n], True for examples without a condition, whose values in "condition" are not read.
        """
        ...


def read_classes(source: Source) -> tuple[int, tuple[str, ...]]:
    """Returns a source's optional attributes: (the number of classes, their names)."""
    return getattr(source, "num_classes", 0), tuple(getattr(source, "class_names", ()))


def read_block_lengths(source: Source) -> tuple[int, ...]:
    """Returns the numbers of examples in the blocks of a source, without empty blocks; () if all examples are one block."""
    lengths = tuple(filter(None, getattr(source, "block_lengths", ())))
    return lengths if len(lengths) > 1 else ()


def batch_examples(batch: Mapping[str, np.ndarray]) -> np.ndarray:
    """Returns the examples in a batch, without labels and conditions."""
    return batch["image"] if "image" in batch else batch["x"]


def read_conditions(batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the arrays "condition" and "condition_missing" of a batch or file, if they exist."""
    return {name: batch[name] for name in ("condition", "condition_missing") if name in batch}


def find_files(root: pathlib.Path) -> tuple[list[pathlib.Path], list[str]]:
    """Returns (the files below a folder, relative to the folder, in path order and without hidden files; notes).

    Links out of the folder are skipped.
    """
    found = list(root.rglob("*"))
    links = {path for path in found if path.is_symlink() and leads_out(path, root)}
    files = [path.relative_to(root) for path in found if path not in links and path.is_file()]
    files = sorted(path for path in files if not any(part.startswith(".") for part in path.parts))
    return files, [f"Skipped {len(links):,} links out of the folder; copy the files to use them."] * bool(links)


def classes_of_files(files: Sequence[pathlib.Path]) -> tuple[tuple[str, ...], np.ndarray | None]:
    """Returns (the subfolder names, each file's label int32 [N]); ((), None) if a file is outside all subfolders."""
    if any(len(path.parts) == 1 for path in files):
        return (), None
    names, labels = np.unique([path.parts[0] for path in files], return_inverse=True)
    return tuple(names.tolist()), labels.astype(np.int32)


def read_in_order(source: Source, size: int) -> Iterator[dict[str, np.ndarray]]:
    """Yields all examples of a source, `size` at a time."""
    for start in range(0, len(source), size):
        yield source.read(np.arange(start, min(start + size, len(source))))


class NamedSource(Source):
    """A source that `data.dataset` names: a class in `data.SOURCES`, or a TFDS data set.

    of_files: whether the examples are files at `data.data_dir`, which `data.holdout` may split.
    """

    num_classes: int = 0
    class_names: tuple[str, ...] = ()
    block_lengths: Sequence[int] = ()
    of_files = False

    @classmethod
    @abc.abstractmethod
    def from_config(cls, config: Mapping) -> Source:
        """Makes the source for a complete `config.data`. Raises: DataError."""

    @classmethod
    def has_splits(cls, config: Mapping) -> bool:
        """Whether `data.split` selects some of the examples, without `data.holdout`."""
        return not cls.of_files

    def notes(self) -> list[str]:
        """Returns lines about data that are not read."""
        return []

    def holdout_keys(self, loaded: Source) -> Iterable[bytes]:
        """Yields each example's key for `are_held_out`: the bytes of the values, without label and condition.

        loaded: the source itself or its copy in memory.
        """
        size = max(_BLOCK_BYTES // batch_examples(loaded.read([0])).nbytes, 1)
        return (row.tobytes() for batch in read_in_order(loaded, size) for row in batch_examples(batch))


class Arrays:
    """A source of arrays, named as in `Source.read`: NumPy arrays, or arrays in files that are read by indexing."""

    block_lengths: Sequence[int] = ()

    def __init__(self, arrays: Mapping[str, Any], num_classes: int = 0, class_names: Sequence[str] = ()):
        self.arrays, self.num_classes, self.class_names = dict(arrays), num_classes, tuple(class_names)

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values())))

    def read(self, indices: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
        rows = np.asarray(indices, np.int64)
        return {name: array[rows] for name, array in self.arrays.items()}


class InMemory(Arrays):
    """A source of NumPy arrays, such as "image" uint8 [N, *spatial, C]."""

    @classmethod
    def load(cls, source: Source, progress: Progress = lambda sizes, total: sizes) -> InMemory:
        """Reads all examples of a source. Raises: UnreadableFilesError with all corrupted images."""
        n, first, failures = len(source), {}, {}
        with contextlib.suppress(UnreadableFilesError):  # `decode` finds this corrupted image again
            first = source.read([0])
        arrays = {name: np.empty((n, *array.shape[1:]), array.dtype) for name, array in first.items()}

        def decode(chunk):
            try:
                batch = source.read(chunk)
                for name, array in arrays.items():
                    array[chunk] = batch[name]
            except UnreadableFilesError as error:
                failures.update(error.failures)
            return len(chunk)

        with ThreadPoolExecutor() as pool:  # decoding PNG and JPEG releases the interpreter's lock
            for _ in progress(pool.map(decode, np.array_split(np.arange(n), -(-n // 256))), n):
                pass
        if failures:
            raise UnreadableFilesError(failures.items())
        loaded = cls(arrays, *read_classes(source))
        loaded.block_lengths = read_block_lengths(source)  # the order must not depend on the available memory
        return loaded


class DerivedSource:
    """A source derived from another source, with the same classes."""

    def __init__(self, source: Source):
        self.source = source
        self.num_classes, self.class_names = read_classes(source)
        self.block_lengths = read_block_lengths(source)

    def __len__(self) -> int:
        return len(self.source)

    def read(self, indices: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
        return self.source.read(indices)


def is_in_memory(source: Source) -> bool:
    """Whether a source, or the source that it is derived from, is in memory, so that batches need no worker processes."""
    while isinstance(source, DerivedSource):
        source = source.source
    return isinstance(source, InMemory)


class SelectedExamples(DerivedSource):
    """The examples at some indices [N] of a source."""

    def __init__(self, source: Source, indices: np.ndarray):
        super().__init__(source)
        self.indices, self.block_lengths = indices, ()

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, indices: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
        return self.source.read(self.indices[indices])


@contextlib.contextmanager
def readable(what: object) -> Iterator[None]:
    """Turns any error from reading data into a one-line DataError, because codecs raise their own errors."""
    try:
        yield
    except (DiffusionJaxError, MemoryError):
        raise
    except Exception as error:
        reason = str(error)
        if isinstance(error, OSError) and error.strerror and str(error.filename) in str(what):
            reason = error.strerror
        reason = " ".join(reason.split()) or type(error).__name__
        raise DataError(f"cannot read {what}: {reason}") from error


# ---- Checks


def example_shape(config: Mapping) -> tuple[int, ...]:
    """Returns (*spatial, C) from `config.data`; `image_size` is the size of each axis, or one number for a square."""
    size = config["image_size"]
    return (*(size if isinstance(size, tuple | list) else (size, size)), config["channels"])


def is_of_images(config: Mapping) -> bool:
    """Whether `config.data` describes images: gray levels, and examples of an image's shape."""
    return config["levels"] is not None and is_image_shape(example_shape(config))


def noun(config: Mapping) -> str:
    """Returns "images" or "examples", the word for the examples of `config.data` in messages."""
    return "images" if is_of_images(config) else "examples"


def size_and_channels(config: Mapping) -> tuple[tuple[int, int], int]:
    """Returns ((height, width), channels) for image files. Raises: DataError for settings that describe other data."""
    if not is_of_images(config):
        settings = ", ".join(f"data.{name}={config[name]}" for name in ("image_size", "channels", "levels"))
        raise DataError(
            f"data.dataset={config['dataset']!r} has images with 1 or 3 channels of gray levels, not {settings}; "
            "other arrays are data.dataset=arrays or module:function"
        )
    height, width, channels = example_shape(config)
    return (height, width), channels


def check_levels(images: np.ndarray, levels: int) -> None:
    """Raises DataError if uint8 images have values outside the `levels` evenly spaced gray levels that a likelihood needs."""
    grid = np.arange(256) * ((levels - 1) / 255)
    is_between = np.abs(grid - np.round(grid)) * (255 / (levels - 1)) > 0.5  # gray levels may be rounded to integers
    wrong = images[is_between[images]]
    if wrong.size:
        raise DataError(
            f"data.levels={levels}, but the images contain the value {wrong[0]}, which is not one of {levels} even gray "
            "levels (resizing makes other values); use data.levels=256, in a new --workdir"
        )


def check_examples(config: Mapping, source: Source) -> None:
    """Raises DataError if a source has no examples, or if the shape or kind of its first examples contradicts the config."""
    if not len(source):
        raise DataError(f"data.dataset={config['dataset']!r} has no examples")
    lengths = getattr(source, "block_lengths", ())
    if len(lengths) and sum(lengths) != len(source):
        raise DataError(f"a source's block_lengths add up to {sum(lengths):,}, but it has {len(source):,} examples")
    batch: Any = source.read(np.arange(min(_NUM_CHECKED, len(source))))
    names = list(batch) if isinstance(batch, Mapping) else [type(batch).__name__]
    if len({"image", "x"} & set(names)) != 1 or set(names) - set(_ARRAYS):
        raise DataError(
            'a source must return a dictionary with either "image" (uint8) or "x" (other numbers), and optionally "label", '
            f'"condition" and "condition_missing"; got {", ".join(map(repr, names))}'
        )
    arrays = {name: np.asarray(array) for name, array in batch.items()}
    name, shape, levels = "image" if "image" in arrays else "x", example_shape(config), config["levels"]
    dtype = arrays[name].dtype
    is_uint8, is_real = dtype == np.uint8, dtype.kind in "iuf" or dtype.name == "bfloat16"
    if (name == "image") != is_uint8 or not is_real:
        advice = "give uint8 as image, and other real numbers as x"
        raise DataError(f'a source returns "{name}" as {dtype}; {advice}')
    if is_uint8 == (levels is None):
        needed = 256 if is_uint8 else None
        raise DataError(
            f'data.levels={levels}, but the data are {dtype} ("{name}"): use data.levels={needed}, which is for '
            f"{'uint8' if is_uint8 else 'continuous'} data"
        )
    if arrays[name].shape[1:] != shape:
        found, advice = arrays[name].shape[1:], ""
        if found:
            spatial = str(found[:-1]).replace(" ", "")
            advice = f"; use --config.data.image_size={spatial} --config.data.channels={found[-1]}"
        raise DataError(
            f"the examples have shape {list(found)}, not {list(shape)} as data.image_size and data.channels say{advice}"
        )
    label, condition, missing = map(arrays.get, ("label", "condition", "condition_missing"))
    wrong: dict[str, str] = {}  # name of a wrong array: what the array must be
    if label is not None and (label.ndim != 1 or label.dtype.kind not in "iu"):
        wrong["label"] = "integers [n]"
    if condition is not None:
        is_field = condition.ndim == len(shape) + 1 and condition.shape[1:-1] == shape[:-1]
        if condition.dtype.kind not in "iuf" or not (condition.ndim == 2 or is_field):
            field = f" or [{', '.join(map(str, ('n', *shape[:-1], 'K')))}]" if shape[:-1] else ""
            wrong["condition"] = f"numbers [n, D]{field}"
    if missing is not None and (condition is None or missing.dtype != bool or missing.ndim != 1):
        wrong["condition_missing"] = 'bool [n] beside "condition"'
    if wrong:
        name, allowed = wrong.popitem()
        found = f"{arrays[name].dtype} {list(arrays[name].shape)}"
        raise DataError(f'a source returns "{name}" as {found}; it must be {allowed}')


class CheckedSource(DerivedSource, NamedSource):
    """A user's source. Batches must have the first example's arrays and shapes, and are converted to that example's types."""

    @classmethod
    def from_config(cls, config: Mapping) -> Source:
        """Returns the source that "module:function" returns for `config.data`."""
        name, where = config["dataset"], f"data.dataset={config['dataset']!r}"
        try:
            function = import_function(name)
        except ValueError as error:
            raise DataError(f"{where} {error}; give module:function, a function of config.data") from error
        try:
            source = function(config)
        except DataError:
            raise
        except Exception as error:
            raise DataError(f"{where}: {shorten(describe_exception(error, with_type=True), 300)}") from error
        if not isinstance(source, Source):
            raise DataError(
                f"{where} returns a {type(source).__name__}, which has no __len__ and read(indices) (data.Source)"
            )
        return cls.wrap(config, source)

    @classmethod
    def wrap(cls, config: Mapping, source: Source) -> Source:
        """Wraps a user's source, checked now and at every read. Raises: DataError."""
        check_examples(config, source)
        return source if isinstance(source, NamedSource) else cls(source)

    def __init__(self, source: Source):
        super().__init__(source)
        first = {name: np.asarray(array) for name, array in source.read(np.arange(1)).items()}
        self._expected = {name: (array.shape[1:], array.dtype) for name, array in first.items()}

    def read(self, indices: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
        """Converts arrays to the types of the first example, such as float64 to float32, but not float to int.

        Raises: DataError for other arrays or shapes, types that are not converted, or labels outside `num_classes`.
        """
        batch = {name: np.asarray(array) for name, array in self.source.read(indices).items()}
        where = f"a source, read at the indices {indices[0]} ... {indices[-1]}," if len(indices) else "a source"
        found = {name: (array.dtype, array.shape) for name, array in batch.items()}
        expected = {name: (dtype, (len(indices), *shape)) for name, (shape, dtype) in self._expected.items()}
        if found.keys() != expected.keys() or not all(
            found[name][1] == shape and np.can_cast(found[name][0], dtype, "same_kind")
            for name, (dtype, shape) in expected.items()
        ):
            listed = (", ".join(f'"{k}" {d} {list(s)}' for k, (d, s) in arrays.items()) for arrays in (found, expected))
            raise DataError("{} returns {}; its first example has {}".format(where, *listed))
        batch = {name: batch[name].astype(dtype, copy=False) for name, (dtype, _) in expected.items()}
        labels = batch.get("label", np.zeros(0, int))
        if self.num_classes and labels.size and not 0 <= labels.min() <= labels.max() < self.num_classes:
            low, high, allowed = labels.min(), labels.max(), f"0 ... {self.num_classes - 1}"
            raise DataError(
                f"{where} returns labels from {low} to {high}; num_classes={self.num_classes} allows {allowed}"
            )
        return batch


# ---- Held-out examples


def are_held_out(keys: Iterable[bytes], share: float) -> np.ndarray:
    """Returns bool [N]: whether the SHA-256 of each example's key falls into the held-out share.

    An example's split does not depend on other examples or their order; examples with equal keys share a split.
    """
    hashes = (int.from_bytes(hashlib.sha256(key).digest()[:8], "big") for key in keys)
    return np.array([value < share * 2**64 for value in hashes], bool)


def select_split(source: NamedSource, loaded: Source, share: float, split: str) -> SelectedExamples:
    """Selects a split made by `data.holdout`: the held-out examples for "test", and all other examples for "train".

    source: before loading. loaded: `source` itself or its copy in memory. Raises: DataError if a split has no example.
    """
    held_out = are_held_out(source.holdout_keys(loaded), share)
    if held_out.all() or not held_out.any():
        raise DataError(
            f"data.holdout={share} holds out {held_out.sum():,} of {len(held_out):,} examples; each split needs at "
            "least one: use another share"
        )
    return SelectedExamples(loaded, np.flatnonzero(held_out == (split == "test")))
