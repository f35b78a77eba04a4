"""`--mode=plan`: logs notes about the settings, a train step's memory and FLOPs, and settings that fit a kind of GPU.

This mode writes nothing. The notes name settings that cannot give good results; training logs the notes, too. Memory and
FLOPs follow from array shapes, from the sharding rule of `distributed/sharding.py`, and from traced programs; or, for a TPU
topology, from the compiled program.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core
from ml_collections import ConfigDict

from diffusion_jax import data, models, timesteps, training
from diffusion_jax.config import is_classifier, is_continuous, resolve, resolve_clip, sampler_setting
from diffusion_jax.console import log, log_compilation
from diffusion_jax.distributed import hlo, sharding, topologies
from diffusion_jax.errors import DataError, UserError, as_user_error, first_line
from diffusion_jax.schedules.respacing import DATA_STD
from diffusion_jax.training.batches import abstract_batch
from diffusion_jax.training.optimizer import MAX_INITIAL_SHARE, initial_share
from diffusion_jax.training.state import abstract_params

DEVICES = {"a100": 80e9, "h100": 80e9}  # bytes of memory
USABLE = 0.9  # fraction of a device's memory; the runtime and fragmentation use the rest
CHECKPOINTS = ("checkpoint", "remat", "remat2")  # the name of jax.checkpoint differs between versions
_PRODUCTS = ("conv_general_dilated", "dot_general")
_MAX_TRIAL_STEPS = 20  # shorter runs only show that the program works
_MAX_TERMINAL_ALPHA_BAR = 0.01
_NUM_CHECKED_IMAGES = 64

Remat = bool | tuple[int, ...]


class Settings(NamedTuple):
    """Values of `mesh.fsdp`, `model.remat` and `training.accumulation_steps`."""

    fsdp: int
    remat: Remat
    accumulation_steps: int

    @property
    def flags(self) -> str:
        """The settings as command-line flags."""
        remat = str(self.remat).replace(" ", "")
        return (
            f"--config.mesh.fsdp={self.fsdp} '--config.model.remat={remat}' "
            f"--config.training.accumulation_steps={self.accumulation_steps}"
        )


class Estimate(NamedTuple):
    """Bytes on one device, in the order that `run` prints.

    state: parameters, EMA and two moments of each parameter, as Adam has. gradients: one tree, or two with accumulation.
    activations: stored for the backward pass of a microbatch. working: further memory of the backward pass, and gathered
    parameters.
    """

    settings: Settings
    state: float
    gradients: float
    activations: float
    working: float

    @property
    def total(self) -> float:
        """The peak memory."""
        return sum(self[1:])

    def __str__(self) -> str:
        parts = zip(self._fields[1:], self[1:], strict=True)
        return f"{_bytes(self.total)} ({' + '.join(f'{name} {_bytes(size)}' for name, size in parts)})"


class Traced(NamedTuple):
    """Shapes of the parameters, and, for one example, bytes of activations and FLOPs of a step for each `model.remat`.

    choices: the network's `remat_choices`, and the config's own value of `model.remat`.
    """

    choices: list[Remat]
    shapes: list[tuple[int, ...]]
    activations: dict[Remat, int]
    flops: dict[Remat, float]


def run(config: ConfigDict) -> None:
    """Prints the plan for this machine's devices, with settings that fit `mesh.device`; or the compiled plan for a topology.

    Raises: UserError.
    """
    config, num_devices = resolve(config), jax.device_count()
    mesh, options = config.mesh, config.training
    given = Settings(mesh.fsdp, config.model.remat, options.accumulation_steps)
    if mesh.device not in (None, *DEVICES):
        compile_for(config, mesh.device)
        return
    with as_user_error("config"):
        log_notes(config)
        training.build_program(config)  # checks the config
        choices = remat_choices(config) if mesh.device is not None else [given.remat]
        log(f"Tracing the network with model.remat={', '.join(map(str, choices))} ...")
        traced = trace(config, choices)
    found, steps = estimate(config, traced, given, num_devices), given.accumulation_steps
    log(
        f"On {num_devices} device{'s' * (num_devices > 1)} of any kind (data {num_devices // mesh.fsdp}, fsdp {mesh.fsdp}), "
        f"batch {options.batch_size} ({options.batch_size // num_devices} per device, "
        f"in {steps} microbatch{'es' * (steps > 1)}), layers in {config.model.dtype}:"
    )
    flops = traced.flops[given.remat]
    flops = f"{flops / 1e9:,.1f} GFLOP" if flops >= 1e8 else f"{flops / 1e6:,.2f} MFLOP"
    log(f"  parameters          {sum(map(math.prod, traced.shapes)):,}")
    activations = _bytes(traced.activations[given.remat])
    log(f"  per example         {flops} a step; {activations} of activations kept for the backward pass")
    log(f"  memory per device   {found}")
    if mesh.device is None:
        return
    usable = USABLE * DEVICES[mesh.device]
    memory = f"{_bytes(usable)} of the {_bytes(DEVICES[mesh.device])} on each {mesh.device}"
    log(f"On {num_devices} x {mesh.device} (may use {memory}):")
    log(f"  as given            {'fits' if found.total <= usable else 'does not fit'}")
    estimates = all_estimates(config, traced, num_devices)
    fitting = [each for each in estimates if each.total <= usable]
    best = fitting[0] if fitting else min(estimates, key=lambda each: each.total)
    log(f"  {'first that fits' if fitting else 'none fits; smallest':19} {best}")
    log(f"    with              {best.settings.flags}")
    if not fitting:
        log(
            "    use more devices (--config.mesh.data), --config.model.dtype=bfloat16, or a smaller training.batch_size"
        )


def compile_for(config: ConfigDict, topology: str) -> None:
    """Compiles the train step for a TPU topology, and prints the bytes and the estimated cycles of a device.

    Raises: UserError without libtpu, and for a step that does not compile.
    """
    chip, devices = topologies.find_chip(topology), topologies.tpu_devices(topology)
    advice = "use --config.model.remat=True, a larger --config.training.accumulation_steps or --config.mesh.fsdp"
    with as_user_error("config"):
        log_notes(config)
        program = training.build_program(config, devices)
    log("A large network takes many minutes to compile for a TPU.")
    try:
        with log_compilation(f"the train step for {len(devices)} devices of {topology}"):
            lowered = program.train_step.lower(program.abstract_state, abstract_batch(config))
            compiled = lowered.compile()
    except RuntimeError as error:  # such as too little memory
        raise UserError(f"mesh.device={topology}: {first_line(error)}; {advice}", exit_code=1) from error
    memory, text = compiled.memory_analysis(), compiled.as_text()
    assert memory is not None and text is not None  # TPU compilers return both
    cycles = hlo.Program(text).cycles
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    total, size = held + memory.temp_size_in_bytes, config.training.batch_size
    shape, seconds = dict(program.mesh.shape), cycles / chip.clock
    log(
        f"On {len(devices)} devices of {topology} ({', '.join(f'{name} {n}' for name, n in shape.items())}), batch {size}:"
    )
    parts = f"state and batch {_bytes(held)} + temporaries {_bytes(memory.temp_size_in_bytes)}"
    log(f"  memory per device   {_bytes(total)} ({parts}) of {_bytes(chip.memory)}")
    speed = f"{1e3 * seconds:,.1f} ms at {chip.clock / 1e9:.2f} GHz, {size / max(seconds, 1e-9):,.0f} examples/s"
    log(f"  step                {cycles:,} cycles: {speed}. The compiler's estimate, not a measurement")
    if total > USABLE * chip.memory:
        log(f"  does not fit        {advice}, and compile again")


def trace(config: Mapping[str, Any], choices: list[Remat]) -> Traced:
    """Traces the network for each value of `model.remat` in `choices`, and for the values that `estimate` needs."""
    every = remat_choices(config)
    for_estimate = [*every[:2], True] if len(every) > 1 else every
    needed = dict.fromkeys([*choices, *for_estimate])
    variants = {remat: resolve({**config, "model": {**config["model"], "remat": remat}}) for remat in needed}
    activations = {remat: activations_per_example(variant) for remat, variant in variants.items()}
    shapes = [leaf.shape for leaf in jax.tree.leaves(_network(config, 1)[1])]
    return Traced(every, shapes, activations, {remat: _flops_per_example(variants[remat]) for remat in choices})


def estimate(config: Mapping[str, Any], traced: Traced, settings: Settings, num_devices: int) -> Estimate:
    """Estimates the memory that training with a complete config on `num_devices` devices needs on each device."""
    activations, width = traced.activations, jnp.dtype(config["model"]["dtype"]).itemsize
    if len(every := traced.choices) == 1:
        backward = activations[every[0]]  # an unknown network has at most one gradient for each activation
    else:
        # The backward pass of a block holds the block's activations and equally many gradients. The gradients of all skip
        # connections, half of the arrays between blocks, are kept for the encoder. Blocks at full resolution are the largest.
        num_blocks = 2 * config["model"]["num_res_blocks"] + 1
        backward = 2 * (activations[every[0]] - activations[every[1]]) / num_blocks + activations[True] / 2
    fsdp, remat, steps = settings
    microbatch = config["training"]["batch_size"] // num_devices // steps
    split = [math.prod(s) for s in traced.shapes if sharding.split_axis(s, fsdp) is not None]
    held = sum(map(math.prod, traced.shapes)) - sum(split) + sum(split) / fsdp
    # The backward pass stores all gathered parameters; with recomputation, it stores about two arrays at a time.
    gathered = width * (2 * max(split, default=0) if remat else sum(split))
    return Estimate(
        settings,
        state=4 * 4 * held,
        gradients=4 * held * (1 if steps == 1 else 2),
        activations=microbatch * activations[remat],
        working=microbatch * backward + gathered,
    )


def all_estimates(config: Mapping[str, Any], traced: Traced, num_devices: int) -> list[Estimate]:
    """Returns estimates for all settings, the cheapest first: ordered by recomputation, then fsdp, then microbatches."""
    examples = config["training"]["batch_size"] // num_devices
    choices = [
        Settings(fsdp, remat, steps)
        for remat in sorted(traced.flops, key=lambda remat: traced.flops[remat])
        for fsdp in range(1, num_devices + 1)
        for steps in (2**k for k in range(examples.bit_length()))
        if num_devices % fsdp == 0 and examples % steps == 0
    ]
    return [estimate(config, traced, settings, num_devices) for settings in choices]


def activations_per_example(config: Mapping[str, Any]) -> int:
    """Returns the bytes of activations that each example adds to the backward pass: batch size 2 minus batch size 1.

    Inputs of convolutions and matrix products, block outputs, and the output of each block's first convolution count once.
    Norms and activation functions do not count, because compilers for accelerators recompute them inside fused kernels. A
    block that `remat` recomputes counts only its output.
    """

    def size(n: int) -> int:
        apply, params, inputs = _network(config, n)
        kept = _kept(jax.make_jaxpr(apply)(inputs, params).jaxpr)
        return sum(aval.size * aval.dtype.itemsize for aval in kept.values())

    return size(2) - size(1)


def _kept(jaxpr: core.Jaxpr) -> dict[Any, Any]:
    """Returns {variable: shape and dtype} for the arrays of a program that `activations_per_example` counts."""
    kept, named = {}, {}  # named: {result of jax.ad_checkpoint.checkpoint_name: its argument}
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        variables = equation.invars if name in _PRODUCTS else []
        if name == "name":
            (variable,), (result,) = equation.invars, equation.outvars
            named[result] = named.get(variable, variable)
            variables = [variable]
        kept |= {named.get(variable, variable): variable.aval for variable in variables}
        if name not in CHECKPOINTS:
            for inner in core.jaxprs_in_params(equation.params):
                # A call's arguments are no new arrays; a scan's arguments are slices, which are new arrays.
                is_call = name != "scan" and len(inner.invars) == len(equation.invars)
                outer = dict(zip(inner.invars, equation.invars, strict=True)) if is_call else {}
                for variable, aval in _kept(inner).items():
                    variable = outer.get(variable, variable)
                    kept[named.get(variable, variable)] = aval
    return kept


def _flops_per_example(config: Mapping[str, Any]) -> float:
    """Returns the FLOPs of one example's forward and backward pass as traced, including recomputation."""
    apply, params, inputs = _network(config, 1)
    gradient = jax.grad(lambda p, x: jnp.sum(apply(x, p)))
    cost = jax.jit(gradient).lower(params, inputs).cost_analysis()
    assert cost is not None  # JAX counts the operations of the uncompiled program
    return cost["flops"]


def _network(config: Mapping[str, Any], batch_size: int):
    """Returns (apply(inputs, params), parameter shapes, input shapes)."""
    model, shape = training.model_from_config(config), data.example_shape(config["data"])
    example = jax.eval_shape(lambda: models.initial_inputs(model, shape))
    params = abstract_params(model, shape)
    inputs = {name: jax.ShapeDtypeStruct((batch_size, *leaf.shape[1:]), leaf.dtype) for name, leaf in example.items()}
    rngs = {"dropout": jax.random.key(0)}

    def apply(inputs, params) -> Any:
        return model.apply({"params": params}, **inputs, train=True, rngs=rngs)

    return apply, params, inputs


def remat_choices(config: Mapping[str, Any]) -> list[Remat]:
    """Returns the network's `remat_choices`, ordered by recomputation, and the config's own value of `model.remat`."""
    own, choices = config["model"]["remat"], list(training.model_from_config(config).remat_choices)
    return choices if own in choices else [*choices, own]


def _bytes(size: float) -> str:
    return f"{size / 1e9:,.2f} GB" if size >= 1e8 else f"{size / 1e6:,.1f} MB"


# ---- Notes


def log_notes(config: ConfigDict, source: data.Source | None = None) -> None:
    """Logs the `notes`, one line each."""
    for note in notes(config, source):
        log(f"Note: {note}.")


def notes(config: ConfigDict, source: data.Source | None = None) -> list[str]:
    """Returns problems in a complete config, and in the training data if passed. These problems do not stop the run."""
    found, diffusion, num_steps = [], config.diffusion, config.training.num_steps
    warmup_steps, share = config.optimizer.warmup_steps, initial_share(config, num_steps)
    if num_steps > _MAX_TRIAL_STEPS and warmup_steps >= num_steps:
        found.append(
            f"optimizer.warmup_steps={warmup_steps} is not below training.num_steps={num_steps}, so the learning rate "
            f"never reaches {config.optimizer.learning_rate:g}; use --config.optimizer.warmup_steps={num_steps // 20}, or "
            "more steps"
        )
    decay_steps = config.optimizer.decay_steps
    if config.optimizer.schedule != "constant" and decay_steps < num_steps:
        found.append(
            f"optimizer.decay_steps={decay_steps} is below training.num_steps={num_steps}, so the learning rate is 0 from "
            f"step {decay_steps} on; in a new run, use --config.optimizer.decay_steps={num_steps}, or use fewer steps"
        )
    if num_steps > _MAX_TRIAL_STEPS and share > MAX_INITIAL_SHARE:
        found.append(
            f"at training.num_steps={num_steps} the EMA (ema.decay={config.ema.decay:g}) still holds {share:.0%} of the "
            "random initial weights, so samples use the raw weights; use --config.ema.warmup=True, or more steps"
        )
    if not is_classifier(config):
        if is_continuous(config) and diffusion.prediction in ("eps", "score") and not resolve_clip(config):
            found.append(
                f"diffusion.prediction={diffusion.prediction} on continuous data (data.levels=None) without a clip amplifies "
                "the network's errors in a sampler's first steps; use --config.diffusion.prediction=v"
            )
        std = training.sigma_data(diffusion, is_continuous(config))
        is_known = diffusion.sigma_data is not None or config.data.normalization == "auto"
        is_default = diffusion[sampler_setting(diffusion)] == "log_normal" and diffusion.draw_mean is None
        if is_default and std != DATA_STD and is_known:
            mean = timesteps.log_normal.mean
            found.append(
                f"diffusion.draw_mean=None is EDM's {mean:g} for data with standard deviation {DATA_STD:g}, but these data "
                f"have {std:g}, so the drawn noise is relatively faint; in a new run, "
                f"use --config.diffusion.draw_mean={mean + math.log(std / DATA_STD):.2g}"
            )
        alpha_bar = training.schedule_from_config(diffusion).alpha_bar[-1]
        if alpha_bar > _MAX_TERMINAL_ALPHA_BAR:
            settings = f"diffusion.num_timesteps={diffusion.num_timesteps} with the schedule {diffusion.schedule}"
            better = "--config.diffusion.num_timesteps=1000, or --config.diffusion.schedule=cosine"
            if diffusion.path:
                settings = f"diffusion.path={diffusion.path} with log_snr_shift={diffusion.log_snr_shift:g}"
                better = "--config.diffusion.log_snr_shift=0"
            found.append(
                f"{settings} ends at alpha_bar={alpha_bar:.2g} instead of nearly 0, but samples start from pure noise; use "
                f"{better}"
            )
    if source is not None:
        batch_size, levels = config.training.batch_size, config.data.levels
        if batch_size > len(source):
            found.append(
                f"training.batch_size={batch_size} exceeds the {len(source)} examples of the data, so every batch repeats "
                f"some; use --config.training.batch_size={2 ** int(math.log2(len(source)))}"
            )
        if levels not in (None, 256):
            try:
                data.check_levels(source.read(np.arange(min(_NUM_CHECKED_IMAGES, len(source))))["image"], levels)
            except DataError as error:
                found.append(f"{error} (otherwise --mode=evaluate cannot measure the likelihood)")
    return found
