"""What a network of a diffusion model is given besides x_t and the time: a class label, and a vector or an array.

A label or a vector is embedded and added to the time embedding; an array of x_t's spatial shape is concatenated to its
channels. For classifier-free guidance training replaces an example's label, or its condition, by a null with some
probability.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffusion_jax import labels
from diffusion_jax.models.layers import LayerFactory

__all__ = ["Conditional"]


class Conditional(nn.Module):
    """The fields and layers for labels and conditions, which every network of a diffusion model has.

    num_classes: 0 for an unconditional network, else y int [B] in 0 ... num_classes - 1 is embedded and added to the
      time embedding. A label outside raises an error, or makes its example NaN if y is traced.
    label_dropout: probability with which training replaces an example's label by `null_label`, an embedding of its own for
      no class, as classifier-free guidance needs (Ho & Salimans 2022). At 0 there is no such label.
    condition_features: D of a condition float [B, D], which two dense layers embed and add to the time embedding; 0 for none.
    condition_channels: K of a condition float [B, *spatial, K] with x_t's spatial shape, which is concatenated to the
      channels of x_t; 0 for none. A network takes one kind of condition.
    condition_dropout: probability with which training replaces an example's condition by the null condition: for a vector an
      embedding of its own; for an array zeros, and one more input channel is 1 where an example has a condition and 0 where
      it has none, because zeros can be data. At 0 there is neither. A network with condition_dropout takes condition=None
      for no conditions, and `null_condition` (NaN everywhere) for an example without one. Training drops a label and a
      condition together with the smaller of the two probabilities, and the other one of them alone with the rest of the
      larger, because the unconditional half of guidance needs examples without both.
    """

    num_classes: int = 0
    label_dropout: float = 0.0
    condition_features: int = 0
    condition_channels: int = 0
    condition_dropout: float = 0.0

    @property
    def null_label(self) -> int | None:
        """The label for no class; None if the network has none."""
        return self.num_classes if self.num_classes and self.label_dropout else None

    @property
    def null_condition(self) -> float | None:
        """The value of all entries of an example's condition that stands for none, NaN; None if the network has none.

        `guidance.classifier_free` takes it as `null_y`, with a denoise_fn that passes its third argument as condition.
        """
        return float("nan") if self.condition_dropout else None

    def nulls_of(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The null label and condition, for those of "y" and "condition" that `given` has; the null_y of guidance.

        Where the network has no null, the given one itself, which guidance then leaves as it is.
        """
        nulls = {"y": self.null_label, "condition": self.null_condition}
        return {name: value if nulls[name] is None else nulls[name] for name, value in given.items()}

    def condition_shape(self, spatial: tuple[int, ...]) -> tuple[int, ...] | None:
        """The shape of an example's condition, (D,) or (*spatial, K); None for a network without conditions."""
        if self.condition_features:
            return (self.condition_features,)
        return (*spatial, self.condition_channels) if self.condition_channels else None

    @property
    def _num_labels(self) -> int:
        """The number of classes and the null label."""
        return self.num_classes + (1 if self.label_dropout else 0)

    def add_conditions(
        self, layers: LayerFactory, x_t, embedding, y, condition, train: bool
    ) -> tuple[jax.Array, jax.Array]:
        """(x_t with the channels of an array condition, the time embedding with those of the label and of a vector).

        Training drops labels and conditions. Raises: ValueError for fields, labels or conditions that do not fit together.
        """
        y, condition = self._check_labels(y), self._check_condition(condition, x_t)
        if train:
            y, condition = self._drop(y, condition)
        features = embedding.shape[-1]
        if y is not None:
            label = layers.embed(self._num_labels, features, "class")(y)
            if self._num_labels == 1:  # Flax returns the only row for every y
                label = jnp.where(jnp.reshape(y, (-1, 1)) == 0, label, jnp.nan)
            embedding += label
        if condition is None:
            return x_t, embedding
        axes, present = tuple(range(1, condition.ndim)), jnp.ones(len(condition), bool)
        if self.condition_dropout:
            present = ~jnp.isnan(condition).all(axis=axes)
            condition = jnp.where(jnp.expand_dims(present, axes), condition, 0)
        if self.condition_features:
            vector = nn.silu(layers.dense(features, "condition_0")(condition.astype(layers.dtype)))
            vector = layers.dense(features, "condition_1")(vector)
            if self.condition_dropout:
                null = layers.embed(1, features, "condition_null")(jnp.zeros(len(condition), jnp.int32))
                vector = jnp.where(present[:, None], vector, null)
            return x_t, embedding + vector
        parts = [x_t, condition.astype(x_t.dtype)]
        if self.condition_dropout:  # one more channel marks the examples that have a condition
            marks = jnp.expand_dims(present, axes).astype(x_t.dtype)
            parts.append(jnp.broadcast_to(marks, (*x_t.shape[:-1], 1)))
        return jnp.concatenate(parts, axis=-1), embedding

    def _drop(self, y, condition) -> tuple[jax.Array | None, jax.Array | None]:
        """(y, condition) of training, with nulls in place of those that dropout draws; called once in a forward pass."""
        joint = min(self.label_dropout, self.condition_dropout)
        kept_jointly = self._draw_kept("joint_dropout", joint, y) if joint else True

        def draw_kept(name: str, rate: float, rows):
            return kept_jointly & self._draw_kept(name, (rate - joint) / (1 - joint), rows)

        if self.null_label is not None:
            y = jnp.where(draw_kept("label_dropout", self.label_dropout, y), y, self.null_label)
        if self.null_condition is not None:
            kept = draw_kept("condition_dropout", self.condition_dropout, condition)
            condition = jnp.where(jnp.expand_dims(kept, range(1, condition.ndim)), condition, self.null_condition)
        return y, condition

    def _draw_kept(self, name: str, rate: float, rows):
        """bool [B], True with probability 1 - rate. Dropout draws it, so that microbatches take their rows of it."""
        return nn.Dropout(rate, deterministic=False, name=name)(jnp.ones(jnp.shape(rows)[:1])) > 0

    def _check_labels(self, y) -> jax.Array | None:
        """y as int, with traced labels outside the range replaced by one beyond the embedding. Raises: ValueError."""
        if not 0 <= self.label_dropout < 1:
            raise ValueError(f"label_dropout must lie in [0, 1), got {self.label_dropout}")
        if self.label_dropout and not self.num_classes:
            raise ValueError(f"label_dropout={self.label_dropout} needs labels to drop; give num_classes, or use 0")
        if self.num_classes and y is None:
            raise ValueError(f"a network of {self.num_classes} classes needs y, the labels")
        if not self.num_classes and y is not None:
            raise ValueError("labels were given to a network without classes (num_classes=0)")
        return None if y is None else labels.in_range(y, self._num_labels, null_label=bool(self.label_dropout))

    def _check_condition(self, condition, x_t) -> jax.Array | None:
        """The condition as an array, null conditions for None; None for a network without. Raises: ValueError."""
        features, channels, dropout = self.condition_features, self.condition_channels, self.condition_dropout
        if features and channels:
            raise ValueError(
                f"condition_features={features} and condition_channels={channels}: a network takes one kind of condition; "
                "use 0 for one of them, and give a vector as constant channels"
            )
        if not 0 <= dropout < 1:
            raise ValueError(f"condition_dropout must lie in [0, 1), got {dropout}")
        example_shape = self.condition_shape(x_t.shape[1:-1])
        if example_shape is None:
            if dropout:
                raise ValueError(
                    f"condition_dropout={dropout} needs conditions to drop; give condition_features or "
                    "condition_channels, or use 0"
                )
            if condition is not None:
                raise ValueError(
                    "a condition was given to a network without; use condition_features or condition_channels"
                )
            return None
        shape = (x_t.shape[0], *example_shape)
        if condition is None:
            if not dropout:
                raise ValueError(f"this network needs a condition of shape {shape}; only condition_dropout allows None")
            return jnp.full(shape, jnp.nan, jnp.float32)
        condition = jnp.asarray(condition)
        if not jnp.issubdtype(condition.dtype, jnp.floating) or condition.shape != shape:
            raise ValueError(
                f"the condition must be float of shape {shape}, got {condition.dtype} of shape {condition.shape}"
            )
        return condition
