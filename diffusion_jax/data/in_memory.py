"""Sources in memory, and decoded images in the user's cache, so that a data set is decoded once and not at every launch.

A file of the cache is named by the SHA-256 of the names and contents of the encoded files and of how they are decoded, so a
changed source has another name. Its arrays are memory-mapped; a damaged file is found by the checksums of .npz and replaced.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pathlib
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import PIL

from diffusion_jax.data.array_rows import map_array
from diffusion_jax.data.images import Folder
from diffusion_jax.data.sources import DerivedSource, Source, read_classes
from diffusion_jax.data.tfds import Tfds
from diffusion_jax.errors import UnreadableFilesError
from diffusion_jax.files import user_cache

__all__ = ["InMemory", "decode_once", "is_in_memory"]

_VERSION = 2  # increase it if sources decode the same files to other arrays


class InMemory:
    """A source that is read once: arrays by the names of `Source.read`, such as "image" uint8 [N, *spatial, C]."""

    def __init__(
        self,
        source: Source,
        progress: Callable[[Iterable[int], int], Iterable] = lambda sizes, total: sizes,
        arrays: dict[str, np.ndarray] | None = None,
    ):
        """Reads the source, unless its arrays are given.

        progress: (sizes of the decoded chunks, number of examples) -> sizes, to show the number of decoded examples.
        Raises: UnreadableFilesError with all corrupted images.
        """
        self.num_classes, self.class_names = read_classes(source)
        self.arrays: dict[str, np.ndarray] = arrays or {}
        if arrays is None:
            self._decode(source, progress)

    def _decode(self, source: Source, progress: Callable[[Iterable[int], int], Iterable]) -> None:
        n, failures = len(source), {}
        try:
            first = source.read([0])
        except UnreadableFilesError as error:
            failures = dict(error.failures)
        else:
            self.arrays = {name: np.empty((n, *array.shape[1:]), array.dtype) for name, array in first.items()}

        def decode(chunk):
            try:
                batch = source.read(chunk)
            except UnreadableFilesError as error:
                failures.update(error.failures)
            else:
                if not failures:
                    for name, array in self.arrays.items():
                        array[chunk] = batch[name]
            return len(chunk)

        chunks = np.array_split(np.arange(n), -(-n // 256))
        with ThreadPoolExecutor() as pool:  # decoding PNG and JPEG releases the interpreter's lock
            for _ in progress(pool.map(decode, chunks), n):
                pass
        if failures:
            raise UnreadableFilesError(failures.items())

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values())))

    def read(self, indices: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
        return {name: array[indices] for name, array in self.arrays.items()}


def is_in_memory(source: Source) -> bool:
    """Whether a source, or the one that it is made from, is in memory, so that its batches need no other processes."""
    while isinstance(source, DerivedSource):
        source = source.source
    return isinstance(source, InMemory)


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
    directory = user_cache() / "decoded"
    try:
        path = directory / f"{_source_digest(source, settings)}.npz"
    except OSError:  # a file that cannot be read, which the source reports better
        return InMemory(source, progress)
    with contextlib.suppress(OSError, ValueError, EOFError, zipfile.BadZipFile):  # it does not exist, or is damaged
        with zipfile.ZipFile(path) as archive:
            names = [name.removesuffix(".npy") for name in archive.namelist()]
            is_whole = archive.testzip() is None
        if is_whole:
            return InMemory(source, arrays={name: map_array(path, name).view(np.ndarray) for name in names})
    loaded = InMemory(source, progress)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory) as temporary:  # processes may write the same file at once
            np.savez(f"{temporary}/{path.name}", **loaded.arrays)  # pyright: ignore[reportArgumentType]  # as in `save_npz`
            os.replace(f"{temporary}/{path.name}", path)
    except OSError as error:
        reason = error.strerror or str(error)
        log(f"Note: the decoded images are not kept in {directory} ({reason}); the next launch decodes them again.")
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
