"""Array files for editing data that are not images: examples and masks in .npy files, with the shape of the model's data."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from diffusion_jax.errors import UserError
from diffusion_jax.storage.downloads import local_path

__all__ = ["check_known", "read_array", "read_array_mask"]


def _load(path: str, leaf: str) -> np.ndarray:
    """The array of a file. leaf: of `config.editing`, for messages. Raises: UserError."""
    if not path:
        raise UserError(f"editing.{leaf}=FILE.npy is needed: the path of an array file")
    try:
        array = np.load(local_path(path), allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"editing.{leaf}={path!r} cannot be read as an .npy file: {reason}") from None
    if not isinstance(array, np.ndarray):
        raise UserError(f"editing.{leaf}={path!r} holds several arrays; save the one to use with np.save")
    return array


def read_array(path: str, leaf: str, shape: tuple[int, ...], levels: int | None) -> np.ndarray:
    """A file of one example [*spatial, C]: uint8, or for continuous data (levels None) float32 or float64 in their units.

    Raises: UserError for another shape or type.
    """
    array = _load(path, leaf)
    expected = "real numbers, in the units of the data" if levels is None else "uint8"
    is_allowed = array.dtype.kind in "iuf" if levels is None else array.dtype == np.uint8
    if array.shape != shape or not is_allowed:
        raise UserError(
            f"editing.{leaf}={path!r} holds {array.dtype} {list(array.shape)}; it must be one example of shape "
            f"{list(shape)} of {expected}"
        )
    if levels is not None:
        return array
    return array.astype(np.float32 if array.dtype in (np.float16, np.float32) else np.float64)


def read_array_mask(path: str, shape: tuple[int, ...]) -> np.ndarray:
    """A file as bool [*spatial, 1] or [*spatial, C], True where values are known. shape: (*spatial, C).

    Raises: UserError for another shape or type, or a mask that is the same everywhere.
    """
    mask = _load(path, "mask")
    *spatial, channels = shape
    allowed = [[*spatial, channels], [*spatial, 1], spatial] if spatial else [[channels]]
    if mask.dtype != bool or list(mask.shape) not in allowed:
        shapes = " or ".join(map(str, allowed))
        raise UserError(
            f"editing.mask={path!r} holds {mask.dtype} {list(mask.shape)}; it must be bool of shape {shapes}, True where "
            "values are known"
        )
    if mask.all() or not mask.any():
        problem = "nothing is left to generate" if mask.all() else "no value is known"
        raise UserError(
            f"editing.mask={path!r} is {bool(mask.all())} everywhere: {problem}; use True for the values to keep and False "
            "for those to generate"
        )
    return mask if mask.ndim == len(shape) else mask[..., None]


def check_known(values: np.ndarray, leaf: str, limits: Sequence[float] = ()) -> None:
    """Raises: UserError for known values of `editing.<leaf>` that are not finite, or outside the limits of the data."""
    if not np.isfinite(values).all():
        raise UserError(
            f"editing.{leaf} has values that are not finite; repair them (editing.task=inpaint generates values that "
            "editing.mask leaves out)"
        )
    if limits and (values.min() < limits[0] or values.max() > limits[1]):
        raise UserError(
            f"editing.{leaf} has values from {values.min():g} to {values.max():g}, outside data.limits={tuple(limits)}; "
            "clip them"
        )
