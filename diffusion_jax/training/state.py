"""The state of training: everything that a run needs besides its config."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from diffusion_jax import models, timesteps
from diffusion_jax.training.metrics import empty_window, metric_names

__all__ = ["IMPORTANCE_SAMPLER", "Network", "TrainState", "abstract_params", "initial_params", "initial_state"]

Network = models.UNet | models.MLP | models.Classifier

IMPORTANCE_SAMPLER = "loss_second_moment"


@flax.struct.dataclass
class TrainState:
    """The complete state of a run, without its config. A checkpoint holds all of it.

    step: int32, the number of finished steps. params, ema_params: trees of float32. opt_state: the optimizer's. window: sums
    of the metrics since the last multiple of `training.log_every`, where the train loop empties it (see `metrics`); part of
    the state so that a resumed run logs the same means. loss_history: the losses that `timesteps.loss_second_moment` needs;
    None for other timestep samplers.
    """

    step: jax.Array
    params: Any
    ema_params: Any
    opt_state: optax.OptState
    window: dict[str, Any]
    loss_history: timesteps.LossHistory | None = None


def initial_params(key: jax.Array, model: Network, shape: tuple[int, ...]) -> Mapping[str, Any]:
    """Initial parameters of a network for examples of `shape`, (*spatial, C).

    Raises: ValueError for fields of the network that do not fit together, by their names as settings, model.NAME.
    """
    try:
        return model.init(key, **models.initial_inputs(model, shape))["params"]
    except ValueError as error:
        if re.split(r"\W", str(error))[0] in models.fields_of(model):
            raise ValueError(f"model.{error}") from error
        raise


def abstract_params(model: Network, shape: tuple[int, ...]) -> Any:
    """Shapes and dtypes of `initial_params`, without computing them.

    The key is an argument of the traced function: `jax.ensure_compile_time_eval` computes what depends on constants only.
    """
    return jax.eval_shape(lambda key: initial_params(key, model, shape), jax.random.key(0))


def initial_state(
    config: Mapping[str, Any],
    model: Network,
    optimizer: optax.GradientTransformation,
    shape: tuple[int, ...],
    seed: jax.Array | np.uint32,
) -> TrainState:
    """The state before the first step; the EMA starts as a copy of the parameters. seed: in place of `config.seed`."""
    diffusion = config["diffusion"]
    params = initial_params(jax.random.key(seed), model, shape)
    window = empty_window(metric_names(diffusion["loss"]))
    history = None
    if diffusion["timestep_sampler"] == IMPORTANCE_SAMPLER:
        history = timesteps.loss_history(diffusion["num_timesteps"])
    ema_params = jax.tree.map(jnp.copy, params)
    return TrainState(jnp.zeros((), jnp.int32), params, ema_params, optimizer.init(params), window, history)
