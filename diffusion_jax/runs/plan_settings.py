"""The settings with which a train step fits into the memory of a kind of device, and the time that each predicts.

Everything here follows from shapes, by the rule of `distributed/sharding.py`, and from traced programs; nothing is compiled.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core

from diffusion_jax import data, models, training
from diffusion_jax.distributed import sharding
from diffusion_jax.training.state import abstract_params

__all__ = [
    "DEVICES",
    "USABLE",
    "UTILIZATION",
    "Device",
    "Estimate",
    "Settings",
    "Traced",
    "activations_per_example",
    "estimates",
    "parameter_shapes",
    "sent_bytes",
    "state_bytes",
    "trace",
]

USABLE = 0.9  # of a device's memory; the rest is for the runtime, and for fragments between arrays
_CHECKPOINTS = ("checkpoint", "remat", "remat2")  # the name of jax.checkpoint differs between versions
_PRODUCTS = ("conv_general_dilated", "dot_general")
UTILIZATION = 0.4  # of the peak FLOPs, as good trainers of such networks report


class Device(NamedTuple):
    """Published figures. memory: bytes. flops: dense bfloat16. links: (largest ring, bytes/s that a device sends in it)."""

    memory: float
    flops: float
    links: tuple[tuple[float, float], ...]

    def link(self, count: int) -> float:
        """Bytes/s of the slowest link in a ring of `count` devices."""
        return next(speed for size, speed in self.links if count <= size)


# TPUs: one axis of their torus, both ways at once. GPUs: NVLink in a node of eight; InfiniBand, 400 or 200 Gbit/s a GPU.
DEVICES = {
    "v4": Device(32e9, 275e12, ((math.inf, 90e9),)),
    "v5e": Device(16e9, 197e12, ((math.inf, 90e9),)),
    "a100": Device(80e9, 312e12, ((8, 300e9), (math.inf, 25e9))),
    "h100": Device(80e9, 989e12, ((8, 450e9), (math.inf, 50e9))),
}


class Settings(NamedTuple):
    """Values of `mesh.fsdp`, `model.remat` and `training.accumulation_steps`."""

    fsdp: int
    remat: bool | tuple[int, ...]
    accumulation_steps: int

    @property
    def flags(self) -> str:
        """As arguments of the command line."""
        remat = str(self.remat).replace(" ", "")
        return (
            f"--config.mesh.fsdp={self.fsdp} '--config.model.remat={remat}' "
            f"--config.training.accumulation_steps={self.accumulation_steps}"
        )


class Estimate(NamedTuple):
    """Bytes on one device, and seconds of a step.

    activations: of a microbatch, kept for the backward pass. working: what the backward pass needs beside them, and gathered
    parameters. gradients: one tree, or two with accumulation.
    """

    settings: Settings
    state: float
    gradients: float
    activations: float
    working: float
    seconds: float

    @property
    def total(self) -> float:
        """The peak."""
        return self.state + self.gradients + self.activations + self.working


def parameter_shapes(config: Mapping[str, Any]) -> list[tuple[int, ...]]:
    """The shapes of the parameters."""
    model, shape = training.model_from_config(config), data.example_shape(config["data"])
    params = abstract_params(model, shape)
    return [leaf.shape for leaf in jax.tree.leaves(params)]


def state_bytes(shapes: list[tuple[int, ...]], count: int, copies: int = 4) -> float:
    """Bytes of float32 trees on each of `count` devices; four copies: the parameters, the EMA and Adam's two moments."""
    numbers = sum(math.prod(s) / (1 if sharding.split_axis(s, count) is None else count) for s in shapes)
    return 4 * copies * numbers


def sent_bytes(shapes: list[tuple[int, ...]], count: int, width: int, reduced: int) -> float:
    """Bytes that a device sends in a step: two gathers of `width` bytes per number and `reduced` reductions of that size."""
    num_split = sum(math.prod(s) for s in shapes if sharding.split_axis(s, count) is not None)
    num_replicated = sum(map(math.prod, shapes)) - num_split
    return (count - 1) / count * ((2 + reduced) * width * num_split + 2 * 4 * num_replicated)


def activations_per_example(config: Mapping[str, Any]) -> int:
    """Bytes that a network keeps of an example for its backward pass: those of two examples minus those of one.

    Counted are the inputs of convolutions and matrix products, the results of blocks and of the first convolution of each,
    all once: compilers for accelerators recompute the rest, norms and activation functions, inside of fused kernels. Of a
    block that `remat` recomputes, only the result.
    """

    def size(n: int) -> int:
        apply, params, inputs = _network(config, n)
        kept = _kept(jax.make_jaxpr(apply)(inputs, params).jaxpr)
        return sum(aval.size * aval.dtype.itemsize for aval in kept.values())

    return size(2) - size(1)


def _kept(jaxpr: core.Jaxpr) -> dict[Any, Any]:
    """{variable: its shape and dtype} of the arrays of a program that `activations_per_example` counts."""
    kept, named = {}, {}  # named: what jax.ad_checkpoint.checkpoint_name returns, which is its argument
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        variables = equation.invars if name in _PRODUCTS else []
        if name == "name":
            (variable,), (result,) = equation.invars, equation.outvars
            named[result] = named.get(variable, variable)
            variables = [variable]
        kept |= {named.get(variable, variable): variable.aval for variable in variables}
        if name not in _CHECKPOINTS:
            for inner in core.jaxprs_in_params(equation.params):
                kept |= _kept(inner)
    return kept


def flops_per_example(config: Mapping[str, Any]) -> float:
    """FLOPs of the forward and the backward pass for an example, recomputation included, as traced."""
    apply, params, inputs = _network(config, 1)
    gradient = jax.grad(lambda p, x: jnp.sum(apply(x, p)))
    cost = jax.jit(gradient).lower(params, inputs).cost_analysis()
    assert cost is not None  # jax's own count, of the program before it is compiled
    return cost["flops"]


def _network(config: Mapping[str, Any], batch_size: int):
    """(function of inputs and parameters, the shapes of the parameters, those of the inputs)."""
    model, shape = training.model_from_config(config), data.example_shape(config["data"])
    example = jax.eval_shape(lambda: models.initial_inputs(model, shape))
    params = abstract_params(model, shape)
    inputs = {name: jax.ShapeDtypeStruct((batch_size, *leaf.shape[1:]), leaf.dtype) for name, leaf in example.items()}
    rngs = {"dropout": jax.random.key(0)}

    def apply(inputs, params) -> Any:
        return model.apply({"params": params}, **inputs, train=True, rngs=rngs)

    return apply, params, inputs


def _remat_choices(config: Mapping[str, Any]) -> list[bool | tuple[int, ...]]:
    """Without, with the first levels, and with all, of which each recomputes more; and that of the config."""
    choices: list[bool | tuple[int, ...]] = [False, True]
    if config["model"].get("kind", "unet") == "unet":  # a classifier has no such leaf
        choices[1:1] = [tuple(range(n)) for n in range(1, len(config["model"]["channel_multipliers"]))]
    return choices if config["model"]["remat"] in choices else [*choices, config["model"]["remat"]]


def _with_remat(config: Mapping[str, Any], remat: bool | tuple[int, ...]) -> dict[str, Any]:
    return {**config, "model": {**config["model"], "remat": remat, "convolution": "xla"}}


def _all_settings(config: Mapping[str, Any], num_devices: int) -> Iterator[Settings]:
    """The settings to choose from, for the batch of a config."""
    examples = config["training"]["batch_size"] // num_devices
    microbatches = [2**k for k in range(examples.bit_length()) if examples % 2**k == 0]
    for fsdp in (n for n in range(1, num_devices + 1) if num_devices % n == 0):
        for remat in _remat_choices(config):
            for steps in microbatches:
                yield Settings(fsdp, remat, steps)


class Traced(NamedTuple):
    """Of an example, {remat: bytes of activations} and {remat: FLOPs}."""

    activations: dict[bool | tuple[int, ...], int]
    flops: dict[bool | tuple[int, ...], float]


def trace(config: Mapping[str, Any]) -> Traced:
    """Traces the network of a config with every choice of remat."""
    variants = {remat: _with_remat(config, remat) for remat in _remat_choices(config)}
    activations = {remat: activations_per_example(variant) for remat, variant in variants.items()}
    return Traced(activations, {remat: flops_per_example(variant) for remat, variant in variants.items()})


def estimates(config: Mapping[str, Any], traced: Traced, num_devices: int, device: Device) -> list[Estimate]:
    """Every choice of settings for a config on `num_devices` devices of a kind, the fastest first.

    Of equal times, those that send and recompute less are first.
    """
    shapes, width = parameter_shapes(config), jnp.dtype(config["model"]["dtype"]).itemsize
    activations, flops = traced
    # The backward pass of a block has what the block keeps and as many gradients; those of all skip connections, half of
    # the arrays between blocks, wait for the encoder's. The full resolution has the largest blocks.
    num_blocks = 2 * config["model"]["num_res_blocks"] + 1
    block = (activations[False] - activations.get((0,), activations[True])) / num_blocks
    backward = 2 * block + activations[True] / 2
    peak = UTILIZATION * device.flops * (1 if width == 2 else 0.5)

    def estimate(settings: Settings) -> Estimate:
        fsdp, remat, steps = settings
        examples = config["training"]["batch_size"] // num_devices
        largest = max(map(math.prod, shapes)) * width if fsdp > 1 else 0
        gathers = steps * sent_bytes(shapes, fsdp, width, 1)
        sums = 2 * (1 - fsdp / num_devices) * state_bytes(shapes, fsdp, 1)
        # A ring of fsdp devices has neighbors, one over all the others does not.
        sending = gathers / device.link(fsdp) + sums / device.link(num_devices)
        return Estimate(
            settings,
            state=state_bytes(shapes, fsdp),
            gradients=state_bytes(shapes, fsdp, 1 if steps == 1 else 2),
            activations=examples // steps * activations[remat],
            working=examples // steps * backward + 2 * largest,
            seconds=max(examples * flops[remat] / peak, sending),
        )

    order = lambda e: (e.seconds, e.settings.fsdp, e.settings.accumulation_steps, flops[e.settings.remat])  # noqa: E731
    return sorted(map(estimate, _all_settings(config, num_devices)), key=order)
