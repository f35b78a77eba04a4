"""What the main thread cannot do while it computes: react to SIGTERM and Ctrl-C, and notice that nothing moves any more.

Exit codes, beside 0 (done), 1 (the run failed) and 2 (bad input): 75 where SIGTERM stopped the run, 130 where Ctrl-C did, and
69 where another process of it was lost or nothing moved. After all three, the same command resumes the run.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pathlib
import select
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils

from diffusion_jax.training.digests import committed_steps

STOPPED, LOST = 75, 69  # EX_TEMPFAIL and EX_UNAVAILABLE of sysexits.h
INTERRUPTED = 130  # what shells report for SIGINT
_NAMES = {signal.SIGTERM: "stopped by SIGTERM", signal.SIGINT: "interrupted by Ctrl-C"}
_GRACE = 5.0  # seconds until the process ends in the midst of a compiler, too


class Stopped(BaseException):
    """SIGTERM or Ctrl-C came, and everything worth saving is saved.

    Not an Exception, so that code which catches those, as for files that may be damaged, does not catch this one.
    """

    def __init__(self, number: int, detail: str):
        super().__init__(f"{_NAMES[number]}{detail}")
        self.exit_code = STOPPED if number == signal.SIGTERM else INTERRUPTED


_LAST_LINE = threading.Lock()  # acquired by whoever writes the last line, and never released


def _write_last_line(message: str) -> None:
    """Writes the line, unless another thread or signal handler has written one; not by `print`, which may be what the signal
    interrupted."""
    if _LAST_LINE.acquire(blocking=False):
        if sys.stdout.isatty():
            os.write(1, b"\x1b[?25h\n")  # shows the cursor, which a progress bar hides
        os.write(2, f"error: {' '.join(message.split())}\n".encode())


def _exit(exit_code: int) -> None:
    """Ends the process now, and those that read data for it, which would otherwise wait for it."""
    with contextlib.suppress(Exception):
        for child in multiprocessing.active_children():
            child.kill()
    os._exit(exit_code)


def end(message: str, exit_code: int) -> None:
    """Ends the process from any thread or signal handler, at once, with one line; nothing is cleaned up, as after SIGKILL."""
    _write_last_line(message)
    _exit(exit_code)


def is_multiprocess() -> bool:
    """Whether this is one of several processes that work together."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def abort_process(message: str, exit_code: int) -> None:
    """Ends one process of several, with one line, and without JAX's meeting of all at the exit, to which the others may never
    come. Process 0, whose end aborts whoever is left, gives them time to say the same."""
    _write_last_line(message)
    if jax.process_index() == 0:
        time.sleep(_GRACE)
    _exit(exit_code)


def barrier() -> None:
    """Waits for all processes, where there are several: what process 0 alone has still to write may take longer than JAX's
    own meeting at the exit allows."""
    if is_multiprocess():
        multihost_utils.sync_global_devices("the end")


def is_peer_failure(error: BaseException) -> bool:
    """Whether that is how it looks when another process is gone."""
    if not is_multiprocess():
        return False
    text = f"{error} {error.__cause__}"
    return any(word in text for word in ("Gloo", "UNAVAILABLE", "DEADLINE_EXCEEDED", "heartbeat", "Connection"))


def _how_to_resume(directory: pathlib.Path | None) -> str:
    """directory: that of a training run; None for what has no checkpoints of its own."""
    if directory is None:
        return "rerun the same command to continue from what is saved"
    steps = committed_steps(directory / "checkpoints")
    if not steps:
        return "nothing was saved yet"
    return f"step {steps[-1]} is saved; rerun the same command to resume from it"


@contextlib.contextmanager
def _on_signals(numbers, handler, directory: pathlib.Path | None, grace: float | None) -> Iterator[None]:
    """Calls `handler` in the main thread at each of the signals. A thread ends the process at a second Ctrl-C, and where
    `grace` is given that many seconds after the first signal: Python calls handlers between two instructions of its own, and
    the main thread may compile, or wait for a device, for minutes. Changes nothing outside the main thread.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def force_exit():
        first, deadline, interrupts = None, None, 0
        while select.select([reader], [], [], deadline and max(0.0, deadline - time.monotonic()))[0]:
            read = os.read(reader, 1)
            if not read:  # closed: the main thread went on
                return
            if read[0] not in numbers:
                continue
            interrupts += read[0] == signal.SIGINT
            if interrupts == 2:
                end(f"stopped at once by a second Ctrl-C; {_how_to_resume(directory)}", INTERRUPTED)
            if grace is not None and first is None:
                first, deadline = read[0], time.monotonic() + grace
        stopped = Stopped(first, f"; {_how_to_resume(directory)}")
        end(str(stopped), stopped.exit_code)

    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    thread = threading.Thread(target=force_exit, daemon=True, name="signals")
    thread.start()
    descriptor = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, signal.SIG_DFL if earlier is None else earlier)  # None: it was not Python's
        signal.set_wakeup_fd(descriptor)
        os.close(writer)
        thread.join()
        os.close(reader)


@contextlib.contextmanager
def stopping_at_once(directory: pathlib.Path | None = None, only_interrupts: bool = False) -> Iterator[None]:
    """For what has nothing to save, or keeps its parts as it makes them: SIGTERM and Ctrl-C end the process, at the latest
    five seconds later where the main thread is inside a compiler.

    The handler raises nothing: it may run inside a callback that swallows what is raised, and Python's own way to end takes
    the libraries down while the devices still compute. Parts are written whole or not at all, and locks end with the process.

    directory: of a training run, whose last checkpoint the message names. only_interrupts: leaves SIGTERM alone, as processes
    that train together must: JAX's own service takes it, for `Preemption`.
    """

    def stop(number, _):
        stopped = Stopped(number, f"; {_how_to_resume(directory)}")
        (abort_process if is_multiprocess() else end)(str(stopped), stopped.exit_code)

    numbers = (signal.SIGINT,) if only_interrupts else (signal.SIGINT, signal.SIGTERM)
    with _on_signals(numbers, stop, directory, _GRACE):
        yield


class Preemption:
    """Whether SIGTERM or Ctrl-C asked the run to stop: `asked()` after every call of the train step, by every process.

    Processes that work together agree on the step by JAX's own service, which took SIGTERM for itself when it was
    initialized; a process that gets Ctrl-C sends itself SIGTERM. A process alone has a handler for both.
    """

    def __init__(self, directory: pathlib.Path):
        self._directory, self._calls = directory, 0
        self._number, self._interrupted = None, False

    @contextlib.contextmanager
    def handled(self) -> Iterator[None]:
        """While the train loop runs. A second Ctrl-C ends the process at once."""

        def note(number, _):
            if number == signal.SIGINT and not self._interrupted:
                self._interrupted = True
                # Not print, which may be what this interrupts.
                os.write(1, b"\nCtrl-C: saving after this step. Press it again to stop at once.\n")
                if is_multiprocess():
                    os.kill(os.getpid(), signal.SIGTERM)
            self._number = self._number or number

        numbers = (signal.SIGINT,) if is_multiprocess() else (signal.SIGINT, signal.SIGTERM)
        with _on_signals(numbers, note, self._directory, None):
            yield

    def asked(self) -> bool:
        """True at the same call on every process."""
        self._calls += 1  # not the step: the service waits for the next whole number
        if is_multiprocess():
            return multihost_utils.reached_preemption_sync_point(self._calls)
        return self._number is not None

    def stopped(self, step: int) -> Stopped:
        """What to raise once `step` is saved; every process calls this, and each gets the same."""
        number = self._number or signal.SIGTERM
        if is_multiprocess() and np.any(multihost_utils.process_allgather(np.array(number == signal.SIGINT))):
            number = signal.SIGINT
        return Stopped(number, f" at step {step}, which is saved; rerun the same command to resume from it")


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
                others = " or another process is stuck" if is_multiprocess() else ""
                end(
                    f"process {jax.process_index()}: no step has finished for {limit:.0f} s: the data{others}, or the limit "
                    "training.stall_timeout is too short; the same command goes on from the last checkpoint",
                    LOST,
                )


def over_batches(batches: Iterable[int], seconds: float) -> Iterator[int]:
    """Passes the numbers of batches through, and watches over what is done with each, where a peer could be stuck in it. The
    first may take any time: it is compiled.
    """
    with Watchdog(seconds if is_multiprocess() else 0) as watchdog:
        for i, batch in enumerate(batches):
            began = time.monotonic()
            with contextlib.nullcontext() if i else watchdog.paused():
                yield batch
            watchdog.expect(time.monotonic() - began)
            watchdog.beat()
