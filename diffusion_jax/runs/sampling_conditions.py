"""The classes and conditions of samples, and the small images that an upsampler enlarges."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence

import numpy as np
from ml_collections import ConfigDict

from diffusion_jax import data
from diffusion_jax.errors import UserError, closest_names, list_names
from diffusion_jax.runs.console import log
from diffusion_jax.storage.downloads import local_path
from diffusion_jax.training import condition_shape

__all__ = [
    "class_captions",
    "condition_captions",
    "parse_classes",
    "read_conditions",
    "read_small_images",
    "standardize_conditions",
]

_MAX_SHOWN_NUMBERS = 4


# ---- Classes


def class_captions(labels: np.ndarray, names: Sequence[str]) -> list[str]:
    """Each label with its name, as "class 1: cats"; only the number if it has no other name."""
    known = [names[y] if y < len(names) else "" for y in labels.tolist()]
    pairs = zip(labels.tolist(), known, strict=True)
    return [f"class {y}" if name in ("", str(y)) else f"class {y}: {name}" for y, name in pairs]


def parse_classes(value, num_classes: int, names: Sequence[str]) -> tuple[int, ...] | None:
    """The classes of `sampling.class`: all classes for None; None for a model without classes. Raises: UserError.

    value: a class or several, each an index or a name; a string may list several, as in "3,cats".
    """
    if value is None:
        return tuple(range(num_classes)) or None
    if not num_classes:
        raise UserError(f"sampling.class={value}, but the model has no classes (model.num_classes=0)")
    classes = value
    if isinstance(value, str) and value not in names:
        classes = [part.strip(" '\"") for part in value.strip("()[] ,").split(",")]
    indices = []
    for y in classes if isinstance(classes, tuple | list) else (classes,):
        if isinstance(y, str):
            y = names.index(y) if y in names else int(y) if y.isdecimal() else y
        elif str(y) in names and names.index(str(y)) != y:
            raise UserError(
                f"sampling.class={y} is ambiguous: {str(y)!r} is the name of class {names.index(str(y))}; give the name of "
                f"the class, as in --config.sampling.class=\"'{y}'\""
            )
        if type(y) is not int or not 0 <= y < num_classes:
            known = f" ({list_names(names, 20)})" if names else ""
            near = closest_names(y, names, count=3) if isinstance(y, str) else []
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise UserError(f"sampling.class={value} must be classes in 0 ... {num_classes - 1}{known}{hint}")
        indices.append(y)
    return tuple(indices)


# ---- Conditions


def read_conditions(config: ConfigDict) -> np.ndarray | None:
    """The conditions of samples [N, ...] in the units of the data; None without `sampling.conditions`.

    Raises: UserError for a file that is missing or unreadable, or conditions that the model does not take.
    """
    options, shape = config.sampling, condition_shape(config)
    leaf = f"sampling.conditions={options.conditions!r}"
    expected = ", ".join(map(str, ("N", *(shape or ()))))
    if not options.conditions:
        file = f"sampling.conditions=FILE.npy, numbers [{expected}] in the units of the data"
        if shape is not None and not config.model.condition_dropout:
            raise UserError(f"this model needs conditions: set {file}")
        if shape is not None and options.guidance_scale != 1 and not config.model.label_dropout:
            raise UserError(f"sampling.guidance_scale={options.guidance_scale} guides by conditions: set {file}")
        return None
    if shape is None:
        raise UserError(f"{leaf}: this model takes no conditions (model.condition_features, model.condition_channels)")
    path = local_path(options.conditions)
    try:
        loaded = np.load(path, allow_pickle=False)
        if not isinstance(loaded, np.ndarray) and "condition" not in loaded:
            raise UserError(
                f"{leaf} has no array 'condition', only {list_names(map(repr, loaded), 8)}; save it under that name"
            )
        conditions = loaded if isinstance(loaded, np.ndarray) else loaded["condition"]
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise UserError(f'{leaf} is neither an .npy nor an .npz with "condition": {error}') from None
    if conditions.dtype.kind not in "iuf" or conditions.shape[1:] != shape or not len(conditions):
        raise UserError(
            f"{leaf} holds {conditions.dtype} {list(conditions.shape)}; this model takes numbers [{expected}]"
        )
    finite = np.isfinite(conditions).reshape(len(conditions), -1).all(axis=1)
    if not finite.all():
        raise UserError(f"{leaf}: row {finite.argmin()} has values that are not finite")
    return conditions


def standardize_conditions(conditions: np.ndarray | None, normalizations: data.Normalizations) -> np.ndarray | None:
    """The conditions as the model takes them, float32. A line is logged if some are far outside the training data."""
    if conditions is None:
        return None
    normalization = normalizations.get("condition")
    if normalization and (found := normalization.describe_outside(conditions)):
        log(f"Note: {found}.")
    return data.to_model_units(conditions, normalization)


def condition_captions(conditions: np.ndarray | None) -> list[str] | None:
    """The numbers of short conditions [N, D], such as "0.5, 2"; None for long ones and arrays."""
    if conditions is None or conditions.ndim != 2 or conditions.shape[1] > _MAX_SHOWN_NUMBERS:
        return None
    return [", ".join(f"{number:.3g}" for number in row) for row in conditions.tolist()]


# ---- Small images


def read_small_images(config: ConfigDict) -> tuple[np.ndarray | None, np.ndarray | None]:
    """(the images of `sampling.low_resolution`, uint8 [N, h, w, C], their labels [N] or None); (None, None) without one.

    Raises: UserError, DataError.
    """
    path, side = config.sampling.low_resolution, config.data.low_resolution
    if not side:
        return None, None
    if not path:
        raise UserError(
            "this model enlarges images: set sampling.low_resolution to an .npz of --mode=sample or to a folder of images"
        )
    height, width, channels = data.example_shape(config.data)
    size = (side, width * side // height)
    source = local_path(path)
    if source.is_dir():
        folder = data.Folder(str(source), size, channels)
        return folder.read(np.arange(len(folder)))["image"], None
    try:
        with np.load(source, allow_pickle=False) as arrays:
            images, labels = arrays["arr_0"], arrays.get("arr_1")
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise UserError(
            f"sampling.low_resolution={path!r} is neither a folder nor an .npz with arr_0: {error}"
        ) from None
    if images.dtype != np.uint8 or images.shape[1:] != (*size, channels):
        raise UserError(
            f"sampling.low_resolution={path!r} holds {images.dtype} {images.shape}; this model enlarges uint8 images of "
            f"{size[0]}x{size[1]} with {channels} channels"
        )
    if labels is not None and labels.shape != images.shape[:1]:
        raise UserError(
            f"sampling.low_resolution={path!r} holds {len(images)} images and labels of shape {labels.shape}; there must be "
            "one label for each image"
        )
    return images, labels
