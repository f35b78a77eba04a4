"""The train step, a pure function from (state, batch) to (state, metrics), and the loss to minimize."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import types
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from diffusion_jax import coordinates, data, losses, timesteps
from diffusion_jax.config import is_continuous, sampler_setting
from diffusion_jax.console import log
from diffusion_jax.denoiser import Denoiser
from diffusion_jax.functions import find_function
from diffusion_jax.models import layers, upsampling
from diffusion_jax.schedules import Schedule
from diffusion_jax.schedules.respacing import DATA_STD
from diffusion_jax.training.batches import Examples, condition_shape, random_flip, read_batch
from diffusion_jax.training.optimizer import ema_decay, find_frozen
from diffusion_jax.training.state import (
    Network,
    TrainState,
    initial_history,
    make_average,
    quarter_averages,
    update_averages,
)
from diffusion_jax.types import TimestepSampler

TrainStep = Callable[[TrainState, Any], tuple[TrainState, dict[str, jax.Array]]]

# (params, loss history, key, examples, microbatch) -> (loss [B], values by name, each [B])
Objective = Callable[..., tuple[jax.Array, Any]]


@dataclasses.dataclass(frozen=True)
class Microbatch:
    """The rows index, index + count, index + 2 count, ... of a batch, so that each device has equally many of the rows.

    Timesteps, noise and the masks of dropout layers are drawn for all B rows, so that the number of microbatches does not
    change the results. The network sees only the rows of the microbatch. Other random numbers of a user's network, such as
    dropout inside of attention, differ between microbatches.
    """

    index: Any = 0
    count: int = 1

    def take(self, x: Any) -> jax.Array:
        """Selects rows: [B, ...] to [B / count, ...]."""
        return x if self.count == 1 else x.reshape(-1, self.count, *x.shape[1:])[:, self.index]

    def put(self, x: jax.Array) -> jax.Array:
        """Inserts rows: [B / count, ...] to [B, ...], with zeros in all other rows."""
        if self.count == 1:
            return x
        rows = jnp.zeros((len(x), self.count, *x.shape[1:]), x.dtype)
        return rows.at[:, self.index].set(x).reshape(-1, *x.shape[1:])

    def dropout(self, layer: Callable, args: tuple, kwargs: dict[str, Any], context: nn.module.InterceptorContext):
        """Linen interceptor: applies this microbatch's rows of a dropout mask for the whole batch."""
        module = context.module
        if self.count == 1 or not isinstance(module, nn.Dropout | layers.Dropout):
            return layer(*args, **kwargs)
        x, *others = args
        # A user's Linen network has this stream, except inside an `nn.scan` that does not name the stream.
        if module.has_rng("batch_dropout") and len(others) < 2:
            kwargs = {"rng": module.make_rng("batch_dropout"), **kwargs}
        ones = jnp.ones((len(x) * self.count, *x.shape[1:]))
        mask = self.take(layer(ones, *others, **kwargs))  # zeros and 1 / (1 - rate)
        return (x * mask).astype(x.dtype)


_WHOLE_BATCH = Microbatch()

# Fields of a loss's second result that are logged.
_LOSS_TERMS = {"vlb": ("mse", "vlb"), "hybrid": ("mse", "vlb"), "classify": ("accuracy",)}


def _loss_and_options(config: Mapping[str, Any]) -> tuple[Callable, dict[str, Any]]:
    """Returns (the loss function that a config names, its keyword arguments from the settings).

    The timestep sampler is not included, because it may need the loss history.
    """
    diffusion = config["diffusion"]
    loss = find_function(diffusion["loss"], "diffusion.loss", losses.LOSSES)
    settings = {**diffusion, "gray_levels": config["data"]["levels"], "draw": None}
    if ":" in diffusion["weighting"]:
        settings["weighting"] = find_function(diffusion["weighting"], "diffusion.weighting")
    elif diffusion["weighting"] == "edm":
        settings["weighting"] = functools.partial(
            losses.edm_weight, sigma_data=sigma_data(diffusion, is_continuous(config))
        )
    names = set(list(inspect.signature(loss).parameters)[4:])  # after key, schedule, the network and x_0
    if ":" in diffusion["loss"]:
        sampler = sampler_setting(diffusion), "uniform", _sampler_arguments(diffusion)
        for name, default, arguments in (("weighting", "none", {"weighting"}), sampler):
            if not names & arguments and diffusion[name] != default:
                raise ValueError(
                    f"diffusion.{name}={diffusion[name]} has no effect on {diffusion['loss']}, which has no argument {name}; "
                    f"use {default}"
                )
    if ":" not in diffusion["loss"]:
        names -= {"prediction"}  # an argument of the denoiser
    return loss, {name: settings[name] for name in names & settings.keys() - {"timestep_sampler"}}


def _sampler_arguments(diffusion: Mapping[str, Any]) -> set[str]:
    """Returns the arguments of a loss that take the timestep sampler; on a path, losses written for 0.3 name it `draw`."""
    return {"timestep_sampler", "draw"} if diffusion["path"] else {"timestep_sampler"}


def make_timestep_sampler(
    diffusion: Mapping[str, Any], history: timesteps.LossHistory | None = None
) -> TimestepSampler:
    """Builds the timestep sampler of `config.diffusion`. history: past losses, for samplers that need them."""
    setting = sampler_setting(diffusion)
    if ":" in diffusion[setting]:
        return find_function(diffusion[setting], f"diffusion.{setting}")
    sampler = timesteps.sampler_by_name(diffusion[setting], history)
    if not dataclasses.is_dataclass(sampler):
        return sampler
    options = {"mean": diffusion["draw_mean"], "std": diffusion["draw_std"]}
    options = {name: value for name, value in options.items() if value is not None}
    sampler = dataclasses.replace(sampler, **options, stratified=diffusion["timestep_sampler"] != "uniform")
    if isinstance(sampler, timesteps.log_normal):  # its levels do not depend on the path, so a shift moves the mean
        sampler = dataclasses.replace(sampler, mean=sampler.mean - diffusion["log_snr_shift"] / 2)
    return sampler


def sigma_data(diffusion: Mapping[str, Any], is_continuous: bool) -> float:
    """Returns the standard deviation of x_0 for EDM's constants: the setting, or 1 for standardized data, 0.5 for images."""
    return diffusion["sigma_data"] or (1.0 if is_continuous else DATA_STD)


def _small_image(key: jax.Array, x_0: jax.Array, low_resolution: int, max_noise: float) -> jax.Array:
    """Returns an upsampler's condition [B, H, W, K]: x_0 at low resolution, plus noise of random std if max_noise > 0."""
    low, noise_std = upsampling.downsample(x_0, low_resolution), None
    if max_noise:
        key_std, key_noise = jax.random.split(key)
        noise_std = jax.random.uniform(key_std, x_0.shape[:1], x_0.dtype, maxval=max_noise)
        low = upsampling.augment(key_noise, low, noise_std)
    return upsampling.condition(low, x_0.shape, noise_std)


def make_objective(config: Mapping[str, Any], model: Network, schedule: Schedule) -> Objective:
    """Builds the loss of `config.diffusion`: objective(params, history, key, examples, microbatch) -> (loss [B], values).

    history: `TrainState.loss_history`. examples: the result of `read_batch`. microbatch: the rows that the network sees; all
    other rows of the results have no meaning. values: "t", "importance" and the terms that the loss logs, each [B]; a
    user's loss logs its scalars as "loss/NAME". objective raises ValueError if a user's loss returns a wrong type or shape.
    """
    (loss, options), diffusion = _loss_and_options(config), config["diffusion"]
    is_path, classifies = bool(diffusion["path"]), diffusion["loss"] == "classify"
    schedule_or_path = schedule.path if is_path else schedule
    d = sigma_data(diffusion, is_continuous(config)) if diffusion["preconditioning"] == "edm" else None
    is_conditional = bool(model.num_classes) and not classifies
    sampler_arguments = inspect.signature(loss).parameters.keys() & _sampler_arguments(diffusion)
    low_resolution, max_noise = config["data"]["low_resolution"], diffusion["conditioning_noise"]

    def objective(params, history, key, examples: Examples, microbatch=_WHOLE_BATCH):
        x_0, y, condition = examples
        key_loss, key_dropout, key_low = jax.random.split(key, 3)
        if low_resolution:
            condition = _small_image(key_low, x_0, low_resolution, max_noise)
        with_sampler = dict(options)
        if sampler_arguments:
            with_sampler |= dict.fromkeys(sampler_arguments, make_timestep_sampler(diffusion, history))

        def network(x_t, time, extra=None):
            labels = (microbatch.take(y),) if is_conditional else ()
            conditions: dict[str, Any] = {"condition": condition, "extra": extra}
            conditions = {name: microbatch.take(each) for name, each in conditions.items() if each is not None}
            x, time = microbatch.take(x_t), microbatch.take(time)
            rngs = {"dropout": key_dropout}
            if microbatch.count > 1:  # for random numbers other than dropout layers' masks
                rngs["microbatch"] = jax.random.fold_in(key_dropout, microbatch.index)
            with nn.intercept_methods(microbatch.dropout):
                output = model.apply({"params": params}, x, time, *labels, train=True, rngs=rngs, **conditions)
            return microbatch.put(jnp.asarray(output))

        arrays: tuple[Any, ...] = (x_0, y) if classifies else (x_0,)
        if ":" in diffusion["loss"]:
            denoiser = network if d is None else coordinates.precondition(network, schedule, d)
        elif classifies:
            denoiser = network
        else:
            denoiser = Denoiser(network, diffusion["prediction"], diffusion["variance"], clip=False, sigma_data=d)
        result = loss(key_loss, schedule_or_path, denoiser, *arrays, **with_sampler)
        return _loss_and_values(diffusion["loss"], result, len(x_0))

    return objective


def _loss_and_values(name: str, result: Any, batch_size: int) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns (loss, values to log) from the result of the loss `name`.

    Raises: ValueError if a user's loss did not return (losses, aux), or if losses, t, importance or a scalar is not [B].
    """
    expected = f"diffusion.loss={name} must return (losses [{batch_size}], losses.LossAux), one loss for each example"
    if not isinstance(result, tuple) or len(result) != 2:
        raise ValueError(f"{expected}; it returned a {type(result).__name__}")
    loss, aux = result
    scalars = getattr(aux, "scalars", None)
    scalars = {} if scalars is None else scalars
    if not isinstance(scalars, Mapping):
        raise ValueError(f"{expected}; aux.scalars is a {type(scalars).__name__}, not a dictionary of numbers by name")
    values: dict[str, Any] = {
        each: getattr(aux, each, None) for each in ("t", "importance", *_LOSS_TERMS.get(name, ()))
    }
    checked = {"losses": loss} | {f"aux.{each}": value for each, value in values.items()}
    for what, value in (checked | {f"aux.scalars[{each!r}]": value for each, value in scalars.items()}).items():
        shape = getattr(value, "shape", None)
        if shape != (batch_size,):
            found = f"a {type(value).__name__}" if shape is None else f"of shape {list(shape)}"
            raise ValueError(f"{expected}; {what} is {found}")
    return loss, values | {f"loss/{each}": value for each, value in scalars.items()}


def find_terms(config: Mapping[str, Any], model: Network, schedule: Schedule) -> tuple[str, ...]:
    """Returns the names of the values that the loss logs besides the loss. Evaluates a user's loss with a linear network.

    Raises: ValueError if a user's loss returns a wrong type or shape, or if it does not allow microbatches. In a microbatch,
    `Microbatch.put` sets the network's output to 0 in all other rows, which must not change the losses of the microbatch.
    """
    name, microbatch = config["diffusion"]["loss"], Microbatch(0, config["training"]["accumulation_steps"])
    if ":" not in name:
        return _LOSS_TERMS.get(name, ())
    shape, batch_size = data.example_shape(config["data"]), config["training"]["batch_size"]
    channels = getattr(model, "out_channels", None) or shape[-1]

    def apply(variables, x_t, time, *inputs, **options):
        output = variables["params"].reshape(-1, *[1] * len(shape)) * x_t
        return jnp.concatenate([output] * (channels // shape[-1]), axis=-1)

    linear: Any = types.SimpleNamespace(apply=apply, num_classes=model.num_classes)
    key_x, key = jax.random.split(jax.random.key(0))
    condition = condition_shape(config)
    examples = Examples(
        jax.random.normal(key_x, (batch_size, *shape)),
        jnp.zeros(batch_size, jnp.int32),
        None if condition is None else jnp.zeros((batch_size, *condition)),
    )
    objective, whole, history = make_objective(config, linear, schedule), jnp.ones(batch_size), initial_history(config)
    _, values = jax.eval_shape(objective, whole, history, key, examples)
    terms = tuple(name for name in values if name not in ("t", "importance"))
    losses_of = jax.jit(lambda weights: objective(weights, history, key, examples)[0])
    of_batch, without_last = losses_of(whole), losses_of(whole.at[-1].set(0))
    # A mean is equal for all examples, and depends on the output for the last one.
    if batch_size > 1 and (of_batch == of_batch[0]).all() and of_batch[0] != without_last[0]:
        advice = "return a loss for each example, which loss_q1 ... loss_q4 and loss_second_moment need"
        log(f"Note: diffusion.loss={name} returns one number, the mean of the batch, for all examples; {advice}.")
    if microbatch.count == 1:
        return terms
    of_batch, of_microbatch = map(microbatch.take, (of_batch, losses_of(microbatch.put(microbatch.take(whole)))))
    if not np.allclose(of_batch, of_microbatch, rtol=1e-5, atol=0, equal_nan=True):  # tolerates only rounding
        raise ValueError(
            f"diffusion.loss={name}: the loss of an example changes with the network's outputs for other examples, which "
            f"a microbatch does not have; use training.accumulation_steps=1 and not {microbatch.count}"
        )
    return terms


def make_train_step(
    config: Mapping[str, Any],
    model: Network,
    schedule: Schedule,
    optimizer: optax.GradientTransformationExtraArgs,
    learning_rate: optax.Schedule,
    gather_params: Callable[[Callable], Callable] = lambda loss_fn: loss_fn,
) -> TrainStep:
    """Builds train_step(state, batch) -> (state, metrics), not compiled. batch: as for `read_batch`.

    All random numbers derive from `fold_in(key(config.seed), state.step)`. The metrics are scalars: loss (batch mean),
    loss_q1 ... loss_q4 (means over each quarter of the timesteps, q1 the least noisy, or on a path over the log SNRs above 4,
    0 to 4, -4 to 0 and below -4; NaN for a quarter without an example in the batch),
    mse and vlb (bits per dimension, without L_T) for the losses vlb and hybrid, accuracy for a classifier, loss/NAME for the
    scalars of a user's loss, grad_norm (before clipping), param_norm, learning_rate. With importance sampling, losses are
    weighted, so that the means are unbiased.

    gather_params: wraps a function of the parameters, which may be split over devices, as `sharding.gather_params` does.
    """
    objective = make_objective(config, model, schedule)
    gradient = _make_gradient(objective, config["training"]["accumulation_steps"], gather_params)

    def train_step(state: TrainState, batch: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        key_flip, key_loss = jax.random.split(jax.random.fold_in(jax.random.key(config["seed"]), state.step))
        examples = read_batch(batch, config)
        if config["data"]["random_flip"]:
            examples = random_flip(key_flip, examples)
        grads, values = gradient(state.params, state.loss_history, key_loss, examples)
        loss = values["loss"].mean()
        frozen = config["optimizer"]["frozen"]
        is_frozen = find_frozen(frozen, grads) if frozen else jax.tree.map(lambda _: False, grads)
        grads = jax.tree.map(lambda frozen, g: jnp.zeros_like(g) if frozen else g, is_frozen, grads)
        grad_norm = optax.tree.norm(grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params, grad_norm=grad_norm)
        params = optax.apply_updates(state.params, updates)
        ema_params = optax.incremental_update(params, state.ema_params, 1.0 - ema_decay(state.step, config["ema"]))
        # Rounding would move the average of a frozen parameter step by step, by up to 2e-4 of its value.
        ema_params = jax.tree.map(lambda frozen, ema, p: p if frozen else ema, is_frozen, ema_params, params)
        history = state.loss_history
        if history is not None:
            history = timesteps.record(history, values["t"], values["loss"] / values["importance"])

        param_norm = optax.tree.norm(params)
        scalars = {"loss": loss, "grad_norm": grad_norm, "param_norm": param_norm}
        scalars["learning_rate"] = jnp.asarray(learning_rate(state.step), jnp.float32)
        terms = values.keys() - {"loss", "importance", "t"}
        scalars |= {name: (values["importance"] * values[name]).mean() for name in sorted(terms)}
        step_averages = {name: make_average(value, jnp.ones((), jnp.float32)) for name, value in scalars.items()}
        step_averages |= quarter_averages(values, schedule)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm) & jnp.isfinite(param_norm)
        averages = update_averages(state.averages, step_averages, state.step, finite)
        metrics = {name: average.compute() for name, average in step_averages.items()}
        return TrainState(state.step + 1, params, ema_params, opt_state, averages, history), metrics

    return train_step


def _make_gradient(
    objective: Objective, num_microbatches: int, gather_params: Callable[[Callable], Callable]
) -> Callable[..., tuple[Any, dict[str, jax.Array]]]:
    """Builds gradient(params, history, key, examples) -> (gradient of the mean loss, {name: values [B]} including "loss")."""

    def loss_fn(params, history, key, examples: Examples, index):
        microbatch = Microbatch(index, num_microbatches)
        loss, values = objective(params, history, key, examples, microbatch)
        values = {"loss": loss} | values
        # Values are float32 even with x64, except for t, which may be an index.
        values = {name: value if name == "t" else value.astype(jnp.float32) for name, value in values.items()}
        values = jax.tree.map(microbatch.take, values)
        return values["loss"].mean(), values

    gradient_fn = jax.grad(gather_params(loss_fn), has_aux=True)

    def gradient(params, *arguments):
        if num_microbatches == 1:
            return gradient_fn(params, *arguments, 0)

        def add(total, index):
            grads, values = gradient_fn(params, *arguments, index)
            return jax.tree.map(jnp.add, total, grads), values

        # On XLA's CPU backend, convolution gradients are many times slower inside a loop than outside.
        unroll = num_microbatches if layers.platform() == "cpu" else 1
        zeros = jax.tree.map(jnp.zeros_like, params)
        total, values = jax.lax.scan(add, zeros, jnp.arange(num_microbatches), unroll=unroll)
        grads = jax.tree.map(lambda g: g / num_microbatches, total)
        return grads, jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1), values)

    return gradient


def scan_steps(train_step: TrainStep) -> TrainStep:
    """Runs K train steps in one `lax.scan`: (state, batches [K, B, ...]) -> (state, metrics of the last step).

    train_step: from `training.create`, or a function without `jax.jit`. The returned function is not compiled.
    """
    # A function with compiler options cannot be called inside another program.
    train_step = getattr(train_step, "__wrapped__", train_step)

    def train_steps(state: TrainState, batches: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        state, metrics = jax.lax.scan(train_step, state, batches)
        return state, jax.tree.map(lambda m: m[-1], metrics)

    return train_steps
