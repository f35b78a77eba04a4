"""The features of whole sets of images, over all devices, in parts that are kept: an interrupted run goes on from them, and
a reference is read once for all its comparisons.
"""

from __future__ import annotations

import hashlib
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from diffusion_jax.distributed import sharding
from diffusion_jax.distributed.processes import broadcast_from_process_0
from diffusion_jax.evaluation import images as image_sets
from diffusion_jax.evaluation.features import Extracted, Extractor, compiled
from diffusion_jax.evaluation.metrics import Moments, moments_of_chunks

# Images to a part. Sums are over parts, so that no figure depends on the batch size.
CHUNK = 1024
MAX_POOLED = 50_000
_VERSION = 1  # of the features: to be raised when the same network, asked the same, would give others


class Features(NamedTuple):
    """Of a set of images. pool: [N, D] float32, of its first `MAX_POOLED` images, or None where there are statistics alone.

    moments: of the features of all images. spatial: moments of Inception's spatial features, or None. digest: of the
    pixels, or of the statistics. parts: where the features lie.
    """

    pool: np.ndarray | None
    moments: Moments
    spatial: Moments | None
    digest: str
    parts: pathlib.Path | None = None

    def delete_cache(self) -> None:
        """Removes the parts of a set that will not be asked for again; for one process to call."""
        if self.parts:
            shutil.rmtree(self.parts)


class _Parts:
    """Features of the chunks of a set, one .npz each. Several programs may write the same ones at once."""

    def __init__(self, directory: pathlib.Path):
        self._directory = directory
        broadcast_from_process_0(lambda: directory.mkdir(parents=True, exist_ok=True))
        self.done = set(
            broadcast_from_process_0(lambda: [int(p.stem) for p in directory.glob("*.npz") if p.stem.isdecimal()])
        )

    def save(self, i: int, arrays: dict[str, np.ndarray]) -> None:
        """Part i, whole or not at all; from process 0 only."""
        if jax.process_index() == 0:
            with tempfile.NamedTemporaryFile(dir=self._directory, suffix=".partial", delete=False) as file:
                np.savez(file, **arrays)
            os.replace(file.name, self._directory / f"{i}.npz")

    def load(self, i: int) -> dict[str, np.ndarray]:
        """The arrays of part i."""
        with np.load(self._directory / f"{i}.npz") as arrays:
            return dict(arrays)


def cache_directory() -> pathlib.Path:
    """Where features of references are kept: safe to delete."""
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "diffusion_jax" / "features"


class Extraction:
    """An extractor at work: batches of `batch_size` over a mesh. bar: (what, total, done) -> a context whose `update(done)`
    shows progress.
    """

    def __init__(self, extractor: Extractor, mesh, batch_size: int, bar: Callable):
        self.extractor, self._mesh, self._bar = extractor, mesh, bar
        self._batch_size = -(-batch_size // mesh.size) * mesh.size
        self._run = compiled(extractor, mesh)

    def __call__(self, images: np.ndarray) -> Extracted:
        """Features of images uint8 [N, H, W, C], which every process has.

        Raises: ValueError for features that are not finite, or not [N, D].
        """
        return self._extract(images.__getitem__, len(images), lambda done: None)

    def _extract(
        self, read: Callable[[np.ndarray], np.ndarray], count: int, progress: Callable[[int], None]
    ) -> Extracted:
        """Of `count` images, of which each process reads the rows that its devices hold. progress: told how many are done."""
        size, rows = self._batch_size, sharding.batch_sharding(self._mesh)
        compiles = self.extractor.compiles
        held = sharding.process_rows(size, self._mesh) if compiles else np.arange(size)
        found = []
        for start in range(0, count, size):
            # The last batch is filled up with its last image, whose copies are cut off again.
            batch = read(np.minimum(start + held, count - 1))
            out = self._run(jax.make_array_from_process_local_data(rows, batch) if compiles else batch)
            out = multihost_utils.process_allgather(out, tiled=True) if compiles else out
            out = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), out)
            if out.pool.ndim != 2 or len(out.pool) != size:
                raise ValueError(
                    f"{self.extractor.name} gives {size} images features of shape {out.pool.shape}, not [{size}, D]"
                )
            found.append(jax.tree.map(lambda leaf, start=start: leaf[: count - start], out))
            progress(min(start + size, count))
        out = jax.tree.map(lambda *leaves: np.concatenate(leaves), *found)
        if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(out)):
            raise ValueError(f"the features {self.extractor.name} gives are not finite")
        return out

    def of(self, what: str, source, directory: pathlib.Path) -> Features:
        """Features of a source of images, whose parts stay below `directory`. what: its name, for the bar."""
        count, chunks = len(source), -(-len(source) // CHUNK)
        with self._bar(f"Reading {what}", count, 0) as bar:
            content = broadcast_from_process_0(lambda: image_sets.digest(source, CHUNK, bar.update))
        key = (content, self.extractor.digest, CHUNK, _VERSION, jax.default_backend())
        directory = directory / hashlib.sha256(repr(key).encode()).hexdigest()[:16]
        parts = _Parts(directory)
        with self._bar(f"Features of {what}", count, min(len(parts.done) * CHUNK, count)) as bar:
            for i in range(chunks):
                if i in parts.done:
                    continue
                first, size = i * CHUNK, min(CHUNK, count - i * CHUNK)
                read = lambda rows, first=first: source.read(first + rows)[0]  # noqa: E731
                out = self._extract(read, size, lambda done, first=first: bar.update(first + done))
                parts.save(i, {name: leaf for name, leaf in out._asdict().items() if leaf is not None})
        multihost_utils.sync_global_devices("features written")
        kept = [parts.load(i)["pool"] for i in range(min(chunks, -(-MAX_POOLED // CHUNK)))]
        moments = moments_of_chunks(parts.load(i)["pool"] for i in range(chunks))
        spatial = None
        if "spatial" in parts.load(0):
            spatial = moments_of_chunks(parts.load(i)["spatial"] for i in range(chunks))
        multihost_utils.sync_global_devices("features read")
        return Features(np.concatenate(kept)[:MAX_POOLED], moments, spatial, content, directory)
