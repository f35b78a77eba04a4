"""The devices as one mesh, and where arrays live on it."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

DATA_AXES = ("data", "fsdp")


def make_mesh(config: Mapping) -> Mesh:
    """All devices as a mesh of axes `data` and `fsdp`, sized by `config.mesh` (data=-1 takes what is left).

    Raises: ValueError where the sizes do not multiply to the number of devices.
    """
    devices = jax.device_count()
    data, fsdp = config["data"], config["fsdp"]
    if fsdp != 1:
        raise ValueError(f"mesh.fsdp={fsdp}: parameters are not sharded, only the batch is; use mesh.fsdp=1")
    data = devices if data == -1 else data
    if data != devices:
        raise ValueError(f"mesh.data={data} must be the number of devices, {devices}, or -1")
    # Said explicitly: the default axis type is Explicit, under which Linen layers do not trace.
    return jax.make_mesh((data, fsdp), DATA_AXES, axis_types=(AxisType.Auto, AxisType.Auto))


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh, leading: int = 0) -> NamedSharding:
    """The batch axis split over the devices, after `leading` axes that are not."""
    return NamedSharding(mesh, PartitionSpec(*(None,) * leading, DATA_AXES))


def check_divides(batch_size: int, mesh: Mesh, name: str) -> None:
    """Raises: ValueError, with the nearest sizes that work, for a batch that does not divide over the mesh."""
    devices = mesh.size
    if batch_size < 1 or batch_size % devices:
        below, above = batch_size // devices * devices, (batch_size // devices + 1) * devices
        near = f"{below} or {above}" if below > 0 else f"{above}"
        raise ValueError(f"{name}={batch_size} must be a multiple of the {devices} devices; nearest: {near}")


def process_rows(batch_size: int, mesh: Mesh) -> np.ndarray:
    """The rows of a global batch that this process reads: those that its own devices hold. int [rows], increasing."""
    held = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[index] for index in held]))
