"""`--mode=plan`: what a config would take on a mesh, from its train step compiled for virtual devices. Nothing is trained or
written.

The program is one for CPUs, split as it would be on accelerators: what the state takes and what is sent hold there too (an
all-reduce and a slice become one reduce-scatter, which sends half). Temporaries are the CPU compiler's: other compilers fuse
more, and pad.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from diffusion_jax import data, training
from diffusion_jax.distributed import collectives, compiler
from diffusion_jax.errors import as_user_error
from diffusion_jax.runs.console import compiling, say
from diffusion_jax.training.step import initial_params


class Plan(NamedTuple):
    """What a train step takes. All but the first three of one device, bytes; flops are those of the compiled program.

    kept_per_image: activations that an image leaves in memory from the forward to the backward pass, whatever the compiler.
    temporaries: activations, gradients and gathered parameters at their most. ideal: what a device must send: two gathers
    and a reduce-scatter of the parameters over `fsdp`, and an all-reduce of its part of the gradient over `data`.
    """

    parameters: int
    flops_per_image: float
    kept_per_image: int
    params: int
    ema: int
    optimizer: int
    arguments: int
    temporaries: int
    collectives: list[collectives.Collective]
    ideal: float

    @property
    def ring_bytes(self) -> float:
        """What the device sends in a step."""
        return sum(c.ring_bytes for c in self.collectives)


def virtual_devices(config: Mapping) -> int:
    """How many devices the mesh of a config is of, where it alone decides: `mesh.data=-1` counts as 1."""
    return max(1, config["mesh"]["data"]) * max(1, config["mesh"]["fsdp"])


def measure(config: Mapping) -> Plan:
    """Compiles the train step of a config on the devices that there are. Raises: as `training.setup`."""
    config = ConfigDict(config)
    # The program stands for an accelerator's, whatever is best on the CPU that compiles it.
    config.model.convolution = "xla"
    built = training.setup(config)
    batch_size, state = config["training"]["batch_size"], built.abstract_state
    batch = {
        "image": jax.ShapeDtypeStruct((batch_size, *data.image_shape(config["data"])), jnp.uint8),
        "label": jax.ShapeDtypeStruct((batch_size,), jnp.int32),
    }
    options = compiler.options() | compiler.low_memory_options()
    compiled = built.train_step.lower(state, batch).compile(compiler_options=options)
    memory, devices = compiled.memory_analysis(), built.mesh.size
    params = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state.params))
    data_axis, fsdp = built.mesh.shape["data"], built.mesh.shape["fsdp"]
    return Plan(
        parameters=sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        flops_per_image=compiled.cost_analysis()["flops"] / (batch_size / devices),
        kept_per_image=kept_per_image(config),
        params=_held(state.params),
        ema=_held(state.ema_params),
        optimizer=_held(state.opt_state),
        arguments=memory.argument_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        collectives=collectives.parse(compiled.as_text()),
        ideal=params * (3 * (fsdp - 1) / fsdp + 2 * (data_axis - 1) / data_axis / fsdp),
    )


def kept_per_image(config: Mapping) -> int:
    """Bytes that a network keeps of an image for its backward pass: what two images leave over what one does."""
    model, shape = training.model_from_config(config), training.input_shape(config)
    labeled = model.num_classes and not training.is_classifier(config)

    def kept(params, x, y, key):
        def network(params):
            labels = (y,) if labeled else ()
            return model.apply({"params": params}, x, x[:, 0, 0, 0], *labels, train=True, rngs={"dropout": key})

        return jax.vjp(network, params)[1]

    def size(images: int) -> int:
        params = jax.eval_shape(lambda: initial_params(jax.random.key(0), model, shape))
        x, y = jax.ShapeDtypeStruct((images, *shape), jnp.float32), jax.ShapeDtypeStruct((images,), jnp.int32)
        residuals = jax.eval_shape(kept, params, x, y, jax.random.key(0))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(residuals))

    return size(2) - size(1)


def _held(tree) -> int:
    """Bytes of a tree of shapes and shardings on one device."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def plan(config: ConfigDict) -> None:
    """Prints the plan of a config on the devices that there are."""
    with as_user_error("config"), compiling("the train step"):
        found = measure(config)
    mesh, batch_size = config.mesh, config.training.batch_size
    devices, parts = jax.device_count(), config.training.accumulation_steps
    say(
        f"On {devices} devices (data {devices // mesh.fsdp}, fsdp {mesh.fsdp}), batch {batch_size} ({batch_size // devices} "
        f"a device, in {parts} part{'s' * (parts > 1)}), layers in {config.model.dtype}:"
    )
    say(f"  parameters        {found.parameters:,}")
    say(f"  an image          {found.flops_per_image / 1e9:,.1f} GFLOP a step, as compiled")
    say(f"                    {_mb(found.kept_per_image)} of activations kept for the backward pass")
    say(f"  memory a device   {_mb(found.arguments + found.temporaries)}: of it")
    for name, size in (("parameters", found.params), ("EMA", found.ema), ("optimizer", found.optimizer)):
        say(f"    {name:<16}{_mb(size)}")
    say(
        f"    {'temporaries':<16}{_mb(found.temporaries)} (activations, gradients, gathered parameters; of CPU's program)"
    )
    say(f"  a device sends    {_mb(found.ring_bytes)} a step, around a ring")
    for kind, count, size, ring in collectives.summarize(found.collectives):
        say(f"    {kind:<16}{_mb(ring)} in {count} of together {_mb(size)}")
    if found.ideal:
        say(
            f"    {found.ring_bytes / found.ideal:.2f} times the least: two gathers and a reduce-scatter over fsdp, an "
            "all-reduce of the parts over data"
        )


def _mb(size: float) -> str:
    return f"{size / 1e6:,.1f} MB"
