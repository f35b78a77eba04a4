"""The devices as one mesh, and where arrays live on it.

Both axes of the mesh split the batch. `fsdp` splits the large leaves of parameters, optimizer state and EMA too (FSDP, or
ZeRO-3): a device gathers each layer's parameters where it computes with them, again in the backward pass, and keeps of the
gradient's sum only its own part. Activations never leave their device. XLA makes the collectives from the constraints in
`gathering`; without these it would split convolutions by their kernels' parts and send activations around.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

DATA_AXES = ("data", "fsdp")

# Leaves of fewer elements stay whole: biases and norms, under 1% of the published networks, where a gather is all latency.
SMALL = 2**14


def make_mesh(config: Mapping) -> Mesh:
    """All devices as a mesh of axes `data` and `fsdp`, sized by `config.mesh` (data=-1 takes what is left).

    Raises: ValueError where the sizes do not multiply to the number of devices.
    """
    devices = jax.device_count()
    data, fsdp = config["data"], config["fsdp"]
    if fsdp < 1 or devices % fsdp:
        divisors = ", ".join(str(n) for n in range(1, devices + 1) if devices % n == 0)
        raise ValueError(f"mesh.fsdp={fsdp} must divide the number of devices, {devices}; use one of {divisors}")
    if data not in (-1, devices // fsdp):
        raise ValueError(
            f"mesh.data={data} times mesh.fsdp={fsdp} must be the number of devices, {devices}; use "
            f"mesh.data={devices // fsdp}, or -1 for what is left"
        )
    # Said explicitly: the default axis type is Explicit, under which Linen layers do not trace.
    return jax.make_mesh((devices // fsdp, fsdp), DATA_AXES, axis_types=(AxisType.Auto, AxisType.Auto))


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh, leading: int = 0) -> NamedSharding:
    """The batch axis split over the devices, after `leading` axes that are not."""
    return NamedSharding(mesh, PartitionSpec(*(None,) * leading, DATA_AXES))


def split_axis(shape: tuple[int, ...], parts: int) -> int | None:
    """The rule: a leaf is split along its longest axis that `parts` divides, the last of equally long ones; None for none."""
    axes = [axis for axis, size in enumerate(shape) if size % parts == 0]
    if parts == 1 or math.prod(shape) < SMALL or not axes:
        return None
    return max(axes, key=lambda axis: (shape[axis], axis))


def leaf_sharding(mesh: Mesh, shape: tuple[int, ...]) -> NamedSharding:
    """Where a parameter of this shape lives, and whatever is as large as it: its gradient, moments and average."""
    axis = split_axis(shape, mesh.shape["fsdp"])
    return replicated(mesh) if axis is None else NamedSharding(mesh, PartitionSpec(*(None,) * axis, "fsdp"))


def state_sharding(mesh: Mesh, state):
    """A TrainState of shardings for one of shapes: weights and optimizer by `leaf_sharding`, the rest whole."""
    split = {
        name: jax.tree.map(lambda leaf: leaf_sharding(mesh, leaf.shape), getattr(state, name))
        for name in ("params", "ema_params", "opt_state")
    }
    return jax.tree.map(lambda _: replicated(mesh), state).replace(**split)


def gathering(function: Callable, mesh: Mesh, dtype, kept: str | None = None) -> Callable:
    """function(params, *rest), to be differentiated by params, for parameters that are split over `fsdp`.

    Each leaf is gathered by itself, in `dtype` (what the layers compute in, and would cast it to), and its gradient is
    scattered. What was gathered is not kept for the backward pass but gathered again; all else is kept. Where `function`
    has a jax.checkpoint in it, `kept` must name what these keep: this one decides for all within it.
    """
    if mesh.shape["fsdp"] == 1:
        return function
    whole = replicated(mesh)

    def to_whole(leaf):
        return jax.lax.with_sharding_constraint(leaf, whole)

    def scatter(_, gradient):
        # Whole first: a sum over devices of which each keeps a part, which accelerators make one reduce-scatter. Asked for
        # the part alone, XLA may split the layer's backward pass by it, and send activations: an embedding's, on two axes.
        split = leaf_sharding(mesh, gradient.shape)
        return (jax.lax.with_sharding_constraint(to_whole(gradient), split),)

    gather = jax.custom_vjp(to_whole)
    gather.defvjp(lambda leaf: (to_whole(leaf), None), scatter)

    def gathered(params, *rest):
        is_split = jax.tree.map(lambda leaf: split_axis(leaf.shape, mesh.shape["fsdp"]) is not None, params)
        whole_params = jax.tree.map(lambda leaf, split: gather(leaf.astype(dtype)) if split else leaf, params, is_split)
        return function(whole_params, *rest)

    def keep(primitive, *_, **__):
        return primitive.name != "sharding_constraint"

    policy = jax.checkpoint_policies.save_only_these_names(kept) if kept else keep
    return jax.checkpoint(gathered, policy=policy)


def check_divides(batch_size: int, mesh: Mesh, name: str, accumulation_steps: int = 1) -> None:
    """Raises: ValueError, with the nearest sizes that work, for a batch that does not divide over the mesh and its steps."""
    parts = mesh.size * accumulation_steps
    if batch_size < 1 or batch_size % parts:
        below, above = batch_size // parts * parts, (batch_size // parts + 1) * parts
        near = f"{below} or {above}" if below > 0 else f"{above}"
        over = f"the {mesh.size} devices"
        if accumulation_steps > 1:
            over = f"{parts}, {over} times training.accumulation_steps={accumulation_steps}"
        raise ValueError(f"{name}={batch_size} must be a multiple of {over}; nearest: {near}")


def process_rows(batch_size: int, mesh: Mesh) -> np.ndarray:
    """The rows of a global batch that this process reads: those that its own devices hold. int [rows], increasing."""
    held = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[index] for index in held]))
