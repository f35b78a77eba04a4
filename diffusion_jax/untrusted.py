"""Reads files that another person may have made: JSON, arrays and images, each with its limits.

A reader takes regular files only, because a named pipe would block. Every error about the content is a ValueError, except
that an image that is cut off raises OSError.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import pathlib
import re
import stat
import zipfile
import zlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

JSON_BYTES = 16 * 2**20
JSON_DEPTH = 50
NPZ_BYTES = 16 * 2**30  # the decompressed size of all arrays in one file
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP")  # Pillow's other decoders start programs or are rarely tested
IMAGE_PIXELS = 2 * 89_478_485  # Pillow's own limit


def check_regular(path: str | os.PathLike) -> None:
    """Raises: ValueError for a pipe, a device or a folder; OSError."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError(f"{path} is not a regular file")


def leads_out(path: pathlib.Path, directory: str | os.PathLike) -> bool:
    """Whether a path in a directory leads out of the directory, through a link or a linked folder."""
    return not pathlib.Path(os.path.realpath(path)).is_relative_to(os.path.realpath(directory))


def read_json(path: str | os.PathLike, kind: type = dict, limit: int = JSON_BYTES) -> Any:
    """Reads a JSON file whose value has the type `kind`. limit: the largest size in bytes. Raises: ValueError, OSError."""
    check_regular(path)
    if (size := os.stat(path).st_size) > limit:
        raise ValueError(f"it has {size:,} bytes; the limit is {limit:,}")
    return parse_json(pathlib.Path(path).read_text(encoding="utf-8"), kind)


def parse_json(text: str, kind: type = dict) -> Any:
    """Parses JSON whose value has the type `kind`. Raises: ValueError."""
    depth = deepest = 0
    for bracket in re.findall(r"[\[\]{}]", text):
        depth += 1 if bracket in "[{" else -1
        deepest = max(depth, deepest)
    if deepest > JSON_DEPTH:
        raise ValueError(f"its brackets are nested more than {JSON_DEPTH} deep")
    value = json.loads(text)
    if not isinstance(value, kind):
        raise ValueError(f"it is not a JSON {'object' if kind is dict else 'list'}")
    return value


def read_header(file: Any, num_bytes: int) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Reads the header of an .npy: (shape, is in Fortran's order, dtype). num_bytes: the size of header and values.

    Raises: ValueError, also for an array of Python objects and for a shape with more values than the file has.
    """
    try:
        version = np.lib.format.read_magic(cast(Any, file))
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, is_fortran, dtype = read(cast(Any, file))
    except Exception as error:  # NumPy parses the header as Python code, so any tokenizer error is possible
        raise ValueError(f"not a NumPy array ({error})") from error
    if dtype.hasobject or not dtype.itemsize:
        raise ValueError("arrays of Python objects are not read")
    if min(shape, default=0) < 0 or file.tell() + math.prod(shape) * dtype.itemsize > num_bytes:
        raise ValueError(f"an array {list(shape)} of {dtype} does not fit into {num_bytes:,} bytes")
    return shape, is_fortran, dtype


@contextlib.contextmanager
def open_npz(path: str | os.PathLike, limit: float = NPZ_BYTES) -> Iterator[Any]:
    """Opens an .npz to read arrays by name. limit: bytes of all arrays. Raises: ValueError, also in the block; OSError."""
    check_regular(path)
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                # Python expands the other compressions without a limit.
                if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                    raise ValueError(f"{member.filename} has a compression that NumPy does not write")
                with archive.open(member) as file:
                    read_header(file, member.file_size)
            if (size := sum(member.file_size for member in archive.infolist())) > limit:
                raise ValueError(f"its arrays have {size:,} bytes; the limit is {limit:,}")
        with np.load(path, allow_pickle=False) as arrays:
            yield arrays
    except KeyError as error:
        raise ValueError(str(error.args[0])) from error
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, MemoryError) as error:
        raise ValueError(str(error) or type(error).__name__) from error


def read_image(source: pathlib.Path | io.BytesIO, max_pixels: int = IMAGE_PIXELS, upright: bool = False) -> Image.Image:
    """Decodes a PNG, JPEG, WebP or BMP (the first frame of an animation). upright: rotates by the EXIF orientation.

    Raises: ValueError, OSError.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError  # not installed with the core

    if isinstance(source, pathlib.Path):
        check_regular(source)
    try:
        with Image.open(source, formats=IMAGE_FORMATS) as image:
            if image.width * image.height > max_pixels:
                raise ValueError(f"it has {image.width * image.height:,} pixels; the limit is {max_pixels:,}")
            image.load()
            if upright:
                ImageOps.exif_transpose(image, in_place=True)
            return image
    except UnidentifiedImageError as error:
        raise ValueError("not a PNG, JPEG, WebP or BMP image, or corrupted") from error
    except (SyntaxError, EOFError, MemoryError, Image.DecompressionBombError, zlib.error) as error:
        raise ValueError(str(error) or type(error).__name__) from error
