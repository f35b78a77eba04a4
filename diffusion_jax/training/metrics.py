"""The metrics of training: sums of one step, and their running sums in a window of several steps.

The train loop begins a window after each multiple of `training.log_every`. A window is a dictionary {name: {"total": float32,
"count": float32}}; `nonfinite_step` is the first step whose loss, gradient or parameters were not finite, or -1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

__all__ = ["QUARTERS", "empty_window", "loss_terms", "metric_names", "quarter_sums", "update_window", "window_means"]

QUARTERS = ("loss_q1", "loss_q2", "loss_q3", "loss_q4")

Sums = dict[str, tuple[Any, Any]]  # {name: (total, count)}, whose quotient is the metric

_LOSS_TERMS = {"simple": (), "vlb": ("mse", "vlb"), "hybrid": ("mse", "vlb"), "classify": ("accuracy",)}


def loss_terms(loss: str) -> tuple[str, ...]:
    """The values that a loss logs beside itself, which are fields of its second result."""
    return _LOSS_TERMS[loss]


def metric_names(loss: str) -> tuple[str, ...]:
    """The names of all metrics of a training step."""
    return ("loss", *QUARTERS, *loss_terms(loss), "grad_norm", "param_norm", "learning_rate")


def quarter_sums(examples: Mapping[str, jax.Array], num_timesteps: int) -> Sums:
    """The loss in each quarter of the timesteps, q1 the least noisy; examples: "t", "loss" and "importance", each [B]."""
    in_quarter = (examples["t"] * 4 // num_timesteps)[:, None] == jnp.arange(4)
    totals, counts = ((examples[name][:, None] * in_quarter).sum(0) for name in ("loss", "importance"))
    return {name: (totals[i], counts[i]) for i, name in enumerate(QUARTERS)}


def empty_window(names: Sequence[str]) -> dict[str, Any]:
    """A window without steps."""
    window: dict[str, Any] = {name: {part: jnp.zeros((), jnp.float32) for part in ("total", "count")} for name in names}
    window["nonfinite_step"] = jnp.full((), -1, jnp.int32)
    return window


def update_window(
    window: Mapping[str, Any], sums: Sums, names: Sequence[str], step: jax.Array, finite: jax.Array
) -> dict[str, Any]:
    """The window after one more step.

    names: the metrics, in order. step: the number of steps before this one. finite: whether the loss, the gradient and the
    parameters of this step are finite.
    """
    updated: dict[str, Any] = {
        name: {
            "total": window[name]["total"] + sums[name][0],
            "count": window[name]["count"] + sums[name][1],
        }
        for name in names
    }
    earlier = window["nonfinite_step"]
    updated["nonfinite_step"] = jnp.where((earlier < 0) & ~finite, step + 1, earlier)
    return updated


def window_means(window: Mapping[str, Any]) -> dict[str, float]:
    """The means of a window on the host, without metrics of count 0 (a quarter that no timestep was in)."""
    sums = {name: value for name, value in window.items() if isinstance(value, Mapping)}
    return {name: float(value["total"] / value["count"]) for name, value in sums.items() if value["count"] > 0}
