"""Training: from a config to a state and a compiled, sharded train step."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from diffusion_jax import data, losses, models, process, schedules, timesteps
from diffusion_jax.config import resolve
from diffusion_jax.distributed import compiler, sharding
from diffusion_jax.training.optimizer import from_config as optimizer_from_config
from diffusion_jax.training.optimizer import learning_rate
from diffusion_jax.training.step import (
    IMPORTANCE_SAMPLER,
    TrainState,
    initial_state,
    make_train_step,
    window_means,
)

__all__ = [
    "Setup",
    "TrainState",
    "check_whole_numbers",
    "create",
    "input_shape",
    "is_classifier",
    "is_upsampler",
    "model_from_config",
    "schedule_from_config",
    "setup",
    "window_means",
]


class Setup(NamedTuple):
    """What a config builds, before any array exists.

    init: () -> TrainState, compiled. train_step: (state, batch) -> (state, metrics), compiled, the state donated.
    train_steps: the same for batches with a leading axis of `training.steps_per_call` steps, in one program; None where that
    is 1. abstract_state: shapes, dtypes and shardings of the state.
    """

    mesh: Mesh
    model: models.UNet | models.Classifier
    schedule: schedules.Schedule
    init: Callable[[], TrainState]
    train_step: Callable
    train_steps: Callable | None
    abstract_state: Any


# The least value of each leaf that must be a whole number. A classifier's model lacks some of the leaves.
MINIMUMS = {
    "seed": 0,
    "data.low_resolution": 0,
    "data.memory_mb": 0,
    "data.workers": 0,
    "model.channels": 4,
    "model.num_groups": 1,
    "model.num_heads": 1,
    "model.num_res_blocks": 1,
    "model.num_classes": 0,
    "diffusion.num_timesteps": 1,
    "training.num_steps": 1,
    "training.batch_size": 1,
    "training.accumulation_steps": 1,
    "training.steps_per_call": 1,
    "training.log_every": 1,
    "training.sample_every": 0,
    "training.checkpoint_every": 1,
    "training.checkpoints_kept": 1,
    "training.checkpoint_keep_every": 0,
}
DTYPES = ("float32", "bfloat16")


def check_whole_numbers(config: Mapping) -> None:
    """Raises: ValueError for a leaf of `MINIMUMS` that is too small or no whole number, 1e4 included."""
    for name, least in MINIMUMS.items():
        group, _, leaf = name.rpartition(".")
        leaves = config[group] if group else config
        if leaf not in leaves:
            continue
        value = leaves[leaf]
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            integral = isinstance(value, float) and value.is_integer()
            raise ValueError(f"{name}={value!r} must be a whole number" + (f"; write {int(value)}" if integral else ""))
        if value < least:
            raise ValueError(f"{name}={value} must be at least {least}")


def is_classifier(config: Mapping) -> bool:
    """Whether a config trains a classifier of noisy images, not a diffusion model."""
    return config["diffusion"]["loss"] == "classify"


def is_upsampler(config: Mapping) -> bool:
    """Whether a config's diffusion model enlarges smaller images that it is given."""
    return bool(config["data"]["low_resolution"])


def input_shape(config: Mapping) -> tuple[int, int, int]:
    """(H, W, C) of what the network takes: an image, and for an upsampler the smaller one and the channel of its noise.

    Raises: ValueError for a low resolution or a noise that fits no image or no such network.
    """
    height, width, channels = data.image_shape(config["data"])
    low, noise = config["data"]["low_resolution"], config["diffusion"]["conditioning_noise"]
    if not low:
        if noise:
            raise ValueError(
                f"diffusion.conditioning_noise={noise} is for upsamplers; give data.low_resolution, or use 0"
            )
        return height, width, channels
    if not 1 <= low < height or height % low or width % (height // low):
        raise ValueError(
            f"data.low_resolution={low}: smaller images of that height must divide those of {height}x{width} (0 for none)"
        )
    if noise < 0:
        raise ValueError(f"diffusion.conditioning_noise={noise} must be at least 0")
    if is_classifier(config):
        raise ValueError(f"data.low_resolution={low}: a classifier (diffusion.loss=classify) takes none; use 0")
    return height, width, 2 * channels + (1 if noise else 0)


def schedule_from_config(config: Mapping) -> schedules.Schedule:
    """The Schedule of `config.diffusion`. Raises: ValueError for values that do not fit one another."""
    betas = schedules.betas(
        config["schedule"], config["num_timesteps"], beta_start=config["beta_start"], beta_end=config["beta_end"]
    )
    rescaled = None
    if config["rescale_timesteps"]:
        rescaled = np.arange(config["num_timesteps"]) * (1000.0 / config["num_timesteps"])
    schedule = schedules.from_betas(betas, rescaled)
    if config["loss"] == "classify":  # nothing is predicted of x_0
        return schedule
    if config["prediction"] not in process.PREDICTIONS:
        known = ", ".join(process.PREDICTIONS)
        raise ValueError(f"diffusion.prediction={config['prediction']!r} is unknown; known: {known}")
    if config["variance"] not in process.VARIANCES:
        raise ValueError(f"diffusion.variance={config['variance']!r} is unknown; known: {', '.join(process.VARIANCES)}")
    if schedule.zero_terminal_snr and config["prediction"] in ("eps", "score"):
        raise ValueError(
            f"diffusion.schedule={config['schedule']!r} ends at alpha_bar = 0, where {config['prediction']} says nothing "
            "about x_0; use diffusion.prediction=v"
        )
    return schedule


def model_from_config(config: Mapping) -> models.UNet | models.Classifier:
    """The network of `config.model`: a U-Net with the output channels that `config.diffusion.variance` asks for, or, with
    the loss "classify", a classifier.

    Raises: ValueError where `model.out_channels` says otherwise, for a leaf that the network does not have, or a dtype that
    it cannot be trained in.
    """
    _check_dtype(config["model"])
    _check_tuples(config["model"])
    if is_classifier(config):
        return models.from_config(config["model"], models.Classifier)
    model = models.from_config(config["model"])
    channels, variance = config["data"]["channels"], config["diffusion"]["variance"]
    needed = channels * (2 if variance.startswith("learned") else 1)
    if model.out_channels not in (None, needed):
        raise ValueError(
            f"model.out_channels={model.out_channels}, but diffusion.variance={variance!r} and data.channels={channels} "
            f"need {needed}; leave it out"
        )
    return model.clone(out_channels=None if needed == channels and not is_upsampler(config) else needed)


def _check_dtype(config: Mapping) -> None:
    value = config.get("dtype", "float32")
    try:
        name = jnp.dtype(value).name
    except TypeError:
        name = value
    if name not in DTYPES:
        reason = ": its gradients underflow without loss scaling, which this program does not have"
        raise ValueError(
            f"model.dtype={name!r} is not supported{reason if name == 'float16' else ''}; use {' or '.join(DTYPES)}"
        )


def _check_tuples(config: Mapping) -> None:
    """Raises: ValueError for tuples of the network's leaves that hold other things than numbers of the right kind."""
    for leaf, kind, least, example in (
        ("channel_multipliers", (int, float), 0, "positive numbers, one a level, such as (1, 2, 2)"),
        ("attention_levels", int, -1, "numbers of levels, such as (1,), or () for none"),
        ("downsample_padding", int, -1, "two whole numbers, such as (0, 1)"),
    ):
        value = config.get(leaf, (1, 1))
        good = isinstance(value, tuple | list) and all(type(v) is not bool and isinstance(v, kind) for v in value)
        if not good or any(v <= least for v in value) or (leaf != "attention_levels" and not value):
            raise ValueError(f"model.{leaf}={value!r} must be {example}")


def _check_loss(config: Mapping) -> None:
    loss, variance = config["loss"], config["variance"]
    learned = variance.startswith("learned")
    if loss not in losses.LOSSES:
        raise ValueError(f"diffusion.loss={loss!r} is unknown; known: {', '.join(losses.LOSSES)}")
    known = (*timesteps.SAMPLERS, IMPORTANCE_SAMPLER)
    if config["timestep_sampler"] not in known:
        raise ValueError(
            f"diffusion.timestep_sampler={config['timestep_sampler']!r} is unknown; known: {', '.join(known)}"
        )
    if loss == "classify":
        return
    if loss == "simple" and learned:
        raise ValueError(
            f"diffusion.variance={variance!r}: L_simple leaves a learned variance untrained; use diffusion.loss=hybrid, or a "
            "fixed variance"
        )
    if loss == "hybrid" and not learned:
        raise ValueError(
            f"diffusion.loss='hybrid' trains a learned variance, but diffusion.variance={variance!r}; use learned_range"
        )
    if config["weighting"] not in (None, "none", *losses.WEIGHTINGS):
        raise ValueError(
            f"diffusion.weighting={config['weighting']!r} is unknown; known: none, {', '.join(losses.WEIGHTINGS)}"
        )
    if loss == "vlb" and config["weighting"] not in (None, "none"):
        raise ValueError(f"diffusion.weighting={config['weighting']!r} is for L_simple; the vlb has weights of its own")


def setup(config: Mapping) -> Setup:
    """Builds the model, the schedule and the compiled functions of a config.

    config: any mapping that `config.resolve` takes, partial ones included. Raises: ConfigError for a value that its leaf does
    not allow; ValueError (or data.DataError for `config.data`) for a config that cannot be built.
    """
    config = resolve(config)
    mesh = sharding.make_mesh(config["mesh"])
    options = config["training"]
    sharding.check_divides(options["batch_size"], mesh, "training.batch_size", options["accumulation_steps"])
    schedule = schedule_from_config(config["diffusion"])
    _check_loss(config["diffusion"])
    levels = config["data"]["levels"]
    if not 2 <= levels <= 256:
        raise ValueError(f"data.levels={levels} must lie in 2 ... 256, the gray levels that the images have")
    if not 0 <= config["ema"]["decay"] <= 1:
        raise ValueError(f"ema.decay={config['ema']['decay']} must lie in [0, 1]")
    model = model_from_config(config)
    optimizer = optimizer_from_config(config["optimizer"])
    shape = input_shape(config)

    def init():
        return initial_state(config, model, optimizer, shape)

    shapes = jax.eval_shape(init)
    whole, states = sharding.replicated(mesh), sharding.state_sharding(mesh, shapes)

    def gathering(loss_fn):
        return sharding.gather_params(loss_fn, mesh, model.dtype, models.REMAT_NAME if model.remat else None)

    train_step = make_train_step(config, model, schedule, optimizer, learning_rate(config["optimizer"]), gathering)

    def compiled(function, leading):
        batches = sharding.batch_sharding(mesh, leading)
        return jax.jit(
            function,
            donate_argnums=0,
            in_shardings=(states, batches),
            out_shardings=(states, whole),
            compiler_options=compiler.options(options["deterministic"]),
        )

    # On XLA's CPU backend a scan around convolution gradients is ten times slower than single calls: there the program of
    # several steps is left out and the caller makes single calls.
    many = options["steps_per_call"] > 1 and jax.default_backend() != "cpu"
    return Setup(
        mesh=mesh,
        model=model,
        schedule=schedule,
        init=jax.jit(init, out_shardings=states, compiler_options=compiler.fast_compile_options()),
        train_step=compiled(train_step, 0),
        train_steps=compiled(scan_steps(train_step), 1) if many else None,
        abstract_state=jax.tree.map(
            lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), shapes, states
        ),
    )


def scan_steps(train_step: Callable) -> Callable:
    """(state, batches [K, B, ...]) -> (state, the last step's metrics): K train steps in one `lax.scan`."""

    def train_steps(state, batches):
        state, metrics = jax.lax.scan(train_step, state, batches)
        return state, jax.tree.map(lambda m: m[-1], metrics)

    return train_steps


def create(config: Mapping) -> tuple[TrainState, Callable]:
    """(state, train_step) of a config, for use in other programs.

    state: TrainState with `.params`, `.ema_params`, `.opt_state`, `.step`. train_step(state, {"image": uint8 [B, H, W, C],
    "label": int32 [B]}) -> (state, metrics) is compiled with the config's mesh and donates the state it is given. Float data,
    already standardized, come as "x" [B, H, W, C] instead of "image". "label" is needed only where `model.num_classes` or the
    loss "classify" asks for labels. A config is any nested mapping, partial or complete, as `config.resolve` takes it.
    Raises: as `setup`; train_step raises ValueError for a batch of other names, types or shapes.
    """
    built = setup(config)
    return built.init(), built.train_step
