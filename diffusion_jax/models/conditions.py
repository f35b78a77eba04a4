"""The inputs of a diffusion network besides x_t and the time: a class label, and a condition, which is a vector or an array.

A label or a vector is embedded and added to the time embedding; an array with x_t's spatial shape is concatenated to the
channels of x_t. For classifier-free guidance, training replaces random labels by a null label, and random conditions by a
null condition.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffusion_jax import labels
from diffusion_jax.models.layers import LayerFactory


def condition_shape(fields: Mapping[str, Any], spatial: tuple[int, ...]) -> tuple[int, ...] | None:
    """Returns the shape of a condition: (D,) for a vector, (*spatial, K) for an array; None without conditions.

    fields: `Conditional`'s fields by name; missing fields count as 0. spatial: the sizes of x_t's spatial axes.
    """
    if features := fields.get("condition_features", 0):
        return (features,)
    channels = fields.get("condition_channels", 0)
    return (*spatial, channels) if channels else None


def mark_missing(condition, missing) -> jax.Array:
    """Returns conditions [B, ...] with the null condition, NaN, in the rows where `missing`, bool [B], is True."""
    return jnp.where(jnp.expand_dims(missing, range(1, condition.ndim)), jnp.nan, condition)


class Conditional(nn.Module):
    """The fields and layers for labels and conditions, common to every diffusion network.

    num_classes: the number of classes; 0 without labels. The embeddings of y, int [B] in 0 ... num_classes - 1, are added to
      the time embedding. A label out of range raises an error; if y is traced, the label gives NaN for its example.
    label_dropout: probability with which training replaces an example's label by `null_label`, which means "no class" and
      has its own embedding, for classifier-free guidance (Ho & Salimans 2022). At 0 there is no null label.
    condition_features: the size D of condition vectors, float [B, D]; 0 for none. Two dense layers embed the vectors, and
      their output is added to the time embedding.
    condition_channels: the channels K of condition arrays, float [B, *spatial, K] with x_t's spatial shape; 0 for none. The
      arrays are concatenated to the channels of x_t. A network takes one kind of condition.
    condition_dropout: probability with which training replaces an example's condition by the null condition. A null vector
      has its own embedding. A null array becomes zeros; because zeros can be data, an extra input channel is 1 for examples
      with a condition and 0 for all others. At 0 there is no null condition. A network with condition_dropout accepts
      condition=None for a batch without conditions, and NaN (`null_condition`) in all entries of an example's condition.
      Training drops label and condition together with the smaller of the two probabilities, because guidance also calls the
      network without both. The input with the larger probability is also dropped alone, so that both probabilities hold.
    """

    num_classes: int = 0
    label_dropout: float = 0.0
    condition_features: int = 0
    condition_channels: int = 0
    condition_dropout: float = 0.0

    @property
    def null_label(self) -> int | None:
        """The label for no class; None if the network has no such label."""
        return self.num_classes if self.num_classes and self.label_dropout else None

    @property
    def null_condition(self) -> float | None:
        """The value of all entries in a null condition, NaN; None for a network without null conditions.

        For `guidance.classifier_free`, pass y={"condition": conditions} and null_y={"condition": null_condition}.
        """
        return float("nan") if self.condition_dropout else None

    def nulls(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Returns `null_y` for guidance: `given` with the null label for the key "y", the null condition for "condition".

        If the network has no null for a key, `null_y` keeps the given value, so that guidance has no effect on this input.
        """
        nulls = {"y": self.null_label, "condition": self.null_condition}
        return {name: value if nulls[name] is None else nulls[name] for name, value in given.items()}

    @property
    def _num_labels(self) -> int:
        """The number of labels: the classes, and the null label if the network has one."""
        return self.num_classes + (1 if self.label_dropout else 0)

    def add_conditions(
        self, layers: LayerFactory, x_t, embedding, y, condition, train: bool
    ) -> tuple[jax.Array, jax.Array]:
        """Returns (x_t with an array condition's channels, the time embedding plus the embedded label and vector).

        Training drops random labels and conditions. Raises: ValueError for fields, labels or conditions that do not fit.
        """
        y, condition = self._prepare(y, condition, x_t, train)
        features = embedding.shape[-1]
        if y is not None:
            label = layers.embed(self._num_labels, features, "class")(y)
            if self._num_labels == 1:  # Flax returns the only row for any y
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
        if self.condition_dropout:  # an extra channel marks the examples with a condition
            marks = jnp.expand_dims(present, axes).astype(x_t.dtype)
            parts.append(jnp.broadcast_to(marks, (*x_t.shape[:-1], 1)))
        return jnp.concatenate(parts, axis=-1), embedding

    def _prepare(self, y, condition, x_t, train: bool) -> tuple[jax.Array | None, jax.Array | None]:
        """Returns (labels, conditions), checked and, in training, partly dropped. Raises: ValueError, as `add_conditions`."""
        shape = condition_shape(vars(self), x_t.shape[1:-1])
        if self.condition_features and self.condition_channels:
            raise ValueError(
                f"condition_features={self.condition_features} and condition_channels={self.condition_channels}: a network "
                "takes one kind of condition; use 0 for one of them, and give a vector as constant channels"
            )
        for name, needed, is_given in (
            ("label", "num_classes", self.num_classes),
            ("condition", "condition_features or condition_channels", shape),
        ):
            rate = getattr(self, f"{name}_dropout")
            if not 0 <= rate < 1:
                raise ValueError(f"{name}_dropout must lie in [0, 1), got {rate}")
            if rate and not is_given:
                raise ValueError(f"{name}_dropout={rate} needs {name}s to drop; give {needed}, or use 0")
        y, condition = self._prepare_labels(y), self._prepare_condition(condition, shape, len(x_t))
        return self._drop(y, condition) if train else (y, condition)

    def _drop(self, y, condition) -> tuple[jax.Array | None, jax.Array | None]:
        """Replaces random labels and conditions by nulls, for training. Must be called only once per forward pass."""
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
        """Draws bool [B], True with probability 1 - rate, with `nn.Dropout`, because microbatches share its draw."""
        return nn.Dropout(rate, deterministic=False, name=name)(jnp.ones(jnp.shape(rows)[:1])) > 0

    def _prepare_labels(self, y) -> jax.Array | None:
        """Returns y as int; traced labels out of range become an index whose embedding is NaN. Raises: ValueError."""
        if self.num_classes and y is None:
            raise ValueError(f"a network of {self.num_classes} classes needs y, the labels")
        if not self.num_classes and y is not None:
            raise ValueError("labels were given to a network without classes (num_classes=0)")
        return None if y is None else labels.in_range(y, self._num_labels, null_label=bool(self.label_dropout))

    def _prepare_condition(self, condition, example_shape, num_rows: int) -> jax.Array | None:
        """Returns the condition as an array (nulls for None); None if the network takes none. Raises: ValueError."""
        if example_shape is None:
            if condition is not None:
                raise ValueError(
                    "a condition was given to a network without; use condition_features or condition_channels"
                )
            return None
        shape = (num_rows, *example_shape)
        if condition is None:
            if not self.condition_dropout:
                raise ValueError(f"this network needs a condition of shape {shape}; only condition_dropout allows None")
            return jnp.full(shape, jnp.nan, jnp.float32)
        condition = jnp.asarray(condition)
        if not jnp.issubdtype(condition.dtype, jnp.floating) or condition.shape != shape:
            raise ValueError(
                f"the condition must be float of shape {shape}, got {condition.dtype} of shape {condition.shape}"
            )
        return condition


def initial_inputs(model: Any, shape: tuple[int, ...]) -> dict[str, Any]:
    """Returns inputs for `model.init(key, **inputs)`, all 0: x_t [1, *shape], the time, and any label and condition."""
    inputs: dict[str, Any] = {"x_t": jnp.zeros((1, *shape)), "time": jnp.zeros(1)}
    if isinstance(model, Conditional):
        if model.num_classes:
            inputs["y"] = jnp.zeros(1, jnp.int32)
        if (condition := condition_shape(vars(model), shape[:-1])) is not None:
            inputs["condition"] = jnp.zeros((1, *condition))
    return inputs
