"""The files of checkpoints: written by every process, joined to a step by process 0, and in a bucket, uploaded.

Each process writes its arrays into a directory of its own, `<step>.partial/<process>`, which the others need not see: Orbax
takes every process for the only one. Process 0 moves the files of all into its directory, writes their digests, and renames
it to `<step>`. In a bucket, each process uploads its files, and process 0 the digests last. So a launch that is killed at any
moment leaves the step, or files that no reader counts and that the next launch removes.

The digests list every other file of a step, because Orbax restores a flipped bit as another number, without an error:

    {"<item>/<file>": [bytes, "<hexadecimal SHA-256>"], ...}
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from diffusion_jax.run_dir import BucketRunDir, RunDir
from diffusion_jax.storage.downloads import MANIFEST

__all__ = [
    "commit",
    "copy_to_host",
    "find_corruption",
    "own_options",
    "remove_uncommitted",
    "write_part",
]

Table = dict[str, tuple[int, str]]  # {file: (bytes, SHA-256)}


def own_options() -> ocp.options.MultiprocessingOptions:
    """Options with which Orbax neither waits for other processes nor leaves work to them."""
    return ocp.options.MultiprocessingOptions(primary_host=None, active_processes={jax.process_index()})


def copy_to_host(tree: Any) -> Any:
    """A copy of what this process writes of some arrays, in the memory of the host; None for arrays of process 0 alone."""

    def select(array: jax.Array) -> jax.Array | None:
        if not array.is_fully_replicated:
            return array
        return array.addressable_data(0) if jax.process_index() == 0 else None

    device = jax.local_devices()[0]
    kinds = [memory.kind for memory in device.addressable_memories()]
    # Devices copy fastest to the pinned memory of the host. CPUs have it, too.
    kind = "pinned_host" if "pinned_host" in kinds else device.default_memory().kind
    arrays, structure = jax.tree.flatten(jax.tree.map(select, tree))
    shards = [[shard.data for shard in array.addressable_shards] for array in arrays]
    places = jax.tree.map(lambda shard: shard.sharding.with_memory_kind(kind), shards)
    copied = jax.device_put(shards, places, may_alias=False)  # one call, so that the devices copy them at once
    jax.block_until_ready(copied)
    copies = [
        jax.make_array_from_single_device_arrays(array.shape, array.sharding.with_memory_kind(kind), its_shards)
        for array, its_shards in zip(arrays, copied, strict=True)
    ]
    return jax.tree.unflatten(structure, copies)


def write_part(part: pathlib.Path, items: Mapping[str, Any], run_dir: RunDir, step: str) -> Table:
    """Writes the arrays of this process into the directory `part`, and in a bucket uploads them for the step.

    If no array is split over processes, process 0 writes everything into a few files (OCDBT). Otherwise every chunk is a
    file of its own (zarr), so the files of all processes have different names and are together one checkpoint of Orbax.

    items: {name: tree of `copy_to_host`}. Returns: the digests of the files that the step needs. Raises: OSError;
    LeaseLostError instead of overwriting objects, if another launch has taken over the bucket.
    """
    size = sum(shard.data.nbytes for array in jax.tree.leaves(items) for shard in array.addressable_shards)
    part.parent.mkdir(parents=True, exist_ok=True)
    if size > shutil.disk_usage(part.parent).free:  # otherwise tensorstore prints a traceback for every array
        raise OSError(errno.ENOSPC, "No space left on device")
    # Orbax does not take an array for the devices of one process of several.
    items = jax.tree.map(lambda array: np.asarray(array) if array.is_fully_addressable else array, items)
    if not jax.tree.leaves(items):
        return {}
    is_split = any(isinstance(array, jax.Array) for array in jax.tree.leaves(items))
    is_first, options = jax.process_index() == 0, own_options()
    types = ocp.type_handlers
    registry = types.create_type_handler_registry(
        (np.ndarray, types.NumpyHandler()),
        (jax.Array, types.ArrayHandler(use_replica_parallel=False)),  # otherwise processes share the work of each chunk
    )
    handlers: dict[str, Any] = {
        name: ocp.PyTreeCheckpointHandler(
            use_ocdbt=not is_split,
            multiprocessing_options=options,
            type_handler_registry=registry,
        )
        for name in items
    }
    # Without directories of its own making, Orbax would pass signals through a store that all processes share.
    own_directories = ocp.AsyncOptions(create_directories_asynchronously=False)
    composite = ocp.CompositeCheckpointHandler(
        composite_options=ocp.CompositeOptions(multiprocessing_options=options, async_options=own_directories),
        **handlers,
    )
    with ocp.Checkpointer(composite, multiprocessing_options=options) as checkpointer:
        saves = {name: ocp.args.PyTreeSave(tree) for name, tree in items.items()}
        checkpointer.save(part, args=ocp.args.Composite(**saves), force=True)
    files = [path for path in part.rglob("*") if path.is_file()]
    table = {path.relative_to(part).as_posix(): digest(path) for path in files}
    if not is_first:  # files of the step itself and of its items describe all arrays: those of process 0 are complete
        table = {name: value for name, value in table.items() if name.count("/") > 1}
    if isinstance(run_dir, BucketRunDir):
        name = run_dir.name_of(run_dir / step)
        uploads: dict[str | os.PathLike, str] = {part / file: f"{name}/{file}" for file in table}
        run_dir.store.upload_all(uploads, before_overwriting=run_dir.check_locks)
        if not is_first:
            shutil.rmtree(part.parent, ignore_errors=True)
    return table


def digest(path: pathlib.Path) -> tuple[int, str]:
    """(bytes, SHA-256) of a file."""
    with path.open("rb") as file:
        return path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()


def commit(parts: Sequence[pathlib.Path], tables: Sequence[Table], run_dir: RunDir, step: str) -> None:
    """Makes a step of the parts of all processes: now it exists. Process 0 calls it.

    Raises: OSError; LeaseLostError if another launch has taken over the bucket.
    """
    part, table = parts[0], {}
    for files in tables:
        for name in table.keys() & files.keys():
            raise OSError(f"two processes have written {name}")
        table |= files
    if isinstance(run_dir, BucketRunDir):
        write_manifest(part, table)
        run_dir.check_locks()
        store, name = run_dir.store, run_dir.name_of(run_dir / step)
        written = {f"{name}/{file}" for file in table}
        store.delete(store.list(f"{name}/").keys() - written)  # of a failed save of the same step
        store.upload(part / MANIFEST, f"{name}/{MANIFEST}")
        for path in filter(pathlib.Path.is_dir, part.iterdir()):  # the mirror keeps the small files
            shutil.rmtree(path)
    else:
        for other, files in zip(parts[1:], tables[1:], strict=True):
            for name in files:
                (part / name).parent.mkdir(parents=True, exist_ok=True)
                (other / name).rename(part / name)
        write_manifest(part, table)
    part.rename(run_dir / step)


def write_manifest(directory: pathlib.Path, table: Table) -> None:
    """Writes the digests of the files in `directory` into it, and syncs them to the disk."""
    with (directory / MANIFEST).open("w") as file:
        json.dump(dict(sorted(table.items())), file, indent=0)
        file.flush()
        os.fsync(file.fileno())


def find_corruption(directory: pathlib.Path, items: Iterable[str]) -> str | None:
    """The first corrupted file of `items` and its fault, as a phrase; None if their files are intact."""
    try:
        table = json.loads((directory / MANIFEST).read_bytes())
        listed = {name: (size, value) for name, (size, value) in table.items()}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        return f"{MANIFEST} cannot be read: {type(error).__name__}"
    items = set(items)
    missing = sorted(items - {name.split("/")[0] for name in listed})
    if missing:
        return f"{MANIFEST} lists no files of {missing[0]}"
    for name, (expected_size, expected_value) in listed.items():
        if "/" in name and name.split("/")[0] not in items:
            continue
        try:
            size, value = digest(directory / name)
        except OSError as error:
            return f"{name} {'is missing' if isinstance(error, FileNotFoundError) else f'cannot be read: {error}'}"
        if size != expected_size:
            return f"{name} has {size} bytes, not {expected_size}"
        if value != expected_value:
            return f"{name} was changed: its SHA-256 differs from the stored one"
    return None


def remove_uncommitted(run_dir: RunDir) -> None:
    """Deletes what interrupted launches left in the directory of all steps, also in a bucket, whose lease is held."""
    for pattern in ("*.partial", "*.removed"):
        for path in run_dir.path.glob(pattern):
            shutil.rmtree(path)
    if not isinstance(run_dir, BucketRunDir):
        return
    prefix = f"{run_dir.name_of(run_dir.path)}/"
    for step in {name.removeprefix(prefix).split("/")[0] for name in run_dir.store.list(prefix)}:
        if step.isdecimal() and run_dir.store.find(f"{prefix}{step}/{MANIFEST}") is None:  # the list may be old
            run_dir.delete(run_dir / step)
