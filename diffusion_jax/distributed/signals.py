"""Handles SIGTERM and Ctrl-C in a thread, because the main thread may compile, or wait for a device, for minutes."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
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

_REASONS = {signal.SIGTERM: "stopped by SIGTERM", signal.SIGINT: "interrupted by Ctrl-C"}


class StoppedBySignal(BaseException):
    """SIGTERM or Ctrl-C stopped the run after it saved its state.

    The base class is BaseException, so that code that catches every Exception, such as for unreadable files, does not catch a
    signal.
    """

    def __init__(self, number: int, detail: str):
        super().__init__(f"{_REASONS[signal.Signals(number)]}{detail}")
        self.exit_code = EXIT_PREEMPTED if number == signal.SIGTERM else EXIT_INTERRUPTED


class SignalHandler:
    """Handles SIGTERM and Ctrl-C after `install`, or inside `saving`.

    A signal ends the process at once with one line: result files are written completely or not at all, and locks end with the
    process. Inside `saving`, the first signal is only recorded: the train loop of every process calls `requested` in each
    iteration, and saves if the result is True. A second Ctrl-C ends the process at once.

    With several processes, JAX's preemption service chooses the step at which all processes save. The service handles
    SIGTERM from the time when the processes were joined; a process that gets Ctrl-C sends SIGTERM to itself.

    resume_hint: a function that returns the end of the message: how to resume.
    """

    def __init__(self):
        self.resume_hint: Callable[[], str] = lambda: "rerun the same command to continue from the saved files"
        self._writer: socket.socket | None = None  # None: not installed
        self._previous: dict[signal.Signals, Any] = {}
        self._is_saving = False
        self._number: signal.Signals | None = None  # the first signal inside `saving`

    def install(self, *numbers: signal.Signals) -> None:
        """Handles `numbers`, by default both signals, also if other code has replaced the handlers.

        Does nothing outside of the main thread.
        """
        if threading.current_thread() is not threading.main_thread():
            return
        if self._writer is None:
            reader, self._writer = socket.socketpair()  # on Windows, signals cannot be written to a pipe
            self._writer.setblocking(False)
            self._thread = threading.Thread(target=self._watch, args=(reader,), daemon=True, name="signals")
            self._thread.start()
        self._descriptor = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        for number in numbers or _REASONS:
            self._previous[number] = signal.signal(number, lambda *_: None)

    def _uninstall(self) -> None:
        if self._writer is None:
            return
        for number, before in self._previous.items():
            signal.signal(number, signal.SIG_DFL if before is None else before)  # None: not installed by Python
        signal.set_wakeup_fd(self._descriptor)
        self._writer.close()
        self._thread.join()
        self._writer = None

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """Records signals inside the block, so that the train loop can save; calls `install` if the program did not."""
        self._number, self._interrupted, self._num_calls = None, False, 0
        is_in_program, self._is_saving = self._writer is not None, True
        if not is_in_program:
            self.install(*(signal.SIGINT,) if is_multiprocess() else _REASONS)  # JAX's service handles SIGTERM
        try:
            yield
        finally:
            self._is_saving = False
            if not is_in_program:
                self._uninstall()

    def _watch(self, reader: socket.socket) -> None:
        with reader:
            while received := reader.recv(1):
                if received[0] in _REASONS:
                    self._handle(signal.Signals(received[0]))

    def _handle(self, number: signal.Signals) -> None:
        if not self._is_saving:
            stopped = StoppedBySignal(number, f"; {self.resume_hint()}")
            return (abort_process if is_multiprocess() else exit_now)(str(stopped), stopped.exit_code)
        if number == signal.SIGINT and self._interrupted:
            exit_now(f"stopped at once by a second Ctrl-C; {self.resume_hint()}", EXIT_INTERRUPTED)
        if number == signal.SIGINT:
            self._interrupted = True
            # `print` could block, because the main thread may hold its lock.
            os.write(1, b"\nCtrl-C: saving after the steps in progress. Press it again to stop at once.\n")
            if is_multiprocess():
                os.kill(os.getpid(), signal.SIGTERM)
        self._number = self._number or number

    def requested(self) -> bool:
        """Returns whether a signal requested a stop; the same call returns True on every process."""
        self._num_calls += 1  # counts calls, not steps, because the service needs consecutive integers
        if is_multiprocess():
            return multihost_utils.reached_preemption_sync_point(self._num_calls)
        return self._number is not None

    def stop_exception(self, step: int) -> StoppedBySignal:
        """Returns the exception to raise after `step` is saved. Every process must call this, and gets the same result."""
        number = self._number or signal.SIGTERM
        if signal.SIGINT in gather(int(number)):
            number = signal.SIGINT
        detail = f" at step {step}, which is saved; rerun the same command to resume from it"
        return StoppedBySignal(number, detail)


HANDLER = SignalHandler()
