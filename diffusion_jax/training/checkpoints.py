"""Checkpoints, by Orbax: saved in the background, committed by a rename, checked before they are read, restored to the bit.

A step's directory holds three parts, so that sampling reads only the weights it needs: `params`, `ema_params`, and `rest`
(optimizer, step, running sums); and the digests of all their files, which are committed with them.
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

import jax
import numpy as np
import orbax.checkpoint as ocp

from diffusion_jax.distributed.processes import all_processes_agree, broadcast_from_process_0
from diffusion_jax.errors import CheckpointError, SaveError
from diffusion_jax.training import digests
from diffusion_jax.training.digests import committed_steps
from diffusion_jax.training.state import TrainState

_WEIGHTS = ("params", "ema_params")


class _WithDigests(ocp.path.atomicity.AtomicRenameTemporaryPath):
    """A directory that gets its digests before the rename that commits it. Orbax's background thread calls this, on process
    0, when all processes have written their files: the train steps go on meanwhile (hashing releases the interpreter)."""

    async def finalize(self) -> None:
        try:
            if self.get_final().name.isdecimal():  # a step, not one of its parts
                await asyncio.to_thread(digests.write, pathlib.Path(self.get()))
            await super().finalize()
        except Exception as error:
            if jax.process_count() > 1:
                # The others wait for this process in the same place, and Orbax's threads would for ever.
                print(
                    f"error: a checkpoint could not be written ({_first_line(error)}); is the disk full?",
                    file=sys.stderr,
                )
                sys.stderr.flush()
                os._exit(1)
            raise


def _say(text: str) -> None:
    if jax.process_index() == 0:
        print(text, flush=True)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _rest(state: TrainState) -> dict:
    """What a state holds besides its weights."""
    rest = {"opt_state": state.opt_state, "step": state.step, "window": state.window}
    return rest if state.loss_history is None else rest | {"loss_history": state.loss_history}


def _leaves(tree) -> dict[str, str]:
    """{path of a leaf: its type and shape}; classes and dictionaries have the same paths."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    key = functools.partial(jax.tree_util.keystr, simple=True, separator="/")
    return {key(path): f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves}


def resume_hint(directory: pathlib.Path) -> str:
    """How to resume a training run in `directory`, as the end of a message."""
    steps = committed_steps(directory / "checkpoints")
    if not steps:
        return "nothing was saved yet"
    return f"step {steps[-1]} is saved; rerun the same command to resume from it"


class Checkpoints:
    """The checkpoints of one run: the newest `kept`, and every `keep_every`-th step (0 for none) for good.

    With several processes, all make every call, and all get the same answer.
    """

    def __init__(self, directory: pathlib.Path, kept: int = 3, keep_every: int = 0, read_only: bool = False):
        """read_only: leaves everything in the directory as it is, so that a run in progress is not disturbed."""
        self._directory, self._read_only = directory.absolute(), read_only
        writing = {
            "max_to_keep": kept,
            "keep_period": keep_every or None,
            "cleanup_tmp_directories": True,
            "create": True,
            "temporary_path_class": _WithDigests,
        }
        if not read_only:
            broadcast_from_process_0(self._set_aside_uncommitted)
        options = ocp.CheckpointManagerOptions(read_only=True) if read_only else ocp.CheckpointManagerOptions(**writing)
        self._manager = ocp.CheckpointManager(self._directory, options=options)
        self._writer, self._handed_over = ThreadPoolExecutor(1), Future()
        self._handed_over.set_result(None)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind, *_) -> None:
        if jax.process_count() > 1 and kind is not None and issubclass(kind, jax.errors.JaxRuntimeError):
            return  # a process is lost, and closing would wait for it
        try:
            self._writer.shutdown()
            try:
                self._handed_over.result()
            finally:
                self._manager.close()
        except Exception as error:
            if kind is None:  # else the first error is the one to tell
                raise SaveError(self._not_written(error)) from error

    def steps(self) -> list[int]:
        """Steps with a committed checkpoint, oldest first."""
        return committed_steps(self._directory)

    def save(self, step: int, state: TrainState) -> None:
        """Copies the state to the host and writes it in the background. Raises: SaveError, for an earlier save too.

        Orbax itself copies before it returns, but also keeps its books of every array, which takes several times as long. A
        process that has the whole state copies it and leaves all else to a thread, where Orbax copies once more: the host
        holds the state twice meanwhile. Of several processes each has a part, and Orbax's thread must meet theirs.
        """
        trees = {name: getattr(state, name) for name in _WEIGHTS} | {"rest": _rest(state)}
        try:
            self._handed_over.result()
            if jax.process_count() > 1:
                self._hand_over(step, trees)
            else:
                jax.tree.map(lambda leaf: leaf.copy_to_host_async(), trees)  # all at once, then one after the other
                copies = jax.tree.map(lambda leaf: np.array(leaf, copy=True), trees)
                self._handed_over = self._writer.submit(self._hand_over, step, copies)
        except Exception as error:  # Orbax and tensorstore raise many types where a disk is full
            raise SaveError(self._not_written(error)) from error

    def _hand_over(self, step: int, trees: Mapping) -> None:
        saves = {name: ocp.args.StandardSave(tree) for name, tree in trees.items()}
        mark = {"digests": digests.NAME}  # tells a step whose table is lost from one that never had any
        self._manager.save(step, args=ocp.args.Composite(**saves), force=True, custom_metadata=mark)

    def check(self) -> None:
        """Raises: SaveError where a save in the background has failed; does not wait."""
        if not self._handed_over.done():
            return
        try:
            self._handed_over.result()
            self._manager.check_for_errors()
        except Exception as error:
            raise SaveError(self._not_written(error)) from error

    def finish(self, step: int) -> None:
        """Waits for the background, then makes sure that `step` is really there. Raises: SaveError."""
        try:
            self._handed_over.result()
            self._manager.wait_until_finished()
        except Exception as error:
            raise SaveError(self._not_written(error)) from error
        if step not in broadcast_from_process_0(self.steps):
            raise SaveError(self._not_written(f"step {step} is not there"))

    def _not_written(self, error) -> str:
        kept = self.steps()
        return (
            f"a checkpoint could not be written below {self._directory} ({_first_line(error)}); is the disk full? "
            + (f"The checkpoint of step {kept[-1]} is kept" if kept else "There was none before it")
        )

    def restore(self, abstract: TrainState) -> TrainState | None:
        """The newest whole state, on the shardings of `abstract`; None where there is no checkpoint.

        A checkpoint whose files are not those that were saved is renamed to `<step>.unreadable` and the one before it is
        used. Raises: CheckpointError where there are checkpoints and none is whole, or the newest whole one is of another
        state than `abstract`.
        """
        found = self._newest({name: getattr(abstract, name) for name in _WEIGHTS} | {"rest": _rest(abstract)})
        if found is None:
            return None
        parts = found[1]
        return TrainState(params=parts["params"], ema_params=parts["ema_params"], **parts["rest"])

    def restore_weights(self, abstract_params, ema: bool) -> tuple[int, Mapping] | None:
        """(step, params) of the newest whole checkpoint, the EMA's or the raw ones; None where there is no checkpoint.

        Raises: CheckpointError, as `restore`.
        """
        name = "ema_params" if ema else "params"
        found = self._newest({name: abstract_params})
        return None if found is None else (found[0], found[1][name])

    def whole_step(self) -> int | None:
        """The newest step all of whose files are those that were saved, without reading it; None where there is none."""
        for step in reversed(broadcast_from_process_0(self.steps)):
            if broadcast_from_process_0(lambda: self._damage(step, (*_WEIGHTS, "rest"))) is None:  # noqa: B023 (called at once)
                return step
        return None

    def _newest(self, trees: Mapping) -> tuple[int, Mapping] | None:
        """(step, parts) of the newest checkpoint whose `trees` are whole."""
        damaged: list[int] = []
        for name in broadcast_from_process_0(self._uncommitted) if self._read_only else ():
            _say(f"Note: {self._directory / name} is no finished checkpoint; it is passed over.")
        for step in reversed(broadcast_from_process_0(self.steps)):
            problem = broadcast_from_process_0(lambda: self._damage(step, trees))  # noqa: B023 (called at once)
            if problem is None:
                self._check_fits(step, trees)
                try:
                    parts = self._read(step, trees)
                except Exception as error:  # Orbax and tensorstore raise many types for damaged files
                    problem = _first_line(error)
                if all_processes_agree(problem is None):
                    self._set_aside(damaged)
                    return step, parts
            damaged.append(step)
            _say(f"The checkpoint of step {step} is damaged: {problem or 'another process cannot read it'}.")
        if damaged:
            raise CheckpointError(f"none of the checkpoints {damaged} below {self._directory} is whole")
        return None

    def _damage(self, step: int, trees: Iterable[str]) -> str | None:
        try:
            return digests.find_corruption(self._directory / str(step), trees)
        except FileNotFoundError:
            _say(f"The checkpoint of step {step} has no digests, being of an earlier version: it is used as it is.")
            return None

    def _check_fits(self, step: int, trees: Mapping) -> None:
        """Raises: CheckpointError where the arrays are others than those of `trees`: Orbax would cast them, or complain of
        itself. Nothing is set aside, for nothing is damaged."""
        for name, tree in trees.items():
            try:
                saved = ocp.StandardCheckpointHandler().metadata(self._directory / str(step) / name).tree
            except Exception:  # a damaged file, of a checkpoint without digests: reading it will say so
                continue
            theirs, ours = _leaves(saved), _leaves(tree)
            differing = [key for key in sorted(theirs.keys() | ours.keys()) if theirs.get(key) != ours.get(key)]
            if differing:
                key = differing[0]
                raise CheckpointError(
                    f"the checkpoint of step {step} below {self._directory} is of another state: {name}/{key} is "
                    f"{theirs.get(key, 'not there')}, here {ours.get(key, 'not there')} (and {len(differing) - 1} others "
                    "differ); use the config and the version that wrote it, or another --workdir"
                )

    def _read(self, step: int, trees: Mapping) -> Mapping:
        restores = {name: ocp.args.StandardRestore(tree) for name, tree in trees.items()}
        return self._manager.restore(step, args=ocp.args.Composite(**restores))

    def _set_aside(self, steps: list[int]) -> None:
        """Renames damaged steps, unless the directory is only read."""
        for step in steps:
            if self._read_only:
                _say("It is left as it is; the checkpoint before it is used.")
                continue
            aside = broadcast_from_process_0(lambda: self._rename(self._directory / str(step)))  # noqa: B023 (called at once)
            _say(f"Set it aside as {aside}; continuing from the checkpoint before it.")
        if steps and not self._read_only:
            self._manager.reload()

    @staticmethod
    def _rename(path: pathlib.Path) -> str:
        aside = path.with_name(f"{path.name}.unreadable")
        shutil.rmtree(aside, ignore_errors=True)  # of an earlier time
        path.rename(aside)
        return str(aside)

    def _uncommitted(self) -> list[str]:
        """Directories named like a step that hold something else than one."""
        committed = set(self.steps())
        paths = [path for path in self._directory.glob("*") if path.name.isdecimal() and path.is_dir()]
        return [path.name for path in paths if int(path.name) not in committed and any(path.iterdir())]

    def _set_aside_uncommitted(self) -> None:
        """Clears the way for steps to come: a directory named like a step that is none, empty or without the file that
        commits it, would be one to Orbax, which then refuses to save that step."""
        for name in self._uncommitted():
            _say(f"The checkpoint of step {name} is damaged: {digests.COMMITTED} is missing.")
            _say(f"Set it aside as {self._rename(self._directory / name)}.")
        for path in self._directory.glob("*"):
            if path.name.isdecimal() and path.is_dir() and not any(path.iterdir()):
                path.rmdir()
