"""The files of checkpoints: written by every process, joined to a step by process 0, and in a bucket, uploaded.

Each process writes its arrays into a directory of its own, `<step>.partial/<process>`, which the others need not see: Orbax
takes every process for the only one. Process 0 moves the files of all into its directory, writes their digests, and renames
it to `<step>`. In a bucket, each process uploads its files, and process 0 the digests last. So a launch that is killed at any
moment leaves the step, or files that no reader counts and that the next launch removes.

If no array is split over processes, process 0 writes everything into a few files (OCDBT). Otherwise every chunk is a file of
its own (zarr), so the files of all processes have different names and are together one checkpoint of Orbax.
"""

from __future__ import annotations

import os
import pathlib
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import orbax.checkpoint as ocp

from diffusion_jax.storage.locations import Mirror, find_mirror
from diffusion_jax.training import digests

__all__ = ["commit", "delete_step", "fetch_items", "own_options", "remove_uncommitted", "save_part", "upload_part"]


def own_options() -> ocp.options.MultiprocessingOptions:
    """Options with which Orbax neither waits for other processes nor leaves work to them."""
    return ocp.options.MultiprocessingOptions(primary_host=None, active_processes={jax.process_index()})


def save_part(part: pathlib.Path, items: Mapping[str, Any]) -> Callable[[], digests.Table]:
    """Copies the arrays of this process to the host, and starts to write them into the directory `part`.

    items: {name: tree of arrays}. An array that several processes hold is written by one of them. Returns: a function that
    waits for the files and returns the digests of those that the step needs; any thread may call it.
    """
    is_first = jax.process_index() == 0
    is_split = not all(leaf.is_fully_replicated for leaf in jax.tree.leaves(items)) and jax.process_count() > 1
    if not (is_first or is_split):
        return dict
    options = own_options()
    # Without directories of its own making, Orbax would pass signals through a store that all processes share.
    in_background = ocp.AsyncOptions(create_directories_asynchronously=False)
    registry = ocp.type_handlers.create_type_handler_registry(
        (jax.Array, ocp.type_handlers.ArrayHandler(use_replica_parallel=False))
    )
    handlers: dict[str, Any] = {
        name: ocp.PyTreeCheckpointHandler(
            use_ocdbt=not is_split, multiprocessing_options=options, type_handler_registry=registry
        )
        for name in items
    }
    composite = ocp.CompositeCheckpointHandler(
        composite_options=ocp.CompositeOptions(multiprocessing_options=options, async_options=in_background), **handlers
    )
    checkpointer = ocp.AsyncCheckpointer(composite, async_options=in_background, multiprocessing_options=options)
    saves = {name: ocp.args.PyTreeSave(tree) for name, tree in items.items()}
    checkpointer.save(part, args=ocp.args.Composite(**saves), force=True)

    def finish() -> digests.Table:
        with checkpointer:
            checkpointer.wait_until_finished()
        table = digests.compute(part)
        # The files of the step itself and of its items describe all arrays, and only those of process 0 are complete.
        return table if is_first else {name: digest for name, digest in table.items() if name.count("/") > 1}

    return finish


def upload_part(part: pathlib.Path, table: digests.Table, directory: pathlib.Path) -> None:
    """Uploads the files of this process of a step, which do not make it exist; only in a bucket.

    A launch that was suspended in an upload overwrites nothing when it goes on, if another launch has taken over the bucket.
    Raises: OSError, LeaseLostError.
    """
    mirror = find_mirror(directory)
    if mirror:
        name = mirror.name_of(directory)
        files: dict[str | os.PathLike, str] = {part / file: f"{name}/{file}" for file in table}
        mirror.store.upload_all(files, before_overwriting=mirror.before_commit)
        if jax.process_index() > 0:
            shutil.rmtree(part.parent, ignore_errors=True)


def commit(parts: Sequence[pathlib.Path], tables: Sequence[digests.Table], directory: pathlib.Path) -> None:
    """Makes a step of the parts of all processes: now it exists. Process 0 calls it.

    Raises: OSError; LeaseLostError if another launch has taken over the bucket.
    """
    mirror, part = find_mirror(directory), parts[0]
    table: digests.Table = {}
    for files in tables:
        for name in table.keys() & files.keys():
            raise OSError(f"two processes have written {name}")
        table |= files
    if mirror:
        digests.write(part, table)
        mirror.before_commit()
        name = mirror.name_of(directory)
        known = {f"{name}/{file}" for file in table}
        mirror.store.delete(mirror.store.list(f"{name}/").keys() - known)  # of a failed save of the same step
        mirror.store.upload(part / digests.NAME, f"{name}/{digests.NAME}")
        mirror.known_steps.add(int(directory.name))
        for path in filter(pathlib.Path.is_dir, part.iterdir()):  # the mirror keeps the small files
            shutil.rmtree(path)
    else:
        for other, files in zip(parts[1:], tables[1:], strict=True):
            for name in files:
                (part / name).parent.mkdir(parents=True, exist_ok=True)
                (other / name).rename(part / name)
        digests.write(part, table)
    part.rename(directory)


def fetch_items(directory: pathlib.Path, items: Iterable[str]) -> None:
    """Downloads the files of some items of a step that are not in the mirror yet. Raises: OSError."""
    mirror = find_mirror(directory)
    for item in items if mirror else ():
        if mirror and not (directory / item).exists():
            mirror.fetch_directory(directory / item)


def delete_step(directory: pathlib.Path) -> None:
    """Deletes a step, which no longer exists when the deletion begins."""
    mirror = find_mirror(directory)
    if mirror:
        _delete_objects(mirror, mirror.name_of(directory))
    removed = directory.with_name(f"{directory.name}.removed")
    shutil.rmtree(removed, ignore_errors=True)  # from an earlier launch
    directory.rename(removed)
    shutil.rmtree(removed, ignore_errors=True)


def remove_uncommitted(directory: pathlib.Path) -> None:
    """Deletes what interrupted launches left in the directory of all steps, also in a bucket, whose lease is held."""
    for pattern in ("*.partial", "*.removed"):
        for path in directory.glob(pattern):
            shutil.rmtree(path)
    mirror = find_mirror(directory)
    if mirror is None:
        return
    prefix = f"{mirror.name_of(directory)}/"
    steps = {name.removeprefix(prefix).split("/")[0] for name in mirror.store.list(prefix)}
    for step in filter(str.isdecimal, steps):
        if mirror.store.find(f"{prefix}{step}/{digests.NAME}") is None:
            _delete_objects(mirror, f"{prefix}{step}")


def _delete_objects(mirror: Mirror, name: str) -> None:
    """Deletes the objects of a step, the digests first."""
    mirror.store.delete([f"{name}/{digests.NAME}"])
    mirror.store.delete(mirror.store.list(f"{name}/"))
