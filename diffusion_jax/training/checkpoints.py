"""Checkpoints by Orbax: saved in the background, committed by a rename, checked when read, restored bit-identically.

A step's directory holds three items, so that sampling reads only the weights it needs: `params`, `ema_params`, and `rest`
(optimizer, step, window of metrics); and the digests of all their files, which are committed with them.
"""

from __future__ import annotations

import asyncio
import functools
import os
import pathlib
import shutil
import sys
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from diffusion_jax.distributed.processes import all_processes_agree, broadcast_from_process_0, log
from diffusion_jax.errors import CheckpointError, SaveError
from diffusion_jax.storage import locations
from diffusion_jax.storage.locations import find_mirror
from diffusion_jax.training import bucket_checkpoints, digests
from diffusion_jax.training.digests import committed_steps
from diffusion_jax.training.state import TrainState

__all__ = ["Checkpoints", "committed_steps", "resume_hint"]

_WEIGHTS = ("params", "ema_params")


def resume_hint(directory: pathlib.Path) -> str:
    """How to resume a training run in `directory`, as the end of a message."""
    steps = committed_steps(directory / "checkpoints")
    if not steps:
        return "nothing was saved yet"
    return f"step {steps[-1]} is saved; rerun the same command to resume from it"


class _DirectoryWithDigests(ocp.path.atomicity.AtomicRenameTemporaryPath):
    """A directory that gets its digests before the rename that commits it.

    Orbax's background thread calls `finalize` on process 0 after all processes have written their files. Training continues
    meanwhile, because hashing releases the interpreter lock.
    """

    async def finalize(self) -> None:
        try:
            if self.get_final().name.isdecimal():  # a step, not one of its items
                await asyncio.to_thread(digests.write, pathlib.Path(self.get()))
            await super().finalize()
        except Exception as error:
            if jax.process_count() > 1:
                # The other processes wait for this one here, and Orbax's threads would wait forever.
                message = f"error: a checkpoint could not be written ({_first_line(error)}); is the disk full?"
                print(message, file=sys.stderr, flush=True)
                os._exit(SaveError.exit_code)
            raise


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
        if read_only:
            options = ocp.CheckpointManagerOptions(read_only=True)
        else:
            broadcast_from_process_0(self._set_aside_uncommitted)
            broadcast_from_process_0(functools.partial(bucket_checkpoints.remove_uncommitted, self._directory))
            options = ocp.CheckpointManagerOptions(
                max_to_keep=kept,
                keep_period=keep_every or None,
                cleanup_tmp_directories=True,
                create=True,
                temporary_path_class=_DirectoryWithDigests,
            )
        self._manager = ocp.CheckpointManager(self._directory, options=options)
        self._thread = ThreadPoolExecutor(1)
        self._started: Future[None] = Future()  # whether Orbax has taken over the last save
        self._started.set_result(None)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if jax.process_count() > 1 and kind is not None and issubclass(kind, jax.errors.JaxRuntimeError):
            return  # another process may be lost, and closing would wait for it
        try:
            self._thread.shutdown()
            try:
                self._started.result()
            finally:
                self._manager.close()
        except Exception as close_error:
            if kind is None:  # otherwise the first error is more useful
                raise self._save_error(close_error) from close_error

    def steps(self) -> list[int]:
        """Steps with a committed checkpoint, in increasing order."""
        return committed_steps(self._directory)

    def save(self, step: int, state: TrainState) -> None:
        """Copies the state to the host and writes it in the background. Raises: SaveError, also for an earlier save.

        Orbax alone would copy the state too, but block the train loop 0.65 s for 572 MB in 1,332 arrays, most of it
        bookkeeping for each array, instead of 0.07 s (benchmarks/checkpoints.py). A single process therefore copies the
        state itself and calls Orbax in a thread, for which the host holds the state twice. Several processes call Orbax in
        the main thread, because it synchronizes them.
        """
        items = _items(state)
        try:
            self._started.result()
            if jax.process_count() > 1:
                self._start_save(step, items)
            else:
                jax.tree.map(lambda leaf: leaf.copy_to_host_async(), items)  # starts all copies before waiting for one
                copies = jax.tree.map(lambda leaf: np.array(leaf, copy=True), items)
                self._started = self._thread.submit(self._start_save, step, copies)
        except Exception as error:  # Orbax and tensorstore raise many types for a full disk
            raise self._save_error(error) from error

    def _start_save(self, step: int, items: Mapping[str, Any]) -> None:
        saves = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
        metadata = {"digests": digests.NAME}  # distinguishes a step that lost its digests from one that never had any
        self._manager.save(step, args=ocp.args.Composite(**saves), force=True, custom_metadata=metadata)
        if find_mirror(self._directory):
            self._manager.wait_until_finished()
            bucket_checkpoints.publish(self._directory, step)

    def check(self) -> None:
        """Raises: SaveError if a save in the background has failed; does not wait."""
        if not self._started.done():
            return
        try:
            self._started.result()
            self._manager.check_for_errors()
        except Exception as error:
            raise self._save_error(error) from error

    def finish(self, step: int) -> None:
        """Waits for the background, then checks that `step` is committed. Raises: SaveError."""
        try:
            self._started.result()
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._save_error(error) from error
        if step not in broadcast_from_process_0(self.steps):
            raise self._save_error(f"step {step} is missing")

    def _save_error(self, reason: BaseException | str) -> SaveError:
        steps = self.steps()
        return SaveError(
            f"a checkpoint could not be written in {self._directory} ({_first_line(reason)}); is the disk full? "
            + (f"The checkpoint of step {steps[-1]} is kept" if steps else "There is no earlier checkpoint")
        )

    def restore(self, abstract: TrainState) -> TrainState | None:
        """The newest intact state, on the shardings of `abstract`; None if there is no checkpoint.

        A checkpoint whose files are not those that were saved is renamed to `<step>.unreadable`, and the one before it is
        used. Raises: CheckpointError if there are checkpoints but none is intact, or if the newest intact one holds another
        state than `abstract`.
        """
        restored = self._restore_newest(_items(abstract))
        if restored is None:
            return None
        _, items = restored
        return TrainState(params=items["params"], ema_params=items["ema_params"], **items["rest"])

    def restore_weights(self, abstract_params: Any, ema: bool) -> tuple[int, Any] | None:
        """(step, params) of the newest intact checkpoint, the EMA's or the raw ones; None if there is no checkpoint.

        Raises: CheckpointError, as `restore`.
        """
        name = "ema_params" if ema else "params"
        restored = self._restore_newest({name: abstract_params})
        return None if restored is None else (restored[0], restored[1][name])

    def newest_intact_step(self) -> int | None:
        """The newest step whose files are all as they were saved; restores nothing. None if there is none."""
        for step in reversed(broadcast_from_process_0(self.steps)):
            if broadcast_from_process_0(functools.partial(self._find_corruption, step, (*_WEIGHTS, "rest"))) is None:
                return step
        return None

    def _restore_newest(self, abstract: Mapping[str, Any]) -> tuple[int, Mapping[str, Any]] | None:
        """(step, items) of the newest checkpoint in which the items of `abstract` are intact."""
        damaged: list[int] = []
        for name in broadcast_from_process_0(self._uncommitted) if self._read_only else ():
            log(f"Note: {self._directory / name} is not a finished checkpoint; it is ignored.")
        for step in reversed(broadcast_from_process_0(self.steps)):
            items = None
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
        return self._manager.restore(step, args=ocp.args.Composite(**restores))

    def _set_aside(self, steps: list[int]) -> None:
        """Renames damaged steps, unless the directory is read-only."""
        for step in steps:
            if self._read_only:
                log("It is left unchanged; the checkpoint before it is used.")
                continue
            path = broadcast_from_process_0(functools.partial(self._rename, self._directory / str(step)))
            log(f"Renamed it to {path}; continuing from the checkpoint before it.")
        if steps and not self._read_only:
            self._manager.reload()

    @staticmethod
    def _rename(path: pathlib.Path) -> str:
        unreadable = path.with_name(f"{path.name}.unreadable")
        shutil.rmtree(unreadable, ignore_errors=True)  # from an earlier launch
        path.rename(unreadable)
        locations.moved(path, unreadable)
        return str(unreadable)

    def _uncommitted(self) -> list[str]:
        """Directories that are named like a step and not empty, but not committed."""
        committed = set(self.steps())
        paths = [path for path in self._directory.glob("*") if path.name.isdecimal() and path.is_dir()]
        return [path.name for path in paths if int(path.name) not in committed and any(path.iterdir())]

    def _set_aside_uncommitted(self) -> None:
        """Renames or removes directories that are named like a step but not committed: Orbax would not save that step."""
        for name in self._uncommitted():
            log(f"The checkpoint of step {name} is damaged: {digests.COMMITTED} is missing.")
            log(f"Renamed it to {self._rename(self._directory / name)}.")
        for path in self._directory.glob("*"):
            if path.name.isdecimal() and path.is_dir() and not any(path.iterdir()):
                path.rmdir()
