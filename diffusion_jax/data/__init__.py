"""Data: sources of examples, their normalization, and batches as a pure function of (seed, step)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from diffusion_jax.config import check, resolve
from diffusion_jax.data.array_files import ArrayFiles
from diffusion_jax.data.batches import Batches, stream
from diffusion_jax.data.images import Digits, EncodedImages, Folder, decode_once, find_folder, fit
from diffusion_jax.data.normalization import (
    Normalization,
    Normalizations,
    Normalized,
    find_normalizations,
    to_data_units,
    to_model_units,
)
from diffusion_jax.data.sources import (
    CheckedSource,
    InMemory,
    NamedSource,
    Progress,
    SelectedExamples,
    Source,
    check_examples,
    check_levels,
    example_shape,
    is_in_memory,
    is_of_images,
    noun,
    read_classes,
    select_split,
)
from diffusion_jax.data.tfds import Tfds, make_builder, natural_shape
from diffusion_jax.errors import DataError, UnreadableFilesError, list_names
from diffusion_jax.storage.objects import is_url

__all__ = [
    "SOURCES",
    "ArrayFiles",
    "Batches",
    "DataError",
    "Digits",
    "Folder",
    "InMemory",
    "NamedSource",
    "Normalization",
    "Normalizations",
    "Normalized",
    "SelectedExamples",
    "Source",
    "UnreadableFilesError",
    "check_examples",
    "check_levels",
    "check_location",
    "describe",
    "example_shape",
    "find_normalizations",
    "fit",
    "has_splits",
    "is_in_memory",
    "is_of_images",
    "load",
    "natural_shape",
    "noun",
    "origin",
    "read_classes",
    "stream",
    "to_data_units",
    "to_model_units",
]


# Keys: values of `data.dataset`. All other values are TFDS data sets, or module:function.
SOURCES: dict[str, type[NamedSource]] = {"digits": Digits, "folder": Folder, "arrays": ArrayFiles}


def describe(source: Source) -> str:
    """Returns the numbers of examples and classes in a source, with the names of up to 12 classes."""
    first, (num_classes, names) = {} if isinstance(source, EncodedImages) else source.read([0]), read_classes(source)
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
    progress: Progress = lambda sizes, total: sizes,
    log: Callable[[str], None] = lambda line: None,
    source: Source | None = None,
) -> Source:
    """Loads the source of `config.data`, in memory if it fits into `data.memory_mb`; "x" is in data units.

    config: the settings of the group `data`, which may be partial; missing settings have their defaults. A missing TFDS data
    set is downloaded and prepared first, if `data.download` is true.
    progress: called while the examples are read. log: called with lines about the examples.
    source: a source to load instead of the source in `config`; `data.holdout` must then be 0.
    Raises: ConfigError for an invalid value; DataError with one line of advice; StorageError for an unusable bucket.
    """
    config = resolve({"data": config})["data"]
    check({"data": config}, "data")
    share, split = config["holdout"], config["split"]
    _refuse_holdout(config, is_given=source is not None)
    source = CheckedSource.wrap(config, source) if source is not None else _source_class(config).from_config(config)
    log(f"{describe(source)}.")
    is_encoded = isinstance(source, EncodedImages)
    first = {} if is_encoded else source.read([0])  # a corrupted image is reported with all other corrupted images
    size = sum(array.nbytes for name, array in first.items() if name != "label") or math.prod(example_shape(config))
    try:
        if len(source) * size > config["memory_mb"] * 2**20:
            loaded = source
        elif is_encoded and config["cache_decoded"] and not source.block_lengths:
            loaded = decode_once(source, config, progress, log)
        else:
            loaded = InMemory.load(source, progress)
    finally:  # even if corrupted images raise an error
        for note in source.notes() if isinstance(source, NamedSource) else ():
            log(note)
    if not share:
        return loaded
    assert isinstance(source, NamedSource)
    selected = select_split(source, loaded, share, split)
    log(f"{len(selected):,} examples are in the split {split!r} (data.holdout={share}).")
    return selected


def check_location(config: Mapping) -> None:
    """Checks that the TFDS data set or the image folder of a config exists, without reading it.

    Not checked: data in a bucket, array files, and data from a function. config: as in `load`. Raises: ConfigError; DataError
    for an unknown data set, a folder that does not exist, a TFDS data set that is not in its directory while
    `data.download` is false, or `data.holdout` for data that are not files.
    """
    config = resolve({"data": config})["data"]
    check({"data": config}, "data")
    source_class, directory = _source_class(config), config["data_dir"]
    if not source_class.of_files:
        _refuse_holdout(config)
    if source_class is Tfds and not is_url(directory):
        make_builder(config["dataset"], directory or None, must_be_prepared=not config["download"])
    if source_class is Folder and not is_url(directory):
        find_folder(directory)


def has_splits(config: Mapping) -> bool:
    """Whether `data.split` selects some of the examples in a complete `config.data`."""
    return bool(config["holdout"]) or _source_class(config).has_splits(config)


def origin(config: Mapping) -> str:
    """Names the data set or the files of a complete `config.data`, with the split if there are several: "cifar10:train"."""
    name = config["data_dir"] if _source_class(config).of_files else config["dataset"]
    return f"{name}:{config['split']}" if has_splits(config) else name


def _source_class(config: Mapping) -> type[NamedSource]:
    name = config["dataset"]
    return CheckedSource if ":" in name else SOURCES.get(name, Tfds)


def _refuse_holdout(config: Mapping, is_given: bool = False) -> None:
    """Raises: DataError for `data.holdout` on data with their own splits, or (is_given) on a source that a program passes."""
    source_class, reason = _source_class(config), ""
    if not config["holdout"]:
        return
    if is_given:
        reason = "but the program gives a source"
    elif not source_class.of_files:
        reason = f"but {config['dataset']!r} has its own splits"
    elif source_class.has_splits(config):
        reason = f"but {config['data_dir']} has its own splits"
    if reason:
        raise DataError(
            f"data.holdout={config['holdout']} needs data.dataset=folder or arrays with one folder or file, {reason}: "
            "use data.holdout=0"
        )
