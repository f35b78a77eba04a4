"""The optimizer of a config, from optax."""

from __future__ import annotations

from collections.abc import Mapping

import optax


def learning_rate(config: Mapping) -> optax.Schedule:
    """Steps -> rate: a line from 0 over `warmup_steps`, then constant, or a line or a cosine to 0 at `decay_steps`."""
    peak, warmup = config["learning_rate"], config["warmup_steps"]
    if config["schedule"] == "constant":
        after = optax.constant_schedule(peak)
    elif config["schedule"] in ("linear", "cosine"):
        steps = config["decay_steps"] - warmup
        if steps <= 0:
            raise ValueError(f"optimizer.decay_steps={config['decay_steps']} must exceed warmup_steps={warmup}")
        linear = config["schedule"] == "linear"
        after = optax.linear_schedule(peak, 0.0, steps) if linear else optax.cosine_decay_schedule(peak, steps)
    else:
        raise ValueError(f"optimizer.schedule={config['schedule']!r} must be 'constant', 'linear' or 'cosine'")
    if not warmup:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup])


def from_config(config: Mapping) -> optax.GradientTransformation:
    """Clipping by the global norm (0 for none), then Adam or AdamW. Raises: ValueError for a value that fits neither."""
    if not config["learning_rate"] > 0:
        raise ValueError(f"optimizer.learning_rate={config['learning_rate']} must be above 0")
    for leaf in ("warmup_steps", "weight_decay", "grad_clip"):
        if not config[leaf] >= 0:
            raise ValueError(f"optimizer.{leaf}={config[leaf]} must be at least 0")
    for leaf in ("b1", "b2"):
        if not 0 <= config[leaf] < 1:
            raise ValueError(f"optimizer.{leaf}={config[leaf]} must lie in [0, 1)")
    moments = {"b1": config["b1"], "b2": config["b2"], "eps": config["eps"]}
    if config["name"] == "adam":
        if config["weight_decay"]:
            raise ValueError("optimizer.weight_decay needs optimizer.name='adamw'")
        update = optax.adam(learning_rate(config), **moments)
    elif config["name"] == "adamw":
        update = optax.adamw(learning_rate(config), weight_decay=config["weight_decay"], **moments)
    else:
        raise ValueError(f"optimizer.name={config['name']!r} must be 'adam' or 'adamw'")
    clip = config["grad_clip"]
    return optax.chain(optax.clip_by_global_norm(clip), update) if clip else update
