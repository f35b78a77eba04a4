"""The loss of a config as a function of the network's parameters, on a batch or on one of its microbatches."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffusion_jax import losses, timesteps
from diffusion_jax.models import upsampling
from diffusion_jax.models.layers import Dropout
from diffusion_jax.schedules import Schedule
from diffusion_jax.training.batches import Examples
from diffusion_jax.training.state import Network

__all__ = ["Microbatch", "Objective", "make_objective", "takes_labels"]

# (params, loss history, key, examples, microbatch) -> (loss [B], values that the loss computed)
Objective = Callable[..., tuple[jax.Array, Any]]


@dataclasses.dataclass(frozen=True)
class Microbatch:
    """Every `count`-th row of a batch, from `index` on, which are equally many rows on every device.

    All draws are those of the whole batch, so that the number of microbatches does not change a step: timesteps and noise
    are drawn for B rows, of which the network sees some, and dropout draws its mask for B rows.
    """

    index: Any = 0
    count: int = 1

    def take(self, x: Any) -> jax.Array:
        """[B, ...] to [B / count, ...]."""
        return x if self.count == 1 else x.reshape(-1, self.count, *x.shape[1:])[:, self.index]

    def put(self, x: jax.Array) -> jax.Array:
        """[B / count, ...] to [B, ...], with zeros in the other rows."""
        if self.count == 1:
            return x
        rows = jnp.zeros((len(x), self.count, *x.shape[1:]), x.dtype)
        return rows.at[:, self.index].set(x).reshape(-1, *x.shape[1:])

    def dropout(self, layer: Callable, args: tuple, kwargs: dict[str, Any], context: nn.module.InterceptorContext):
        """A Linen interceptor: dropout takes this microbatch's rows of the mask of the whole batch."""
        if self.count == 1 or not isinstance(context.module, nn.Dropout | Dropout):
            return layer(*args, **kwargs)
        (x,) = args
        mask = self.take(layer(jnp.ones((len(x) * self.count, *x.shape[1:])), **kwargs))  # zeros and 1 / (1 - rate)
        return (x * mask).astype(x.dtype)


_WHOLE_BATCH = Microbatch()


def takes_labels(model: Network, loss: str) -> bool:
    """Whether the network or the loss needs the labels of a batch."""
    return bool(model.num_classes) or loss == "classify"


def _loss_and_options(config: Mapping[str, Any]) -> tuple[Callable, dict[str, Any]]:
    """The function of `losses` that a config names, and its keyword arguments."""
    diffusion = config["diffusion"]
    prediction, weighting = {"prediction": diffusion["prediction"]}, {"weighting": diffusion["weighting"]}
    bound = {"variance": diffusion["variance"], "gray_levels": config["data"]["levels"]}
    return {
        "simple": (losses.simple, prediction | weighting),
        "vlb": (losses.vlb, prediction | bound),
        "hybrid": (losses.hybrid, prediction | bound | weighting | {"vlb_weight": diffusion["vlb_weight"]}),
        "classify": (losses.classify, {}),
    }[diffusion["loss"]]


def _small_image(key: jax.Array, x_0: jax.Array, low_resolution: int, max_noise: float) -> jax.Array:
    """The condition of an upsampler [B, H, W, K]: the small version of x_0, with noise of random size if max_noise > 0."""
    low, noise_std = upsampling.downsample(x_0, low_resolution), None
    if max_noise:
        key_std, key_noise = jax.random.split(key)
        noise_std = jax.random.uniform(key_std, x_0.shape[:1], x_0.dtype, maxval=max_noise)
        low = upsampling.augment(key_noise, low, noise_std)
    return upsampling.condition(low, x_0.shape, noise_std)


def make_objective(config: Mapping[str, Any], model: Network, schedule: Schedule) -> Objective:
    """objective(params, history, key, examples, microbatch) -> (loss [B], aux): the loss that `config.diffusion` names.

    history: `TrainState.loss_history`. examples: as `read_batch` returns them. microbatch: the rows that the network sees;
    the results in the other rows have no meaning. aux: the second result of the function of `losses`.
    """
    loss, options = _loss_and_options(config)
    classifies = config["diffusion"]["loss"] == "classify"
    is_conditional = bool(model.num_classes) and not classifies
    sampler_name = config["diffusion"]["timestep_sampler"]
    low_resolution, max_noise = config["data"]["low_resolution"], config["diffusion"]["conditioning_noise"]

    def objective(params, history, key, examples: Examples, microbatch=_WHOLE_BATCH):
        x_0, y, condition = examples
        key_loss, key_dropout, key_low = jax.random.split(key, 3)
        if low_resolution:
            condition = _small_image(key_low, x_0, low_resolution, max_noise)
        if history is None:
            timestep_sampler = timesteps.SAMPLERS[sampler_name]
        else:
            timestep_sampler = timesteps.loss_second_moment(history)

        def network(x_t, time):
            labels = (microbatch.take(y),) if is_conditional else ()
            conditions: dict[str, Any] = {} if condition is None else {"condition": microbatch.take(condition)}
            x, time = microbatch.take(x_t), microbatch.take(time)
            rngs = {"dropout": key_dropout}
            with nn.intercept_methods(microbatch.dropout):
                output = model.apply({"params": params}, x, time, *labels, train=True, rngs=rngs, **conditions)
            return microbatch.put(jnp.asarray(output))

        targets = (y,) if classifies else ()
        return loss(key_loss, schedule, network, x_0, *targets, timestep_sampler=timestep_sampler, **options)

    return objective
