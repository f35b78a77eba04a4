"""The arrays of .npy and .npz files: where their values are in the file, and reading rows without loading the rest."""

from __future__ import annotations

import contextlib
import functools
import io
import math
import os
import pathlib
import tokenize
import zipfile
from collections.abc import Container
from typing import BinaryIO, NamedTuple, cast

import numpy as np

__all__ = ["ArrayLayout", "map_array", "map_layout", "npy_layout", "npz_layouts", "read_rows", "seeks_rows"]

_MAX_HEADER = 10_000  # bytes, NumPy's own limit
_MIN_SEEK_BYTES = 2**18  # rows of at least this size are read at least as fast by read() as through a memory map


class ArrayLayout(NamedTuple):
    """An array in a file. offset: the bytes before its values, None if they are compressed."""

    shape: tuple[int, ...]
    dtype: np.dtype
    is_fortran: bool
    offset: int | None

    @property
    def num_bytes(self) -> int:
        """The bytes of its values."""
        return math.prod(self.shape) * self.dtype.itemsize


@functools.lru_cache(maxsize=64)  # the files of a folder have few different headers
def _parse_header(version: int, header: bytes) -> tuple[tuple[int, ...], bool, np.dtype]:
    read = np.lib.format.read_array_header_1_0 if version == 1 else np.lib.format.read_array_header_2_0
    shape, is_fortran, dtype = (-1,), False, np.dtype(object)
    with contextlib.suppress(ValueError, TypeError, SyntaxError, tokenize.TokenError):
        shape, is_fortran, dtype = read(io.BytesIO(header))
    if min(shape, default=0) < 0:
        raise ValueError("the header of the array is corrupted")
    return shape, is_fortran, dtype


def _read_header(file: BinaryIO) -> ArrayLayout:
    """The layout of an array whose .npy header starts at the position of `file`. Raises: ValueError."""
    start = file.read(8)
    if start[:6] != b"\x93NUMPY":
        raise ValueError("it is empty" if not start else "it does not start as an .npy array does")
    version = start[6]
    if version not in (1, 2):  # version 3 is for structured arrays alone
        raise ValueError(f"its array has version {version} of the .npy format, not 1 or 2")
    length = file.read(2 if version == 1 else 4)
    num_bytes = int.from_bytes(length, "little")
    header = file.read(num_bytes) if num_bytes <= _MAX_HEADER else b""
    if len(header) < num_bytes:
        raise ValueError("the header of the array is truncated")
    shape, is_fortran, dtype = _parse_header(version, length + header)
    return ArrayLayout(shape, dtype, is_fortran, 8 + len(length) + num_bytes)


def npy_layout(path: str | os.PathLike[str]) -> ArrayLayout:
    """The layout of an .npy file, from its header alone.

    Raises: OSError; ValueError for a file that is truncated or not an .npy file.
    """
    with open(path, "rb") as file:
        layout = _read_header(file)
        size, expected = os.fstat(file.fileno()).st_size, (layout.offset or 0) + layout.num_bytes
    if size < expected and not layout.dtype.hasobject:
        raise ValueError(f"it is truncated: it has {size:,} bytes, and its header promises {expected:,}")
    return layout


def npz_layouts(path: str | os.PathLike[str], names: Container[str] | None = None) -> dict[str, ArrayLayout]:
    """The layout of each array of an .npz, by name. names: of the arrays that are looked at; None for all.

    Raises: OSError, ValueError; zipfile.BadZipFile if it is corrupted.
    """
    layouts = {}
    with zipfile.ZipFile(path) as archive, open(path, "rb") as raw:
        for member in archive.infolist():
            name = member.filename.removesuffix(".npy")
            if name == member.filename or (names is not None and name not in names):
                continue
            with archive.open(member) as file:
                layout = _read_header(cast(BinaryIO, file))
            if not layout.dtype.hasobject and member.file_size != (layout.offset or 0) + layout.num_bytes:
                raise ValueError(f"{member.filename} is truncated")
            offset = None
            if member.compress_type == zipfile.ZIP_STORED and layout.offset is not None:
                raw.seek(
                    member.header_offset + 26
                )  # of the local header: the lengths of the name and of the extra field
                offset = layout.offset + member.header_offset + 30 + sum(np.frombuffer(raw.read(4), "<u2").tolist())
            layouts[name] = layout._replace(offset=offset)
    return layouts


def map_layout(path: str | os.PathLike[str], layout: ArrayLayout) -> np.ndarray:
    """An uncompressed array, memory-mapped and read-only. Raises: OSError, ValueError."""
    if layout.offset is None or layout.dtype.hasobject:
        raise ValueError("arrays of objects and compressed arrays cannot be memory-mapped")
    if not layout.num_bytes:
        return np.empty(layout.shape, layout.dtype)
    return np.memmap(path, layout.dtype, "r", layout.offset, layout.shape, "F" if layout.is_fortran else "C")


def map_array(path: str | os.PathLike[str], name: str) -> np.ndarray:
    """An array of an .npz, memory-mapped, or loaded if it is compressed.

    Raises: OSError, ValueError; KeyError for an unknown name; zipfile.BadZipFile.
    """
    layout = npz_layouts(path, (name,))[name]
    if layout.offset is not None and not layout.dtype.hasobject:
        return map_layout(path, layout)
    with np.load(pathlib.Path(path), allow_pickle=False) as arrays:
        return arrays[name]


def seeks_rows(layout: ArrayLayout) -> bool:
    """Whether `read_rows` is faster than a memory map that stays open: for large rows in C order."""
    return not layout.is_fortran and layout.num_bytes >= _MIN_SEEK_BYTES * max(layout.shape[0], 1)


def read_rows(path: str | os.PathLike[str], layout: ArrayLayout, rows: np.ndarray) -> np.ndarray:
    """Rows of an uncompressed array by index along its first axis, read from a file that is closed afterwards.

    rows: int [n], in range. In C order only these rows are read, and a file that has become shorter raises an error, where a
    memory map would end the process. Raises: OSError, ValueError.
    """
    if layout.is_fortran or not layout.num_bytes or not len(rows):
        return np.asarray(map_layout(path, layout))[rows]
    values = np.empty((len(rows), *layout.shape[1:]), layout.dtype)
    row_bytes = layout.num_bytes // layout.shape[0]
    buffers = memoryview(values.reshape(-1).view(np.uint8))  # type: ignore[arg-type]
    with open(path, "rb", buffering=0) as file:
        for i, row in enumerate(rows.tolist()):
            file.seek((layout.offset or 0) + row * row_bytes)
            done, buffer = 0, buffers[i * row_bytes : (i + 1) * row_bytes]
            while done < row_bytes:  # one call of the system reads at most 2 GB
                count = file.readinto(buffer[done:])
                if not count:
                    raise ValueError("it is truncated")
                done += count
    return values
