"""Networks of a user: functions for `model.kind`."""

import functools
import math
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from diffusion_jax import draws, losses, schedules
from diffusion_jax.models import Shapes, timestep_embedding


def add_extra(output, extra):
    return output if extra is None else output + extra[:, :1, None, None]


class Convolutions(nn.Module):
    width: int
    channels: int
    num_labels: int
    dropout: float
    null_condition = 0.5

    @nn.compact
    def __call__(self, x_t, time, y=None, condition=None, extra=None, train=False):
        embedding = nn.Dense(self.width)(timestep_embedding(time, 8))
        if y is not None:
            embedding += nn.Embed(self.num_labels, self.width)(y)
        if condition is not None:
            embedding += nn.Dense(self.width, name="condition")(condition)
        h = nn.silu(nn.Conv(self.width, (3, 3))(x_t) + embedding[:, None, None])
        h = nn.Dropout(self.dropout)(h, not train)
        return add_extra(nn.Conv(self.channels, (3, 3))(h), extra)


def linen(shapes: Shapes, *, width: int = 4, dropout: float = 0.0) -> nn.Module:
    return Convolutions(width, shapes.output[-1], shapes.num_labels, dropout)


class Draws(nn.Module):
    """Multiplies x_t by numbers drawn with `make_rng`, or attends to it with dropout of the weights."""

    dropout: float
    attends: bool

    @nn.compact
    def __call__(self, x_t, time, train):
        h = x_t.reshape(len(x_t), -1, 1) + time[:, None, None] / 1000
        if self.attends:
            h = nn.MultiHeadDotProductAttention(1, dropout_rate=self.dropout, deterministic=not train)(h)
        elif train:
            h *= jax.random.bernoulli(self.make_rng("dropout"), 1 - self.dropout, h.shape)
        return nn.Dense(1)(h).reshape(x_t.shape)


def draws_itself(shapes: Shapes, *, dropout: float = 0.0) -> nn.Module:
    return Draws(dropout, attends=False)


def attends(shapes: Shapes, *, dropout: float = 0.0) -> nn.Module:
    return Draws(dropout, attends=True)


class LearnsNull(nn.Module):
    """x_t plus the condition, or plus a parameter where there is none."""

    null_condition = float("nan")

    @nn.compact
    def __call__(self, x_t, time, condition):
        null = self.param("null", nn.initializers.constant(0.7), condition.shape[1:])
        return x_t + 0 * time[:, None] + jnp.where(jnp.isnan(condition), null, condition)


def learns_null(shapes: Shapes) -> nn.Module:
    return LearnsNull()


class Dense(nnx.Module):
    def __init__(self, shapes, width, dropout, rngs):
        self.dense_0 = nnx.Linear(math.prod(shapes.data) + 1, width, rngs=rngs)
        self.dense_1 = nnx.Linear(width, math.prod(shapes.output), rngs=rngs)
        self.drop = nnx.Dropout(dropout, rngs=rngs)
        self.shape = shapes.output

    def __call__(self, x_t, time, extra=None):
        h = jnp.concatenate([x_t.reshape(len(x_t), -1), time[:, None] / 1000], axis=1)
        h = self.dense_1(self.drop(jax.nn.silu(self.dense_0(h))))
        return add_extra(h.reshape(-1, *self.shape), extra)


def of_nnx(shapes: Shapes, *, width: int = 8, dropout: float = 0.0, rngs: nnx.Rngs) -> nnx.Module:
    return Dense(shapes, width, dropout, rngs)


def pair(shapes: Shapes, *, scale: float = 1.0, mode: Literal["plain", "wide"] = "plain"):
    """A linear map of x_t and the time; `extra` is added."""
    size = math.prod(shapes.data)

    def init(key):
        return {"w": scale * jax.random.normal(key, (size + 1, math.prod(shapes.output))) / size}

    def apply(params, x_t, time, extra=None):
        x = jnp.concatenate([x_t.reshape(len(x_t), -1), time[:, None] / 1000], axis=1)
        return add_extra((x @ params["w"]).reshape(-1, *shapes.output), extra)

    return init, apply


class TwoDropouts(nnx.Module):
    def __init__(self, dropout, rngs):
        self.scale = nnx.Param(jnp.ones(()))
        self.first, self.second = (nnx.Dropout(dropout, rngs=rngs) for _ in range(2))

    def __call__(self, x_t, time):
        return self.second(self.first(self.scale[...] * x_t + 0 * time.sum() + 1))


def two_dropouts(shapes: Shapes, *, dropout: float = 0.0, rngs: nnx.Rngs):
    return TwoDropouts(dropout, rngs)


def with_key(shapes: Shapes, *, dropout: float = 0.0):
    """A pair whose dropout draws from the key."""

    def apply(params, x_t, time, key=None):
        kept = 1.0 if key is None else jax.random.bernoulli(key, 1 - dropout, x_t.shape) / (1 - dropout)
        return params * kept * x_t + time[:, None, None, None]

    return lambda key: jnp.ones(()), apply


def ignores_dropout(shapes: Shapes, *, dropout: float = 0.0):
    return lambda key: jnp.ones(()), lambda params, x_t, time: params * x_t + time[:, None, None, None]


def without_time(shapes: Shapes):
    return lambda key: jnp.ones(()), lambda params, x_t: params * x_t


def too_wide(shapes: Shapes):
    return lambda key: jnp.ones(()), lambda params, x_t, time: jnp.stack([params * x_t + time[0]] * 2)


class Normalized(nn.Module):
    @nn.compact
    def __call__(self, x_t, time, train):
        return nn.BatchNorm(use_running_average=not train)(x_t) + time[:, None, None, None]


def batch_norm(shapes: Shapes):
    return Normalized()


def number(shapes: Shapes):
    return 3


# ---- Functions for other settings


def betas(count):
    return jnp.linspace(1e-3, 0.03, count)


def hundred_betas(count):
    return betas(100)


def path():
    return schedules.edm(0.01, 50.0)


def draw(key, batch_size, path):
    return draws.log_normal(0.0, 1.0)(key, batch_size, path)


def draw_without_density(key, batch_size, path):
    time, log_density = draw(key, batch_size, path)
    return time, log_density - jnp.inf


def weight(snr):
    return snr**0.5


def last_quarter(key, batch_size, num_timesteps):
    t = jax.random.randint(key, (batch_size,), 3 * num_timesteps // 4, num_timesteps)
    return t, jnp.ones(batch_size)


def half_loss(key, schedule, denoise_fn, x_0, *, prediction, weighting, timestep_sampler):
    options = {"prediction": prediction, "weighting": weighting, "timestep_sampler": timestep_sampler}
    loss, aux = losses.simple(key, schedule, denoise_fn, x_0, **options)
    return loss / 2, aux


def half_loss_and(change):
    """`half_loss` with another result: change(loss, aux)."""

    def loss(key, schedule, denoise_fn, x_0, *, prediction, weighting, timestep_sampler):
        options = {"prediction": prediction, "weighting": weighting, "timestep_sampler": timestep_sampler}
        return change(*half_loss(key, schedule, denoise_fn, x_0, **options))

    return loss


one_number = half_loss_and(lambda loss, aux: (loss.mean(), aux))
the_mean = half_loss_and(lambda loss, aux: (jnp.full(loss.shape, loss.mean()), aux))
always_zero = half_loss_and(lambda loss, aux: (jnp.maximum(loss - 1e6, 0), aux))
a_column = half_loss_and(lambda loss, aux: (loss[:, None], aux))
a_number_per_entry = half_loss_and(lambda loss, aux: ((aux.output - aux.eps) ** 2, aux))
without_aux = half_loss_and(lambda loss, aux: loss)
aux_without_t = half_loss_and(lambda loss, aux: (loss, aux._replace(t=None)))
with_scalars = half_loss_and(lambda loss, aux: (loss, aux._replace(scalars={"doubled": 4 * loss, "step": aux.t})))
a_scalar_of_the_batch = half_loss_and(lambda loss, aux: (loss, aux._replace(scalars={"mean": loss.mean()})))
scalars_without_names = half_loss_and(lambda loss, aux: (loss, aux._replace(scalars=loss)))
in_groups_of_four = half_loss_and(lambda loss, aux: (loss.reshape(-1, 4).reshape(-1), aux))  # fails for other batches
relative_to_the_batch = half_loss_and(lambda loss, aux: (loss / jax.lax.stop_gradient(loss.mean()), aux))


def with_extra(key, schedule, denoise_fn, x_0, *, prediction, timestep_sampler):
    """Adds the number of its row to the output of `pair`, by the argument `extra`."""
    extra = jnp.arange(len(x_0), dtype=jnp.float32)[:, None]
    options = {"prediction": prediction, "timestep_sampler": timestep_sampler}
    return losses.simple(key, schedule, functools.partial(denoise_fn, extra=extra), x_0, **options)


def with_addition(key, schedule, denoise_fn, x_0, *, prediction, timestep_sampler):
    """Adds the number of its row to the output, without the network."""
    rows = jnp.arange(len(x_0), dtype=jnp.float32).reshape(-1, *[1] * (x_0.ndim - 1))
    options = {"prediction": prediction, "timestep_sampler": timestep_sampler}
    return losses.simple(key, schedule, lambda x_t, time: denoise_fn(x_t, time) + rows, x_0, **options)


def mean_shift(reference, samples):
    return samples.mean() - reference.mean()


def distinct_values(reference, samples):
    return {"in_reference": len(np.unique(reference)), "in_samples": len(np.unique(samples))}


def by_class(reference, samples, reference_label, samples_label):
    """The mean of each set, after each example is divided by its label + 1."""
    sets = ((reference, reference_label), (samples, samples_label))
    return dict(zip(("one", "other"), [float((x.mean(axis=(1, 2, 3)) / (y + 1)).mean()) for x, y in sets], strict=True))


def by_condition(reference, samples, samples_condition, reference_label=None):
    return {"condition": np.nanmean(samples_condition), "has_label": reference_label is not None}


def several_numbers(reference, samples):
    return {"one": np.float32(0.5), "other": samples.sum(dtype=np.float64)}


def not_finite(reference, samples):
    return np.nan


def text(reference, samples):
    return "good"


def fid(reference, samples):
    return 1.0


def steps(reference, samples):
    return {"steps": 3}


class Lines:
    """A tracker."""

    def __init__(self, workdir, config, step):
        self._path = workdir / f"from_{step}.txt"

    def write_scalars(self, step, scalars):
        with self._path.open("a") as file:
            file.write(f"{step} {scalars['loss']}\n")


class WithoutMethods:
    def __init__(self, workdir, config, step):
        pass


def lion(learning_rate, config):
    return optax.lion(learning_rate, b1=config["b1"])


def is_encoder(name):
    return name.startswith(("dense_in", "time_"))
