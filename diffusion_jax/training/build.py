"""From a config to the initial state and the compiled, sharded train step."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jax.stages import Wrapped

from diffusion_jax import data, models, schedules
from diffusion_jax.config import resolve
from diffusion_jax.distributed import compiler, sharding
from diffusion_jax.training.from_config import check_loss, model_from_config, schedule_from_config
from diffusion_jax.training.optimizer import from_config as optimizer_from_config
from diffusion_jax.training.optimizer import learning_rate
from diffusion_jax.training.state import Network, TrainState, empty_window, initial_state, metric_names
from diffusion_jax.training.step import TrainStep, make_train_step, scan_steps

__all__ = ["TrainingProgram", "build_program", "create"]


class TrainingProgram(NamedTuple):
    """The programs and shapes that a config describes, before any array exists.

    init: () -> TrainState, a compiled function with its seed. empty_window: () -> its window before the first step, compiled.
    train_step: (state, batch) -> (state, metrics), compiled; it donates the state. train_steps: the same for batches with a
    leading axis of `training.steps_per_call` steps, in one program; None for one step per call. abstract_state: the shapes,
    dtypes and shardings of the state.
    """

    mesh: Mesh
    model: Network
    schedule: schedules.Schedule
    init: functools.partial[TrainState]
    empty_window: Wrapped
    train_step: Wrapped
    train_steps: Wrapped | None
    abstract_state: TrainState


def build_program(config: Mapping[str, Any]) -> TrainingProgram:
    """Builds the network, the schedule and the compiled functions of a config.

    config: any mapping that `config.resolve` takes, partial ones included; `init_from` is not read. Raises: ConfigError for a
    value that its leaf does not allow; ValueError (or data.DataError for `config.data`) for a config that cannot be built.
    """
    config = resolve(config)
    mesh = sharding.make_mesh(config["mesh"])
    options = config["training"]
    sharding.check_divides(options["batch_size"], mesh, "training.batch_size", options["accumulation_steps"])
    schedule = schedule_from_config(config["diffusion"])
    check_loss(config["diffusion"])
    data.check_random_flip(config["data"])
    model = model_from_config(config)
    optimizer = optimizer_from_config(config["optimizer"])
    shape = data.example_shape(config["data"])

    # The seed is an argument, so that the compilation cache has one program for all seeds.
    def init(seed) -> TrainState:
        return initial_state(config, model, optimizer, shape, seed)

    seed = np.uint32(config["seed"])
    shapes = jax.eval_shape(init, seed)
    state_shardings, replicated = sharding.state_sharding(mesh, shapes), sharding.replicated(mesh)

    def gather_params(loss_fn: Callable) -> Callable:
        return sharding.gather_params(loss_fn, mesh, model.dtype, models.KEPT_NAMES if model.remat else ())

    train_step = make_train_step(config, model, schedule, optimizer, learning_rate(config["optimizer"]), gather_params)

    def compiled(function: TrainStep, leading: int) -> Wrapped:
        return jax.jit(
            function,
            donate_argnums=0,
            in_shardings=(state_shardings, sharding.batch_sharding(mesh, leading)),
            out_shardings=(state_shardings, replicated),
            compiler_options=compiler.options(options["deterministic"]),
        )

    # On XLA's CPU backend a scan around convolution gradients is ten times slower than single calls, so the caller makes
    # single calls there.
    scans = options["steps_per_call"] > 1 and jax.default_backend() != "cpu"
    return TrainingProgram(
        mesh=mesh,
        model=model,
        schedule=schedule,
        init=functools.partial(
            jax.jit(init, out_shardings=state_shardings, compiler_options=compiler.fast_compile_options()), seed
        ),
        empty_window=jax.jit(lambda: empty_window(metric_names(config["diffusion"]["loss"])), out_shardings=replicated),
        train_step=compiled(train_step, 0),
        train_steps=compiled(scan_steps(train_step), 1) if scans else None,
        abstract_state=jax.tree.map(
            lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), shapes, state_shardings
        ),
    )


def create(config: Mapping[str, Any]) -> tuple[TrainState, TrainStep]:
    """(state, train_step) of a config, for use in other programs.

    state: TrainState with `.params`, `.ema_params`, `.opt_state`, `.step`. train_step(state, {"image": uint8 [B, *spatial,
    C], "label": int32 [B]}) -> (state, metrics) is compiled with the config's mesh and donates its state. Float data,
    already standardized, come as "x" [B, *spatial, C] instead of "image". "label" is needed only for `model.num_classes` or
    the loss "classify", and "condition", float, only for a network that takes conditions. A config is any nested mapping,
    partial or complete, as `config.resolve` takes it.

    Float data need data.random_flip=False. They also need data.levels=None if the loss is vlb or hybrid.

    Raises: as `build_program`; ValueError for a config with `init_from`, which only the program reads; train_step raises
    ValueError for a batch of other names, types or shapes.
    """
    config = resolve(config)
    if config["init_from"]:
        raise ValueError(
            f"init_from={config['init_from']!r}: training.create does not load weights; leave it out, and put those "
            "of pretrained.load into the state: state.replace(params=..., ema_params=...)"
        )
    built = build_program(config)
    return built.init(), built.train_step
