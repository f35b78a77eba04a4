"""The moving average (EMA) of the parameters: its decay, and from which step on it is used in place of the raw weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["MAX_INITIAL_SHARE", "ema_decay", "initial_share", "raw_weights_note", "weights_kind"]

MAX_INITIAL_SHARE = 0.1


def ema_decay(step: Any, config: Mapping[str, Any]) -> Any:
    """Decay of the EMA at a step, for `config.ema`: `decay`, or with `warmup` min(decay, (1 + step) / (10 + step))."""
    if not config["warmup"]:
        return config["decay"]
    minimum = jnp.minimum if isinstance(step, jax.Array) else np.minimum
    return minimum(config["decay"], (1.0 + step) / (10.0 + step))


def initial_share(config: Mapping[str, Any], step: int) -> float:
    """Weight of the initial parameters in the EMA after `step` steps: the product of the decays.

    config: complete. 0 for a run that starts from `init_from`, whose initial parameters are trained.
    """
    if config["init_from"]:
        return 0.0
    if not config["ema"]["warmup"]:
        return config["ema"]["decay"] ** step
    # The first 10,000 decays of a warm-up have a product below 1e-30.
    return float(np.prod(ema_decay(np.arange(min(step, 10_000)), config["ema"])))


def weights_kind(config: Mapping[str, Any], step: int, use_ema: bool = True) -> Literal["ema", "raw"]:
    """The weights to sample and measure with after `step` steps, for the setting `use_ema`.

    An EMA with more than `MAX_INITIAL_SHARE` of the random initial parameters gives noise, so the raw weights replace it.
    """
    return "ema" if use_ema and initial_share(config, step) <= MAX_INITIAL_SHARE else "raw"


def raw_weights_note(config: Mapping[str, Any], step: int) -> str:
    """Why the raw weights replace the EMA of a step, as a sentence without a period."""
    return (
        f"the EMA (ema.decay={config['ema']['decay']:g}) of step {step:,} still holds {initial_share(config, step):.0%} of "
        "the random initial weights, so the raw weights are used"
    )
