"""How a checkpoint is written: copies in the memory of the host, a part for each process, and the commit of all parts.

`HostCopies.copy` is all that stops the train loop. In the background, `write_part` writes what one process copied into a
directory of its own, without the others, which need not see it. `commit` then joins the parts of all processes to a step.

If no array is split over processes, process 0 writes everything into a few files (OCDBT). Otherwise every chunk is a file of
its own (zarr), so the files of all processes have different names and are together one checkpoint of Orbax.
"""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from diffusion_jax.training import digests

__all__ = ["HostCopies", "HostCopy", "commit", "own_options", "write_part"]


class HostCopy:
    """A copy of the chunks of an array that this process writes, in the memory of the host.

    sharding: how the chunks of all processes make up the array. chunks: {device: the copy of its chunk}; empty if other
    processes write the array.
    """

    def __init__(self, array: jax.Array):
        """array: has the shape, type and sharding of those that will be copied."""
        self._shape, self._has_one_device = array.shape, len(array.sharding.addressable_devices) == 1
        self.sharding = _without_replicas(array.sharding, array.shape, _host_memory_kind())
        chunk = self.sharding.shard_shape(array.shape), array.dtype
        devices = sorted(self.sharding.addressable_devices, key=lambda device: device.id)
        self.chunks: dict[Any, np.ndarray | jax.Array | None] = {device: np.empty(*chunk) for device in devices}

    def select(self, array: jax.Array) -> list[jax.Array]:
        """The chunks of an array that are to be copied, in the order of `chunks`."""
        if not self.chunks:
            return []
        if self._has_one_device:
            return [array.addressable_data(0)]  # takes half as long as the shards
        shards = {shard.device: shard.data for shard in array.addressable_shards}
        return [shards[device] for device in self.chunks]

    def as_array(self) -> np.ndarray | jax.Array | None:
        """As Orbax takes it: a NumPy array if this process has all chunks, otherwise a sharded array; None without chunks."""
        if not self.chunks:
            return None
        if self.sharding.num_devices == 1:
            return np.asarray(next(iter(self.chunks.values())))
        chunks = [jax.device_put(chunk, _host_memory(device)) for device, chunk in self.chunks.items()]
        array = jax.make_array_from_single_device_arrays(self._shape, self.sharding, chunks)
        return np.asarray(array) if array.is_fully_addressable else array


class HostCopies:
    """Copies of a state in the memory of the host. It is kept for the next copies: new pages take longer than the copies."""

    def __init__(self):
        self._layout: list[tuple] = []
        self._copies: list[HostCopy] = []

    def copy(self, tree: Any) -> Any:
        """Copies what this process writes of the arrays, over the copies of an earlier call, and waits for the copies.

        Returns: a tree of HostCopy.
        """
        leaves, structure = jax.tree.flatten(tree)
        layout = [(leaf.shape, leaf.dtype, leaf.sharding) for leaf in leaves]
        if layout != self._layout:
            self._layout, self._copies = layout, [HostCopy(leaf) for leaf in leaves]
        chunks = [chunk for leaf, copy in zip(leaves, self._copies, strict=True) for chunk in copy.select(leaf)]
        targets = [(copy.chunks, device) for copy in self._copies for device in copy.chunks]
        if _host_memory_kind() is None:
            for (copies, device), chunk in zip(targets, chunks, strict=True):
                np.copyto(copies[device], chunk)  # pyright: ignore[reportArgumentType]
            return jax.tree.unflatten(structure, self._copies)
        for copies, device in targets:
            copies[device] = None  # frees the earlier copy
        on_host = jax.device_put(chunks, [_host_memory(device) for _, device in targets])  # starts all copies at once
        for (copies, device), chunk in zip(targets, jax.block_until_ready(on_host), strict=True):
            copies[device] = chunk
        return jax.tree.unflatten(structure, self._copies)


def _host_memory_kind() -> str | None:
    """The kind of the host's memory into which devices copy fastest; None for devices that are the host itself."""
    device = jax.local_devices()[0]
    kinds = [memory.kind for memory in device.addressable_memories()]
    return "pinned_host" if device.platform != "cpu" and "pinned_host" in kinds else None


def _host_memory(device: Any) -> SingleDeviceSharding:
    return SingleDeviceSharding(device, memory_kind=_host_memory_kind())


@functools.lru_cache(maxsize=4096)
def _without_replicas(sharding: Sharding, shape: tuple[int, ...], memory_kind: str | None) -> NamedSharding:
    """The sharding that splits an array as `sharding` does, with each chunk on one device: on the first process that has it.

    So process 0 has a chunk of every array, and its description of the tree is complete.
    """
    devices: dict[tuple[int, ...], Any] = {}
    indices = sharding.devices_indices_map(shape).items()
    for device, index in sorted(indices, key=lambda item: (item[0].process_index, item[0].id)):
        devices.setdefault(tuple(part.start or 0 for part in index), device)
    starts = sorted(devices)
    num_chunks = [len(set(axis)) for axis in zip(*starts, strict=True)]
    axes = [f"axis_{i}" for i in range(len(shape))]
    mesh = Mesh(np.array([devices[start] for start in starts], object).reshape(num_chunks), axes)
    return NamedSharding(mesh, PartitionSpec(*axes), memory_kind=memory_kind)


def own_options() -> ocp.options.MultiprocessingOptions:
    """Options with which Orbax neither waits for other processes nor leaves work to them."""
    return ocp.options.MultiprocessingOptions(primary_host=None, active_processes={jax.process_index()})


def write_part(directory: pathlib.Path, items: Mapping[str, Any], metadata: dict[str, Any]) -> digests.Table:
    """Writes the part of this process into `directory`; any thread may call it.

    items: {name: tree of HostCopy}. metadata: stored with the step. Returns: the digests of the files that the step needs.
    """
    trees = {name: jax.tree.map(HostCopy.as_array, tree) for name, tree in items.items()}
    arrays = {name: jax.tree.leaves(tree) for name, tree in trees.items()}
    saves = {name: ocp.args.StandardSave(trees[name]) for name in trees if arrays[name]}
    if not saves:
        return {}
    is_split = any(isinstance(array, jax.Array) for array in jax.tree.leaves(arrays))
    options = own_options()
    handlers: dict[str, Any] = {
        name: ocp.StandardCheckpointHandler(use_ocdbt=not is_split, multiprocessing_options=options) for name in saves
    }
    composite = ocp.CompositeCheckpointHandler(
        composite_options=ocp.CompositeOptions(
            multiprocessing_options=options,
            # Otherwise Orbax would pass signals through a store that all processes share.
            async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
        ),
        **handlers,
    )
    with ocp.Checkpointer(composite, multiprocessing_options=options) as checkpointer:
        checkpointer.save(directory, args=ocp.args.Composite(**saves), custom_metadata=metadata, force=True)
    table = digests.compute(directory)
    if jax.process_index() == 0:
        return table
    # The files of the step itself and of its items describe all arrays, and only those of process 0 are complete.
    return {name: digest for name, digest in table.items() if name.count("/") > 1}


def commit(parts: Sequence[pathlib.Path], tables: Sequence[digests.Table], directory: pathlib.Path) -> None:
    """Joins the parts of all processes in that of process 0, and renames it to `directory`: now the step exists.

    Raises: OSError.
    """
    table = digests.join(tables)
    for part, files in zip(parts[1:], tables[1:], strict=True):
        for name in files:
            (parts[0] / name).parent.mkdir(parents=True, exist_ok=True)
            (part / name).rename(parts[0] / name)
    digests.write(parts[0], table)
    parts[0].rename(directory)
