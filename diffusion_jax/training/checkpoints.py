"""Checkpoints, by Orbax: saved in the background, committed by a rename, restored to the bit.

A step's directory holds three parts, so that sampling reads only the weights it needs: `params`, `ema_params`, and `rest`
(optimiser, step, running sums).
"""

from __future__ import annotations

import pathlib
import shutil
from collections.abc import Mapping

import jax
import orbax.checkpoint as ocp

from diffusion_jax.training.step import TrainState

_WEIGHTS = ("params", "ema_params")


class CheckpointError(Exception):
    """A checkpoint that cannot be written or read: one line that says which and what to do."""


def _say(text: str) -> None:
    if jax.process_index() == 0:
        print(text, flush=True)


def _rest(state: TrainState) -> dict:
    """What a state holds besides its weights."""
    rest = {"opt_state": state.opt_state, "step": state.step, "window": state.window}
    return rest if state.loss_history is None else rest | {"loss_history": state.loss_history}


def committed_steps(directory: pathlib.Path) -> list[int]:
    """Steps with a committed checkpoint below `directory`, oldest first; Orbax itself would count an empty `7/` as one."""
    found = directory.glob("*/_CHECKPOINT_METADATA")
    return sorted(int(path.parent.name) for path in found if path.parent.name.isdecimal())


class Checkpoints:
    """The checkpoints of one run: the newest `kept`, and every `keep_every`-th step (0 for none) for good."""

    def __init__(self, directory: pathlib.Path, kept: int = 3, keep_every: int = 0, read_only: bool = False):
        """read_only: leaves everything in the directory as it is, so that a run in progress is not disturbed."""
        self._directory = directory.absolute()
        writing = {
            "max_to_keep": kept,
            "keep_period": keep_every or None,
            "cleanup_tmp_directories": True,
            "create": True,
        }
        options = ocp.CheckpointManagerOptions(read_only=True) if read_only else ocp.CheckpointManagerOptions(**writing)
        self._manager = ocp.CheckpointManager(self._directory, options=options)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_) -> None:
        self._manager.close()

    def steps(self) -> list[int]:
        """Steps with a committed checkpoint, oldest first."""
        return committed_steps(self._directory)

    def save(self, step: int, state: TrainState) -> None:
        """Copies the state to the host and writes it in the background; errors of an earlier save surface here."""
        parts = {name: getattr(state, name) for name in _WEIGHTS}
        saves = {name: ocp.args.StandardSave(tree) for name, tree in {**parts, "rest": _rest(state)}.items()}
        self._manager.save(step, args=ocp.args.Composite(**saves), force=True)

    def finish(self, step: int) -> None:
        """Waits for the background, then makes sure that `step` is really there. Raises: CheckpointError."""
        self._manager.wait_until_finished()
        if step not in self.steps():
            raise CheckpointError(
                f"the checkpoint of step {step} was not written below {self._directory}; is the disk full?"
            )

    def restore(self, abstract: TrainState) -> TrainState | None:
        """The newest readable state, on the shardings of `abstract`; None where there is no checkpoint.

        A checkpoint that cannot be read is renamed to `<step>.unreadable` and the one before it is used. Raises:
        CheckpointError where there are checkpoints and none can be read.
        """
        trees = {name: getattr(abstract, name) for name in _WEIGHTS} | {"rest": _rest(abstract)}
        failed: list[int] = []
        for step in reversed(self.steps()):
            try:
                parts = self._read(step, trees)
            except Exception as error:  # Orbax and tensorstore raise many types for damaged files
                failed.append(step)
                reason = str(error).strip().splitlines() or [type(error).__name__]
                _say(f"Cannot read the checkpoint of step {step}: {reason[0][:200]}")
                continue
            self._set_aside(failed)
            return TrainState(params=parts["params"], ema_params=parts["ema_params"], **parts["rest"])
        if failed:
            raise CheckpointError(f"none of the checkpoints {failed} below {self._directory} can be read")
        return None

    def restore_weights(self, abstract_params, ema: bool) -> tuple[int, Mapping] | None:
        """(step, params) of the newest checkpoint, the EMA's or the raw ones; None where there is no checkpoint."""
        steps = self.steps()
        if not steps:
            return None
        name = "ema_params" if ema else "params"
        try:
            return steps[-1], self._read(steps[-1], {name: abstract_params})[name]
        except Exception as error:
            raise CheckpointError(
                f"the checkpoint of step {steps[-1]} below {self._directory} cannot be read: {str(error)[:300]}"
            ) from error

    def _read(self, step: int, trees: Mapping) -> Mapping:
        restores = {name: ocp.args.StandardRestore(tree) for name, tree in trees.items()}
        return self._manager.restore(step, args=ocp.args.Composite(**restores))

    def _set_aside(self, steps: list[int]) -> None:
        for step in steps:
            path = self._directory / str(step)
            aside = path.with_name(f"{step}.unreadable")
            if jax.process_index() == 0:
                shutil.rmtree(aside, ignore_errors=True)  # of an earlier time
                path.rename(aside)
            _say(f"Set it aside as {aside}; continuing from the checkpoint before it.")
        if steps:
            self._manager.reload()
