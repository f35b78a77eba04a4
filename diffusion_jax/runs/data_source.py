"""Checks of the images of a run, and the names of config leaves in their errors."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import numpy as np
from ml_collections import ConfigDict

from diffusion_jax import data
from diffusion_jax.config import is_classifier
from diffusion_jax.errors import DataError, UserError

__all__ = ["check_source", "rename_leaves_in_errors"]

_NUM_CHECKED_IMAGES = 64


def check_source(config: ConfigDict, source: data.Source) -> None:
    """Raises: UserError or DataError for labels that do not fit the network, or gray levels that do not fit the bound."""
    if config.diffusion.loss in ("vlb", "hybrid"):
        images, _ = source.read(np.arange(min(_NUM_CHECKED_IMAGES, len(source))))
        data.check_levels(images, config.data.levels)
    num_classes = config.model.num_classes
    if num_classes and source.num_classes > num_classes:
        raise UserError(
            f"model.num_classes={num_classes}, but the data has {source.num_classes} classes; use that number, or 0"
        )
    if num_classes and not source.num_classes:
        advice = "a classifier needs labeled images" if is_classifier(config) else "use model.num_classes=0"
        reason = getattr(source, "no_labels_reason", "")
        because = f" ({reason})" if reason else ""
        raise UserError(f"model.num_classes={num_classes}, but the data has no labels{because}; {advice}")


@contextlib.contextmanager
def rename_leaves_in_errors(leaves: Mapping[str, str]) -> Iterator[None]:
    """Replaces names of leaves in the message of a DataError, such as {"data.split": "evaluation.split"}."""
    try:
        yield
    except DataError as error:
        message = str(error)
        for old, new in leaves.items():
            message = message.replace(f"{old}=", f"{new}=")
        raise DataError(message) from error
