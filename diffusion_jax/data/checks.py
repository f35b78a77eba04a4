"""Checks of sources against `config.data`, and sources by the name of a function."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from diffusion_jax.data.sources import DerivedSource, Source
from diffusion_jax.errors import DataError, shorten

__all__ = [
    "CheckedSource",
    "check_examples",
    "check_image_leaves",
    "check_levels",
    "check_random_flip",
    "example_shape",
    "import_source",
    "is_of_images",
]

_NUM_CHECKED = 4
_ARRAYS = ("x", "image", "label", "condition")


def example_shape(config: Mapping) -> tuple[int, ...]:
    """(*spatial, C) of `config.data`, whose `image_size` is the size of each spatial axis, or one number for two axes."""
    size = config["image_size"]
    return (*(size if isinstance(size, tuple | list) else (size, size)), config["channels"])


def is_of_images(config: Mapping) -> bool:
    """Whether `config.data` describes images: gray levels, two spatial axes, and 1 or 3 channels."""
    shape = example_shape(config)
    return config["levels"] is not None and len(shape) == 3 and shape[-1] in (1, 3)


def check_image_leaves(config: Mapping) -> tuple[tuple[int, int], int]:
    """((height, width), channels) of a data set of image files. Raises: DataError for leaves that describe other data."""
    shape, name = example_shape(config), config["dataset"]
    other = "other arrays are data.dataset=arrays or module:function"
    if len(shape) != 3 or shape[-1] not in (1, 3):
        raise DataError(
            f"data.dataset={name!r} has images with 1 or 3 channels, not examples of shape {list(shape)} "
            f"(data.image_size={config['image_size']}, data.channels={config['channels']}); {other}"
        )
    if config["levels"] is None:
        raise DataError(f"data.levels=None is for continuous data, and data.dataset={name!r} has images; {other}")
    return shape[:2], shape[2]


def check_levels(images: np.ndarray, levels: int) -> None:
    """Raises: DataError for uint8 images with other values than `levels` even gray levels, which a likelihood assumes."""
    grid = np.arange(256) * ((levels - 1) / 255)
    is_between = np.abs(grid - np.round(grid)) * (255 / (levels - 1)) > 0.5  # gray levels may be rounded to integers
    wrong = images[is_between[images]]
    if wrong.size:
        raise DataError(
            f"data.levels={levels}, but the images contain the value {wrong[0]}, which is not one of {levels} even gray "
            "levels (resized images have others); use data.levels=256, in a new --workdir"
        )


def check_random_flip(config: Mapping, name: str = "image") -> None:
    """Raises: DataError if `data.random_flip` is True for data other than images. name: "x" for data that are not uint8."""
    if config["random_flip"] and (name == "x" or config["levels"] is None or len(example_shape(config)) != 3):
        raise DataError(
            "data.random_flip=True mirrors images of gray levels; use data.random_flip=False for these data"
        )


def import_source(name: str, config: Mapping) -> Source:
    """The source that a function "module:function" returns for `config.data`.

    Modules of the current directory are found, too. Raises: DataError if it cannot be imported, fails, or returns no source.
    """
    module_name, _, function_name = name.partition(":")
    where = f"data.dataset={name!r}"
    if os.getcwd() not in sys.path:  # the installed command does not add it
        sys.path.append(os.getcwd())
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError, SyntaxError, ValueError) as error:
        raise DataError(
            f"{where} cannot be imported ({error}); give module:function, a function of config.data"
        ) from None
    try:
        source = function(config)
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"{where} raises {type(error).__name__}: {shorten(str(error), 200)}") from error
    if not isinstance(source, Source):
        raise DataError(
            f"{where} returns a {type(source).__name__}, which has no __len__ and read(indices) (data.Source)"
        )
    return source


def check_examples(config: Mapping, source: Source) -> None:
    """Raises: DataError if a source has no examples, or its first ones have another shape or kind than `config.data`."""
    if not len(source):
        raise DataError(f"data.dataset={config['dataset']!r} has no examples")
    batch: Any = source.read(np.arange(min(_NUM_CHECKED, len(source))))
    names = list(batch) if isinstance(batch, Mapping) else [type(batch).__name__]
    if len({"image", "x"} & set(names)) != 1 or set(names) - set(_ARRAYS):
        raise DataError(
            'a source must return a dictionary with either "image" (uint8) or "x" (other numbers), and optionally "label" '
            f'and "condition"; got {", ".join(map(repr, names))}'
        )
    arrays = {name: np.asarray(array) for name, array in batch.items()}
    name, shape = "image" if "image" in arrays else "x", example_shape(config)
    _check_kind(config, name, arrays[name].dtype)
    if arrays[name].shape[1:] != shape:
        found, advice = arrays[name].shape[1:], ""
        if found:
            spatial = str(found[:-1]).replace(" ", "")
            advice = f"; use --config.data.image_size={spatial} --config.data.channels={found[-1]}"
        raise DataError(
            f"the examples have shape {list(found)}, not {list(shape)} as data.image_size and data.channels say{advice}"
        )
    label, condition = arrays.get("label"), arrays.get("condition")
    if label is not None and (label.ndim != 1 or label.dtype.kind not in "iu"):
        raise DataError(f'a source returns "label" as {label.dtype} {list(label.shape)}; it must be integers [n]')
    if condition is not None:
        is_field = condition.ndim == len(shape) + 1 and condition.shape[1:-1] == shape[:-1]
        if condition.dtype.kind not in "iuf" or not (condition.ndim == 2 or is_field):
            field = f" or [{', '.join(map(str, ('n', *shape[:-1], 'K')))}]" if shape[:-1] else ""
            raise DataError(
                f'a source returns "condition" as {condition.dtype} {list(condition.shape)}; it must be numbers [n, D]{field}'
            )
    check_random_flip(config, name)


def _check_kind(config: Mapping, name: str, dtype: np.dtype) -> None:
    """Raises: DataError for a type that the name does not allow, or that contradicts `data.levels`."""
    levels, is_real = config["levels"], dtype.kind in "iuf" or dtype.name == "bfloat16"
    if name == "image" and dtype != np.uint8:
        raise DataError(f'a source returns "image" as {dtype}, which must be uint8; give other numbers as "x"')
    if name == "x" and (not is_real or dtype == np.uint8):
        advice = 'give it as "image"' if dtype == np.uint8 else "give real numbers"
        raise DataError(f'a source returns "x" as {dtype}; {advice}')
    if name == "x" and levels is not None:
        raise DataError(f"data.levels={levels}, but the data are {dtype}, not uint8: use data.levels=None")
    if name == "image" and levels is None:
        raise DataError("data.levels=None is for continuous data, but the data are uint8: use data.levels=256")


class CheckedSource(DerivedSource):
    """A user's source, of which every batch must have the arrays of the first example, in their shapes and types."""

    def __init__(self, source: Source):
        super().__init__(source)
        first = {name: np.asarray(array) for name, array in source.read(np.arange(1)).items()}
        self._expected = {name: (array.shape[1:], array.dtype) for name, array in first.items()}

    def read(self, indices: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
        """Raises: DataError for a batch with other arrays, other shapes or types, or labels outside `num_classes`."""
        batch = {name: np.asarray(array) for name, array in self.source.read(indices).items()}
        where = f"a source, read at the indices {indices[0]} ... {indices[-1]}," if len(indices) else "a source"
        if batch.keys() != self._expected.keys():
            names = (", ".join(map(repr, arrays)) for arrays in (batch, self._expected))
            raise DataError("{} returns {}, but for its first example {}".format(where, *names))
        for name, (shape, dtype) in self._expected.items():
            array = batch[name]
            if array.shape != (len(indices), *shape) or not np.can_cast(array.dtype, dtype, "same_kind"):
                raise DataError(
                    f'{where} returns "{name}" as {array.dtype} {list(array.shape)}; as for its first example it must be '
                    f"{dtype} {[len(indices), *shape]}"
                )
            batch[name] = array.astype(dtype, copy=False)
        labels = batch.get("label", np.zeros(0, int))
        if self.num_classes and labels.size and not 0 <= labels.min() <= labels.max() < self.num_classes:
            raise DataError(
                f"{where} returns labels from {labels.min()} to {labels.max()}; num_classes={self.num_classes} allows 0 ... "
                f"{self.num_classes - 1}"
            )
        return batch
