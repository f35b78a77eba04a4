"""Builds the schedule, the network, the initial state and the compiled, sharded train step of a config."""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jax.stages import Wrapped

from diffusion_jax import data, models, schedules
from diffusion_jax.config import (
    check,
    is_classifier,
    is_continuous,
    is_upsampler,
    resolve,
    sampler_setting,
    untrusted_values,
)
from diffusion_jax.distributed import devices, sharding
from diffusion_jax.errors import CheckpointError
from diffusion_jax.functions import find_function
from diffusion_jax.models import layers, upsampling
from diffusion_jax.run_dir import RunDir
from diffusion_jax.training.batches import abstract_batch, condition_shape
from diffusion_jax.training.optimizer import from_config as optimizer_from_config
from diffusion_jax.training.optimizer import learning_rate
from diffusion_jax.training.state import Network, TrainState, empty_averages, initial_state
from diffusion_jax.training.step import TrainStep, find_terms, make_timestep_sampler, make_train_step, scan_steps
from diffusion_jax.untrusted import read_json


def stored_normalizations(config: Mapping[str, Any], workdir: RunDir | pathlib.Path) -> data.Normalizations:
    """Reads the normalizations of the training data from a run's data.json.

    Raises: CheckpointError if the file cannot be read, or is missing and the data need normalization.
    """
    path = workdir / "data.json"
    has_scale = is_continuous(config) or condition_shape(config) is not None
    if not path.exists() and not has_scale:
        return {}
    try:
        stored = read_json(path).get("normalization", {})
        return {name: data.Normalization.from_json(value) for name, value in stored.items()}
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        missing = ", which stores the scale of the data, is missing"
        problem = missing if isinstance(error, FileNotFoundError) else f" cannot be read ({error})"
        raise CheckpointError(f"{path}{problem}: restore it") from None


def schedule_from_config(config: Mapping[str, Any]) -> schedules.Schedule:
    """Builds the noise schedule of `config.diffusion`.

    Raises: ValueError for a prediction that does not determine x_0 if x_t is pure noise, and for a user's invalid function.
    """
    schedule = _steps_of_path(config) if config["path"] else _chain(config)
    predicts_x_0 = config["loss"] != "classify"
    if predicts_x_0 and schedule.zero_terminal_snr and config["prediction"] in ("eps", "score"):
        setting, better = ("path", "flow") if config["path"] else ("schedule", "v")
        raise ValueError(
            f"diffusion.{setting}={config[setting]!r} ends at alpha_bar = 0, where {config['prediction']} does not determine "
            f"x_0; use diffusion.prediction={better}"
        )
    return schedule


def _chain(config: Mapping[str, Any]) -> schedules.Schedule:
    """Returns a schedule with published betas, or with the betas that a user's function returns."""
    name, count = config["schedule"], config["num_timesteps"]
    if ":" in name:
        betas = find_function(name, "diffusion.schedule")(count)
        if np.shape(betas) != (count,):
            raise ValueError(
                f"{name} (diffusion.schedule) returned betas of shape {np.shape(betas)} for "
                f"diffusion.num_timesteps={count}; return one beta for each timestep: ({count},)"
            )
    else:
        betas = schedules.betas(name, count, beta_start=config["beta_start"], beta_end=config["beta_end"])
    network_times = None
    if config["rescale_timesteps"]:
        network_times = np.arange(config["num_timesteps"]) * (1000.0 / config["num_timesteps"])
    return schedules.from_betas(betas, network_times)


def _steps_of_path(config: Mapping[str, Any]) -> schedules.Schedule:
    """Returns T levels, evenly spaced in network time on the path, without its start if the log SNR is infinite there."""
    path = find_function(config["path"], "diffusion.path", schedules.PATHS)()
    if config["log_snr_shift"]:
        path = schedules.shifted(path, config["log_snr_shift"])
    (first, last), count = path.interval, config["num_timesteps"]
    times = np.linspace(first, last, count) if count > 1 else np.array([last])
    if not np.isfinite(path.log_snr(times[0])) and count > 1:
        times = np.linspace(first, last, count + 1)[1:]
    return schedules.from_path(path, times)


def model_from_config(config: Mapping[str, Any], network: Callable | None = None) -> Network:
    """Builds the network of `config.model`, with more output channels for a learned variance, or a classifier.

    config: complete, from `config.resolve`. network: replaces the function that `config.model.kind` names.
    Raises: ValueError for values that the network does not allow.
    """
    check(config, "network")
    shape, noise = data.example_shape(config["data"]), config["diffusion"]["conditioning_noise"]
    small_image_channels = upsampling.condition_channels(shape[-1], noise) if is_upsampler(config) else 0
    model = models.from_config(config["model"], models.Classifier if is_classifier(config) else None, network, shape)
    fields: dict[str, Any] = {"spatial_dims": len(shape) - 1}
    if not is_classifier(config):
        is_learned = config["diffusion"]["variance"].startswith("learned")
        fields["out_channels"] = shape[-1] * (2 if is_learned else 1)
        fields["condition_channels"] = small_image_channels or model.condition_channels
    model = model.clone(**{name: value for name, value in fields.items() if name in models.network_fields(model)})
    if isinstance(model, models.CustomNetwork):
        model.check_data(shape)  # after its number of output channels is known
    return model


def _refuse_lost_levels(config: Mapping[str, Any], path: schedules.Path) -> None:
    """Raises: ValueError if training draws levels whose log density is not finite, such as levels outside the path."""
    _, log_density = make_timestep_sampler(config)(jax.random.key(0), 16, path)
    lost, name = np.asarray(log_density)[~np.isfinite(log_density)], config[drawn := sampler_setting(config)]
    if lost.size:
        advice = "use diffusion.draw_mean and draw_std nearer to the published -1.2 and 1.2"
        if ":" in name:
            advice = "the function must return the log density of each log SNR"
        raise ValueError(
            f"diffusion.{drawn}={name} draws levels with the log density {lost[0]:g} on diffusion.path={config['path']!r}; "
            f"{advice}"
        )


class TrainingProgram(NamedTuple):
    """The compiled functions and the array shapes for a config; no array exists yet.

    init: () -> TrainState, compiled, with the config's seed. empty_averages: () -> empty averages, compiled. train_step:
    (state, batch) -> (state, metrics), compiled, donates the state. train_steps: runs `training.steps_per_call` train steps,
    on batches stacked along a first axis of this size; None for one step per call, and on CPUs. abstract_state: the shapes,
    dtypes and shardings of the state.
    """

    mesh: Mesh
    model: Network
    schedule: schedules.Schedule
    init: functools.partial[TrainState]
    empty_averages: Wrapped
    train_step: Wrapped
    train_steps: Wrapped | None
    abstract_state: TrainState


def build_program(config: Mapping[str, Any], mesh_devices: Sequence[Any] | None = None) -> TrainingProgram:
    """Builds the network, the schedule and the compiled functions of a config.

    config: any mapping that `config.resolve` takes, also a partial config; `init_from` is not read. mesh_devices: the devices
    of the mesh, by default the present devices; with devices of a topology, programs can be compiled but not run. Raises:
    ConfigError for values that a setting does not allow; ValueError for a config that cannot be built. Users' functions in
    `config.diffusion` are traced, so their errors are raised here.
    """
    config = resolve(config)
    mesh = sharding.make_mesh(config["mesh"], mesh_devices)
    platform = mesh.devices.flat[0].platform
    options = config["training"]
    sharding.check_divides(options["batch_size"], mesh, "training.batch_size", options["accumulation_steps"])
    check(config, "train step")
    schedule = schedule_from_config(config["diffusion"])
    if config["diffusion"]["path"]:
        _refuse_lost_levels(config["diffusion"], schedule.path)
    model = model_from_config(config)
    terms = find_terms(config, model, schedule)
    optimizer = optimizer_from_config(config["optimizer"])
    shape = data.example_shape(config["data"])

    # The seed is an argument, so that all seeds share one program in the compilation cache.
    def init(seed) -> TrainState:
        return initial_state(config, model, optimizer, shape, seed, terms)

    seed = np.uint32(config["seed"])
    shapes = jax.eval_shape(init, seed)
    state_shardings, replicated = sharding.state_sharding(mesh, shapes), sharding.replicated(mesh)

    def gather_params(loss_fn: Callable) -> Callable:
        return sharding.gather_params(loss_fn, mesh, model.dtype, models.KEPT_NAMES if model.remat else ())

    train_step = make_train_step(config, model, schedule, optimizer, learning_rate(config["optimizer"]), gather_params)

    def compiled(function: TrainStep, leading: int) -> Wrapped:
        return jax.jit(
            layers.compiling_for(platform)(function),
            donate_argnums=0,
            in_shardings=(state_shardings, sharding.batch_sharding(mesh, leading)),
            out_shardings=(state_shardings, replicated),
            compiler_options=devices.compiler_options(options["deterministic"], platform=platform),
        )

    single_step = compiled(train_step, 0)
    if any(setting.startswith("diffusion.") for setting in untrusted_values(config)):
        jax.eval_shape(single_step, shapes, abstract_batch(config))
    # On XLA's CPU backend, a scan around convolution gradients is ten times slower than single calls, so CPUs use single
    # calls.
    scans = options["steps_per_call"] > 1 and platform != "cpu"
    fast_compile = devices.compiler_options(fast_compile=True, platform=platform)
    return TrainingProgram(
        mesh=mesh,
        model=model,
        schedule=schedule,
        init=functools.partial(jax.jit(init, out_shardings=state_shardings, compiler_options=fast_compile), seed),
        empty_averages=jax.jit(lambda: empty_averages(terms), out_shardings=replicated),
        train_step=single_step,
        train_steps=compiled(scan_steps(train_step), 1) if scans else None,
        abstract_state=jax.tree.map(
            lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), shapes, state_shardings
        ),
    )


def create(config: Mapping[str, Any]) -> tuple[TrainState, TrainStep]:
    """Returns (state, train_step) for a config, for use in other programs.

    config: any nested mapping, partial or complete, as `config.resolve` takes it. state: TrainState with `.params`,
    `.ema_params`, `.opt_state`, `.step`. train_step(state, {"image": uint8 [B, *spatial, C], "label": int32 [B]}) -> (state,
    metrics) is compiled for the config's mesh and donates the state. Standardized float data use the key "x" [B, *spatial, C]
    instead of "image". "label" is read only for a network with classes or the loss "classify". "condition", float, and
    the optional "condition_missing", bool [B], are read only for a conditional network.

    Float data need data.random_flip=False; with the loss vlb or hybrid, also data.levels=None.

    Raises: as `build_program`; ValueError for a config with `init_from`, which only the command line reads; train_step raises
    ValueError for a batch with other names, dtypes or shapes.
    """
    config = resolve(config)
    if config["init_from"]:
        raise ValueError(
            f"init_from={config['init_from']!r}: training.create does not load weights; omit init_from, and put the "
            "weights from pretrained.load into the state: state.replace(params=..., ema_params=...)"
        )
    built = build_program(config)
    return built.init(), built.train_step
