"""Random access to the records of TFRecord files, without TensorFlow."""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from diffusion_jax.errors import DataError

_HEADER, _FOOTER = 12, 4  # the length (uint64) and its checksum before the data, the data's checksum after


class TfRecords:
    """The records that TFDS's file instructions name, in order: `records[i]` is bytes. Picklable.

    A record's place is found by walking over the lengths of those before it, once. Raises: DataError for files that are
    missing or do not hold the records that they should. The checksums of the data are not verified.
    """

    def __init__(self, instructions: Sequence):
        with ThreadPoolExecutor() as pool:
            places = list(pool.map(_places, instructions))
        self._files = [instruction.filename for instruction in instructions]
        self._file = np.repeat(np.arange(len(places)), [len(place) for place in places])
        self._places = np.concatenate([np.empty((0, 2), np.int64), *places])  # offset, length

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> bytes:
        offset, length = self._places[index].tolist()
        with open(self._files[self._file[index]], "rb") as file:
            return os.pread(file.fileno(), length, offset)


def _places(instruction) -> np.ndarray:
    """int64 [n, 2]: offset and length of the data of each record that an instruction of TFDS takes from its file."""
    found, at = [], 0
    try:
        with open(instruction.filename, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else memoryview(b"") as data:
                while at + _HEADER <= size:
                    (length,) = struct.unpack_from("<Q", data, at)
                    found.append((at + _HEADER, length))
                    at += _HEADER + length + _FOOTER
    except OSError as error:
        raise DataError(f"cannot read {instruction.filename}: {error.strerror or error}") from None
    if at != size or len(found) != instruction.examples_in_shard:
        end = "" if at == size else ", the last cut off"
        raise DataError(
            f"{instruction.filename} is damaged: it should hold {instruction.examples_in_shard:,} records and has "
            f"{len(found):,}{end}; remove the data set, and prepare it anew"
        )
    return np.array(found, np.int64).reshape(-1, 2)[instruction.skip :][: instruction.take]
