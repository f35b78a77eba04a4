"""Reactions to SIGTERM and Ctrl-C, in a thread: the main thread may compile, or wait for a device, for minutes."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

from jax.experimental import multihost_utils

from diffusion_jax.distributed.processes import abort_process, gather, is_multiprocess
from diffusion_jax.distributed.termination import EXIT_INTERRUPTED, EXIT_PREEMPTED, exit_now

__all__ = ["Preemption", "StoppedBySignal", "exit_on_signals", "rerun_hint"]

_REASONS = {signal.SIGTERM: "stopped by SIGTERM", signal.SIGINT: "interrupted by Ctrl-C"}


class StoppedBySignal(BaseException):
    """SIGTERM or Ctrl-C stopped the run after it saved its state.

    Not an Exception, so that code which catches any Exception, such as one for unreadable files, does not catch it.
    """

    def __init__(self, number: int, detail: str, is_computing: bool = False):
        """is_computing: a thread still computes, so the process must end by `termination.exit_now`."""
        super().__init__(f"{_REASONS[signal.Signals(number)]}{detail}")
        self.is_computing = is_computing
        self.exit_code = EXIT_PREEMPTED if number == signal.SIGTERM else EXIT_INTERRUPTED


def rerun_hint() -> str:
    """How to resume work that has no checkpoints, as the end of a message."""
    return "rerun the same command to continue from what is saved"


@contextlib.contextmanager
def exit_on_signals(resume_hint: Callable[[], str] = rerun_hint, only_interrupts: bool = False) -> Iterator[None]:
    """Makes SIGTERM and Ctrl-C end the process at once, for work that has no state to save or saves its results one by one.

    Result files are written completely or not at all, and locks end with the process.

    resume_hint: returns the end of the message, how to resume. only_interrupts: leaves SIGTERM to JAX's
    preemption service, as processes that train together must: `Preemption` asks the service.
    """

    def stop(number: signal.Signals) -> None:
        stopped = StoppedBySignal(number, f"; {resume_hint()}")
        (abort_process if is_multiprocess() else exit_now)(str(stopped), stopped.exit_code)

    with _handle_signals(only_interrupts, stop):
        yield


class Preemption:
    """Whether SIGTERM or Ctrl-C requested the run to stop. Every process calls `requested` after each call of the train step.

    Processes that work together agree on the step by JAX's preemption service, which has handled SIGTERM since it was
    initialized; a process that gets Ctrl-C sends itself SIGTERM. A single process handles both signals.
    """

    def __init__(self, resume_hint: Callable[[], str] = rerun_hint):
        """resume_hint: as for `exit_on_signals`."""
        self._resume_hint, self._num_calls = resume_hint, 0
        self._number: signal.Signals | None = None
        self._interrupted = False
        self.has_abandoned = False  # whether a function of `call` may still be computing

    def install_handler(self) -> contextlib.AbstractContextManager[None]:
        """Handles the signals inside the context; a second Ctrl-C ends the process at once."""
        return _handle_signals(is_multiprocess(), self._handle)

    def _handle(self, number: signal.Signals) -> None:
        if number == signal.SIGINT and self._interrupted:
            exit_now(f"stopped at once by a second Ctrl-C; {self._resume_hint()}", EXIT_INTERRUPTED)
        if number == signal.SIGINT:
            self._interrupted = True
            # Not `print`, which the main thread may hold.
            os.write(1, b"\nCtrl-C: saving after the steps in progress, two at most. Press it again to stop at once.\n")
            if is_multiprocess():
                os.kill(os.getpid(), signal.SIGTERM)
        self._number = self._number or number

    def requested(self) -> bool:
        """True in the same call on every process."""
        self._num_calls += 1  # counts calls, not steps, because the service needs consecutive integers
        if is_multiprocess():
            return multihost_utils.reached_preemption_sync_point(self._num_calls)
        return self._number is not None

    def call(self, function: Callable[[], Any]) -> tuple[bool, Any]:
        """Calls `function` in another thread, and does not wait for it any longer once a signal has arrived.

        For work of minutes that a later launch can repeat, such as a picture. Processes that work together wait for the
        function, because all take part in it.
        Returns: (True, the result), or (False, None) if the function was abandoned. Raises: what `function` raises.
        """
        if is_multiprocess():
            return True, function()
        if self._number is None:
            pool = ThreadPoolExecutor(1)
            result = pool.submit(function)
            pool.shutdown(wait=False)
            while self._number is None:
                if wait([result], timeout=0.1).done:
                    return True, result.result()
        self.has_abandoned = True
        return False, None

    def stop_exception(self, step: int) -> StoppedBySignal:
        """The exception to raise after `step` is saved. Every process must call this, and each gets the same."""
        number = self._number or signal.SIGTERM
        if signal.SIGINT in gather(int(number)):
            number = signal.SIGINT
        detail = f" at step {step}, which is saved; rerun the same command to resume from it"
        return StoppedBySignal(number, detail, self.has_abandoned)


@contextlib.contextmanager
def _handle_signals(only_interrupts: bool, handle: Callable[[signal.Signals], None]) -> Iterator[None]:
    """Calls `handle` in a thread for each SIGINT, and unless `only_interrupts`, each SIGTERM; only in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGINT,) if only_interrupts else (signal.SIGINT, signal.SIGTERM)
    reader, writer = socket.socketpair()  # not a pipe, to which Windows cannot write the signals
    writer.setblocking(False)

    def watch() -> None:
        while received := reader.recv(1):
            if received[0] in numbers:
                handle(signal.Signals(received[0]))

    thread = threading.Thread(target=watch, daemon=True, name="signals")
    thread.start()
    descriptor = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    previous = {number: signal.signal(number, lambda *_: None) for number in numbers}
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, signal.SIG_DFL if before is None else before)  # None: not installed by Python
        signal.set_wakeup_fd(descriptor)
        writer.close()
        thread.join()
        reader.close()
