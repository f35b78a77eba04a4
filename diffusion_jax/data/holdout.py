"""`data.holdout`: a share of a folder or file that training leaves out, as a split "test" beside "train"."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from diffusion_jax.data.array_files import ArrayFiles, has_splits
from diffusion_jax.data.images import Folder
from diffusion_jax.data.sources import SelectedExamples, Source
from diffusion_jax.errors import DataError

__all__ = ["are_held_out", "check_holdout", "select_split"]

_BLOCK_BYTES = 2**24
_SPLITS = ("train", "test")


def check_holdout(config: Mapping) -> None:
    """Raises: DataError for a `data.holdout` of data that have splits of their own, or a split that it does not make."""
    share, name = config["holdout"], config["dataset"]
    if not share:
        return
    if name not in ("folder", "arrays"):
        raise DataError(
            f"data.holdout={share} is for data.dataset=folder or arrays; {name!r} defines its splits itself: use "
            "data.holdout=0 and choose them by data.split and evaluation.split"
        )
    if config["split"] not in _SPLITS:
        raise DataError(f"data.split={config['split']!r}: data.holdout={share} makes the splits 'train' and 'test'")
    if name == "arrays" and config["data_dir"] and has_splits(config["data_dir"], config["split"]):
        raise DataError(
            f"data.holdout={share}, but {config['data_dir']} has splits of its own: use data.holdout=0, or the file of one "
            "split as data.data_dir"
        )


def are_held_out(keys: Iterable[bytes], share: float) -> np.ndarray:
    """bool [N]: whether each example belongs to the share, by the SHA-256 of its key alone.

    So an example keeps its side if others are added, removed or reordered, and examples with equal keys are on one side.
    """
    hashes = (int.from_bytes(hashlib.sha256(key).digest()[:8], "big") for key in keys)
    return np.array([value < share * 2**64 for value in hashes], bool)


def select_split(config: Mapping, files: Folder | ArrayFiles, loaded: Source) -> Source:
    """The examples of `data.split`: the held-out ones for "test", and the others for "train".

    The key of an image in a folder is its path below the folder, so that no image must be read. The key of an array is its
    values, because rows have no names.

    files: the source before it was loaded. loaded: `files` itself or its copy in memory.
    Raises: DataError if a side has no example.
    """
    share = config["holdout"]
    if isinstance(files, Folder):
        keys = (name.replace("\\", "/").encode() for name, _ in files.encoded_files())
    else:
        keys = _contents(loaded)
    held_out = are_held_out(keys, share)
    if held_out.all() or not held_out.any():
        raise DataError(
            f"data.holdout={share} holds out {held_out.sum():,} of {len(held_out):,} examples; each of 'train' and 'test' "
            "needs one: use another share"
        )
    return SelectedExamples(loaded, np.flatnonzero(held_out == (config["split"] == "test")))


def _contents(source: Source) -> Iterator[bytes]:
    """The bytes of each example's values, without its label and condition."""

    def values(indices: np.ndarray) -> np.ndarray:
        batch = source.read(indices)
        return np.ascontiguousarray(batch["image"] if "image" in batch else batch["x"])

    size = max(_BLOCK_BYTES // values(np.arange(1)).nbytes, 1)
    for start in range(0, len(source), size):
        for example in values(np.arange(start, min(start + size, len(source)))):
            yield example.tobytes()
