"""The train step: one pure function from (state, batch) to (state, metrics)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental.layout import Layout, with_layout_constraint

from diffusion_jax import data, timesteps
from diffusion_jax.schedules import Schedule
from diffusion_jax.training.batches import Examples, check_settings, random_flip, read_batch
from diffusion_jax.training.ema import ema_decay
from diffusion_jax.training.from_config import condition_shape
from diffusion_jax.training.metrics import loss_terms, metric_names, quarter_sums, update_window
from diffusion_jax.training.objective import Microbatch, Objective, make_objective, takes_labels
from diffusion_jax.training.optimizer import global_norm
from diffusion_jax.training.state import Network, TrainState

__all__ = ["TrainStep", "make_train_step", "scan_steps"]

TrainStep = Callable[[TrainState, Any], tuple[TrainState, dict[str, jax.Array]]]


def make_train_step(
    config: Mapping[str, Any],
    model: Network,
    schedule: Schedule,
    optimizer: optax.GradientTransformationExtraArgs,
    learning_rate: optax.Schedule,
    gather_params: Callable[[Callable], Callable] = lambda loss_fn: loss_fn,
) -> TrainStep:
    """train_step(state, batch) -> (state, metrics), not yet compiled; batch: as `read_batch` takes it.

    Every draw comes from `fold_in(key(config.seed), state.step)`. metrics, scalars: loss (its mean over the batch), loss_q1
    ... loss_q4 (the same over each quarter of the timesteps, q1 the least noisy; NaN for a quarter that no timestep of the
    batch is in), for the vlb and the hybrid also mse and vlb (bits per dimension, without L_T), for a classifier accuracy,
    grad_norm (before clipping), param_norm, learning_rate. Importance sampling weights the losses, so that means
    are unbiased.

    gather_params: wraps a function of the parameters if these are split over devices, as `sharding.gather_params`.
    """
    diffusion, options = config["diffusion"], config["training"]
    num_microbatches = options["accumulation_steps"]
    terms, names = loss_terms(diffusion["loss"]), metric_names(diffusion["loss"])
    shape, labeled = data.example_shape(config["data"]), takes_labels(model, diffusion["loss"])
    shape_of_condition = condition_shape(config)
    objective = make_objective(config, model, schedule)
    gradient = _make_gradient(objective, terms, num_microbatches, gather_params, _can_fuse_casts(config))

    def train_step(state: TrainState, batch: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        key_flip, key_loss = jax.random.split(jax.random.fold_in(jax.random.key(config["seed"]), state.step))
        examples = read_batch(batch, shape, labeled, num_microbatches, shape_of_condition)
        check_settings(batch, config)
        if config["data"]["random_flip"]:
            examples = random_flip(key_flip, examples)
        grads, values = gradient(state.params, state.loss_history, key_loss, examples)
        loss = values["loss"].mean()
        grad_norm = global_norm(_fuse_across_leaves(grads, "grad_norm", (2,)))
        grads = _prepare_for_update(grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params, grad_norm=grad_norm)
        params = optax.apply_updates(state.params, updates)
        ema_params = optax.incremental_update(params, state.ema_params, 1.0 - ema_decay(state.step, config["ema"]))
        history = state.loss_history
        if history is not None:
            history = timesteps.record(history, values["t"], values["loss"] / values["importance"])

        sums = quarter_sums(values, schedule.num_timesteps)
        param_norm = global_norm(_fuse_across_leaves(_after_update(params), "param_norm", (2,)))
        sums |= {"loss": (loss, 1), "grad_norm": (grad_norm, 1), "param_norm": (param_norm, 1)}
        sums |= {"learning_rate": (jnp.asarray(learning_rate(state.step), jnp.float32), 1)}
        sums |= {name: ((values["importance"] * values[name]).mean(), 1) for name in terms}
        metrics = {name: sums[name][0] / sums[name][1] for name in names}
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm) & jnp.isfinite(param_norm)
        window = update_window(_fuse_across_leaves(state.window, "window"), sums, names, state.step, finite)
        return TrainState(state.step + 1, params, ema_params, opt_state, window, history), metrics

    return train_step


# The length of the array that leaves share, another for each purpose, so that they do not share kernels.
_LENGTHS = {"grad_norm": 2, "param_norm": 3, "update": 4, "casts": 5, "window": 6}


def _fuse_across_leaves(tree: Any, purpose: str, ndims: Sequence[int] = range(6)) -> Any:
    """The same tree; what is computed next from its float32 leaves of these numbers of axes takes fewer kernels of a GPU.

    XLA computes leaves of one shape in one kernel only if they all read one array that is not a scalar. So each leaf is
    multiplied by the 1 in an array, which changes no bit; purpose: one of `_LENGTHS`. Other devices get the tree unchanged.
    """
    if jax.default_backend() != "gpu":
        return tree
    # Equal numbers would be written by a kernel.
    one = jax.lax.optimization_barrier(jnp.asarray(np.eye(1, _LENGTHS[purpose], dtype=np.float32)[0]))[0]

    def multiply(leaf):
        return leaf * one if jnp.ndim(leaf) in ndims and jnp.result_type(leaf) == jnp.float32 else leaf

    return jax.tree.map(multiply, tree)


def _prepare_for_update(grads: Any) -> Any:
    """The gradient for the update, in few kernels of a GPU and with the last axis contiguous, as the state is stored.

    cuDNN computes the gradient of a kernel in another order, to which XLA would change the parameters, the moments and the
    average, and back. On other devices the orders are the same.
    """
    if jax.default_backend() != "gpu":
        return grads

    def place(g):
        placed = with_layout_constraint(g, Layout(major_to_minor=tuple(range(g.ndim))))
        # Of convolutions only the changes of layout are fused: XLA would not update several such leaves in place.
        return jax.lax.optimization_barrier(placed) if g.ndim > 2 else placed

    return jax.tree.map(place, _fuse_across_leaves(grads, "update"))


def _after_update(params: Any) -> Any:
    """The same parameters, for their norm; on GPUs the norm of matrices is not computed by the kernels that update them.

    XLA would update one matrix in each of those kernels.
    """
    if jax.default_backend() != "gpu":
        return params
    return jax.tree.map(lambda leaf: jax.lax.optimization_barrier(leaf) if leaf.ndim == 2 else leaf, params)


def _can_fuse_casts(config: Mapping[str, Any]) -> bool:
    """Whether the backward pass reads the parameters that the forward pass has cast, instead of casting them again."""
    model = config["model"]
    return model["dtype"] != "float32" and not model["remat"] and config["mesh"]["fsdp"] == 1


def _make_gradient(
    objective: Objective,
    terms: tuple[str, ...],
    num_microbatches: int,
    gather_params: Callable[[Callable], Callable],
    fuse_casts: bool,
) -> Callable[..., tuple[Any, dict[str, jax.Array]]]:
    """gradient(params, history, key, examples) -> (gradient of the mean loss, values of each example).

    The values are "loss", "importance", "t" and the `terms` of the loss, each [B].
    """

    def loss_fn(params, history, key, examples: Examples, index):
        microbatch = Microbatch(index, num_microbatches)
        loss, aux = objective(params, history, key, examples, microbatch)
        values = {"loss": loss} | {name: getattr(aux, name) for name in ("importance", *terms)}
        values = {name: value.astype(jnp.float32) for name, value in values.items()} | {"t": aux.t}  # with x64, too
        values = jax.tree.map(microbatch.take, values)
        return values["loss"].mean(), values

    gradient_fn = jax.grad(gather_params(loss_fn), has_aux=True)

    def microbatch_gradient(params, *arguments):
        return gradient_fn(_fuse_across_leaves(params, "casts") if fuse_casts else params, *arguments)

    def gradient(params, *arguments):
        if num_microbatches == 1:
            return microbatch_gradient(params, *arguments, 0)

        def add(total, index):
            grads, values = microbatch_gradient(params, *arguments, index)
            return jax.tree.map(jnp.add, total, grads), values

        # XLA's CPU backend computes the gradient of a convolution many times slower inside a loop than outside.
        unroll = num_microbatches if jax.default_backend() == "cpu" else 1
        zeros = jax.tree.map(jnp.zeros_like, params)
        total, values = jax.lax.scan(add, zeros, jnp.arange(num_microbatches), unroll=unroll)
        grads = jax.tree.map(lambda g: g / num_microbatches, total)
        return grads, jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1), values)

    return gradient


def scan_steps(train_step: TrainStep) -> TrainStep:
    """(state, batches [K, B, ...]) -> (state, metrics of the last step): K train steps in one `lax.scan`.

    train_step: of `create`, or a function without `jax.jit`. The result is not compiled: call it in `jax.jit`.
    """
    # A function with compiler options cannot be called inside another program.
    train_step = getattr(train_step, "__wrapped__", train_step)

    def train_steps(state: TrainState, batches: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        state, metrics = jax.lax.scan(train_step, state, batches)
        return state, jax.tree.map(lambda m: m[-1], metrics)

    return train_steps
