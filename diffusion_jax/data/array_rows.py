"""Arrays in files, read by rows: .npy and .npz, folders of .npy, HDF5 and Zarr.

Each class has `shape` and `dtype` of the whole array and `read(rows)`. They hold paths, no values: a copy in another process
opens the files again. `read` raises DataError for files that cannot be read.
"""

from __future__ import annotations

import abc
import contextlib
import importlib
import math
import os
import pathlib
import zipfile
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from diffusion_jax.data.numpy_files import ArrayLayout, map_layout, read_rows, seeks_rows
from diffusion_jax.errors import DataError

__all__ = [
    "FileLabels",
    "FileRows",
    "Hdf5Rows",
    "LoadedRows",
    "NumpyRows",
    "Rows",
    "ZarrRows",
    "import_extra",
    "one_line",
    "open_zarr",
    "readable",
]


def one_line(error: BaseException) -> str:
    """The message of an error without line breaks."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__


@contextlib.contextmanager
def readable(path: str | pathlib.Path) -> Iterator[None]:
    """Raises: DataError for everything that reading a file raises, because codecs have errors of their own."""
    try:
        yield
    except (DataError, MemoryError, ImportError):
        raise
    except Exception as error:
        raise DataError(f"cannot read {path}: {one_line(error)}") from error


def import_extra(name: str, path: str | pathlib.Path) -> Any:
    """A module of the extra `arrays`. Raises: DataError if it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise DataError(f"{path} needs {name} ({one_line(error)}); pip install '.[arrays]'") from error


class Rows(abc.ABC):
    """An array [N, ...] in one or several files."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @abc.abstractmethod
    def read(self, rows: np.ndarray) -> np.ndarray:
        """[n, ...] at the rows int [n], which are in range, in the byte order of this machine. Raises: DataError."""

    def note(self) -> str:
        """A line about values that the files lack; "" if they have all."""
        return ""


class _OpenedRows(Rows):
    """An array with a handle, which is opened at the first read in each process."""

    def __init__(self, path: str):
        self._path = path
        self._opened: tuple[int, Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_opened": None}

    @abc.abstractmethod
    def _open(self) -> Any:
        """The handle."""

    def _handle(self) -> Any:
        if self._opened is None or self._opened[0] != os.getpid():  # a fork must not share the handles of HDF5
            self._opened = os.getpid(), self._open()
        return self._opened[1]


class NumpyRows(_OpenedRows):
    """An uncompressed array of an .npy or .npz: large rows are read, small ones through a memory map."""

    def __init__(self, path: str, layout: ArrayLayout):
        super().__init__(path)
        self.shape, self.dtype, self._layout = layout.shape, _native(layout.dtype), layout

    def _open(self) -> np.ndarray:
        return np.asarray(map_layout(self._path, self._layout))

    def read(self, rows: np.ndarray) -> np.ndarray:
        with readable(self._path):
            if seeks_rows(self._layout):
                values = read_rows(self._path, self._layout, rows)
            else:
                values = self._handle()[rows]
        return np.ascontiguousarray(values, self.dtype)


class LoadedRows(_OpenedRows):
    """A compressed array of an .npz, loaded at the first read."""

    def __init__(self, path: str, name: str, layout: ArrayLayout):
        super().__init__(path)
        self.shape, self.dtype, self._name = layout.shape, _native(layout.dtype), name

    def _open(self) -> np.ndarray:
        with np.load(self._path, allow_pickle=False) as arrays:
            return arrays[self._name]

    def read(self, rows: np.ndarray) -> np.ndarray:
        with readable(self._path):
            return np.ascontiguousarray(self._handle()[rows], self.dtype)


class FileRows(Rows):
    """The rows of several .npy files, one after the other; a file is open only while it is read.

    layouts: those of the files, each of shape [n, ...] with the same rest.
    """

    def __init__(self, root: str, files: Sequence[str], layouts: Sequence[ArrayLayout]):
        self._root, self._files, self._layouts = root, list(files), list(layouts)
        self.ends = np.cumsum([layout.shape[0] for layout in layouts])
        self.shape, self.dtype = (int(self.ends[-1]), *layouts[0].shape[1:]), _native(layouts[0].dtype)

    def read(self, rows: np.ndarray) -> np.ndarray:
        values = np.empty((len(rows), *self.shape[1:]), self.dtype)
        indices = np.searchsorted(self.ends, rows, "right")
        order = np.argsort(indices, kind="stable")
        starts = np.flatnonzero(np.diff(indices[order], prepend=-1))
        for group in np.split(order, starts[1:]) if len(rows) else ():
            file, layout = self._files[indices[group[0]]], self._layouts[indices[group[0]]]
            first = self.ends[indices[group[0]]] - layout.shape[0]
            path = os.path.join(self._root, file)
            with readable(path):
                values[group] = read_rows(path, layout, rows[group] - first)
        return values


class FileLabels(Rows):
    """The label of each row of `FileRows`: that of its file. ends: as of FileRows. labels: int [number of files]."""

    def __init__(self, ends: np.ndarray, labels: np.ndarray):
        self._ends, self._labels = ends, labels.astype(np.int32)
        self.shape, self.dtype = (int(ends[-1]),), np.dtype(np.int32)

    def read(self, rows: np.ndarray) -> np.ndarray:
        return self._labels[np.searchsorted(self._ends, rows, "right")]


class _StoreRows(_OpenedRows):
    """An array of a store, whose chunks are read once for each call: HDF5 takes increasing indices only."""

    def __init__(self, path: str, name: str):
        super().__init__(path)
        self._name = name
        with readable(path):
            array = self._handle()
            self.shape, self.dtype = tuple(array.shape), _native(np.dtype(array.dtype))

    @abc.abstractmethod
    def _count_chunks(self) -> tuple[int, int, Any]:
        """(the chunks that were written, all chunks, what the values of the others are read as)."""

    def note(self) -> str:
        with readable(self._path):
            written, total, fill_value = self._count_chunks()
        if written >= total:
            return ""
        where = f"{self._path}: {self._name}" if self._name else self._path
        return (
            f"Note: {where} has {written:,} of its {total:,} chunks, and all others are read as {fill_value or 0:g}: repair "
            "it unless they contain only this value."
        )

    @abc.abstractmethod
    def _read_sorted(self, rows: np.ndarray) -> np.ndarray:
        """[n, ...] at increasing rows."""

    def read(self, rows: np.ndarray) -> np.ndarray:
        if not len(rows):
            return np.empty((0, *self.shape[1:]), self.dtype)
        unique, inverse = np.unique(rows, return_inverse=True)
        with readable(self._path):
            values = np.asarray(self._read_sorted(unique), self.dtype)
        return values[inverse.reshape(-1)]


class Hdf5Rows(_StoreRows):
    """A data set of an HDF5 file."""

    def _open(self) -> Any:
        return import_extra("h5py", self._path).File(self._path, "r", locking="best-effort")[self._name]

    def _count_chunks(self) -> tuple[int, int, Any]:
        array = self._handle()
        if array.chunks is None:  # contiguous
            return 1, 1, array.fillvalue
        return array.id.get_num_chunks(), _num_chunks(array.shape, array.chunks), array.fillvalue

    def _read_sorted(self, rows: np.ndarray) -> np.ndarray:
        array = self._handle()
        values = np.empty((len(rows), *self.shape[1:]), self.dtype)
        starts = np.flatnonzero(np.diff(rows, prepend=-2) != 1)
        for start, end in zip(starts, [*starts[1:], len(rows)], strict=True):  # slices are faster than lists of indices
            values[start:end] = array[int(rows[start]) : int(rows[end - 1]) + 1]
        return values


class ZarrRows(_StoreRows):
    """An array of a Zarr store; name "" for the store itself."""

    def _open(self) -> Any:
        opened = open_zarr(self._path)
        return opened[self._name] if self._name else opened

    def _count_chunks(self) -> tuple[int, int, Any]:
        # By the names of files, because Array.nchunks_initialized takes 0.2 ms for each of them.
        array = self._handle()
        names = [name for name in _file_names(self._path, self._name) if name != "zarr.json" and name[0] != "."]
        return len(names), _num_chunks(array.shape, array.shards or array.chunks), array.fill_value

    def _read_sorted(self, rows: np.ndarray) -> np.ndarray:
        if len(rows) == rows[-1] - rows[0] + 1:
            return self._handle()[int(rows[0]) : int(rows[-1]) + 1]
        return self._handle().oindex[rows]


def open_zarr(path: str) -> Any:
    """The array or group of a Zarr store of format 2 or 3: a directory, or an archive .zip."""
    zarr = import_extra("zarr", path)
    store = zarr.storage.ZipStore(path, mode="r") if os.path.isfile(path) else path
    return zarr.open(store, mode="r")


def _file_names(path: str, folder: str) -> list[str]:
    """The names of all files below a folder of a directory, or of an archive .zip."""
    if os.path.isfile(path):
        prefix = f"{folder}/" if folder else ""
        with zipfile.ZipFile(path) as archive:
            found = {name for name in archive.namelist() if name.startswith(prefix)}  # a rewritten file is in it twice
        return [name.rpartition("/")[2] for name in found]
    return [name for _, _, names in os.walk(os.path.join(path, folder)) for name in names]


def _num_chunks(shape: Sequence[int], chunk: Sequence[int]) -> int:
    return math.prod(-(-size // step) for size, step in zip(shape, chunk, strict=True))


def _native(dtype: np.dtype) -> np.dtype:
    return dtype.newbyteorder("=")
