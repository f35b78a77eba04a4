"""Files that are written completely or not at all; those of a mirror are uploaded, too."""

from __future__ import annotations

import contextlib
import os
import pathlib
import shutil
from collections.abc import Iterator, Mapping

import numpy as np

from diffusion_jax.storage import locations

__all__ = ["atomic_directory", "atomic_write", "save_npz", "user_cache", "write_text"]


def user_cache() -> pathlib.Path:
    """The directory of everything that later runs can make again: programs, features, decoded images, downloads."""
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "diffusion_jax"


@contextlib.contextmanager
def atomic_write(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields a temporary path in the directory of `path`, with its suffix, for the block to write.

    The temporary file replaces `path` when the block ends, and is removed if the block raises.
    """
    temporary = path.with_name(f"{path.stem}.partial{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
        locations.written(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


@contextlib.contextmanager
def atomic_directory(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields a temporary directory beside `path` for the block to fill.

    It replaces `path`, which may be an empty directory, when the block ends, and is removed if the block raises.
    """
    temporary = path.with_name(f"{path.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)  # of an interrupted write
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if path.exists():
            path.rmdir()  # Windows cannot replace a directory
        os.replace(temporary, path)
        locations.written(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def write_text(path: pathlib.Path, text: str) -> None:
    """Replaces the contents of a text file."""
    with atomic_write(path) as temporary:
        temporary.write_text(text)


def save_npz(path: pathlib.Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes named arrays, in their order, to a new .npz file or over an existing one."""
    with atomic_write(path) as temporary:
        np.savez(temporary, **arrays)  # pyright: ignore[reportArgumentType]  # no array is called allow_pickle
