"""The training state: everything that a run needs besides its config, including averages of the metrics.

The averages are a dictionary {name: Average}, which the train loop empties after each multiple of `training.log_every`. The
entry `nonfinite_step` is the first step with a loss, gradient or parameters that were not finite, or -1.
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
from diffusion_jax.schedules import Schedule

Network = models.UNet | models.MLP | models.CustomNetwork | models.Classifier


QUARTERS = ("loss_q1", "loss_q2", "loss_q3", "loss_q4")


@flax.struct.dataclass
class TrainState:
    """The complete state of a run, without its config. A checkpoint holds the whole state.

    step: int32, the number of finished steps. params, ema_params: float32 trees. opt_state: the state of the optimizer.
    averages: averages of the metrics since the last multiple of `training.log_every`; the state has them so that a resumed
    run logs the same means. loss_history: past losses for `timesteps.loss_second_moment`; None for other samplers.
    """

    step: jax.Array
    params: Any
    ema_params: Any
    opt_state: optax.OptState
    averages: dict[str, Any]
    loss_history: timesteps.LossHistory | None = None


def initial_params(key: jax.Array, model: Network, shape: tuple[int, ...]) -> Mapping[str, Any]:
    """Initializes a network's parameters for examples with `shape`, (*spatial, C).

    Raises: ValueError for network fields that contradict each other; the message names them as settings, model.NAME.
    """
    try:
        return model.init(key, **models.initial_inputs(model, shape))["params"]
    except ValueError as error:
        if re.split(r"\W", str(error))[0] in models.network_fields(model):
            raise ValueError(f"model.{error}") from error
        raise


def abstract_params(model: Network, shape: tuple[int, ...]) -> Any:
    """Returns the shapes and dtypes of `initial_params`, without computing the parameters.

    The traced function gets the key, because with a constant key `jax.ensure_compile_time_eval` would compute parameters.
    """
    return jax.eval_shape(lambda key: initial_params(key, model, shape), jax.random.key(0))


def initial_state(
    config: Mapping[str, Any],
    model: Network,
    optimizer: optax.GradientTransformation,
    shape: tuple[int, ...],
    seed: jax.Array | np.uint32,
    terms: Sequence[str] = (),
) -> TrainState:
    """Returns the state before the first step; the EMA starts as a copy of the parameters.

    seed: replaces `config.seed`. terms: as for `empty_averages`.
    """
    params = initial_params(jax.random.key(seed), model, shape)
    ema_params, averages = jax.tree.map(jnp.copy, params), empty_averages(terms)
    step, history = jnp.zeros((), jnp.int32), initial_history(config)
    return TrainState(step, params, ema_params, optimizer.init(params), averages, history)


def initial_history(config: Mapping[str, Any]) -> timesteps.LossHistory | None:
    """Returns `TrainState.loss_history` before the first step."""
    name = config["diffusion"]["timestep_sampler"]
    if ":" in name or not timesteps.needs_history(name):
        return None
    return timesteps.loss_history(config["diffusion"]["num_timesteps"])


def make_average(total: jax.Array, count: jax.Array) -> Average:
    """Returns the average total / count. total, count: the sums of the values and of the weights, float32 []."""
    return Average(total=total, count=count)  # pyright: ignore[reportCallIssue]


def quarter_averages(examples: Mapping[str, jax.Array], schedule: Schedule) -> dict[str, Average]:
    """Averages the loss over each quarter of the timesteps, q1 the least noisy.

    On a path, the four ranges are log SNRs above 4, 0 to 4, -4 to 0 and below -4. examples: t (indices or network
    times), loss, importance, each [B].
    """
    t = examples["t"]
    if jnp.issubdtype(t.dtype, jnp.integer):
        quarter = t * 4 // schedule.num_timesteps
    else:
        quarter = jnp.sum(schedule.path.log_snr(t)[:, None] < jnp.array([4.0, 0.0, -4.0]), axis=1)
    in_quarter = quarter[:, None] == jnp.arange(4)
    totals, counts = ((examples[name][:, None] * in_quarter).sum(0) for name in ("loss", "importance"))
    return {name: make_average(totals[i], counts[i]) for i, name in enumerate(QUARTERS)}


def empty_averages(terms: Sequence[str]) -> dict[str, Any]:
    """Returns empty averages of all metrics of the train step. terms: names of further values that a loss logs."""
    names = ("loss", *QUARTERS, *terms, "grad_norm", "param_norm", "learning_rate")
    zero = jnp.zeros((), jnp.float32)
    averages = {name: make_average(zero, zero) for name in names}
    return averages | {"nonfinite_step": jnp.full((), -1, jnp.int32)}


def update_averages(
    averages: Mapping[str, Any], metrics: Mapping[str, Average], step: jax.Array, finite: jax.Array
) -> dict[str, Any]:
    """Adds the metrics of a step to the averages.

    step: the number of earlier steps. finite: whether the step's loss, gradient and parameters are finite.
    """
    updated = {name: averages[name].merge(metric) for name, metric in metrics.items()}
    earlier = averages["nonfinite_step"]
    return updated | {"nonfinite_step": jnp.where((earlier < 0) & ~finite, step + 1, earlier)}


def mean_metrics(averages: Mapping[str, Any]) -> dict[str, float]:
    """Returns {name: mean} on the host, without metrics of count 0 (quarters without a timestep)."""
    averages = {name: value for name, value in averages.items() if isinstance(value, Average)}
    return {name: float(average.compute()) for name, average in averages.items() if average.count > 0}
