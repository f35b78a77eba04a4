"""What the main thread cannot do while it computes: heed SIGTERM, and notice that nothing moves any more.

Exit codes, beside 0 (done), 1 (the run failed) and 2 (bad input): 75 where SIGTERM stopped the run, and 69 where another
process of it was lost or nothing moved. After both, the same command goes on.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator

import jax
from jax.experimental import multihost_utils

STOPPED, LOST = 75, 69  # EX_TEMPFAIL and EX_UNAVAILABLE of sysexits.h
_GRACE = 5.0  # seconds that Python's own way to end gets, before the process ends in the midst of a compiler


class Stopped(BaseException):
    """SIGTERM came, and what was worth saving is saved.

    No Exception: whoever catches those, as of files that may be damaged, must not take it for one of them.
    """


def end(message: str, exit_code: int) -> None:
    """Ends the process from any thread, at once, with one line; nothing is cleaned up, as after SIGKILL."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr, flush=True)
    os._exit(exit_code)


def several() -> bool:
    """Whether this is one of several processes that work together."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def leave(message: str, exit_code: int) -> None:
    """Ends one process of several, with one line, and without JAX's meeting of all at the exit, to which the others may never
    come. Process 0, whose end aborts whoever is left, gives them time to say the same."""
    if jax.process_index() == 0:
        print(f"error: {' '.join(message.split())}", file=sys.stderr, flush=True)
        time.sleep(_GRACE)
        os._exit(exit_code)
    end(message, exit_code)


def meet() -> None:
    """Waits for all processes, where there are several: what process 0 alone has still to write may take longer than JAX's
    own meeting at the exit allows."""
    if several():
        multihost_utils.sync_global_devices("the end")


def is_loss(error: BaseException) -> bool:
    """Whether that is how it looks when another process is gone."""
    if not several():
        return False
    text = f"{error} {error.__cause__}"
    return any(word in text for word in ("Gloo", "UNAVAILABLE", "DEADLINE_EXCEEDED", "heartbeat", "Connection"))


@contextlib.contextmanager
def _on_sigterm(handler, wakeup: int = -1) -> Iterator[None]:
    """Calls `handler` on SIGTERM, and writes the signal's number to the descriptor `wakeup`; changes nothing outside the main
    thread, to which signals belong."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    descriptor = signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)
    before = signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)  # None: it was not Python's
        signal.set_wakeup_fd(descriptor)


@contextlib.contextmanager
def stopping_at_once(training: bool = False) -> Iterator[None]:
    """For what has nothing to save, or keeps its parts as it makes them: SIGTERM raises Stopped in the main thread.

    Python heeds a signal between two lines of its own, and a program may compile for minutes: a thread ends the process where
    the exception has not. Processes that train together leave SIGTERM to `Preemption` from the first.
    """
    if training and several():
        yield
        return
    message = "stopped by SIGTERM; the same command goes on from what it had saved"

    def stop(*_):
        raise Stopped(message)

    def insist():
        deadline = None
        while select.select([ended], [], [], deadline and max(0.0, deadline - time.monotonic()))[0]:
            read = os.read(ended, 1)
            if not read:  # closed: the main thread went on
                return
            if read[0] == signal.SIGTERM and deadline is None:
                deadline = time.monotonic() + _GRACE
        end(message, STOPPED)

    ended, told = os.pipe()
    os.set_blocking(told, False)
    thread = threading.Thread(target=insist, daemon=True, name="sigterm")
    thread.start()
    try:
        with _on_sigterm(stop, told):
            yield
    finally:
        os.close(told)
        thread.join()
        os.close(ended)


class Preemption:
    """Whether the run was asked to stop: `asked()` after every call of the train step, by every process.

    Processes that work together agree on the step by JAX's own service, which has taken SIGTERM for itself when it was
    initialised; a process alone has a handler.
    """

    def __init__(self):
        self._asked, self._calls = False, 0

    @contextlib.contextmanager
    def heeded(self) -> Iterator[None]:
        """While the train loop runs."""

        def note(*_):
            self._asked = True

        with contextlib.nullcontext() if several() else _on_sigterm(note):
            yield

    def asked(self) -> bool:
        """True at the same call on every process."""
        self._calls += 1  # not the step: the service waits for the next whole number
        if several():
            return multihost_utils.reached_preemption_sync_point(self._calls)
        return self._asked


class Watchdog:
    """A thread that ends the process, with a line, where no step has finished for too long.

    Too long: `seconds`, or five times the longest time that a step has taken since the first, if that is longer; 0 for never.
    A process whose peer is alive but stuck waits for it inside a collective, where Python has no say.
    """

    def __init__(self, seconds: float):
        self._seconds, self._longest = seconds, 0.0
        self._beats = 0
        self._last: float | None = None  # None while nothing is expected to move
        self._finished = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="watchdog")

    def __enter__(self) -> Watchdog:
        if self._seconds:
            self._last = time.monotonic()
            self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._finished.set()
        if self._seconds:
            self._thread.join()

    def expect(self, seconds: float) -> None:
        """A step may well take this long."""
        self._longest = max(self._longest, seconds)

    def beat(self) -> None:
        """A step has finished, or been handed to the devices."""
        now = time.monotonic()
        self._beats += 1
        if self._last is not None and self._beats > 2:  # the first step also connects the processes
            self._longest = max(self._longest, now - self._last)
        self._last = now

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """While what takes its time is done: compilation, pictures, checkpoints."""
        self._last = None
        try:
            yield
        finally:
            self._last = time.monotonic()

    def _watch(self) -> None:
        while not self._finished.wait(min(1.0, self._seconds / 4)):
            last, limit = self._last, max(self._seconds, 5 * self._longest)
            if last is not None and time.monotonic() - last > limit:
                others = " or another process is stuck" if several() else ""
                end(
                    f"process {jax.process_index()}: no step has finished for {limit:.0f} s: the data{others}, or the limit "
                    "training.stall_timeout is too short; the same command goes on from the last checkpoint",
                    LOST,
                )


def over_batches(batches: Iterable[int], seconds: float) -> Iterator[int]:
    """Passes the numbers of batches through, and watches over what is done with each, where a peer could be stuck in it. The
    first may take any time: it is compiled.
    """
    with Watchdog(seconds if several() else 0) as watchdog:
        for i, batch in enumerate(batches):
            began = time.monotonic()
            with contextlib.nullcontext() if i else watchdog.paused():
                yield batch
            watchdog.expect(time.monotonic() - began)
            watchdog.beat()
