"""Features of sets of images, computed on all devices and cached in chunks.

With the cache an interrupted run resumes, and the features of a reference are computed once for all comparisons.
"""

from __future__ import annotations

import hashlib
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from diffusion_jax.data import Source
from diffusion_jax.distributed import sharding
from diffusion_jax.distributed.processes import broadcast_from_process_0
from diffusion_jax.evaluation.feature_extractors import BatchFeatures, FeatureExtractor, compile_extractor
from diffusion_jax.evaluation.image_sets import pixel_digest, read_examples
from diffusion_jax.evaluation.metrics import Moments, moments_of_chunks
from diffusion_jax.files import user_cache
from diffusion_jax.storage import locations

__all__ = ["CHUNK", "MAX_POOLED", "FeaturePipeline", "SetFeatures", "cache_directory"]

# Images of a chunk. Sums are over chunks, so that no metric depends on the batch size.
CHUNK = 1024
MAX_POOLED = 50_000
_VERSION = 1  # of cached features: increase it if the same extractor returns other features for the same images


class SetFeatures(NamedTuple):
    """Features of a set of images.

    pool: [N, D] float32, of its first `MAX_POOLED` images, or None for a set of statistics only. moments: of the features of
    all images. spatial: moments of Inception's spatial features, or None. digest: of the pixels, or of the statistics.
    cache: the directory of the cached features.
    """

    pool: np.ndarray | None
    moments: Moments
    spatial: Moments | None
    digest: str
    cache: pathlib.Path | None = None

    def delete_cache(self) -> None:
        """Removes the cached features of a set that is not measured again; one process calls this."""
        if self.cache:
            shutil.rmtree(self.cache)
            locations.removed(self.cache)


class _ChunkCache:
    """Features of the chunks of a set, one .npz each. Several programs may write the same files at once."""

    def __init__(self, directory: pathlib.Path):
        self._directory = directory
        broadcast_from_process_0(lambda: directory.mkdir(parents=True, exist_ok=True))
        self.stored = set(
            broadcast_from_process_0(lambda: [int(p.stem) for p in directory.glob("*.npz") if p.stem.isdecimal()])
        )

    def save(self, i: int, arrays: dict[str, Any]) -> None:
        """Writes chunk i completely or not at all, in process 0."""
        if jax.process_index() == 0:
            # A unique temporary name, unlike `files.atomic_write`, because several programs may write the same chunk.
            with tempfile.NamedTemporaryFile(dir=self._directory, suffix=".partial", delete=False) as file:
                np.savez(file, **arrays)
            os.replace(file.name, self._directory / f"{i}.npz")
            locations.written(self._directory / f"{i}.npz")

    def load(self, i: int) -> dict[str, np.ndarray]:
        """The arrays of chunk i."""
        with np.load(locations.fetch(self._directory / f"{i}.npz")) as arrays:
            return dict(arrays)


def cache_directory() -> pathlib.Path:
    """The user's cache directory of features; it is safe to delete."""
    return user_cache() / "features"


class FeaturePipeline:
    """Computes features with an extractor, in batches of `batch_size` over a mesh.

    progress_bar: (title, total, done) -> a context manager whose `update(done)` shows progress.
    """

    def __init__(self, extractor: FeatureExtractor, mesh, batch_size: int, progress_bar: Callable):
        self.extractor, self._mesh, self._progress_bar = extractor, mesh, progress_bar
        self._batch_size = -(-batch_size // mesh.size) * mesh.size
        self._compute = compile_extractor(extractor, mesh)

    def __call__(self, images: np.ndarray) -> BatchFeatures:
        """Features of images uint8 [N, H, W, C], or arrays float32 [N, *spatial, C], which every process has.

        Raises: ValueError for features that are not finite, or not [N, D].
        """
        return self._extract(images.__getitem__, len(images), lambda done: None)

    def _extract(
        self, read: Callable[[np.ndarray], np.ndarray], count: int, progress: Callable[[int], None]
    ) -> BatchFeatures:
        """Features of `count` images, of which each process reads the rows of its devices.

        progress: called with the number of finished images.
        """
        size, rows = self._batch_size, sharding.batch_sharding(self._mesh)
        compiles = self.extractor.compiles
        own_rows = sharding.process_rows(size, self._mesh) if compiles else np.arange(size)
        batches = []
        for start in range(0, count, size):
            # The last batch is padded with copies of the last image, which are removed below.
            batch = read(np.minimum(start + own_rows, count - 1))
            out: Any = self._compute(jax.make_array_from_process_local_data(rows, batch) if compiles else batch)
            out = multihost_utils.process_allgather(out, tiled=True) if compiles else out
            out = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), out)
            if out.pool.ndim != 2 or len(out.pool) != size:
                raise ValueError(
                    f"{self.extractor.name} returns features of shape {out.pool.shape} for {size} images, not [{size}, D]"
                )
            batches.append(jax.tree.map(lambda leaf, start=start: leaf[: count - start], out))
            progress(min(start + size, count))
        features: BatchFeatures = jax.tree.map(lambda *leaves: np.concatenate(leaves), *batches)
        if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(features)):
            raise ValueError(f"the features of {self.extractor.name} are not finite")
        return features

    def extract_set(self, name: str, source: Source, directory: pathlib.Path) -> SetFeatures:
        """Features of a source of images or arrays, cached below `directory`. name: of the source, for the progress bar."""
        count, num_chunks = len(source), -(-len(source) // CHUNK)
        with self._progress_bar(f"Reading {name}", count, 0) as bar:
            digest = broadcast_from_process_0(lambda: pixel_digest(source, CHUNK, bar.update))
        key = (digest, self.extractor.digest, CHUNK, _VERSION, jax.default_backend())
        directory = directory / hashlib.sha256(repr(key).encode()).hexdigest()[:16]
        cache = _ChunkCache(directory)
        with self._progress_bar(f"Features of {name}", count, min(len(cache.stored) * CHUNK, count)) as bar:
            for i in range(num_chunks):
                if i in cache.stored:
                    continue
                first, size = i * CHUNK, min(CHUNK, count - i * CHUNK)

                def read(rows, first=first):
                    return read_examples(source, first + rows)

                features = self._extract(read, size, lambda done, first=first: bar.update(first + done))
                cache.save(i, {kind: leaf for kind, leaf in features._asdict().items() if leaf is not None})
        multihost_utils.sync_global_devices("features written")
        pool = [cache.load(i)["pool"] for i in range(min(num_chunks, -(-MAX_POOLED // CHUNK)))]
        moments = moments_of_chunks(cache.load(i)["pool"] for i in range(num_chunks))
        spatial = None
        if "spatial" in cache.load(0):
            spatial = moments_of_chunks(cache.load(i)["spatial"] for i in range(num_chunks))
        multihost_utils.sync_global_devices("features read")
        return SetFeatures(np.concatenate(pool)[:MAX_POOLED], moments, spatial, digest, directory)
