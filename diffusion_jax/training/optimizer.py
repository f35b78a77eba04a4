"""The optimizer of a config, from optax."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import optax

__all__ = ["from_config", "learning_rate"]


def learning_rate(config: Mapping[str, Any]) -> optax.Schedule:
    """Step -> learning rate: linear from 0 over `warmup_steps`, then constant, or linear or cosine to 0 at `decay_steps`.

    config: `config.optimizer`. Raises: ValueError if `decay_steps` does not exceed `warmup_steps`.
    """
    peak, warmup = config["learning_rate"], config["warmup_steps"]
    if config["schedule"] == "constant":
        after = optax.constant_schedule(peak)
    else:
        steps = config["decay_steps"] - warmup
        if steps <= 0:
            raise ValueError(f"optimizer.decay_steps={config['decay_steps']} must exceed warmup_steps={warmup}")
        is_linear = config["schedule"] == "linear"
        after = optax.linear_schedule(peak, 0.0, steps) if is_linear else optax.cosine_decay_schedule(peak, steps)
    if not warmup:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup])


def from_config(config: Mapping[str, Any]) -> optax.GradientTransformation:
    """Clipping by the global norm (0 for none), then Adam or AdamW, of `config.optimizer`.

    Raises: ValueError for values that contradict each other.
    """
    rate, moments = learning_rate(config), {name: config[name] for name in ("b1", "b2", "eps")}
    if config["name"] == "adam":
        if config["weight_decay"]:
            raise ValueError("optimizer.weight_decay needs optimizer.name='adamw'")
        update = optax.adam(rate, **moments)
    else:
        update = optax.adamw(rate, weight_decay=config["weight_decay"], **moments)
    max_norm = config["grad_clip"]
    return optax.chain(optax.clip_by_global_norm(max_norm), update) if max_norm else update
