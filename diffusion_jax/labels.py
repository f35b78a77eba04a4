"""Class labels, with a range check: a gather would silently clamp an invalid label to another class.

Imports nothing else from this package.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, ArrayLike, Float, Integer, Shaped


def in_range(y: Shaped[ArrayLike, "*shape"], num_classes: int, null_label: bool = False) -> Integer[Array, "*shape"]:
    """Replaces labels of y outside 0 ... num_classes - 1 by num_classes, for which a gather with mode "fill" gives NaN.

    null_label: whether the last label is the null label, which error messages then mention.
    Raises: ValueError for a y that is not int, and for labels out of range; traced values are not checked.
    """
    if not isinstance(y, Tracer):
        y = np.asarray(y)
    allowed = (
        f"0 ... {num_classes - 2} (or {num_classes - 1}, the null label)" if null_label else f"0 ... {num_classes - 1}"
    )
    if not jnp.issubdtype(y.dtype, jnp.integer):
        raise ValueError(f"labels must be int, {allowed}; got {y.dtype}")
    y = y.astype(jnp.promote_types(y.dtype, jnp.int32))  # num_classes may not fit into 8 bits
    outside = (y < 0) | (y >= num_classes)
    if isinstance(y, np.ndarray) and outside.any():
        raise ValueError(f"labels must lie in {allowed}, got {y[outside].flat[0]}")
    return jnp.where(outside, num_classes, y)


def log_prob(logits: Float[Array | np.ndarray, "B K"], y: Shaped[ArrayLike, "..."]) -> Float[Array, "B"]:
    """Returns log p(y) of each row, from logits and labels in 0 ... K - 1; NaN for a traced label out of range.

    Raises: ValueError as `in_range`, and if the numbers of labels and rows differ.
    """
    y = in_range(y, logits.shape[-1])
    if y.shape != logits.shape[:1]:
        raise ValueError(f"y has shape {y.shape} but there are {logits.shape[0]} rows of logits; give each a label")
    return jnp.take_along_axis(jax.nn.log_softmax(logits), y[:, None], axis=1, mode="fill")[:, 0]
