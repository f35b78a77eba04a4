"""Reactions to SIGTERM and Ctrl-C."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

import numpy as np
from jax.experimental import multihost_utils

from diffusion_jax.distributed.processes import abort_process, is_multiprocess
from diffusion_jax.distributed.termination import EXIT_INTERRUPTED, EXIT_PREEMPTED, exit_now

__all__ = ["Preemption", "StoppedBySignal", "exit_on_signals", "rerun_hint"]

Handler = Callable[[int, FrameType | None], None]

_REASONS = {signal.SIGTERM: "stopped by SIGTERM", signal.SIGINT: "interrupted by Ctrl-C"}


class StoppedBySignal(BaseException):
    """SIGTERM or Ctrl-C stopped the run after it saved its state.

    Not an Exception, so that code which catches any Exception, such as one for unreadable files, does not catch it.
    """

    def __init__(self, number: int, detail: str):
        super().__init__(f"{_REASONS[signal.Signals(number)]}{detail}")
        self.exit_code = EXIT_PREEMPTED if number == signal.SIGTERM else EXIT_INTERRUPTED


def rerun_hint() -> str:
    """How to resume work that has no checkpoints, as the end of a message."""
    return "rerun the same command to continue from what is saved"


@contextlib.contextmanager
def exit_on_signals(
    resume_hint: Callable[[], str] = rerun_hint, only_interrupts: bool = False, grace: float = 5.0
) -> Iterator[None]:
    """Makes SIGTERM and Ctrl-C end the process, for work that has no state to save or saves its results one by one.

    The process ends at once, or after `grace` seconds if the main thread is inside a compiler. The handler does not raise: it
    may run in a callback that discards exceptions, and a regular exit unloads libraries while the devices still compute.
    Result files are written completely or not at all, and locks end with the process.

    resume_hint: returns the end of the message, how to resume. only_interrupts: leaves SIGTERM to JAX's
    preemption service, as processes that train together must: `Preemption` asks the service.
    """

    def handler(number: int, _: FrameType | None) -> None:
        stopped = StoppedBySignal(number, f"; {resume_hint()}")
        (abort_process if is_multiprocess() else exit_now)(str(stopped), stopped.exit_code)

    numbers = (signal.SIGINT,) if only_interrupts else (signal.SIGINT, signal.SIGTERM)
    with _install_handler(numbers, handler, resume_hint, grace):
        yield


class Preemption:
    """Whether SIGTERM or Ctrl-C requested the run to stop. Every process calls `requested` after each call of the train step.

    Processes that work together agree on the step by JAX's preemption service, which has handled SIGTERM since it was
    initialized; a process that gets Ctrl-C sends itself SIGTERM. A single process handles both signals.
    """

    def __init__(self, resume_hint: Callable[[], str] = rerun_hint):
        """resume_hint: as for `exit_on_signals`."""
        self._resume_hint, self._num_calls = resume_hint, 0
        self._number: int | None = None
        self._interrupted = False

    @contextlib.contextmanager
    def install_handler(self) -> Iterator[None]:
        """Handles the signals inside the context; a second Ctrl-C ends the process at once."""

        def handler(number: int, _: FrameType | None) -> None:
            if number == signal.SIGINT and not self._interrupted:
                self._interrupted = True
                # Not `print`, which this signal may have interrupted.
                os.write(
                    1, b"\nCtrl-C: saving after the steps in progress, two at most. Press it again to stop at once.\n"
                )
                if is_multiprocess():
                    os.kill(os.getpid(), signal.SIGTERM)
            self._number = self._number or number

        numbers = (signal.SIGINT,) if is_multiprocess() else (signal.SIGINT, signal.SIGTERM)
        with _install_handler(numbers, handler, self._resume_hint, None):
            yield

    def requested(self) -> bool:
        """True in the same call on every process."""
        self._num_calls += 1  # counts calls, not steps, because the service needs consecutive integers
        if is_multiprocess():
            return multihost_utils.reached_preemption_sync_point(self._num_calls)
        return self._number is not None

    def stop_exception(self, step: int) -> StoppedBySignal:
        """The exception to raise after `step` is saved. Every process must call this, and each gets the same."""
        number = self._number or signal.SIGTERM
        if is_multiprocess() and np.any(multihost_utils.process_allgather(np.array(number == signal.SIGINT))):
            number = signal.SIGINT
        detail = f" at step {step}, which is saved; rerun the same command to resume from it"
        return StoppedBySignal(number, detail)


@contextlib.contextmanager
def _install_handler(
    numbers: tuple[signal.Signals, ...], handler: Handler, resume_hint: Callable[[], str], grace: float | None
) -> Iterator[None]:
    """Calls `handler` in the main thread for each of the signals, and `_force_exit` in another thread.

    Two threads are needed because Python calls handlers between two bytecode instructions, and the main thread may compile,
    or wait for a device, for minutes. Outside the main thread this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reader, writer = socket.socketpair()  # not a pipe, which `select` cannot wait for on Windows
    writer.setblocking(False)
    thread = threading.Thread(
        target=_force_exit, args=(reader, numbers, resume_hint, grace), daemon=True, name="signals"
    )
    thread.start()
    descriptor = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    previous = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, signal.SIG_DFL if before is None else before)  # None: not installed by Python
        signal.set_wakeup_fd(descriptor)
        writer.close()
        thread.join()
        reader.close()


def _force_exit(
    reader: socket.socket, numbers: tuple[signal.Signals, ...], resume_hint: Callable[[], str], grace: float | None
) -> None:
    """Ends the process at a second Ctrl-C, and `grace` seconds (None for never) after the first signal.

    reader: receives the number of each signal as one byte, and is closed when the handler is removed.
    """
    first: int | None = None
    deadline: float | None = None
    num_interrupts = 0
    while select.select([reader], [], [], deadline and max(0.0, deadline - time.monotonic()))[0]:
        received = reader.recv(1)
        if not received:
            return
        if received[0] not in numbers:
            continue
        num_interrupts += received[0] == signal.SIGINT
        if num_interrupts == 2:
            exit_now(f"stopped at once by a second Ctrl-C; {resume_hint()}", EXIT_INTERRUPTED)
        if grace is not None and first is None:
            first, deadline = received[0], time.monotonic() + grace
    assert first is not None
    stopped = StoppedBySignal(first, f"; {resume_hint()}")
    exit_now(str(stopped), stopped.exit_code)
