"""The conditions of samples: `sampling.conditions`, or conditions of the data."""

from __future__ import annotations

import numpy as np
from ml_collections import ConfigDict

from diffusion_jax import data
from diffusion_jax.errors import UserError, list_names
from diffusion_jax.runs.console import log
from diffusion_jax.storage.downloads import local_path
from diffusion_jax.training import condition_shape

__all__ = [
    "condition_captions",
    "evenly_spaced_conditions",
    "read_conditions",
    "standardize_conditions",
]

_MAX_SHOWN_NUMBERS = 4


def read_conditions(config: ConfigDict) -> np.ndarray | None:
    """The conditions of samples [N, ...] in the units of the data; None without `sampling.conditions`.

    Raises: UserError for a file that is missing or unreadable, or conditions that the model does not take.
    """
    options, shape = config.sampling, condition_shape(config)
    leaf = f"sampling.conditions={options.conditions!r}"
    if not options.conditions:
        _check_needed(config)
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
    return _check_conditions(conditions, shape, leaf)


def _check_conditions(conditions: np.ndarray, shape: tuple[int, ...], where: str) -> np.ndarray:
    """The conditions [N, *shape]. where: the start of an error. Raises: UserError for others, or for none."""
    if conditions.dtype.kind not in "iuf" or conditions.shape[1:] != shape or not len(conditions):
        expected = ", ".join(map(str, ("N", *shape)))
        raise UserError(
            f"{where} holds {conditions.dtype} {list(conditions.shape)}; this model takes numbers [{expected}]"
        )
    finite = np.isfinite(conditions).reshape(len(conditions), -1).all(axis=1)
    if not finite.all():
        raise UserError(f"{where}: row {finite.argmin()} has values that are not finite")
    return conditions


def _check_needed(config: ConfigDict) -> None:
    """Raises: UserError if samples cannot be drawn, or not guided, without conditions."""
    shape, model = condition_shape(config), config.model
    if shape is None:
        return
    expected = ", ".join(map(str, ("N", *shape)))
    file = f"sampling.conditions=FILE.npy, numbers [{expected}] in the units of the data"
    if not model.condition_dropout:
        raise UserError(f"this model needs conditions: set {file}")
    if config.sampling.guidance_scale != 1 and not model.label_dropout:
        raise UserError(f"sampling.guidance_scale={config.sampling.guidance_scale} guides by conditions: set {file}")


def standardize_conditions(conditions: np.ndarray | None, normalizations: data.Normalizations) -> np.ndarray | None:
    """The conditions as the model takes them, float32. A line is logged if some are far outside the training data."""
    if conditions is None:
        return None
    normalization = normalizations.get("condition")
    if normalization and (found := normalization.describe_outside(conditions)):
        log(f"Note: {found}.")
    return data.to_model_units(conditions, normalization)


def evenly_spaced_conditions(source: data.Source, count: int) -> np.ndarray | None:
    """The conditions of `count` examples of a source, from its first to its last; None if it has none."""
    indices = np.linspace(0, len(source) - 1, count).round().astype(int)
    return source.read(indices).get("condition")


def condition_captions(conditions: np.ndarray | None) -> list[str] | None:
    """The numbers of short conditions [N, D], such as "0.5, 2"; None for long ones and arrays."""
    if conditions is None or conditions.ndim != 2 or conditions.shape[1] > _MAX_SHOWN_NUMBERS:
        return None
    return [", ".join(f"{number:.3g}" for number in row) for row in conditions.tolist()]
