"""Decoded images in the user's cache, so that a data set is decoded once and not at every launch.

A file holds the arrays of a source and their SHA-256. It is named by the SHA-256 of the names and contents of the encoded
files and of how they are decoded. So a changed source has another name, and a damaged file is found before it is used.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pathlib
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import PIL

from diffusion_jax.data.in_memory import InMemory
from diffusion_jax.data.numpy_files import map_array
from diffusion_jax.data.sources import Folder, Tfds
from diffusion_jax.files import user_cache

__all__ = ["MAX_BYTES", "cache_directory", "decode_once"]

MAX_BYTES = 10 * 2**30  # of all files together; those that were not used for the longest time are deleted
_VERSION = 1  # increase it if sources decode the same files to other arrays
_DIGEST, _FINDINGS = "sha256", "findings"


def cache_directory() -> pathlib.Path:
    """The user's cache directory of decoded images; it is safe to delete."""
    return user_cache() / "decoded"


def decode_once(
    source: Tfds | Folder,
    settings: Mapping[str, object],
    progress: Callable[[Iterable[int], int], Iterable],
    log: Callable[[str], None],
) -> InMemory:
    """The source in memory: memory-mapped from the cache, or decoded and written to it.

    settings: what decides the arrays besides the files. A cache that cannot be written costs a line of the log.
    Raises: UnreadableFilesError with all corrupted images; DataError.
    """
    try:
        path = cache_directory() / f"{_source_digest(source, settings)}.npz"
    except OSError:  # a file that cannot be read, which the source reports better
        return InMemory(source, progress)
    arrays = _read(path, source)
    if arrays is not None:
        return InMemory(source, arrays=arrays)
    loaded = InMemory(source, progress)
    try:
        _write(path, loaded.arrays, source)
    except OSError as error:
        reason = error.strerror or str(error)
        log(f"Note: the decoded images are not kept in {path.parent} ({reason}); the next launch decodes them again.")
    return loaded


def _source_digest(source: Tfds | Folder, settings: Mapping[str, object]) -> str:
    """SHA-256 of the names and contents of the files of a source, and of everything that decides how they are decoded."""

    def file_digest(path: pathlib.Path) -> str:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    names, paths = zip(*source.encoded_files(), strict=True)
    with ThreadPoolExecutor() as pool:  # hashing releases the interpreter's lock
        files = list(zip(names, pool.map(file_digest, paths), strict=True))
    made_with = {"version": _VERSION, "pillow": PIL.__version__, "source": type(source).__name__}
    text = json.dumps([made_with, dict(settings), files], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _arrays_digest(arrays: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.shape} {array.dtype}".encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _read(path: pathlib.Path, source: Tfds | Folder) -> dict[str, np.ndarray] | None:
    """The memory-mapped arrays of a file; None, and the file is deleted, if it is damaged; None if there is none."""
    try:
        with np.load(path, allow_pickle=False) as file:
            names = [name for name in file.files if name not in (_DIGEST, _FINDINGS)]
            expected, findings = str(file[_DIGEST]), json.loads(str(file[_FINDINGS]))
        arrays = {name: map_array(path, name).view(np.ndarray) for name in names}
        if _arrays_digest(arrays | {_FINDINGS: np.array(json.dumps(findings))}) == expected:
            with contextlib.suppress(OSError):  # a cache that can be read only
                os.utime(path)
            source.findings = findings
            return arrays
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        pass
    with contextlib.suppress(OSError):
        path.unlink()
    return None


def _write(path: pathlib.Path, arrays: Mapping[str, np.ndarray], source: Tfds | Folder) -> None:
    """Writes the arrays, completely or not at all; processes may write the same file at once. Raises: OSError."""
    size = sum(array.nbytes for array in arrays.values())
    if size > MAX_BYTES:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    _make_room(path.parent, size)
    contents = {**arrays, _FINDINGS: np.array(json.dumps(source.findings))}
    handle, temporary = tempfile.mkstemp(".partial", dir=path.parent)
    try:
        with open(handle, "wb") as file:
            digest = np.array(_arrays_digest(contents))
            np.savez(file, **contents, **{_DIGEST: digest})  # pyright: ignore[reportArgumentType]  # as in `save_npz`
        # Another launch may have mapped a file that was finished in the meantime; on NFS it could not read a replaced one.
        if not path.exists():
            os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            os.unlink(temporary)


def _make_room(directory: pathlib.Path, size: int) -> None:
    """Deletes the files that were not used for the longest time until `size` more bytes fit into `MAX_BYTES`."""
    files = [(path.stat(), path) for path in directory.iterdir()]
    used = sum(stat.st_size for stat, _ in files) + size
    for stat, path in sorted(files, key=lambda item: item[0].st_mtime):
        if used <= MAX_BYTES:
            return
        path.unlink(missing_ok=True)
        used -= stat.st_size
