"""Atomic writes of files, the user's cache, and the local copies of objects in buckets."""

from __future__ import annotations

import contextlib
import getpass
import os
import pathlib
import re
import shutil
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any, cast

import numpy as np

__all__ = [
    "atomic_directory",
    "atomic_write",
    "downloads_root",
    "map_array",
    "mirrors_root",
    "save_npz",
    "user_cache",
    "with_urls",
    "write_text",
]


def user_cache() -> pathlib.Path:
    """Returns the cache directory, for files that later runs can recreate: programs, features, decoded images, downloads."""
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser().absolute() / "diffusion_jax"


def downloads_root() -> pathlib.Path:
    """Returns the directory for downloaded objects: gs://BUCKET/NAME is gs/BUCKET/NAME below it."""
    return user_cache() / "downloads"


def mirrors_root() -> pathlib.Path:
    """Returns the directory for mirrors of work directories that launches write: RANDOM/gs/BUCKET/NAME below it."""
    user = os.getuid() if hasattr(os, "getuid") else getpass.getuser()
    return pathlib.Path(tempfile.gettempdir()) / f"diffusion_jax_mirrors_{user}"


def with_urls(text: str) -> str:
    """Replaces paths of local copies in a text by the objects' URLs."""
    downloads, mirrors = re.escape(str(downloads_root())), re.escape(str(mirrors_root()))
    return re.sub(rf"(?:{downloads}|{mirrors}/[^/]+)/(gs|s3)/", r"\1://", text)


@contextlib.contextmanager
def atomic_write(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields a temporary path in the directory of `path`, with its suffix, for the block to write.

    The temporary file replaces `path` when the block ends, and is deleted if the block raises.
    """
    temporary = path.with_name(f"{path.stem}.partial{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


@contextlib.contextmanager
def atomic_directory(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields a temporary directory beside `path` for the block to fill.

    The temporary directory replaces `path`, which may be an empty directory, when the block ends, and is deleted if the block
    raises.
    """
    temporary = path.with_name(f"{path.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)  # from an interrupted write
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if path.exists():
            path.rmdir()  # Windows cannot replace a directory
        os.replace(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def write_text(path: pathlib.Path, text: str) -> None:
    """Replaces the contents of a text file."""
    with atomic_write(path) as temporary:
        temporary.write_text(text)


def save_npz(path: pathlib.Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes named arrays, in order, to an .npz file, replacing an existing file."""
    with atomic_write(path) as temporary:
        np.savez(temporary, **arrays)  # pyright: ignore[reportArgumentType]  # no array is called allow_pickle


def map_array(path: str | os.PathLike[str], name: str) -> np.ndarray:
    """Returns an array from an .npz, memory-mapped and read-only, or loaded if the array is compressed.

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
    with open(path, "rb") as file:  # the member's local header has the lengths of the name and the extra field
        file.seek(member.header_offset + 26)
        start = member.header_offset + 30 + sum(np.frombuffer(file.read(4), "<u2").tolist())
    if not all(shape):
        return np.empty(shape, dtype)
    return np.memmap(path, dtype, "r", start + header_size, shape, "F" if is_fortran else "C")
