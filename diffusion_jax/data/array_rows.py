"""Arrays in files, read by rows: .npy and .npz, folders of .npy, HDF5 and Zarr."""

from __future__ import annotations

import abc
import contextlib
import functools
import importlib
import os
import pathlib
import zipfile
from collections.abc import Iterator, Sequence
from typing import Any, cast

import numpy as np

from diffusion_jax.errors import DataError

__all__ = ["FileRows", "Hdf5Rows", "NumpyRows", "Rows", "ZarrRows", "import_extra", "map_array", "readable"]


def map_array(path: str | os.PathLike[str], name: str) -> np.ndarray:
    """An array of an .npz, memory-mapped and read-only, or loaded if it is compressed.

    Raises: OSError, ValueError; KeyError for an unknown name; zipfile.BadZipFile.
    """
    with zipfile.ZipFile(path) as archive:
        member = archive.getinfo(f"{name}.npy")
        if member.compress_type != zipfile.ZIP_STORED:
            with np.load(pathlib.Path(path), allow_pickle=False) as arrays:
                return arrays[name]
        with archive.open(member) as file:
            version = np.lib.format.read_magic(cast(Any, file))
            read_header = (
                np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            )
            shape, is_fortran, dtype = read_header(cast(Any, file))
            header_size = file.tell()
    if dtype.hasobject:
        raise ValueError("arrays of Python objects are not read")
    with open(path, "rb") as file:  # the lengths of the name and of the extra field are in the member's local header
        file.seek(member.header_offset + 26)
        start = member.header_offset + 30 + sum(np.frombuffer(file.read(4), "<u2").tolist())
    if not all(shape):
        return np.empty(shape, dtype)
    return np.memmap(path, dtype, "r", start + header_size, shape, "F" if is_fortran else "C")


@contextlib.contextmanager
def readable(path: str | pathlib.Path) -> Iterator[None]:
    """Raises: DataError of one line for everything that reading a file raises, because codecs have errors of their own."""
    try:
        yield
    except (DataError, MemoryError, ImportError):
        raise
    except Exception as error:
        message = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        reason = " ".join(message.split()) or type(error).__name__
        raise DataError(f"cannot read {path}: {reason}") from error


def import_extra(name: str, path: str | pathlib.Path) -> Any:
    """A module of the extra `arrays`. Raises: DataError if it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise DataError(f"{path} needs {name} ({error}); pip install '.[arrays]'") from error


class Rows(abc.ABC):
    """An array [N, ...] in a file, opened at the first read in each process: a copy for another process has the path alone.

    shape, dtype: of the whole array, in the byte order of this machine. Raises: DataError for files that cannot be read.
    """

    def __init__(self, path: str, name: str = ""):
        """name: of the array in the file; "" for an .npy."""
        self._path, self._name = path, name
        with readable(path):
            self.shape: tuple[int, ...] = tuple(self._opened.shape)
            self.dtype = np.dtype(self._opened.dtype).newbyteorder("=")

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_opened"}

    @functools.cached_property
    def _opened(self) -> Any:
        return self._open()

    @abc.abstractmethod
    def _open(self) -> Any:
        """The array, of which nothing is read yet."""

    def _read(self, rows: np.ndarray) -> np.ndarray:
        return self._opened[rows]

    def read(self, rows: np.ndarray) -> np.ndarray:
        """[n, ...] at rows int [n], in any order, also repeated."""
        with readable(self._path):
            return np.ascontiguousarray(self._read(rows), self.dtype)


class NumpyRows(Rows):
    """An .npy, or an array of an .npz."""

    def _open(self) -> np.ndarray:
        return map_array(self._path, self._name) if self._name else np.lib.format.open_memmap(self._path, mode="r")


class Hdf5Rows(Rows):
    """A data set of an HDF5 file."""

    def _open(self) -> Any:
        return import_extra("h5py", self._path).File(self._path, "r", locking="best-effort")[self._name]

    def _read(self, rows: np.ndarray) -> np.ndarray:
        unique, inverse = np.unique(rows, return_inverse=True)  # HDF5 reads increasing rows only
        values = np.empty((len(unique), *self.shape[1:]), self.dtype)
        starts = np.flatnonzero(np.diff(unique, prepend=-2) != 1)
        for start, end in zip(starts, [*starts[1:], len(unique)], strict=False):  # a list of rows is 5 times slower
            values[start:end] = self._opened[int(unique[start]) : int(unique[end - 1]) + 1]
        return values[inverse]


class ZarrRows(Rows):
    """An array of a Zarr store."""

    def _open(self) -> Any:
        return import_extra("zarr", self._path).open(self._path, mode="r")[self._name]

    def _read(self, rows: np.ndarray) -> np.ndarray:
        return self._opened.oindex[rows]


class FileRows:
    """The rows of several .npy files, one after the other; a file is open only while it is read.

    lengths: the number of rows of each file. row_shape: of one row; a file may contain one row without the first axis.
    """

    def __init__(
        self, root: str, files: Sequence[str], lengths: Sequence[int], row_shape: tuple[int, ...], dtype: np.dtype
    ):
        self._root, self._files, self._ends = root, list(files), np.cumsum(lengths)
        self.shape, self.dtype = (int(self._ends[-1]), *row_shape), dtype

    def read(self, rows: np.ndarray) -> np.ndarray:
        """[n, ...] at rows int [n], in any order, also repeated. Raises: DataError."""
        values = np.empty((len(rows), *self.shape[1:]), self.dtype)
        indices = np.searchsorted(self._ends, rows, "right")
        for i in np.unique(indices):
            path, group = os.path.join(self._root, self._files[i]), indices == i
            with readable(path):
                array = np.lib.format.open_memmap(path, mode="r").reshape(-1, *self.shape[1:])
                values[group] = array[rows[group] - self._ends[i]]  # counted from the end of the file
        return values
