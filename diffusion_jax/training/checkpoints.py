"""Orbax checkpoints: saved in the background, committed by a rename, checked when read, restored bit-identically.

A step's directory holds three items, so that sampling reads only the weights it needs: `params`, `ema_params`, and `rest`
(optimizer, step, averages of metrics). `digests.json` lists the step and all files, {"<item>/<file>": [bytes, "<SHA-256>"]}:
Orbax restores a flipped bit as another number, without an error. `check_run_files` reads a step's config.json and data.json.

Each process writes its arrays into its own directory, `<step>.partial/<process>`: Orbax is set up as if each process were
the only process. Process 0 moves all files into its directory, writes the digests, and renames the directory to `<step>`. In
a bucket, each process uploads its files; process 0 uploads the digests last. So a launch that is killed at any moment leaves
a complete step, or files that readers ignore and the next launch removes.
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
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from diffusion_jax.config import flatten, identity_settings, resolve
from diffusion_jax.distributed.processes import broadcast_from_process_0, gather, log
from diffusion_jax.errors import CheckpointError, SaveError, first_line, list_differences, shorten
from diffusion_jax.run_dir import BucketRunDir, RunDir, committed_steps, open_run_dir
from diffusion_jax.storage.downloads import MANIFEST
from diffusion_jax.training.state import TrainState
from diffusion_jax.untrusted import check_regular, read_json

Table = dict[str, tuple[int, str]]  # {file: (bytes, SHA-256)}

_RUN_FILES = ("config.json", "data.json")  # each checkpoint has copies
_MANIFEST_BYTES = 2**28
_WEIGHTS = ("params", "ema_params")
_ITEMS_OF_WEIGHTS = {"raw": "params", "ema": "ema_params"}


def resume_hint(workdir: RunDir) -> str:
    """Returns the end of a message: how to resume a training run in `workdir`."""
    steps = committed_steps(workdir / "checkpoints")
    if not steps:
        return "nothing was saved yet"
    return f"step {steps[-1]} is saved; rerun the same command to resume from it"


def _items(state: TrainState) -> dict[str, Any]:
    """Splits a state into the items of a checkpoint."""
    rest = {"opt_state": state.opt_state, "step": state.step, "averages": state.averages}
    if state.loss_history is not None:
        rest["loss_history"] = state.loss_history
    return {name: getattr(state, name) for name in _WEIGHTS} | {"rest": rest}


def _leaf_types(tree: Any) -> dict[str, str]:
    """Returns {path: dtype and shape} for all leaves; a dataclass has the same paths as a dictionary of its fields."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    path = functools.partial(jax.tree_util.keystr, simple=True, separator="/")
    return {path(keys): f"{leaf.dtype}{list(leaf.shape)}" for keys, leaf in leaves}


class Checkpoints:
    """The checkpoints of one run: keeps the newest `kept` steps, and all steps divisible by `keep_every` (0 for none).

    A single process writes and commits a step in the background. With several processes, every process must make every call,
    and a call returns the same result in every process. Each process writes its arrays in the background. When the main
    threads agree that all arrays are written, process 0 commits the step.
    """

    def __init__(self, directory: RunDir | os.PathLike, kept: int = 3, keep_every: int = 0, read_only: bool = False):
        """directory: contains all steps. read_only: changes no files, so that a run in progress is not disturbed."""
        self._run_dir = open_run_dir(directory, read_only)
        self._directory, self._read_only = self._run_dir.path.absolute(), read_only
        self._kept, self._keep_every = kept, keep_every
        if not read_only:
            broadcast_from_process_0(self._clean_up)
        self._thread = ThreadPoolExecutor(1, "checkpoints")
        self._saving: tuple[int, Future[dict[str, Any]]] | None = None  # the step that is not committed yet
        self._num_checks = 0  # since the last save

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        if kind is None:
            self.finish()
        elif jax.process_count() == 1:  # with several processes, other processes may not get here
            with contextlib.suppress(Exception):  # the first error is more useful
                self.finish()
        self._thread.shutdown(wait=kind is None)

    def steps(self) -> list[int]:
        return committed_steps(self._directory)

    def save(self, step: int, state: TrainState) -> None:
        """Copies the state to the host and writes it in the background. Raises: as `finish`, for the earlier save.

        Waits until an earlier save is committed, and until the state is copied, but not until the copy is written.
        """
        self.finish()
        self._saving = step, self._thread.submit(self._write, step, copy_to_host(_items(state)))
        self._num_checks = 0

    def _write(self, step: int, copies: Mapping[str, Any]) -> dict[str, Any]:
        """Writes the arrays of this process, in the background thread. Returns: {"files": digests} or {"error": message}."""
        part = self._directory / f"{step}.partial" / str(jax.process_index())
        try:
            report: dict[str, Any] = {"files": write_part(part, copies, self._run_dir, str(step))}
        except Exception as error:  # on a full disk, Orbax and tensorstore raise many types
            report = {"error": first_line(error)}
        if jax.process_count() == 1:
            self._commit(step, [report])
        return report

    def _commit(self, step: int, reports: list[dict[str, Any]]) -> None:
        """Commits the step from the directories of all processes, and removes old steps.

        Raises: OSError, also if a process could not write its arrays; LeaseLostError if another launch took over the bucket,
        or if a local directory was moved and arrays could not be written.
        """
        run_dir, partial = self._run_dir, self._directory / f"{step}.partial"
        parts = [partial / str(process) for process in range(len(reports))]
        try:
            for process, report in enumerate(reports):
                if "error" in report:
                    run_dir.check_locks()
                    raise OSError(f"process {process}: {report['error']}" if len(reports) > 1 else report["error"])
            if not isinstance(run_dir, BucketRunDir):  # a bucket has the files of all processes
                for part, report in zip(parts[1:], reports[1:], strict=True):
                    for name in report["files"]:
                        (parts[0] / name).parent.mkdir(parents=True, exist_ok=True)
                        (part / name).rename(parts[0] / name)
            table: Table = {name: value for report in reports for name, value in report["files"].items()}
            write_manifest(parts[0], {**table, "step": step})
            if isinstance(run_dir, BucketRunDir):
                run_dir.check_locks()
                store, name = run_dir.store, run_dir.object_name(run_dir / str(step))
                written = {f"{name}/{file}" for file in table}
                store.delete(store.list(f"{name}/").keys() - written)  # left by a failed save of the same step
                store.upload(parts[0] / MANIFEST, f"{name}/{MANIFEST}")
                for path in filter(pathlib.Path.is_dir, parts[0].iterdir()):  # the mirror keeps the small files
                    shutil.rmtree(path)
            parts[0].rename(run_dir / str(step))
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        for old in self.steps()[: -self._kept]:
            if not self._keep_every or old % self._keep_every:
                self._run_dir.delete(self._directory / str(old))

    def check(self) -> None:
        """Commits the last save if it is written; otherwise returns at once. Raises: SaveError if the save failed.

        With several processes, only calls 1, 2, 4, 8 ... after a save can commit the save, because agreement takes time.
        """
        if self._saving is None:
            return
        self._num_checks += 1
        is_written, is_due = self._saving[1].done(), self._num_checks & (self._num_checks - 1) == 0
        if is_written if jax.process_count() == 1 else is_due and all(gather(is_written)):
            self.finish()

    def finish(self) -> None:
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
            steps = self.steps()
            is_bucket = isinstance(self._run_dir, BucketRunDir)
            advice = "check the network and your permissions." if is_bucket else "is the disk full?"
            kept = f"The checkpoint of step {steps[-1]} is kept" if steps else "There is no earlier checkpoint"
            raise SaveError(
                f"a checkpoint could not be written in {self._directory} ({first_line(error)}); {advice} {kept}"
            ) from error

    def restore(self, abstract: TrainState) -> TrainState | None:
        """Restores the newest intact state with the shardings of `abstract`; None if there is no checkpoint.

        A damaged checkpoint is renamed to `<step>.unreadable`, and the previous checkpoint is used.
        Raises: CheckpointError if no checkpoint is intact, or if the newest intact checkpoint does not match `abstract`.
        """
        expected = _items(abstract)
        if (restored := self._restore_newest(lambda step: expected)) is None:
            return None
        _, items = restored
        return TrainState(params=items["params"], ema_params=items["ema_params"], **items["rest"])

    def restore_weights(self, abstract_params: Any, choose_kind: Callable[[int], str]) -> tuple[int, Any] | None:
        """Restores (step, params) from the newest intact checkpoint; None if there is no checkpoint.

        choose_kind: maps a step to "ema" or "raw", as `optimizer.weights_kind`. Raises: CheckpointError, as `restore`.
        """
        restored = self._restore_newest(lambda step: {_ITEMS_OF_WEIGHTS[choose_kind(step)]: abstract_params})
        return restored and (restored[0], *restored[1].values())

    def newest_intact_step(
        self, items_of: Callable[[int], Iterable[str]] = lambda step: (*_WEIGHTS, "rest")
    ) -> int | None:
        """Returns the newest step whose items `items_of(step)` are intact, or None. Logs damaged steps; restores nothing."""
        for step in reversed(broadcast_from_process_0(self.steps)):
            problem = broadcast_from_process_0(functools.partial(self._find_corruption, step, items_of(step)))
            if problem is None:
                return step
            log(f"The checkpoint of step {step} is damaged: {problem}. Trying the checkpoint before it.")
        return None

    def _restore_newest(
        self, make_abstract: Callable[[int], Mapping[str, Any]]
    ) -> tuple[int, Mapping[str, Any]] | None:
        """Restores (step, items) from the newest checkpoint whose items in `make_abstract(step)` are intact."""
        steps = broadcast_from_process_0(self.steps)
        step = self.newest_intact_step(make_abstract)
        if step is None and steps:
            found = f"none of the checkpoints {steps[::-1]} in {self._directory} is intact"
            raise CheckpointError(f"{found}; restore one from a copy, or use another --workdir")
        if step is None:
            return None
        abstract = make_abstract(step)
        self._fetch(step, abstract)
        self._check_leaves(step, abstract)
        restores = {name: ocp.args.StandardRestore(tree) for name, tree in abstract.items()}
        with _open_checkpointer(own_options()) as checkpointer:
            items = checkpointer.restore(self._directory / str(step), args=ocp.args.Composite(**restores))
        for other in [other for other in steps if other > step and not self._read_only]:
            broadcast_from_process_0(functools.partial(self._rename_as_unreadable, other))
        return step, items

    def _find_corruption(self, step: int, items: Iterable[str]) -> str | None:
        self._fetch(step, items)
        return find_corruption(self._directory / str(step), items)

    def _fetch(self, step: int, items: Iterable[str]) -> None:
        for item in items:
            self._run_dir.fetch(self._directory / str(step) / item)

    def _check_leaves(self, step: int, abstract: Mapping[str, Any]) -> None:
        """Raises: CheckpointError if the names, dtypes or shapes of the arrays differ from `abstract`; Orbax would cast them.

        Such a checkpoint is not damaged, so it is not renamed.
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
                    f"{saved.get(key, 'missing')}, expected {expected.get(key, 'none')} (and {len(differing) - 1} other "
                    "arrays differ); use the config and the version that wrote the checkpoint, with the same scalars of a "
                    "loss of your own, or another --workdir"
                )

    def _rename_as_unreadable(self, step: int) -> None:
        """Renames the directory of a damaged checkpoint, so that it is not restored."""
        self._run_dir.rename(self._directory / str(step), f"{step}.unreadable")
        log(f"Renamed the damaged checkpoint to {self._directory / f'{step}.unreadable'}.")

    def _clean_up(self) -> None:
        """Creates the directory, removes leftovers of interrupted launches, and renames steps without a manifest."""
        self._directory.mkdir(parents=True, exist_ok=True)
        for pattern in ("*.partial", "*.removed"):
            for path in self._directory.glob(pattern):
                shutil.rmtree(path)
        if isinstance(self._run_dir, BucketRunDir):
            store, prefix = self._run_dir.store, f"{self._run_dir.object_name(self._run_dir.path)}/"
            for step in {name.removeprefix(prefix).split("/")[0] for name in store.list(prefix)}:
                if step.isdecimal() and store.find(f"{prefix}{step}/{MANIFEST}") is None:  # the list may be old
                    self._run_dir.delete(self._directory / step)
        committed = set(map(str, self.steps()))
        for name in [path.name for path in self._directory.glob("*") if path.name.isdecimal()]:
            if name not in committed:
                log(f"The checkpoint of step {name} is damaged: {MANIFEST} is missing.")
                self._rename_as_unreadable(int(name))


# ---- Files


def own_options() -> ocp.options.MultiprocessingOptions:
    """Returns Orbax options for this process alone: no waiting for other processes, and no shared work."""
    return ocp.options.MultiprocessingOptions(primary_host=None, active_processes={jax.process_index()})


def _open_checkpointer(options: ocp.options.MultiprocessingOptions, **handlers: Any) -> ocp.Checkpointer:
    # With asynchronous directory creation, Orbax would send signals through a store that all processes share.
    own_directories = ocp.AsyncOptions(create_directories_asynchronously=False)
    composite_options = ocp.CompositeOptions(multiprocessing_options=options, async_options=own_directories)
    composite = ocp.CompositeCheckpointHandler(composite_options=composite_options, **handlers)
    return ocp.Checkpointer(composite, multiprocessing_options=options)


def copy_to_host(tree: Any) -> Any:
    """Returns copies, in host memory, of the shards that this process saves.

    Process 0 saves replicated arrays; the other processes get None instead.
    """

    def select(array: jax.Array) -> jax.Array | None:
        if not array.is_fully_replicated:
            return array
        return array.addressable_data(0) if jax.process_index() == 0 else None

    device = jax.local_devices()[0]
    kinds = [memory.kind for memory in device.addressable_memories()]
    # Copies to pinned host memory are the fastest. CPUs have pinned memory, too.
    kind = "pinned_host" if "pinned_host" in kinds else device.default_memory().kind
    arrays, structure = jax.tree.flatten(jax.tree.map(select, tree))
    shards = [[shard.data for shard in array.addressable_shards] for array in arrays]
    places = jax.tree.map(lambda shard: shard.sharding.with_memory_kind(kind), shards)
    copied = jax.device_put(shards, places, may_alias=False)  # one call, so that all devices copy at the same time
    jax.block_until_ready(copied)
    copies = [
        jax.make_array_from_single_device_arrays(array.shape, array.sharding.with_memory_kind(kind), its_shards)
        for array, its_shards in zip(arrays, copied, strict=True)
    ]
    return jax.tree.unflatten(structure, copies)


def write_part(part: pathlib.Path, items: Mapping[str, Any], run_dir: RunDir, step: str) -> Table:
    """Writes the arrays of this process into the directory `part`, and uploads the files if the run is in a bucket.

    If no array is split over processes, process 0 writes everything into a few files (OCDBT). Otherwise every chunk has its
    own file (zarr), so that no two processes write the same file, and all files together are one Orbax checkpoint.

    items: {name: result of `copy_to_host`}. Returns: the digests of the files that the step needs. Raises: OSError;
    LeaseLostError, before objects are overwritten, if another launch has taken over the bucket.
    """
    size = sum(shard.data.nbytes for array in jax.tree.leaves(items) for shard in array.addressable_shards)
    # Process 0 of a local run creates no parents, which are missing only if the run was moved. Other processes may need them.
    is_first = jax.process_index() == 0
    part.parent.mkdir(parents=isinstance(run_dir, BucketRunDir) or not is_first, exist_ok=True)
    if size > shutil.disk_usage(part.parent).free:  # on a full disk, tensorstore prints a traceback for every array
        raise OSError(errno.ENOSPC, "No space left on device")
    # With several processes, Orbax rejects JAX arrays on the devices of only one process.
    items = jax.tree.map(lambda array: np.asarray(array) if array.is_fully_addressable else array, items)
    if not jax.tree.leaves(items):
        return {}
    is_split = any(isinstance(array, jax.Array) for array in jax.tree.leaves(items))
    options = own_options()
    types = ocp.type_handlers
    registry = types.create_type_handler_registry(
        (np.ndarray, types.NumpyHandler()),
        (jax.Array, types.ArrayHandler(use_replica_parallel=False)),  # otherwise processes share the work of each chunk
    )
    handlers: dict[str, Any] = {
        name: ocp.PyTreeCheckpointHandler(
            use_ocdbt=not is_split, multiprocessing_options=options, type_handler_registry=registry
        )
        for name in items
    }
    with _open_checkpointer(options, **handlers) as checkpointer:
        saves = {name: ocp.args.PyTreeSave(tree) for name, tree in items.items()}
        checkpointer.save(part, args=ocp.args.Composite(**saves), force=True)
    for path in (run_dir.path.parent / name for name in _RUN_FILES):
        if is_first and path.is_file():
            shutil.copyfile(path, part / path.name)
    files = {path.relative_to(part).as_posix(): path for path in part.rglob("*") if path.is_file()}
    # Process 0's metadata of the step and of its items are complete, so the same files of other processes are left out.
    table = {name: digest(path) for name, path in files.items() if is_first or name.count("/") > 1}
    if isinstance(run_dir, BucketRunDir):
        name = run_dir.object_name(run_dir / step)
        uploads: dict[str | os.PathLike, str] = {part / file: f"{name}/{file}" for file in table}
        # A launch that was suspended may have lost the lease to another launch, which may have saved this step.
        run_dir.store.upload_all(uploads, before_overwriting=run_dir.check_locks)
        if not is_first:
            shutil.rmtree(part.parent, ignore_errors=True)
    return table


def digest(path: pathlib.Path) -> tuple[int, str]:
    """Returns (bytes, SHA-256) of a file. Raises: OSError; ValueError for a pipe, a device or a folder."""
    check_regular(path)
    with path.open("rb") as file:
        return path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()


def check_run_files(workdir: RunDir) -> None:
    """Compares config.json and data.json with their copies in the newest checkpoint; a changed byte can change results.

    Logs a note about changed settings that a launch may change, and if the checkpoint lacks a copy or its step. Raises:
    CheckpointError for a file that is missing, invalid or changed in values that change results, or a copy that was changed.
    """
    steps = committed_steps(workdir / "checkpoints")
    if not steps:
        return
    newest = workdir / "checkpoints" / str(steps[-1])
    paths = {workdir / name: newest / name for name in _RUN_FILES}
    try:
        table = read_json(newest / MANIFEST, limit=_MANIFEST_BYTES)
    except (OSError, ValueError):  # `find_corruption` reports it
        table = None
    unknown = ["its step"] * (table is not None and "step" not in table)
    if unknown := unknown + [path.name for path, copy in paths.items() if not copy.exists()]:
        log(f"Note: {newest} has no copies of {', '.join(unknown)} to find changes; the next checkpoint has copies.")
    for path, copy in paths.items():
        if not copy.exists():
            continue
        if not path.exists():
            otherwise = f"; to continue without it: rm {copy}" * (path.name != "config.json")
            raise CheckpointError(f"{path} is missing; to restore it: cp {copy} {path}{otherwise}")
        stored: list[Any] = []
        for file, advice in ((copy, f"remove it: rm {copy}"), (path, f"restore it: cp {copy} {path}")):
            try:
                if file == copy and table is not None and list(digest(copy)) != table.get(path.name):
                    raise ValueError(f"its SHA-256 differs from that in {MANIFEST}")
                stored.append(resolve(read_json(file)) if path.name == "config.json" else read_json(file))
            except (OSError, ValueError) as error:
                raise CheckpointError(f"{file} cannot be used ({error}); {advice}") from error
        changes = shorten("; ".join(list_differences(*map(flatten, stored))), 300)
        old, new = map(identity_settings, stored) if path.name == "config.json" else stored
        if old != new:
            ways = f"to undo this: cp {copy} {path}; to keep it: rm {copy}"
            raise CheckpointError(f"{path} was changed after the checkpoint of step {steps[-1]} ({changes}); {ways}")
        if changes:
            log(f"Note: {path} was changed after step {steps[-1]}: {changes}.")


def write_manifest(directory: pathlib.Path, table: Mapping[str, Any]) -> None:
    """Writes digests.json into `directory`, and syncs it to the disk."""
    with (directory / MANIFEST).open("w") as file:
        json.dump(dict(sorted(table.items())), file, indent=0)
        file.flush()
        os.fsync(file.fileno())


def find_corruption(directory: pathlib.Path, items: Iterable[str]) -> str | None:
    """Returns a phrase about the first damaged file of `items`; None if all files are intact."""
    try:
        table = read_json(directory / MANIFEST, limit=_MANIFEST_BYTES)
        step = table.pop("step", directory.name)  # version 0.3 stored no step
        listed = {name: (size, value) for name, (size, value) in table.items()}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        return f"{MANIFEST} cannot be read: {type(error).__name__}"
    if str(step) != directory.name:
        return f"its {MANIFEST} belongs to step {shorten(str(step), 20)}"
    items = set(items)
    missing = sorted(items - {name.split("/")[0] for name in listed})
    if missing:
        return f"{MANIFEST} lists no files of {missing[0]}"
    for name, (expected_size, expected_value) in listed.items():
        if name in _RUN_FILES or ("/" in name and name.split("/")[0] not in items):
            continue
        try:
            size, value = digest(directory / name)
        except (OSError, ValueError) as error:
            return f"{name} {'is missing' if isinstance(error, FileNotFoundError) else f'cannot be read: {error}'}"
        if size != expected_size:
            return f"{name} has {size} bytes, not {expected_size}"
        if value != expected_value:
            return f"{name} was changed: its SHA-256 differs from the stored one"
    return None
