"""The handler of SIGTERM and Ctrl-C. It works in a thread: the main thread may compile, or wait for a device, for minutes."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

from jax.experimental import multihost_utils

from diffusion_jax.distributed.processes import (
    EXIT_INTERRUPTED,
    EXIT_PREEMPTED,
    abort_process,
    exit_now,
    gather,
    is_multiprocess,
)

__all__ = ["PROGRAM", "SignalHandler", "StoppedBySignal", "rerun_hint"]

_REASONS = {signal.SIGTERM: "stopped by SIGTERM", signal.SIGINT: "interrupted by Ctrl-C"}


class StoppedBySignal(BaseException):
    """SIGTERM or Ctrl-C stopped the run after it saved its state.

    Not an Exception, so that code which catches any Exception, such as one for unreadable files, does not catch it.
    """

    def __init__(self, number: int, detail: str, is_computing: bool = False):
        """is_computing: a thread still computes, so the process must end by `processes.exit_now`."""
        super().__init__(f"{_REASONS[signal.Signals(number)]}{detail}")
        self.is_computing = is_computing
        self.exit_code = EXIT_PREEMPTED if number == signal.SIGTERM else EXIT_INTERRUPTED


def rerun_hint() -> str:
    """How to resume work that has no checkpoints, as the end of a message."""
    return "rerun the same command to continue from what is saved"


class SignalHandler:
    """Handles SIGTERM and Ctrl-C from `install`, or inside its context.

    A signal ends the process at once with one line: result files are written completely or not at all, and locks end with
    the process. A handler with `saves`, that of a train loop, instead notes the first signal; every process calls `requested`
    after each call of the train step, and saves when it is true. A second Ctrl-C ends the process at once.

    Processes that train together agree on the step by JAX's preemption service, which handles SIGTERM since the processes
    were joined; a process that gets Ctrl-C sends itself SIGTERM.

    resume_hint: returns the end of the message, how to resume. has_abandoned: whether a function of `call` may still be
    computing.
    """

    def __init__(self, resume_hint: Callable[[], str] = rerun_hint, saves: bool = False):
        self.resume_hint, self.has_abandoned = resume_hint, False
        self._saves, self._num_calls = saves, 0
        self._number: signal.Signals | None = None  # of the first signal
        self._interrupted = False
        self._writer: socket.socket | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def install(self) -> None:
        """Handles the signals from now on, also if something else has taken them over since the last call.

        Does nothing outside of the main thread.
        """
        if threading.current_thread() is not threading.main_thread():
            return
        if self._writer is None:
            reader, self._writer = socket.socketpair()  # not a pipe, to which Windows cannot write the signals
            self._writer.setblocking(False)
            self._thread = threading.Thread(target=self._watch, args=(reader,), daemon=True, name="signals")
            self._thread.start()
        self._descriptor = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        is_left_to_jax = self._saves and is_multiprocess()
        for number in (signal.SIGINT,) if is_left_to_jax else (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, lambda *_: None)

    def __enter__(self) -> SignalHandler:
        self.install()
        return self

    def __exit__(self, *_) -> None:
        if self._writer is None:
            return
        for number, before in self._previous.items():
            signal.signal(number, signal.SIG_DFL if before is None else before)  # None: not installed by Python
        signal.set_wakeup_fd(self._descriptor)
        self._writer.close()
        self._thread.join()

    def _watch(self, reader: socket.socket) -> None:
        with reader:
            while received := reader.recv(1):
                if received[0] in _REASONS:
                    self._handle(signal.Signals(received[0]))

    def _handle(self, number: signal.Signals) -> None:
        if not self._saves:
            stopped = StoppedBySignal(number, f"; {self.resume_hint()}")
            return (abort_process if is_multiprocess() else exit_now)(str(stopped), stopped.exit_code)
        if number == signal.SIGINT and self._interrupted:
            exit_now(f"stopped at once by a second Ctrl-C; {self.resume_hint()}", EXIT_INTERRUPTED)
        if number == signal.SIGINT:
            self._interrupted = True
            # Not `print`, which the main thread may hold.
            os.write(1, b"\nCtrl-C: saving after the steps in progress, two at most. Press it again to stop at once.\n")
            if is_multiprocess():
                os.kill(os.getpid(), signal.SIGTERM)
        self._number = self._number or number

    def requested(self) -> bool:
        """Whether a signal requested to stop; true in the same call on every process."""
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


PROGRAM = SignalHandler()  # of the whole program; a train loop has another one inside
