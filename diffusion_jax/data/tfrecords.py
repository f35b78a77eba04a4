"""Random access to the records of TFRecord files, without TensorFlow."""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from diffusion_jax.errors import DataError

__all__ = ["TfRecords"]

_HEADER, _FOOTER = 12, 4  # the length (uint64) and its checksum before the data, the data's checksum after


class TfRecords:
    """The records of TFDS's file instructions, in order: `records[i]` is bytes. Picklable.

    The offsets of all records are computed once from the lengths of the records before them. Raises: DataError for files that
    are missing or do not contain the expected records. The checksums of the data are not verified.
    """

    def __init__(self, instructions: Sequence):
        with ThreadPoolExecutor() as pool:
            spans = list(pool.map(_find_records, instructions))
        self._files = [instruction.filename for instruction in instructions]
        self._file_index = np.repeat(np.arange(len(spans)), [len(span) for span in spans])
        self._spans = np.concatenate([np.empty((0, 2), np.int64), *spans])  # offset, length

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, index: int) -> bytes:
        offset, length = self._spans[index].tolist()
        with open(self._files[self._file_index[index]], "rb") as file:
            return os.pread(file.fileno(), length, offset)


def _find_records(instruction) -> np.ndarray:
    """int64 [n, 2]: offset and length of the data of each record that an instruction of TFDS reads from its file."""
    spans, position = [], 0
    try:
        with open(instruction.filename, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else memoryview(b"") as data:
                while position + _HEADER <= size:
                    (length,) = struct.unpack_from("<Q", data, position)
                    spans.append((position + _HEADER, length))
                    position += _HEADER + length + _FOOTER
    except OSError as error:
        raise DataError(f"cannot read {instruction.filename}: {error.strerror or error}") from None
    if position != size or len(spans) != instruction.examples_in_shard:
        end = "" if position == size else ", the last of them truncated"
        raise DataError(
            f"{instruction.filename} is corrupted: it has {len(spans):,} records{end}, not "
            f"{instruction.examples_in_shard:,}; remove the data set, and prepare it again"
        )
    return np.array(spans, np.int64).reshape(-1, 2)[instruction.skip :][: instruction.take]
