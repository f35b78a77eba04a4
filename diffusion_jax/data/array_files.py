"""A source of arrays in files: `data.dataset="arrays"`."""

from __future__ import annotations

import collections
import functools
import importlib
import os
import pathlib
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from diffusion_jax.data.sources import (
    Arrays,
    NamedSource,
    check_examples,
    classes_of_files,
    example_shape,
    find_files,
    readable,
)
from diffusion_jax.errors import DataError, list_names, needs_extra
from diffusion_jax.files import map_array
from diffusion_jax.storage.downloads import local_path
from diffusion_jax.untrusted import check_regular

_CHECKED_BYTES, _MAX_LABELS = 4 * 2**30, 2**28
_KINDS = (".npy", ".npz", ".zarr", ".h5", ".hdf5")
_ALLOWED = "an .npy, .npz, .zarr, .h5 or .hdf5, or a folder of .npy files"
_NAMES = ("x", "image", "label", "condition", "condition_missing")
_SPLIT_NAMES = {"train", "test", "validation", "valid", "val", "eval", "dev"}


class ArrayFiles(Arrays, NamedSource):
    """Examples [*spatial, C] in files, read by index; the files may exceed memory. Picklable, because it holds paths.

    path: one of

    - `.npy`, an array [N, *spatial, C], memory-mapped.
    - `.npz` with the array "x" or "image" (or "arr_0", as in files of samples), and optionally "label", "condition" and
      "condition_missing" (bool [N], True for examples without a condition). Arrays are memory-mapped; compressed ones loaded.
    - `.h5`, `.hdf5` or `.zarr` with arrays of these names, which need the extra `arrays`. Small chunks are read fastest.
    - a folder with `.npy` files, searched recursively in path order, without hidden files. Each file holds one example
      [*spatial, C] or several [n, *spatial, C]. If every file is in a subfolder, each subfolder is a class.
    - a folder with one of the above for each split, such as `train.npy` and `test.npy`, or `train/` and `test/`. Other data
      have only the split "train".

    shape: an example's shape (*spatial, C), or () for any shape. With C = 1, files may lack the channel axis.
    "image" is uint8 and "x" any other real type; in .npy files uint8 is "image".

    num_classes: the largest label + 1, or the number of subfolders; 0 without labels. class_names: the subfolders, or ().
    Raises: DataError. `data.check_examples` checks shapes and types.
    """

    of_files = True

    @classmethod
    def from_config(cls, config: Mapping) -> ArrayFiles:
        split = "train" if config["holdout"] else config["split"]
        source = cls(config["data_dir"], split, example_shape(config))
        try:
            check_examples(config, source)
        except DataError as error:
            raise DataError(f"{config['data_dir']}: {error}") from error
        return source

    @classmethod
    def has_splits(cls, config: Mapping) -> bool:
        """Whether the path is a folder with splits; False for a single file, store or folder of files."""
        names = _split_entries(local_path(config["data_dir"])).keys() if config["data_dir"] else set()
        return config["split"] in names or bool(names & _SPLIT_NAMES)

    def __init__(self, path: str, split: str = "train", shape: tuple[int, ...] = ()):
        location, classes = _find_split(path, split), ()
        if location.is_dir() and not _kind(location.name):
            arrays, classes, self._notes = _open_folder(location, tuple(shape))
        else:
            arrays, self._notes = _open_file(location)
            self._notes += _check_checksums(location) if location.suffix.lower() == ".npz" else []
        self._name, examples = next(iter(arrays.items()))
        self._lacks_channels = (*examples.shape[1:], 1) == tuple(shape)
        super().__init__(arrays, len(classes), classes)
        if "label" in arrays and not classes:
            self.arrays["label"], self.num_classes = _read_labels(f"{location}: label", arrays["label"], len(self))

    def read(self, indices: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
        """Reads the examples at n indices in [0, N), in any order, with repetitions allowed, as `Source.read`.

        "x" and "condition" have the types of the files. Raises: DataError for files that cannot be read.
        """
        batch = super().read(indices)
        if self._lacks_channels:
            batch[self._name] = batch[self._name][..., None]
        return batch

    def notes(self) -> list[str]:
        """Returns lines about arrays and files that are not read."""
        return self._notes


def _key(examples: _Rows | _FolderRows) -> str:
    return "image" if examples.dtype == np.uint8 else "x"


def _kind(name: str) -> str:
    """Returns the suffix of a supported file or store; "" for others."""
    return next((kind for kind in _KINDS if name.lower().endswith(kind)), "")


def _find_split(path: str, split: str) -> pathlib.Path:
    """Finds the file or folder of a split. Raises: DataError."""
    root = local_path(path or "")
    if not path or not root.exists() or (root.is_file() and not _kind(root.name)):
        what = "a file of another kind" if root.is_file() else "no such file or folder" if path else "empty"
        raise DataError(f"data.data_dir={str(path or '')!r} is {what}; set it to {_ALLOWED}")
    entries = _split_entries(root)
    found = entries.get(split, [])
    if len(found) == 1:
        return root / found[0]
    if found:
        problem = f"{list_names(found)}; keep one of them"
    elif entries.keys() & _SPLIT_NAMES:  # a folder with only test.npy is not training data
        other = "" if split == "train" else ", or set evaluation.data_dir to other examples"
        problem = f"the splits {list_names(sorted(entries), 8)}; use one of them{other}"
    elif split == "train":
        return root
    else:
        problem = (
            "only 'train'; use data.split='train', or a folder that contains files or folders such as train.npy and "
            f"{split}.npy, or set evaluation.data_dir, or train with data.holdout"
        )
    raise DataError(f"data.split={split!r}: {root} has {problem}")


def _split_entries(root: pathlib.Path) -> dict[str, list[str]]:
    """Maps each possible split name to its files and folders, without hidden names; {} for a file or store."""
    entries = collections.defaultdict(list)
    if not root.is_dir() or _kind(root.name):
        return {}
    with os.scandir(root) as listing:
        for entry in listing:
            kind = _kind(entry.name)
            if not entry.name.startswith(".") and (kind or entry.is_dir()):
                entries[entry.name[: len(entry.name) - len(kind)]].append(entry.name)
    return {name: sorted(files) for name, files in entries.items()}


def _open_file(path: pathlib.Path) -> tuple[dict[str, _Rows], list[str]]:
    """Returns (the arrays in a file or store, examples first; notes about other arrays). Raises: DataError."""
    with readable(path):
        names = _list_arrays(path)
    found = {name: _Rows(str(path), name) for name in _NAMES if name in names}
    if {"x", "image"} <= found.keys():
        raise DataError(f"{path} has 'x' and 'image'; keep one: 'image' for uint8, 'x' for other numbers")
    others = [name for name in names if name not in found]
    if not {"x", "image"} & found.keys():
        unnamed = [name for name in others if name in ("", "arr_0")]  # in an .npy; in a file of samples
        if not unnamed:
            raise DataError(
                f"{path} has no array 'x' or 'image', {f'only {list_names(names, 8)}' if names else 'and no other arrays'}; "
                f"save them under these names, outside groups, and optionally {', '.join(map(repr, _NAMES[2:]))}"
            )
        others.remove(unnamed[0])
        examples = _Rows(str(path), unnamed[0])
        found = {_key(examples): examples, **found}
    examples = next(iter(found.values()))
    for name, array in found.items():
        if array.shape[:1] != examples.shape[:1] or not array.shape:
            shapes = f"the shape {list(array.shape)}, and the examples {list(examples.shape)}"
            raise DataError(f"{path}: {name} has {shapes}; every example needs a row of each array")
    ignored = f"Ignored arrays: {list_names(map(repr, others), 8)}; arrays are {', '.join(_NAMES)}."
    return found, [ignored] * bool(others)


def _list_arrays(path: pathlib.Path) -> list[str]:
    """Returns the names of the arrays in a file or store; an .npy has one array, with the name ""."""
    if not path.is_dir():
        check_regular(path)
    if path.suffix.lower() == ".npy":
        return [""]
    if path.suffix.lower() == ".npz":
        with zipfile.ZipFile(path) as archive:
            return [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]
    store = _open_store(str(path))
    return [] if hasattr(store, "shape") else sorted(name for name in store if _is_array(store, name))


def _check_checksums(path: pathlib.Path) -> list[str]:
    """Checks the checksums of an .npz, which memory-mapping skips; returns a note for a large file. Raises: DataError."""
    with readable(path), zipfile.ZipFile(path) as archive:
        if sum(each.file_size for each in archive.infolist()) > _CHECKED_BYTES:
            return [f"The checksums of {path} are not checked, because it is large; type: python -m zipfile -t {path}"]
        if damaged := archive.testzip():
            raise ValueError(f"Bad CRC-32 for file {damaged!r}")
    return []


def _open_store(path: str) -> Any:
    """Opens a Zarr store or an HDF5 file: arrays by name. Raises: DataError if the reading package is not installed."""
    name = "zarr" if _kind(path) == ".zarr" else "h5py"
    with needs_extra(f"{path} needs {name}", "arrays", DataError):
        package = importlib.import_module(name)
    if name == "h5py":
        return package.File(path, "r", locking="best-effort")
    # The codec pickle would run code from the file.
    importlib.import_module("numcodecs.registry").codec_registry.pop("pickle", None)
    return package.open(path, mode="r")


def _is_array(store: Any, name: str) -> bool:
    """Whether a name in a store is an array in the store's file. Raises: DataError if an array to read is in another file."""
    is_hdf5 = type(store).__module__.startswith("h5py")
    is_elsewhere = is_hdf5 and "External" in type(store.get(name, getlink=True)).__name__
    if not is_elsewhere:
        found = store.get(name)  # None for a soft link to nothing
        if not hasattr(found, "shape"):
            return False
        is_elsewhere = is_hdf5 and (found.file != store.file or found.external is not None or found.is_virtual)
    if is_elsewhere and name in _NAMES:
        raise DataError(f"the array {name!r} is in another file, which is not opened; copy the array into this file")
    return not is_elsewhere


class _Rows:
    """An array [N, ...] in a file. Pickling copies no values: another process opens the file at its first read.

    name: the array's name in an .npz, an HDF5 file or a Zarr store; "" for an .npy.
    shape, dtype: the array's shape, and its dtype in native byte order. Raises: DataError for files that cannot be read.
    """

    def __init__(self, path: str, name: str = ""):
        self._path, self._name = path, name
        with readable(path):
            self.shape: tuple[int, ...] = tuple(self._opened.shape)
            self.dtype = np.dtype(self._opened.dtype).newbyteorder("=")
        if self.dtype.kind not in "biufc":
            raise DataError(f"{path}: {name or 'the array'} is {self.dtype}, not numbers")

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_opened"}

    @functools.cached_property
    def _opened(self) -> Any:
        """Opens the array without reading its values, except for a compressed array of an .npz."""
        if not self._name:
            return np.lib.format.open_memmap(self._path, mode="r")
        return map_array(self._path, self._name) if _kind(self._path) == ".npz" else _open_store(self._path)[self._name]

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        """Reads [n, ...] at rows int [n], in any order, with repetitions allowed. Raises: DataError."""
        with readable(self._path):
            if _kind(self._path) not in (".h5", ".hdf5"):
                opened = self._opened.oindex if _kind(self._path) == ".zarr" else self._opened
                return np.ascontiguousarray(opened[rows], self.dtype)
            unique, inverse = np.unique(rows, return_inverse=True)  # HDF5 reads only increasing rows
            values = np.empty((len(unique), *self.shape[1:]), self.dtype)
            starts = np.flatnonzero(np.diff(unique, prepend=-2) != 1)
            for start, end in zip(starts, [*starts[1:], len(unique)], strict=False):  # a list of rows is 5 times slower
                values[start:end] = self._opened[int(unique[start]) : int(unique[end - 1]) + 1]
            return values[inverse]


class _FolderRows:
    """The rows of several .npy files, one file after another; a file is open only while it is read.

    lengths: the number of rows in each file. row_shape: shape of a row; a file may store a single row without the first axis.
    """

    def __init__(self, paths: Sequence[str], lengths: Sequence[int], row_shape: tuple[int, ...], dtype: np.dtype):
        self._paths, self._ends = paths, np.cumsum(lengths)
        self.shape, self.dtype = (int(self._ends[-1]), *row_shape), dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        """Reads [n, ...] at rows int [n], in any order, with repetitions allowed. Raises: DataError."""
        values = np.empty((len(rows), *self.shape[1:]), self.dtype)
        indices = np.searchsorted(self._ends, rows, "right")
        for i in map(int, np.unique(indices)):
            with readable(self._paths[i]):
                array = np.lib.format.open_memmap(self._paths[i], mode="r").reshape(-1, *self.shape[1:])
                values[indices == i] = array[rows[indices == i] - self._ends[i]]  # negative: from the file's end
        return values


def _read_labels(where: str, array: _Rows, length: int) -> tuple[np.ndarray, int]:
    """Returns (labels int32 [N], the largest label + 1). Raises: DataError for labels that are not integers >= 0."""
    if array.dtype.kind not in "iu" or array.shape != (length,):
        raise DataError(f"{where} is {array.dtype} {list(array.shape)}, not integers [{length}], one for each example")
    if length > _MAX_LABELS:
        raise DataError(f"{where} has {length:,} values; the limit is {_MAX_LABELS:,}")
    labels = array[np.arange(length)]
    low, high = (int(labels.min()), int(labels.max())) if length else (0, 0)
    if low < 0 or high >= 2**31 - 1:
        wrong = low if low < 0 else high
        raise DataError(f"{where} contains {wrong}; labels are the numbers 0 ... num_classes - 1")
    return labels.astype(np.int32), high + 1


def _open_folder(root: pathlib.Path, shape: tuple[int, ...]) -> tuple[dict[str, Any], tuple[str, ...], list[str]]:
    """Returns (the examples in the .npy files below a folder, with labels; the class names; notes). Raises: DataError."""
    files, notes = find_files(root)
    files = [path for path in files if path.suffix.lower() == ".npy"]
    if not files:
        raise DataError(" ".join([f"no .npy files below {str(root)!r}; set data.data_dir to {_ALLOWED}", *notes]))
    if not shape:
        raise DataError(f"{str(root)!r} is a folder of .npy files; give the shape of one example")
    locations = [str(root / file) for file in files]
    row_shapes = (shape, shape[:-1]) if shape[-1] == 1 else (shape,)
    lengths, dtypes = [], []
    for location in locations:
        array = _Rows(location)
        if array.shape not in row_shapes and array.shape[1:] not in row_shapes:
            raise DataError(
                f"{location} is {array.dtype} {list(array.shape)}; every file must be an example {list(shape)} "
                "(data.image_size and data.channels), or several of them along a first axis"
            )
        lengths.append(1 if array.shape in row_shapes else array.shape[0])
        dtypes.append(array.dtype)
        if array.dtype != dtypes[0]:
            raise DataError(
                f"{location} is {array.dtype}, but {locations[0]} is {dtypes[0]}; save all files as one type"
            )
    examples, (classes, labels) = _FolderRows(locations, lengths, shape, dtypes[0]), classes_of_files(files)
    arrays = {_key(examples): examples} | ({} if labels is None else {"label": np.repeat(labels, lengths)})
    return arrays, classes, notes
