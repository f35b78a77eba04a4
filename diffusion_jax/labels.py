"""Class labels, checked before a gather would take another class for a wrong one.

Imports nothing else from this package: the losses, the guidance and the networks read labels.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np


def in_range(y, num_classes: int, null_label: bool = False) -> jax.Array:
    """y as an int array, where labels outside 0 ... num_classes - 1 are `num_classes`: beyond the end, so gathers give NaN.

    null_label: whether the last of the num_classes labels is the null label; error messages then name it as such.
    Raises: ValueError for a y that is not int, and for labels outside the range unless y is traced, so that its values are
      unknown.
    """
    if not isinstance(y, jax.core.Tracer):
        y = np.asarray(y)
    allowed = (
        f"0 ... {num_classes - 2} (or {num_classes - 1}, the null label)" if null_label else f"0 ... {num_classes - 1}"
    )
    if not jnp.issubdtype(y.dtype, jnp.integer):
        raise ValueError(f"labels must be int, {allowed}; got {y.dtype}")
    y = y.astype(jnp.promote_types(y.dtype, jnp.int32))  # num_classes itself may not fit into 8 bits
    outside = (y < 0) | (y >= num_classes)
    if isinstance(y, np.ndarray) and outside.any():
        raise ValueError(f"labels must lie in {allowed}, got {y[outside].flat[0]}")
    return jnp.where(outside, num_classes, y)


def log_prob(logits, y) -> jax.Array:
    """log p(y) of each row, [B], from logits float [B, K] and labels y int [B] in 0 ... K - 1; NaN for a traced y outside.

    Raises: ValueError as `in_range`, and for labels that are not one for each row.
    """
    y = in_range(y, logits.shape[-1])
    if y.shape != logits.shape[:1]:
        raise ValueError(f"y has shape {y.shape} but there are {logits.shape[0]} rows of logits; give each a label")
    return jnp.take_along_axis(jax.nn.log_softmax(logits), y[:, None], axis=1, mode="fill")[:, 0]
