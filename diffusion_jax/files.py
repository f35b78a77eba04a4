"""Atomic writes of files, the user's cache, and the local copies of objects in buckets."""

from __future__ import annotations

import contextlib
import functools
import getpass
import glob
import os
import pathlib
import re
import secrets
import shutil
import stat
import tempfile
import time
import zipfile
from collections.abc import Iterator, Mapping
from typing import BinaryIO

import numpy as np

from diffusion_jax.errors import StorageError, UserError
from diffusion_jax.untrusted import check_regular, open_npz, read_header


def user_cache() -> pathlib.Path:
    """Returns the cache directory, for files that later runs can recreate: programs, features, decoded images, downloads."""
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser().absolute() / "diffusion_jax"


def downloads_root() -> pathlib.Path:
    """Returns the directory for downloaded objects; it stores gs://BUCKET/NAME as gs/BUCKET/NAME."""
    return user_cache() / "downloads"


def mirrors_root() -> pathlib.Path:
    """Returns the directory for mirrors, one local copy RANDOM/gs/BUCKET/NAME for each launch that writes to a bucket."""
    user = os.getuid() if hasattr(os, "getuid") else getpass.getuser()
    return pathlib.Path(tempfile.gettempdir()) / f"diffusion_jax_mirrors_{user}"


def require_space(directory: pathlib.Path, what: str, size: int, advice: str) -> None:
    """Raises: StorageError with the advice if the disk that holds `directory` has less than `size` bytes left."""
    existing = next(parent for parent in (directory, *directory.absolute().parents) if parent.exists())
    if size > (free := shutil.disk_usage(existing).free):
        sizes = f"{what} needs {size / 1e9:.1f} GB, and {existing} has {free / 1e9:.1f} GB left"
        raise StorageError(f"{sizes}; {advice}")


def with_urls(text: str) -> str:
    """Replaces paths of local copies in a text by the objects' URLs."""
    downloads, mirrors = re.escape(str(downloads_root())), re.escape(str(mirrors_root()))
    return re.sub(rf"(?:{downloads}|{mirrors}/[^/]+)/(gs|s3)/", r"\1://", text)


@contextlib.contextmanager
def atomic_write(path: pathlib.Path) -> Iterator[BinaryIO]:
    """Yields a new binary file in the directory of `path` for the block to write.

    When the block ends, the file replaces `path`, which may be a link; if the block raises, the file is deleted. The next
    write of `path` deletes unfinished files that killed programs left more than an hour ago.
    """
    for left in path.parent.glob(f"{glob.escape(path.stem)}.partial.*{glob.escape(path.suffix)}"):
        with contextlib.suppress(OSError):
            if left.lstat().st_mtime < time.time() - 3600:
                left.unlink()
    # No existing link can have this random name. The descriptor still refers to the directory if the directory is renamed.
    name = f"{path.stem}.partial.{secrets.token_hex(8)}{path.suffix}"
    has_descriptors = os.open in os.supports_dir_fd
    directory = os.open(path.parent, os.O_RDONLY) if has_descriptors else None
    temporary, final = (name, path.name) if has_descriptors else (str(path.with_name(name)), str(path))
    try:
        with open(temporary, "x+b", opener=functools.partial(os.open, mode=0o666, dir_fd=directory)) as file:
            yield file
        os.replace(temporary, final, src_dir_fd=directory, dst_dir_fd=directory)
    finally:
        with contextlib.suppress(OSError):  # the temporary file exists only if the block raised
            os.unlink(temporary, dir_fd=directory)
        if directory is not None:
            os.close(directory)


def check_in_place(*paths: pathlib.Path) -> None:
    """Checks existing files before they are locked, appended to or overwritten; other writes replace files (`atomic_write`).

    Raises: UserError for a folder, a pipe or a device, and for a hard link, where another file would change, too.
    """
    for path in paths:
        if not path.exists():
            continue
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise UserError(f"{path} is not a regular file, so the program cannot write into it; type: rm -r {path}")
        if status.st_nlink > 1:
            raise UserError(
                f"{path} is a hard link: writing into it would change another file, too; to make it a file of its own, type: "
                f"cp {path} {path}.new && mv {path}.new {path}"
            )


@contextlib.contextmanager
def atomic_directory(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields a new directory near `path` for the block to fill.

    When the block ends, the directory replaces `path`, which may be an empty directory; if the block raises, it is deleted.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".", dir=path.parent) as folder:
        temporary = pathlib.Path(folder, path.name)
        temporary.mkdir()
        yield temporary
        if path.exists():
            path.rmdir()  # Windows cannot replace a directory
        os.replace(temporary, path)


def write_text(path: pathlib.Path, text: str) -> None:
    """Replaces the contents of a text file."""
    with atomic_write(path) as file:
        file.write(text.encode())


def save_npz(path: pathlib.Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes named arrays, in order, to an .npz file, replacing an existing file."""
    with atomic_write(path) as file:
        np.savez(file, **arrays)  # pyright: ignore[reportArgumentType]  # no array is called allow_pickle


def map_array(path: str | os.PathLike[str], name: str) -> np.ndarray:
    """Returns an array from an .npz, memory-mapped and read-only, or loaded if the array is compressed.

    Raises: OSError, ValueError; KeyError for an unknown name; zipfile.BadZipFile.
    """
    check_regular(path)
    with zipfile.ZipFile(path) as archive:
        member = archive.getinfo(f"{name}.npy")
        if member.compress_type != zipfile.ZIP_STORED:
            with open_npz(path) as arrays:
                return arrays[name]
        with archive.open(member) as file:
            shape, is_fortran, dtype = read_header(file, member.file_size)
            header_size = file.tell()
    with open(path, "rb") as file:  # the member's local header has the lengths of the name and the extra field
        file.seek(member.header_offset + 26)
        start = member.header_offset + 30 + sum(np.frombuffer(file.read(4), "<u2").tolist())
    if not all(shape):
        return np.empty(shape, dtype)
    return np.memmap(path, dtype, "r", start + header_size, shape, "F" if is_fortran else "C")
