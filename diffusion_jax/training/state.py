"""The state of training: everything that a run needs besides its config, and the metrics that it averages.

The train loop begins a window of metrics after each multiple of `training.log_every`. A window is a dictionary {name:
Average}; `nonfinite_step` is the first step whose loss, gradient or parameters were not finite, or -1.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from clu.metrics import Average

from diffusion_jax import models, timesteps

__all__ = [
    "QUARTERS",
    "Network",
    "TrainState",
    "abstract_params",
    "empty_window",
    "initial_params",
    "initial_state",
    "loss_terms",
    "make_average",
    "metric_names",
    "quarter_averages",
    "update_window",
    "window_means",
]

Network = models.UNet | models.MLP | models.Classifier


QUARTERS = ("loss_q1", "loss_q2", "loss_q3", "loss_q4")

_LOSS_TERMS = {"vlb": ("mse", "vlb"), "hybrid": ("mse", "vlb"), "classify": ("accuracy",)}


@flax.struct.dataclass
class TrainState:
    """The complete state of a run, without its config. A checkpoint holds all of it.

    step: int32, the number of finished steps. params, ema_params: trees of float32. opt_state: the optimizer's. window:
    averages of the metrics since the last multiple of `training.log_every`, where the train loop empties it; part of the
    state so that a resumed run logs the same means. loss_history: the losses that `timesteps.loss_second_moment` needs;
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
    if timesteps.needs_history(diffusion["timestep_sampler"]):
        history = timesteps.loss_history(diffusion["num_timesteps"])
    ema_params = jax.tree.map(jnp.copy, params)
    return TrainState(jnp.zeros((), jnp.int32), params, ema_params, optimizer.init(params), window, history)


def loss_terms(loss: str) -> tuple[str, ...]:
    """The values that a loss logs beside itself, which are fields of its second result."""
    return _LOSS_TERMS.get(loss, ())


def metric_names(loss: str) -> tuple[str, ...]:
    """The names of all metrics of a training step."""
    return ("loss", *QUARTERS, *loss_terms(loss), "grad_norm", "param_norm", "learning_rate")


def make_average(total: jax.Array, count: jax.Array) -> Average:
    """The average of values with the sum `total` and the total weight `count`, both float32 []."""
    return Average(total=total, count=count)  # pyright: ignore[reportCallIssue]


def quarter_averages(examples: Mapping[str, jax.Array], num_timesteps: int) -> dict[str, Average]:
    """The loss in each quarter of the timesteps, q1 the least noisy; examples: "t", "loss" and "importance", each [B]."""
    in_quarter = (examples["t"] * 4 // num_timesteps)[:, None] == jnp.arange(4)
    totals, counts = ((examples[name][:, None] * in_quarter).sum(0) for name in ("loss", "importance"))
    return {name: make_average(totals[i], counts[i]) for i, name in enumerate(QUARTERS)}


def empty_window(names: Sequence[str]) -> dict[str, Any]:
    """A window without steps."""
    window = {name: make_average(jnp.zeros((), jnp.float32), jnp.zeros((), jnp.float32)) for name in names}
    return window | {"nonfinite_step": jnp.full((), -1, jnp.int32)}


def update_window(
    window: Mapping[str, Any], averages: Mapping[str, Average], step: jax.Array, finite: jax.Array
) -> dict[str, Any]:
    """The window after one more step.

    step: the number of steps before this one. finite: whether the loss, the gradient and the parameters of this step are
    finite.
    """
    updated = {name: window[name].merge(average) for name, average in averages.items()}
    earlier = window["nonfinite_step"]
    return updated | {"nonfinite_step": jnp.where((earlier < 0) & ~finite, step + 1, earlier)}


def window_means(window: Mapping[str, Any]) -> dict[str, float]:
    """The means of a window on the host, without metrics of count 0 (a quarter that no timestep was in)."""
    averages = {name: value for name, value in window.items() if isinstance(value, Average)}
    return {name: float(average.compute()) for name, average in averages.items() if average.count > 0}
