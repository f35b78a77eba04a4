"""Checkpoints by Orbax: saved in the background, committed by a rename, checked when read, restored bit-identically.

A step's directory holds three items, so that sampling reads only the weights it needs: `params`, `ema_params`, and `rest`
(optimizer, step, window of metrics). `digests.json` lists all their files, {"<item>/<file>": [bytes, "<SHA-256>"], ...}:
Orbax restores a flipped bit as another number, without an error.

Each process writes its arrays into a directory of its own, `<step>.partial/<process>`, which the others need not see: Orbax
takes every process for the only one. Process 0 moves the files of all into its directory, writes their digests, and renames
it to `<step>`. In a bucket, each process uploads its files, and process 0 the digests last. So a launch that is killed at any
moment leaves the step, or files that no reader counts and that the next launch removes.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from diffusion_jax.distributed.processes import broadcast_from_process_0, gather, log
from diffusion_jax.errors import CheckpointError, SaveError
from diffusion_jax.run_dir import BucketRunDir, RunDir, committed_steps, open_run_dir
from diffusion_jax.storage.downloads import MANIFEST
from diffusion_jax.training.state import TrainState

__all__ = ["Checkpoints", "find_corruption", "resume_hint", "write_manifest", "write_part"]

Table = dict[str, tuple[int, str]]  # {file: (bytes, SHA-256)}

_WEIGHTS = ("params", "ema_params")
_ITEMS_OF_WEIGHTS = {"raw": "params", "ema": "ema_params"}


def resume_hint(workdir: RunDir) -> str:
    """How to resume a training run in `workdir`, as the end of a message."""
    steps = committed_steps(workdir / "checkpoints")
    if not steps:
        return "nothing was saved yet"
    return f"step {steps[-1]} is saved; rerun the same command to resume from it"


def _first_line(error: BaseException | str) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _items(state: TrainState) -> dict[str, Any]:
    """The items of a checkpoint."""
    rest = {"opt_state": state.opt_state, "step": state.step, "window": state.window}
    if state.loss_history is not None:
        rest["loss_history"] = state.loss_history
    return {name: getattr(state, name) for name in _WEIGHTS} | {"rest": rest}


def _leaf_types(tree: Any) -> dict[str, str]:
    """{path of a leaf: its dtype and shape}; classes and dictionaries have the same paths."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    path = functools.partial(jax.tree_util.keystr, simple=True, separator="/")
    return {path(keys): f"{leaf.dtype}{list(leaf.shape)}" for keys, leaf in leaves}


class Checkpoints:
    """The checkpoints of one run: the newest `kept`, and all steps divisible by `keep_every` (0 for none).

    A single process writes and commits a step in the background. With several processes, every process must make every call,
    and all get the same result. Each writes its arrays in the background; the main threads agree when all are written, and
    then process 0 commits the step.
    """

    def __init__(self, directory: RunDir | os.PathLike, kept: int = 3, keep_every: int = 0, read_only: bool = False):
        """directory: of all steps. read_only: changes nothing in it, so that a run in progress is not disturbed."""
        self._run_dir = open_run_dir(directory, read_only)
        self._directory, self._read_only = self._run_dir.path.absolute(), read_only
        self._kept, self._keep_every = kept, keep_every
        if not read_only:
            broadcast_from_process_0(self._clean_up)
        self._thread = ThreadPoolExecutor(1, "checkpoints")
        self._saving: tuple[int, Future[dict[str, Any]]] | None = None  # the step that is not committed yet
        self._num_checks = 0  # since it was saved

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self._wait()
        elif jax.process_count() == 1:  # otherwise the others may not get here
            with contextlib.suppress(Exception):  # the first error is more useful
                self._wait()
        self._thread.shutdown(wait=kind is None)

    def steps(self) -> list[int]:
        """Steps with a committed checkpoint, in increasing order."""
        return committed_steps(self._directory)

    def save(self, step: int, state: TrainState) -> None:
        """Copies the state to the host and writes it in the background. Raises: SaveError for an earlier save.

        It waits for an earlier save, and then for the copies alone.
        """
        self._wait()
        self._saving = step, self._thread.submit(self._write, step, copy_to_host(_items(state)))
        self._num_checks = 0

    def _write(self, step: int, copies: Mapping[str, Any]) -> dict[str, Any]:
        """Writes the part of this process of a step, in the background. Returns: its "files", or an "error"."""
        try:
            part = self._part(step, jax.process_index())
            files = write_part(part, copies, self._run_dir, str(step))
            report: dict[str, Any] = {"files": files}
        except Exception as error:  # Orbax and tensorstore raise many types for a full disk
            report = {"error": _first_line(error)}
        if jax.process_count() == 1:
            self._commit(step, [report])
        return report

    def _part(self, step: int, process: int) -> pathlib.Path:
        """Where a process writes its part of a step."""
        return self._directory / f"{step}.partial" / str(process)

    def _commit(self, step: int, reports: list[dict[str, Any]]) -> None:
        """Makes the step exist and removes old ones. Raises: OSError, also if a process could not write its part."""
        try:
            for process, report in enumerate(reports):
                if "error" in report:
                    self._run_dir.check_locks()  # raises if another launch has taken over the bucket
                    raise OSError(f"process {process}: {report['error']}" if len(reports) > 1 else report["error"])
            parts = [self._part(step, process) for process in range(len(reports))]
            commit(parts, [report["files"] for report in reports], self._run_dir, str(step))
        finally:
            shutil.rmtree(self._directory / f"{step}.partial", ignore_errors=True)
        for old in self.steps()[: -self._kept]:
            if not self._keep_every or old % self._keep_every:
                self._run_dir.delete(self._directory / str(old))

    def check(self) -> None:
        """Finishes the last save if it is written, without waiting for it. Raises: SaveError if it has failed.

        Several processes agree only at the first, second, fourth, eighth ... call after a save, because that takes time.
        """
        if self._saving is None:
            return
        self._num_checks += 1
        is_written, is_due = self._saving[1].done(), self._num_checks & (self._num_checks - 1) == 0
        if is_written if jax.process_count() == 1 else is_due and all(gather(is_written)):
            self._wait()

    def finish(self, step: int) -> None:
        """Waits for the background, then checks that `step` is committed. Raises: SaveError."""
        self._wait()
        if step not in broadcast_from_process_0(self.steps):
            raise self._save_error(f"step {step} is missing")

    def _wait(self) -> None:
        """Waits until the last save is committed. Raises: SaveError, LeaseLostError; JaxRuntimeError if a process is lost."""
        saving, self._saving = self._saving, None
        if saving is None:
            return
        try:
            step, report = saving[0], saving[1].result()
            if jax.process_count() > 1:
                reports = gather(report)
                broadcast_from_process_0(lambda: self._commit(step, reports))
        except OSError as error:
            raise self._save_error(error) from error

    def _save_error(self, reason: BaseException | str) -> SaveError:
        steps = self.steps()
        is_bucket = isinstance(self._run_dir, BucketRunDir)
        advice = "check the network and your permissions." if is_bucket else "is the disk full?"
        return SaveError(
            f"a checkpoint could not be written in {self._directory} ({_first_line(reason)}); {advice} "
            + (f"The checkpoint of step {steps[-1]} is kept" if steps else "There is no earlier checkpoint")
        )

    def restore(self, abstract: TrainState) -> TrainState | None:
        """The newest intact state, on the shardings of `abstract`; None if there is no checkpoint.

        A checkpoint whose files are not those that were saved is renamed to `<step>.unreadable`, and the one before it is
        used. Raises: CheckpointError if there are checkpoints but none is intact, or if the newest intact one holds another
        state than `abstract`.
        """
        items_of_state = _items(abstract)
        restored = self._restore_newest(lambda step: items_of_state)
        if restored is None:
            return None
        _, items = restored
        return TrainState(params=items["params"], ema_params=items["ema_params"], **items["rest"])

    def restore_weights(self, abstract_params: Any, kind_of: Callable[[int], str]) -> tuple[int, Any] | None:
        """(step, params) of the newest intact checkpoint; None if there is no checkpoint.

        kind_of: "ema" or "raw" for a step, as `optimizer.weights_kind`. Raises: CheckpointError, as `restore`.
        """
        restored = self._restore_newest(lambda step: {_ITEMS_OF_WEIGHTS[kind_of(step)]: abstract_params})
        if restored is None:
            return None
        step, items = restored
        return step, items[_ITEMS_OF_WEIGHTS[kind_of(step)]]

    def newest_intact_step(self) -> int | None:
        """The newest step whose files are all as they were saved; restores nothing. None if there is none."""
        for step in reversed(broadcast_from_process_0(self.steps)):
            if broadcast_from_process_0(functools.partial(self._find_corruption, step, (*_WEIGHTS, "rest"))) is None:
                return step
        return None

    def _restore_newest(self, abstract_of: Callable[[int], Mapping[str, Any]]) -> tuple[int, Mapping[str, Any]] | None:
        """(step, items) of the newest checkpoint in which the items `abstract_of(step)` are intact."""
        damaged: list[int] = []
        for name in broadcast_from_process_0(self._uncommitted) if self._read_only else ():
            log(f"Note: {self._directory / name} is not a finished checkpoint; it is ignored.")
        for step in reversed(broadcast_from_process_0(self.steps)):
            abstract = abstract_of(step)
            problem = broadcast_from_process_0(functools.partial(self._find_corruption, step, abstract))
            if problem is None:
                self._fetch(step, abstract)
                self._check_leaves(step, abstract)
                items = self._read(step, abstract)
                self._set_aside(damaged)
                return step, items
            damaged.append(step)
            log(f"The checkpoint of step {step} is damaged: {problem}.")
        if damaged:
            raise CheckpointError(
                f"none of the checkpoints {damaged} in {self._directory} is intact; restore one from a copy, or use another "
                "--workdir"
            )
        return None

    def _find_corruption(self, step: int, items: Iterable[str]) -> str | None:
        self._fetch(step, items)
        return find_corruption(self._directory / str(step), items)

    def _fetch(self, step: int, items: Iterable[str]) -> None:
        for item in items:
            self._run_dir.fetch(self._directory / str(step) / item)

    def _check_leaves(self, step: int, abstract: Mapping[str, Any]) -> None:
        """Raises: CheckpointError if the arrays have other names, types or shapes than `abstract`, which Orbax would cast.

        The checkpoint is not set aside, because it is not damaged.
        """
        for name, tree in abstract.items():
            item = epath.Path(self._directory) / str(step) / name
            metadata = ocp.StandardCheckpointHandler().metadata(item).tree
            saved, expected = _leaf_types(metadata), _leaf_types(tree)
            differing = [key for key in sorted(saved.keys() | expected.keys()) if saved.get(key) != expected.get(key)]
            if differing:
                key = differing[0]
                raise CheckpointError(
                    f"the checkpoint of step {step} in {self._directory} holds another state: {name}/{key} is "
                    f"{saved.get(key, 'missing')}, expected {expected.get(key, 'none')} (and {len(differing) - 1} others "
                    "differ); use the config and the version that wrote it, or another --workdir"
                )

    def _read(self, step: int, abstract: Mapping[str, Any]) -> Mapping[str, Any]:
        options = own_options()  # a process that cannot read must not keep the others waiting
        restores = {name: ocp.args.StandardRestore(tree) for name, tree in abstract.items()}
        composite = ocp.CompositeCheckpointHandler(
            composite_options=ocp.CompositeOptions(multiprocessing_options=options)
        )
        with ocp.Checkpointer(composite, multiprocessing_options=options) as checkpointer:
            return checkpointer.restore(self._directory / str(step), args=ocp.args.Composite(**restores))

    def _set_aside(self, steps: list[int]) -> None:
        """Renames damaged steps, unless the directory is read-only."""
        for step in steps:
            if self._read_only:
                log("It is left unchanged; the checkpoint before it is used.")
                continue
            path = broadcast_from_process_0(functools.partial(self._mark_unreadable, str(step)))
            log(f"Renamed it to {path}; continuing from the checkpoint before it.")

    def _mark_unreadable(self, name: str) -> str:
        """Renames the directory of a step, which then is no step any more. Returns: the new path."""
        self._run_dir.rename(self._directory / name, f"{name}.unreadable")
        return str(self._directory / f"{name}.unreadable")

    def _uncommitted(self) -> list[str]:
        """Directories that are named like a step, but not committed."""
        committed = set(map(str, self.steps()))
        return [path.name for path in self._directory.glob("*") if path.name.isdecimal() and path.name not in committed]

    def _clean_up(self) -> None:
        """Creates the directory, removes what interrupted launches left, and sets aside steps that are not committed."""
        self._directory.mkdir(parents=True, exist_ok=True)
        for pattern in ("*.partial", "*.removed"):
            for path in self._directory.glob(pattern):
                shutil.rmtree(path)
        if isinstance(self._run_dir, BucketRunDir):
            store, prefix = self._run_dir.store, f"{self._run_dir.name_of(self._run_dir.path)}/"
            for step in {name.removeprefix(prefix).split("/")[0] for name in store.list(prefix)}:
                if step.isdecimal() and store.find(f"{prefix}{step}/{MANIFEST}") is None:  # the list may be old
                    self._run_dir.delete(self._directory / step)
        for name in self._uncommitted():
            log(f"The checkpoint of step {name} is damaged: {MANIFEST} is missing.")
            log(f"Renamed it to {self._mark_unreadable(name)}.")


# ---- Files


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
