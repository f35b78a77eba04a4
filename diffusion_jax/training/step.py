"""The train step: one pure function from (state, batch) to (state, metrics)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax

from diffusion_jax import data, losses, models, timesteps
from diffusion_jax.models import upsampling
from diffusion_jax.schedules import Schedule


@flax.struct.dataclass
class TrainState:
    """Everything a run is, but its config: saved whole, restored whole.

    step: int32, steps taken. params, ema_params: trees of float32. opt_state: optax's. window: running sums of the metrics
    since the last multiple of `training.log_every`, and in `nonfinite_step` the first step whose loss, gradient or
    parameters were not finite (-1 for none). They are part of the state so that a run continued in mid-window logs the
    same means. loss_history: what `timesteps.loss_second_moment` draws by; None for the other timestep samplers.
    """

    step: jax.Array
    params: Any
    ema_params: Any
    opt_state: Any
    window: dict[str, Any]
    loss_history: timesteps.LossHistory | None = None


QUARTERS = ("loss_q1", "loss_q2", "loss_q3", "loss_q4")
IMPORTANCE_SAMPLER = "loss_second_moment"


# What each loss logs beside itself, fields of its parts.
_PARTS = {"simple": (), "vlb": ("mse", "vlb"), "hybrid": ("mse", "vlb"), "classify": ("accuracy",)}


def _metric_names(diffusion: Mapping) -> tuple[str, ...]:
    return ("loss", *QUARTERS, *_PARTS[diffusion["loss"]], "grad_norm", "param_norm", "learning_rate")


def ema_decay(step, config: Mapping):
    """Decay of the EMA at a step: `decay`, or with `warmup` min(decay, (1 + step) / (10 + step))."""
    if not config["warmup"]:
        return config["decay"]
    return jnp.minimum(config["decay"], (1.0 + step) / (10.0 + step))


def initial_params(key, model, image_shape: tuple[int, int, int]):
    """Fresh parameters of a network whose input is `image_shape` (H, W, C): `training.input_shape` of a config."""
    takes_labels = model.num_classes and not isinstance(model, models.Classifier)
    y = (jnp.zeros(1, jnp.int32),) if takes_labels else ()
    return model.init(key, jnp.zeros((1, *image_shape)), jnp.zeros(1), *y)["params"]


def initial_state(
    config: Mapping, model, optimizer: optax.GradientTransformation, image_shape: tuple[int, int, int]
) -> TrainState:
    """A fresh state; the EMA starts as a copy of the parameters."""
    diffusion = config["diffusion"]
    params = initial_params(jax.random.key(config["seed"]), model, image_shape)
    window = {
        name: {part: jnp.zeros((), jnp.float32) for part in ("total", "count")} for name in _metric_names(diffusion)
    }
    window["nonfinite_step"] = jnp.full((), -1, jnp.int32)
    history = None
    if diffusion["timestep_sampler"] == IMPORTANCE_SAMPLER:
        history = timesteps.loss_history(diffusion["num_timesteps"])
    ema_params = jax.tree.map(jnp.copy, params)
    return TrainState(jnp.zeros((), jnp.int32), params, ema_params, optimizer.init(params), window, history)


def window_means(window) -> dict[str, float]:
    """The means of a fetched `TrainState.window`; what it saw nothing of (a quarter without a timestep) is left out."""
    sums = {name: value for name, value in window.items() if isinstance(value, Mapping)}
    return {name: float(value["total"] / value["count"]) for name, value in sums.items() if value["count"] > 0}


class _Part(NamedTuple):
    """Every `count`-th row of a batch, from `index` on: what the network sees of it at a time, as many on every device."""

    index: Any = 0
    count: int = 1

    def take(self, x):
        """[B, ...] to [B / count, ...]."""
        return x if self.count == 1 else x.reshape(-1, self.count, *x.shape[1:])[:, self.index]

    def put(self, x):
        """[B / count, ...] to [B, ...], with zeros in the other rows."""
        if self.count == 1:
            return x
        whole = jnp.zeros((len(x), self.count, *x.shape[1:]), x.dtype)
        return whole.at[:, self.index].set(x).reshape(-1, *x.shape[1:])

    def dropout(self, layer, args, kwargs, context):
        """An interceptor of Linen's: dropout drops of these rows what it would have dropped in the whole batch."""
        if self.count == 1 or not isinstance(context.module, nn.Dropout):
            return layer(*args, **kwargs)
        (x,) = args
        return x * self.take(layer(jnp.ones((len(x) * self.count, *x.shape[1:]), x.dtype), **kwargs))


_WHOLE = _Part()


def _takes_labels(config: Mapping, model) -> bool:
    """Whether the network, or the loss, needs the labels of a batch."""
    return bool(model.num_classes) or config["diffusion"]["loss"] == "classify"


def read_batch(batch: Mapping, shape: tuple[int, int, int], takes_labels: bool, parts: int = 1):
    """(x_0 float32 [B, H, W, C], y int [B] or None) of a batch; only shapes and types are looked at, so it works under jit.

    batch: "image", uint8 [B, H, W, C], which is scaled to [-1, 1]; or "x", float, taken as it is. "label", int [B], where
    `takes_labels`; it is not looked at otherwise. shape: (H, W, C). parts: what B must be a multiple of.
    Raises: ValueError for anything else.
    """
    if not isinstance(batch, Mapping):
        raise ValueError(f'a batch must be a dictionary with "image" or "x"; got {type(batch).__name__}')
    given = [name for name in ("image", "x") if name in batch]
    if len(given) != 1:
        found = ", ".join(map(repr, batch)) or "nothing"
        raise ValueError(f'a batch must have either "image" (uint8) or "x" (float, standardized); got {found}')
    (name,) = given
    values = batch[name]
    if not hasattr(values, "dtype"):
        raise ValueError(f'batch["{name}"] must be an array; got {type(values).__name__}')
    dtype = jnp.result_type(values)
    if name == "image" and dtype != jnp.uint8:
        advice = 'give float data, standardized to about [-1, 1], as "x"' if _is_float(dtype) else "convert it to uint8"
        raise ValueError(f'batch["image"] must be uint8, gray levels 0 to 255; got {dtype}; {advice}')
    if name == "x" and not _is_float(dtype):
        advice = 'give it as "image"' if dtype == jnp.uint8 else "convert and standardize it"
        raise ValueError(f'batch["x"] must be float, standardized data; got {dtype}; {advice}')
    if jnp.ndim(values) != 4 or jnp.shape(values)[1:] != tuple(shape):
        wanted = ", ".join(map(str, shape))
        raise ValueError(
            f'batch["{name}"] must have shape [B, {wanted}], as data.image_size and data.channels say; '
            f"got {list(jnp.shape(values))}"
        )
    count = len(values)
    if count < 1:
        raise ValueError("a batch must hold at least one example; got none")
    if count % parts:
        raise ValueError(f"a batch of {count} must be a multiple of training.accumulation_steps={parts}")
    x_0 = values.astype(jnp.float32)
    return x_0 / 127.5 - 1.0 if name == "image" else x_0, _read_labels(batch, count) if takes_labels else None


def _is_float(dtype) -> bool:
    return jnp.issubdtype(dtype, jnp.floating)


def _read_labels(batch: Mapping, count: int):
    if "label" not in batch:
        raise ValueError(
            f'a batch must have "label", int [{count}], for model.num_classes or diffusion.loss=classify; '
            f"got {', '.join(map(repr, batch))}"
        )
    y = batch["label"]
    if not hasattr(y, "dtype"):
        raise ValueError(f'batch["label"] must be an array; got {type(y).__name__}')
    if not jnp.issubdtype(jnp.result_type(y), jnp.integer) or jnp.shape(y) != (count,):
        raise ValueError(
            f'batch["label"] must be int of shape [{count}]; got {jnp.result_type(y)} {list(jnp.shape(y))}'
        )
    return y


def _objective(config: Mapping, model, schedule: Schedule) -> Callable:
    """(params, history, key, x_0, y, part) -> (loss [B], parts): the loss that `config.diffusion` names, in training.

    history: `TrainState.loss_history`. y: int [B], the labels of the batch, None where nothing takes any. part: the
    rows that the network sees; the numbers of other rows mean nothing. Whatever it is, the draws are those of the batch.
    """
    diffusion = config["diffusion"]
    prediction, weighting = {"prediction": diffusion["prediction"]}, {"weighting": diffusion["weighting"]}
    bound = {"variance": diffusion["variance"], "gray_levels": config["data"]["levels"]}
    loss, options = {
        "simple": (losses.simple, prediction | weighting),
        "vlb": (losses.vlb, prediction | bound),
        "hybrid": (losses.hybrid, prediction | bound | weighting | {"vlb_weight": diffusion["vlb_weight"]}),
        "classify": (losses.classify, {}),
    }[diffusion["loss"]]
    classifies = loss is losses.classify
    takes_labels = bool(model.num_classes) and not classifies
    low_resolution, most_noise = config["data"]["low_resolution"], diffusion["conditioning_noise"]

    def conditioning(key, x_0):
        """x_t -> what the network takes: for an upsampler, x_t and the small version of x_0."""
        if not low_resolution:
            return lambda x_t: x_t
        low, noise_std = upsampling.downsample(x_0, low_resolution), None
        if most_noise:
            key_std, key_noise = jax.random.split(key)
            noise_std = jax.random.uniform(key_std, x_0.shape[:1], x_0.dtype, maxval=most_noise)
            low = upsampling.augment(key_noise, low, noise_std)
        return lambda x_t: upsampling.condition(x_t, low, noise_std)

    def objective(params, history, key, x_0, y, part=_WHOLE):
        key_loss, key_dropout, key_low = jax.random.split(key, 3)
        to_input = conditioning(key_low, x_0)
        if history is None:
            timestep_sampler = timesteps.SAMPLERS[diffusion["timestep_sampler"]]
        else:
            timestep_sampler = timesteps.loss_second_moment(history)

        def network(x_t, time):
            labels = (part.take(y),) if takes_labels else ()
            x, time = part.take(to_input(x_t)), part.take(time)
            with nn.intercept_methods(part.dropout):
                output = model.apply({"params": params}, x, time, *labels, train=True, rngs={"dropout": key_dropout})
            return part.put(output)

        targets = (y,) if classifies else ()
        return loss(key_loss, schedule, network, x_0, *targets, timestep_sampler=timestep_sampler, **options)

    return objective


def make_train_step(
    config: Mapping,
    model,
    schedule: Schedule,
    optimizer: optax.GradientTransformation,
    rate: optax.Schedule,
    gathering: Callable[[Callable], Callable] = lambda loss_fn: loss_fn,
) -> Callable[[TrainState, Mapping], tuple[TrainState, dict]]:
    """train_step(state, batch) -> (state, metrics), not yet compiled; batch: as `read_batch` takes it.

    Every draw comes from `fold_in(key(config.seed), state.step)`. metrics, scalars: loss (its mean over the batch), loss_q1
    ... loss_q4 (the same over each quarter of the noise levels, q1 the cleanest; NaN for a quarter the batch has no timestep
    in), for the vlb and the hybrid also mse and vlb (bits per dimension, without L_T), for a classifier accuracy, grad_norm
    (before clipping), param_norm, learning_rate. Under importance sampling losses are weighted, so that means are unbiased.

    gathering: applied to the loss where parameters are split over devices: `sharding.gather_params`.
    """
    diffusion, seed, log_every = config["diffusion"], config["seed"], config["training"]["log_every"]
    count = config["training"]["accumulation_steps"]
    flip, extras = config["data"]["random_flip"], _PARTS[diffusion["loss"]]
    objective, names = _objective(config, model, schedule), _metric_names(diffusion)
    shape, takes_labels = data.image_shape(config["data"]), _takes_labels(config, model)

    def loss_fn(params, history, key, x_0, y, index):
        part = _Part(index, count)
        loss, parts = objective(params, history, key, x_0, y, part)
        seen = {"loss": loss} | {name: getattr(parts, name) for name in ("importance", *extras)}
        seen = {name: value.astype(jnp.float32) for name, value in seen.items()} | {"t": parts.t}  # with x64, too
        seen = jax.tree.map(part.take, seen)
        return seen["loss"].mean(), seen

    def gradient(params, *arguments):
        """(the gradient of the batch's mean loss, what was seen of its examples: a dictionary of [B])."""
        of_part = jax.grad(gathering(loss_fn), has_aux=True)
        if count == 1:
            return of_part(params, *arguments, 0)

        def add(total, index):
            grads, seen = of_part(params, *arguments, index)
            return jax.tree.map(jnp.add, total, grads), seen

        # XLA's CPU backend is many times slower at a convolution's gradient inside a loop than outside of one.
        unroll = count if jax.default_backend() == "cpu" else 1
        total, seen = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), jnp.arange(count), unroll=unroll)
        return jax.tree.map(lambda g: g / count, total), jax.tree.map(lambda s: s.swapaxes(0, 1).reshape(-1), seen)

    def train_step(state: TrainState, batch) -> tuple[TrainState, dict]:
        key_flip, key_loss = jax.random.split(jax.random.fold_in(jax.random.key(seed), state.step))
        x_0, y = read_batch(batch, shape, takes_labels, count)
        if flip:
            flipped = jax.random.bernoulli(key_flip, shape=(x_0.shape[0], 1, 1, 1))
            x_0 = jnp.where(flipped, x_0[:, :, ::-1], x_0)
        grads, example = gradient(state.params, state.loss_history, key_loss, x_0, y)
        loss = example["loss"].mean()
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema_params = optax.incremental_update(params, state.ema_params, 1.0 - ema_decay(state.step, config["ema"]))
        history = state.loss_history
        if history is not None:
            history = timesteps.record(history, example["t"], example["loss"] / example["importance"])

        in_quarter = (example["t"] * 4 // schedule.num_timesteps)[:, None] == jnp.arange(4)
        grad_norm = optax.tree.norm(grads)
        totals, counts = ((example[name][:, None] * in_quarter).sum(0) for name in ("loss", "importance"))
        seen = {name: (totals[i], counts[i]) for i, name in enumerate(QUARTERS)}
        seen |= {"loss": (loss, 1), "grad_norm": (grad_norm, 1), "param_norm": (optax.tree.norm(params), 1)}
        seen |= {"learning_rate": (jnp.asarray(rate(state.step), jnp.float32), 1)}
        seen |= {name: ((example["importance"] * example[name]).mean(), 1) for name in extras}
        metrics = {name: seen[name][0] / seen[name][1] for name in names}

        fresh = state.step % log_every == 0
        window = {
            name: {
                "total": jnp.where(fresh, 0.0, state.window[name]["total"]) + seen[name][0],
                "count": jnp.where(fresh, 0.0, state.window[name]["count"]) + seen[name][1],
            }
            for name in names
        }
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm) & jnp.isfinite(seen["param_norm"][0])
        bad, earlier = ~finite, state.window["nonfinite_step"]
        window["nonfinite_step"] = jnp.where((earlier < 0) & bad, state.step + 1, earlier)
        return TrainState(state.step + 1, params, ema_params, opt_state, window, history), metrics

    return train_step
