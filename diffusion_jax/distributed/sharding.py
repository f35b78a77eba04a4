"""The mesh of all devices, and how arrays are split over the mesh.

Both mesh axes split the batch. The axis `fsdp` also splits the large leaves of parameters, optimizer state and EMA (FSDP, or
ZeRO-3): a device gathers each layer's parameters when it needs them, and keeps only its own shard of the summed gradient.
Activations stay on their device. XLA derives the collectives from the sharding constraints in `gather_params`; without these
constraints, XLA would shard convolutions by kernel and send activations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from diffusion_jax.distributed.devices import compiler_options

DATA_AXES = ("data", "fsdp")

# Smaller leaves are replicated, because gathering them is mostly latency: biases and norms, under 1% of published networks.
MIN_SPLIT_SIZE = 2**14

_State = TypeVar("_State", bound=Any)


def make_mesh(config: Mapping[str, int], mesh_devices: Sequence[Any] | None = None) -> Mesh:
    """Builds a mesh of all devices with the axes `data` and `fsdp` of `config.mesh`; data=-1 uses the remaining devices.

    mesh_devices: by default the present devices. Raises: ValueError if the sizes' product is not the number of devices.
    """
    devices = jax.device_count() if mesh_devices is None else len(mesh_devices)
    data, fsdp = config["data"], config["fsdp"]
    if fsdp < 1 or devices % fsdp:
        divisors = ", ".join(str(n) for n in range(1, devices + 1) if devices % n == 0)
        raise ValueError(f"mesh.fsdp={fsdp} must divide the number of devices, {devices}; use one of {divisors}")
    if data not in (-1, devices // fsdp):
        raise ValueError(
            f"mesh.data={data} times mesh.fsdp={fsdp} must be the number of devices, {devices}; use "
            f"mesh.data={devices // fsdp}, or -1 for the remaining devices"
        )
    # Linen layers cannot be traced with the default axis type, Explicit.
    axis_types = (AxisType.Auto, AxisType.Auto)
    return jax.make_mesh((devices // fsdp, fsdp), DATA_AXES, axis_types=axis_types, devices=mesh_devices)


def one_device_mesh() -> Mesh:
    """Returns a mesh with this process's first device, for programs that run in a single process."""
    return jax.make_mesh((1, 1), DATA_AXES, (AxisType.Auto, AxisType.Auto), devices=jax.local_devices()[:1])


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding with a complete copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh, leading: int = 0) -> NamedSharding:
    """Returns the sharding that splits the batch axis over all devices. leading: number of unsplit axes before that axis."""
    return NamedSharding(mesh, PartitionSpec(*(None,) * leading, DATA_AXES))


def place(tree: Any, mesh: Mesh) -> Any:
    """Replicates arrays over a mesh, except arrays already on its devices; arrays must be equal on every process.

    Arrays on the devices of several processes stay where they are.
    """
    everywhere = replicated(mesh)

    def place_leaf(leaf):
        if isinstance(leaf, jax.Array) and (
            not leaf.is_fully_addressable or leaf.sharding.device_set == set(mesh.devices.flat)
        ):
            return leaf
        value = np.asarray(leaf)
        value = value.astype(jax.dtypes.canonicalize_dtype(value.dtype))
        return jax.make_array_from_callback(value.shape, everywhere, lambda index: value[index])

    return jax.tree.map(place_leaf, tree)


def split_axis(shape: tuple[int, ...], parts: int) -> int | None:
    """Returns the axis to split: the longest axis that `parts` divides, the last of equally long axes; None for no split."""
    axes = [axis for axis, size in enumerate(shape) if size % parts == 0]
    if parts == 1 or math.prod(shape) < MIN_SPLIT_SIZE or not axes:
        return None
    return max(axes, key=lambda axis: (shape[axis], axis))


def leaf_sharding(mesh: Mesh, shape: tuple[int, ...]) -> NamedSharding:
    """Returns the sharding for a parameter with this shape, and for its gradient, moments and EMA."""
    axis = split_axis(shape, mesh.shape["fsdp"])
    return replicated(mesh) if axis is None else NamedSharding(mesh, PartitionSpec(*(None,) * axis, "fsdp"))


def state_sharding(mesh: Mesh, state: _State) -> _State:
    """Returns the shardings of an abstract TrainState: weights and optimizer by `leaf_sharding`, the rest replicated."""
    split = {
        name: jax.tree.map(lambda leaf: leaf_sharding(mesh, leaf.shape), getattr(state, name))
        for name in ("params", "ema_params", "opt_state")
    }
    return jax.tree.map(lambda _: replicated(mesh), state).replace(**split)


def gather_params(function: Callable, mesh: Mesh, dtype: DTypeLike, kept_names: Sequence[str] = ()) -> Callable:
    """Wraps a function (params, *rest) for parameters that are split over `fsdp`; the wrapper is differentiable by params.

    Each leaf is gathered separately, and its gradient is scattered. dtype: the gathered leaves' dtype, in which the layers
    compute. kept_names: if `function` contains a jax.checkpoint, the names of all values that it stores for the backward
    pass; parameters are then gathered again in the backward pass. Without names, gathered parameters are stored, because a
    jax.checkpoint around all layers would make TPUs store each activation as a separate array.
    """
    if mesh.shape["fsdp"] == 1:
        return function
    everywhere = replicated(mesh)

    def replicate(leaf):
        return jax.lax.with_sharding_constraint(leaf, everywhere)

    def scatter(_, gradient):
        # The sum is replicated before it is split; accelerators compile both to one reduce-scatter. If it were only split,
        # XLA might shard a layer's backward pass and send activations, as for an embedding on two axes.
        split = leaf_sharding(mesh, gradient.shape)
        return (jax.lax.with_sharding_constraint(replicate(gradient), split),)

    gather = jax.custom_vjp(replicate)
    gather.defvjp(lambda leaf: (replicate(leaf), None), scatter)

    def gathered(params, *rest):
        is_split = jax.tree.map(lambda leaf: split_axis(leaf.shape, mesh.shape["fsdp"]) is not None, params)
        full_params = jax.tree.map(lambda leaf, split: gather(leaf.astype(dtype)) if split else leaf, params, is_split)
        return function(full_params, *rest)

    if not kept_names:
        return gathered
    # This outer policy also applies inside of `function`, so it needs all names.
    return jax.checkpoint(gathered, policy=jax.checkpoint_policies.save_only_these_names(*kept_names))


def check_divides(batch_size: int, mesh: Mesh, name: str, accumulation_steps: int = 1) -> None:
    """Raises: ValueError, with the nearest valid sizes, if the mesh and accumulation steps do not divide the batch size."""
    parts = mesh.size * accumulation_steps
    if batch_size < 1 or batch_size % parts:
        below, above = batch_size // parts * parts, (batch_size // parts + 1) * parts
        nearest = f"{below} or {above}" if below > 0 else f"{above}"
        divisor = f"the {mesh.size} device{'s' * (mesh.size > 1)}"
        if accumulation_steps > 1:
            divisor = f"{parts}, {divisor} times training.accumulation_steps={accumulation_steps}"
        raise ValueError(f"{name}={batch_size} must be a multiple of {divisor}; nearest: {nearest}")


def process_rows(batch_size: int, mesh: Mesh) -> np.ndarray:
    """Returns the rows of a global batch that are on this process's devices, int [rows], increasing."""
    indices = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[index] for index in indices]))


class BatchFunction:
    """A function of parameters, numbers and a batch, compiled for a mesh that splits the batch.

    batch_size: a multiple of the device count.
    """

    def __init__(self, function: Callable, params: Any, mesh: Mesh, batch_size: int):
        """function: (params, *numbers, batch) -> arrays [B, ...]. batch_size: rounded up to a multiple of mesh.size."""
        whole, self._by_rows = replicated(mesh), batch_sharding(mesh)
        self.batch_size = -(-batch_size // mesh.size) * mesh.size
        self._params, self._own_rows = jax.device_put(params, whole), process_rows(self.batch_size, mesh)
        self._compute = jax.jit(
            lambda params, numbers, batch: function(params, *numbers, batch),
            in_shardings=(whole, whole, self._by_rows),
            out_shardings=self._by_rows,
            compiler_options=compiler_options(),
        )

    def __call__(self, read: Callable[[np.ndarray], Any], start: int, count: int, *numbers: np.generic) -> Any:
        """Computes the results for the batch that starts at example `start`, and returns them on every process.

        read: indices -> arrays; each process reads the rows for its own devices. count: the number of all examples; the
        last batch may be smaller.
        """
        # The last batch is padded with copies of the last example, whose results are dropped.
        own = read(np.minimum(start + self._own_rows, count - 1))
        batch = jax.tree.map(lambda rows: jax.make_array_from_process_local_data(self._by_rows, rows), own)
        out = multihost_utils.process_allgather(self._compute(self._params, numbers, batch), tiled=True)
        return jax.tree.map(lambda rows: np.asarray(rows)[: count - start], out)
