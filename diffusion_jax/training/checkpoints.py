"""Checkpoints by Orbax: saved in the background, committed by a rename, checked when read, restored bit-identically.

A step's directory holds three items, so that sampling reads only the weights it needs: `params`, `ema_params`, and `rest`
(optimizer, step, window of metrics); and the digests of all their files, which are committed with them.
"""

from __future__ import annotations

import functools
import json
import math
import pathlib
import shutil
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from diffusion_jax.distributed.messages import call_on_process_0
from diffusion_jax.distributed.processes import all_processes_agree, broadcast_from_process_0, is_peer_failure, log
from diffusion_jax.errors import CheckpointError, LeaseLostError, SaveError
from diffusion_jax.storage import locations
from diffusion_jax.storage.locations import find_mirror
from diffusion_jax.training import bucket_checkpoints, digests
from diffusion_jax.training.checkpoint_writing import HostCopies, commit, own_options, write_part
from diffusion_jax.training.digests import committed_steps
from diffusion_jax.training.state import TrainState

__all__ = ["Checkpoints", "committed_steps", "resume_hint"]

_WEIGHTS = ("params", "ema_params")
_ITEMS_OF_WEIGHTS = {"raw": "params", "ema": "ema_params"}
_PARTIAL, _REMOVED, _UNREADABLE = ".partial", ".removed", ".unreadable"
_LEFTOVERS = (f"*{_PARTIAL}", f"*{_REMOVED}", "*.orbax-checkpoint-tmp*")  # the last of earlier versions


def resume_hint(directory: pathlib.Path) -> str:
    """How to resume a training run in `directory`, as the end of a message."""
    steps = committed_steps(directory / "checkpoints")
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

    With several processes, every process must make every call, and all get the same result.
    """

    def __init__(self, directory: pathlib.Path, kept: int = 3, keep_every: int = 0, read_only: bool = False):
        """read_only: changes nothing in the directory, so that a run in progress is not disturbed."""
        self._directory, self._read_only = directory.absolute(), read_only
        self._kept, self._keep_every = kept, keep_every
        if not read_only:
            broadcast_from_process_0(self._clean_up)
        self._copies = HostCopies()
        self._thread = ThreadPoolExecutor(1, "checkpoints")
        self._saving: Future[None] | None = None  # None once it is known how the last save ended
        self._lock = threading.Lock()
        self._num_checks = 0
        self._last_check: float = math.inf  # the number of the last check that does not report a failed save

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if jax.process_count() > 1 and kind is not None and issubclass(kind, jax.errors.JaxRuntimeError):
            return  # another process may be lost, and the thread would wait for it
        self._thread.shutdown()
        if kind is None:  # otherwise the first error is more useful
            self._wait()

    def steps(self) -> list[int]:
        """Steps with a committed checkpoint, in increasing order."""
        return committed_steps(self._directory)

    def save(self, step: int, state: TrainState) -> None:
        """Copies the state to the host and writes it in the background. Raises: SaveError, also for an earlier save.

        It waits for an earlier save, and then for the copies alone. While they are written, the host holds them twice.
        """
        self._wait()
        try:
            copies = self._copies.copy(_items(state))
        except Exception as error:  # jax raises many types when the memory is full
            raise self._save_error(error) from error
        self._saving = self._thread.submit(self._write, step, copies)

    def _write(self, step: int, copies: Mapping[str, Any]) -> None:
        """Writes the part of this process and commits the step, in the background."""
        metadata = {"digests": digests.NAME}  # distinguishes a step that lost its digests from one that never had any
        try:
            part = self._part(step, jax.process_index())
            report = {"files": write_part(part, copies, metadata)}
            bucket_checkpoints.upload_part(part, report["files"], self._directory / str(step))
        except Exception as error:  # Orbax and tensorstore raise many types for a full disk
            report = {"error": _first_line(error)}
        try:
            call_on_process_0("save", functools.partial(self._commit, step), json.dumps(report))
        except Exception:
            self._agree_on_last_check()
            raise

    def _part(self, step: int, process: int) -> pathlib.Path:
        """Where a process writes its part of a step."""
        return self._directory / f"{step}{_PARTIAL}" / str(process)

    def _commit(self, step: int, reports: list[str]) -> None:
        """Makes the step exist and removes old ones. Raises: OSError, also if a process could not write its part."""
        tables = []
        try:
            for process, report in enumerate(map(json.loads, reports)):
                if "error" in report:
                    bucket_checkpoints.check_lease(self._directory)
                    raise OSError(f"process {process}: {report['error']}" if len(reports) > 1 else report["error"])
                tables.append(report["files"])
            parts = [self._part(step, process) for process in range(len(tables))]
            if find_mirror(self._directory):
                bucket_checkpoints.commit(parts[0], tables, self._directory / str(step))
            else:
                commit(parts, tables, self._directory / str(step))
        finally:
            shutil.rmtree(self._directory / f"{step}{_PARTIAL}", ignore_errors=True)
        for old in self.steps()[: -self._kept]:
            if not self._keep_every or old % self._keep_every:
                bucket_checkpoints.delete_step(self._directory / str(old))
                # Removing takes long, and would leave a damaged step where it is interrupted.
                shutil.rmtree(self._rename(self._directory / str(old), _REMOVED), ignore_errors=True)

    def _agree_on_last_check(self) -> None:
        """Makes every process report a failed save in the same call of `check`: none waits for another in a later step."""
        with self._lock:  # the main thread waits in its next call, so the counts stay
            try:
                self._last_check = call_on_process_0(
                    "checks", lambda counts: max(map(int, counts)), str(self._num_checks)
                )
            except Exception:  # a process is lost
                self._last_check = self._num_checks

    def check(self) -> None:
        """Raises: SaveError if a save in the background has failed; does not wait for it."""
        with self._lock:
            self._num_checks += 1
            has_failed = self._num_checks > self._last_check
        if has_failed:
            self._wait()

    def finish(self, step: int) -> None:
        """Waits for the background, then checks that `step` is committed. Raises: SaveError."""
        self._wait()
        if step not in broadcast_from_process_0(self.steps):
            raise self._save_error(f"step {step} is missing")

    def _wait(self) -> None:
        """Waits for the last save. Raises: SaveError, or what jax raises if another process is lost."""
        saving, self._saving = self._saving, None
        try:
            if saving is not None:
                saving.result()
        except Exception as error:
            self._last_check = math.inf
            if isinstance(error, LeaseLostError) or (
                isinstance(error, jax.errors.JaxRuntimeError) and is_peer_failure(error)
            ):
                raise
            raise self._save_error(error) from error

    def _save_error(self, reason: BaseException | str) -> SaveError:
        steps = self.steps()
        advice = "check the network and your permissions." if find_mirror(self._directory) else "is the disk full?"
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

        kind_of: "ema" or "raw" for a step, as `ema.weights_kind`. Raises: CheckpointError, as `restore`.
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
            abstract, items = abstract_of(step), None
            problem = broadcast_from_process_0(functools.partial(self._find_corruption, step, abstract))
            if problem is None:
                bucket_checkpoints.fetch_items(self._directory, step, abstract)
                self._check_leaves(step, abstract)
                try:
                    items = self._read(step, abstract)
                except Exception as error:  # Orbax and tensorstore raise many types for damaged files
                    problem = _first_line(error)
                if all_processes_agree(problem is None):
                    assert items is not None
                    self._set_aside(damaged)
                    return step, items
            damaged.append(step)
            log(f"The checkpoint of step {step} is damaged: {problem or 'another process cannot read it'}.")
        if damaged:
            raise CheckpointError(
                f"none of the checkpoints {damaged} in {self._directory} is intact; restore one from a copy, or use another "
                "--workdir"
            )
        return None

    def _find_corruption(self, step: int, items: Iterable[str]) -> str | None:
        bucket_checkpoints.fetch_items(self._directory, step, items)
        try:
            return digests.find_corruption(self._directory / str(step), items)
        except FileNotFoundError:
            log(f"The checkpoint of step {step} has no digests, as those of earlier versions; it is used unchecked.")
            return None

    def _check_leaves(self, step: int, abstract: Mapping[str, Any]) -> None:
        """Raises: CheckpointError if the arrays have other names, types or shapes than `abstract`, which Orbax would cast.

        The checkpoint is not set aside, because it is not damaged.
        """
        for name, tree in abstract.items():
            try:
                item = epath.Path(self._directory) / str(step) / name
                metadata = ocp.StandardCheckpointHandler().metadata(item).tree
            except Exception:  # a damaged file of a checkpoint without digests, which reading will report
                continue
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
        restores = {name: ocp.args.StandardRestore(tree) for name, tree in abstract.items()}
        composite = ocp.CompositeCheckpointHandler(
            composite_options=ocp.CompositeOptions(multiprocessing_options=own_options())
        )
        # A process that cannot read must not keep the others waiting.
        with ocp.Checkpointer(composite, multiprocessing_options=own_options()) as checkpointer:
            return checkpointer.restore(self._directory / str(step), args=ocp.args.Composite(**restores))

    def _set_aside(self, steps: list[int]) -> None:
        """Renames damaged steps, unless the directory is read-only."""
        for step in steps:
            if self._read_only:
                log("It is left unchanged; the checkpoint before it is used.")
                continue
            path = broadcast_from_process_0(functools.partial(self._rename, self._directory / str(step), _UNREADABLE))
            log(f"Renamed it to {path}; continuing from the checkpoint before it.")

    @staticmethod
    def _rename(path: pathlib.Path, suffix: str) -> str:
        """Appends a suffix to the name of a step, which removes it from the steps. Returns: the new path."""
        renamed = path.with_name(path.name + suffix)
        shutil.rmtree(renamed, ignore_errors=True)  # from an earlier launch
        path.rename(renamed)
        if suffix == _UNREADABLE:
            locations.moved(path, renamed)
        return str(renamed)

    def _uncommitted(self) -> list[str]:
        """Directories that are named like a step and not empty, but not committed."""
        committed = set(self.steps())
        paths = [path for path in self._directory.glob("*") if path.name.isdecimal() and path.is_dir()]
        return [path.name for path in paths if int(path.name) not in committed and any(path.iterdir())]

    def _clean_up(self) -> None:
        """Creates the directory, removes what an interrupted launch left, and sets aside steps that are not committed."""
        self._directory.mkdir(parents=True, exist_ok=True)
        for pattern in _LEFTOVERS:
            for path in self._directory.glob(pattern):
                shutil.rmtree(path)
        for name in self._uncommitted():
            log(f"The checkpoint of step {name} is damaged: {digests.COMMITTED} is missing.")
            log(f"Renamed it to {self._rename(self._directory / name, _UNREADABLE)}.")
        for path in self._directory.glob("*"):
            if path.name.isdecimal() and path.is_dir() and not any(path.iterdir()):
                path.rmdir()
        bucket_checkpoints.remove_uncommitted(self._directory)
