"""Data: sources of examples, their normalization, and batches as a pure function of (seed, step)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

import numpy as np

from diffusion_jax.config import resolve
from diffusion_jax.data.array_files import ArrayFiles, has_splits
from diffusion_jax.data.checks import (
    CheckedSource,
    check_examples,
    check_image_leaves,
    check_levels,
    check_random_flip,
    example_shape,
    import_source,
    is_of_images,
)
from diffusion_jax.data.holdout import check_holdout, select_split
from diffusion_jax.data.images import Digits, EncodedImages, Folder, decode_once, find_folder, fit
from diffusion_jax.data.normalization import (
    Normalization,
    Normalizations,
    Normalized,
    find_normalizations,
    to_data_units,
    to_model_units,
)
from diffusion_jax.data.pipeline import Batches, stream
from diffusion_jax.data.sources import InMemory, Source, is_in_memory, read_classes
from diffusion_jax.data.tfds import Tfds, local_data_dir, make_builder, natural_shape, prepare
from diffusion_jax.errors import DataError, UnreadableFilesError, list_names
from diffusion_jax.storage.objects import is_url

__all__ = [
    "ArrayFiles",
    "Batches",
    "DataError",
    "Digits",
    "Folder",
    "InMemory",
    "Normalization",
    "Normalizations",
    "Normalized",
    "Source",
    "UnreadableFilesError",
    "check_examples",
    "check_levels",
    "check_location",
    "check_random_flip",
    "describe",
    "example_shape",
    "find_normalizations",
    "fit",
    "has_splits",
    "is_in_memory",
    "is_of_images",
    "load",
    "natural_shape",
    "read_classes",
    "stream",
    "to_data_units",
    "to_model_units",
]


def describe(source: Source) -> str:
    """The numbers of examples and classes of a source, with the names of up to 12 classes."""
    first, (num_classes, names) = _read_first(source), read_classes(source)
    noun = "example" if "x" in first or ("image" in first and first["image"].ndim != 4) else "image"
    examples = f"{len(source):,} {noun}{'s' * (len(source) != 1)}"
    if "condition" in first:
        examples += f" with conditions of shape {list(first['condition'].shape[1:])}"
    if not num_classes:
        return f"{examples} without classes"
    classes = f"{examples} of {num_classes:,} class{'es' * (num_classes != 1)}"
    if all(name == str(i) for i, name in enumerate(names)):
        return classes
    return f"{classes}: {list_names([f'{i} {name}' for i, name in enumerate(names)], 12)}"


def load(
    config: Mapping,
    progress: Callable[[Iterable[int], int], Iterable] = lambda sizes, total: sizes,
    log: Callable[[str], None] = lambda line: None,
    source: Source | None = None,
) -> Source:
    """The source of `config.data`, in memory if it fits into `data.memory_mb`; its "x" are in the units of the data.

    config: the leaves of the group `data`, which may be partial; the others have their defaults. A missing TFDS data set is
    downloaded and prepared first, if `data.download` is true.
    progress: as for `InMemory.load`, while the examples are read. log: called with lines about the examples.
    source: a source to load instead of the one that `config` names; `data.holdout` must then be 0.
    Raises: ConfigError for a value that its leaf does not allow; DataError with one line of advice.
    """
    config = resolve({"data": config})["data"]
    if source is None:
        source = _open_source(config)
    elif config["holdout"]:
        raise DataError(
            f"data.holdout={config['holdout']} is for a folder or file that the config names, not for a source that a "
            "program gives: leave examples out of the source, and use data.holdout=0"
        )
    else:
        source = _check_source(config, source)
    log(f"{describe(source)}.")
    try:
        loaded = _load_into_memory(config, source, progress, log)
    finally:  # also if corrupted images raise an error
        for note in source.notes() if isinstance(source, Folder | ArrayFiles) else ():
            log(note)
    if not config["holdout"]:
        return loaded
    assert isinstance(source, Folder | ArrayFiles)
    selected = select_split(config, source, loaded)
    log(f"{len(selected):,} of them are the split {config['split']!r} (data.holdout={config['holdout']}).")
    return selected


def _load_into_memory(config: Mapping, source: Source, progress, log) -> Source:
    """The source in memory if it fits, otherwise the source itself."""
    if _megabytes(source, config) > config["memory_mb"]:
        return source
    if isinstance(source, EncodedImages) and config["cache_decoded"]:
        settings = {name: config[name] for name in ("dataset", "image_size", "channels")}
        settings["split"] = "train" if isinstance(source, Folder) else config["split"]  # a folder is decoded as a whole
        return decode_once(source, settings, progress, log)
    return InMemory.load(source, progress)


def _read_first(source: Source) -> dict[str, np.ndarray]:
    """The first example; {} for image files, whose shape is known and whose damage is reported for all of them together."""
    return {} if isinstance(source, EncodedImages) else source.read([0])


def _megabytes(source: Source, config: Mapping) -> float:
    """The size of a source in memory, in megabytes."""
    arrays = [array for name, array in _read_first(source).items() if name != "label"]
    bytes_per_example = sum(array.nbytes for array in arrays) if arrays else math.prod(example_shape(config))
    return len(source) * bytes_per_example / 2**20


def _check_source(config: Mapping, source: Source) -> Source:
    """A source from outside this package, checked now and whenever it is read. Raises: DataError."""
    check_examples(config, source)
    return source if isinstance(source, Folder | ArrayFiles) else CheckedSource(source)


def check_location(config: Mapping) -> None:
    """Checks that the data of a config exist, without reading them; what is in a bucket is not checked.

    config: as in `load`. Raises: ConfigError; DataError for an unknown data set, a folder that does not exist, or a set
    of TFDS that is neither in its directory nor to be downloaded.
    """
    config = resolve({"data": config})["data"]
    name, data_dir = config["dataset"], config["data_dir"]
    if name not in ("folder", "arrays"):
        check_holdout(config)
    if is_url(data_dir) or ":" in name or name in ("arrays", "digits"):
        return
    if name == "folder":
        find_folder(data_dir)
    else:
        make_builder(name, data_dir or None, must_be_prepared=not config["download"])


def _open_source(config: Mapping) -> Source:
    name, data_dir, shape = config["dataset"], config["data_dir"], example_shape(config)
    check_holdout(config)
    if ":" in name:
        return _check_source(config, import_source(name, config))
    if name == "arrays":
        source = ArrayFiles(data_dir, "train" if config["holdout"] else config["split"], shape)
        try:
            check_examples(config, source)
        except DataError as error:
            raise DataError(f"{data_dir}: {error}") from error
        return source
    size, channels = check_image_leaves(config)
    if name == "digits":
        return Digits(config["split"], size, channels)
    if name == "folder":
        return Folder(data_dir or "", size, channels)
    local_dir = local_data_dir(name, data_dir or None)
    if config["download"] and not is_url(data_dir):
        prepare(name, local_dir)
    return Tfds(name, config["split"], local_dir, size, channels)
