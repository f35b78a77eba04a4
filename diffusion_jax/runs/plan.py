"""`--mode=plan`: memory and communication of a train step on a mesh, compiled for virtual devices. Writes nothing.

The program is a CPU program that is split as it would be on accelerators, so the size of the state and of what is sent are
the same there (an all-reduce and a slice become one reduce-scatter, which sends half). The temporaries are those of the CPU
compiler: other compilers fuse more, and pad.
"""

from __future__ import annotations

import math
import pathlib
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from diffusion_jax import data, training
from diffusion_jax.config import is_continuous, resolve
from diffusion_jax.distributed import collectives, compiler
from diffusion_jax.errors import as_user_error
from diffusion_jax.runs import plan_settings, recipe_checks
from diffusion_jax.runs.console import log, log_compilation
from diffusion_jax.runs.plan_settings import activations_per_example

__all__ = ["Plan", "batch_shapes", "estimate", "log_settings", "num_virtual_devices", "run"]


class Plan(NamedTuple):
    """Requirements of a train step: bytes on one device, except for the first three; flops are those of the compiled program.

    activations_per_example: bytes of an example that stay in memory from the forward to the backward pass, for any compiler.
    temporaries: maximum of activations, gradients and gathered parameters. minimum_sent: what a device must send: two gathers
    and a reduce-scatter of the parameters over `fsdp`, and an all-reduce of its part of the gradient over `data`.
    """

    num_parameters: int
    flops_per_example: float
    activations_per_example: int
    params: int
    ema: int
    optimizer: int
    arguments: int
    temporaries: int
    collectives: list[collectives.Collective]
    minimum_sent: float

    @property
    def ring_bytes(self) -> float:
        """Bytes that the device sends in a step."""
        return sum(c.ring_bytes for c in self.collectives)


def num_virtual_devices(config: Mapping) -> int:
    """The size of the mesh of a config; `mesh.data=-1` counts as 1, since there are no devices to count."""
    return max(1, config["mesh"]["data"]) * max(1, config["mesh"]["fsdp"])


def estimate(config: Mapping) -> Plan:
    """Compiles the train step of a config on the present devices. Raises: as `training.build_program`."""
    config = resolve(config)
    # The program represents an accelerator's, so the choice for a CPU does not apply.
    config.model.convolution = "xla"
    program = training.build_program(config)
    assert isinstance(program.train_step, jax.stages.Wrapped)
    batch_size, state = config["training"]["batch_size"], program.abstract_state
    batch = batch_shapes(config)
    options = compiler.options() | compiler.low_memory_options()
    compiled = program.train_step.lower(state, batch).compile(compiler_options=options)
    memory, cost, text = compiled.memory_analysis(), compiled.cost_analysis(), compiled.as_text()
    assert memory is not None and cost is not None and text is not None  # the CPU compiler has all of them
    num_devices = program.mesh.size
    params_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state.params))
    data_size, fsdp_size = program.mesh.shape["data"], program.mesh.shape["fsdp"]
    return Plan(
        num_parameters=sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        flops_per_example=cost["flops"] / (batch_size / num_devices),
        activations_per_example=activations_per_example(config),
        params=_bytes_per_device(state.params),
        ema=_bytes_per_device(state.ema_params),
        optimizer=_bytes_per_device(state.opt_state),
        arguments=memory.argument_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        collectives=collectives.parse(text),
        minimum_sent=params_bytes * (3 * (fsdp_size - 1) / fsdp_size + 2 * (data_size - 1) / data_size / fsdp_size),
    )


def batch_shapes(config: Mapping) -> dict[str, jax.ShapeDtypeStruct]:
    """The batch of a train step, as `data.Batches` makes it."""
    name, dtype = ("x", jnp.float32) if is_continuous(config) else ("image", jnp.uint8)
    shapes = {name: (data.example_shape(config["data"]), dtype), "label": ((), jnp.int32)}
    condition = training.condition_shape(config)
    if condition is not None:
        shapes["condition"] = (condition, jnp.float32)
    batch_size = config["training"]["batch_size"]
    return {name: jax.ShapeDtypeStruct((batch_size, *shape), dtype) for name, (shape, dtype) in shapes.items()}


def _bytes_per_device(tree) -> int:
    """Bytes of a tree of shapes and shardings on one device."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def run(config: ConfigDict, workdir: pathlib.Path | None = None) -> None:
    """Prints the plan of a config on the present devices. workdir: ignored, because nothing is written. Raises: UserError."""
    del workdir
    config, num_devices = resolve(config), jax.device_count()
    with as_user_error("config"):
        recipe_checks.log_notes(config)
    if config.mesh.device is not None:
        with as_user_error("config"):
            log_settings(config, num_devices)
    with as_user_error("config"), log_compilation("the train step"):
        plan = estimate(config)
    mesh, batch_size = config.mesh, config.training.batch_size
    num_microbatches = config.training.accumulation_steps
    devices = f"{num_devices} device{'s' * (num_devices > 1)}"
    log(
        f"On {devices} (data {num_devices // mesh.fsdp}, fsdp {mesh.fsdp}), batch {batch_size} "
        f"({batch_size // num_devices} per device, in {num_microbatches} microbatch{'es' * (num_microbatches > 1)}), layers "
        f"in {config.model.dtype}:"
    )
    log(f"  parameters          {plan.num_parameters:,}")
    log(f"  per example         {_gigaflop(plan.flops_per_example)} a step, as compiled")
    log(f"                      {_megabytes(plan.activations_per_example)} of activations kept for the backward pass")
    log(f"  memory per device   {_megabytes(plan.arguments + plan.temporaries)}, of which")
    for name, size in (("parameters", plan.params), ("EMA", plan.ema), ("optimizer", plan.optimizer)):
        log(f"    {name:<18}{_megabytes(size)}")
    log(
        f"    {'temporaries':<18}{_megabytes(plan.temporaries)} (activations, gradients, gathered parameters; of the CPU "
        "program)"
    )
    log(f"  sent per device     {_megabytes(plan.ring_bytes)} a step, around a ring")
    for kind, count, size, ring_bytes in collectives.summarize(plan.collectives):
        log(f"    {kind:<18}{_megabytes(ring_bytes)} in {count}, {_megabytes(size)} in total")
    if plan.minimum_sent:
        log(
            f"    {plan.ring_bytes / plan.minimum_sent:.2f} times the minimum: two gathers and a reduce-scatter over fsdp, "
            "an all-reduce of the parts over data"
        )


def log_settings(config: ConfigDict, num_devices: int) -> None:
    """Prints the fastest settings that fit the devices of `mesh.device`, and how much the given ones need."""
    name, model, options = config.mesh.device, config.model, config.training
    log("Tracing the network with each choice of model.remat ...")
    device = plan_settings.DEVICES[name]
    usable = plan_settings.USABLE * device.memory
    all_estimates = plan_settings.estimates(config, plan_settings.trace(config), num_devices, device)
    given = plan_settings.Settings(config.mesh.fsdp, model.remat, options.accumulation_steps)
    found = [each for each in all_estimates if each.settings == given]
    fitting = [each for each in all_estimates if each.total <= usable]
    log(
        f"On {num_devices} x {name} ({_bytes(usable)} of {_bytes(device.memory)} counted), a step at "
        f"{plan_settings.UTILIZATION:.0%} of the peak FLOPs:"
    )
    for each in found:
        log(f"  as given            {_describe(each)}: {'fits' if each.total <= usable else 'does not fit'}")
    if fitting:
        log(f"  fastest that fits   {_describe(fitting[0])}")
        log(f"    type              {fitting[0].settings.flags}")
    else:
        least = min(all_estimates, key=lambda each: each.total)
        log(f"  nothing fits; least {_describe(least)}")
        log(f"    with              {least.settings.flags}")
        log(
            "    use more devices (--config.mesh.data), --config.model.dtype=bfloat16, or a smaller training.batch_size"
        )


def _describe(estimate: plan_settings.Estimate) -> str:
    parts = {name: getattr(estimate, name) for name in ("state", "gradients", "activations", "working")}
    sizes = " + ".join(f"{name} {_bytes(size)}" for name, size in parts.items())
    return f"{_bytes(estimate.total)} ({sizes}), {1e3 * estimate.seconds:,.1f} ms"


def _gigaflop(flops: float) -> str:
    return f"{flops / 1e9:,.1f} GFLOP" if flops >= 1e8 else f"{flops / 1e6:,.2f} MFLOP"


def _bytes(size: float) -> str:
    return f"{size / 1e9:,.2f} GB" if size >= 1e8 else _megabytes(size)


def _megabytes(size: float) -> str:
    return f"{size / 1e6:,.1f} MB"
