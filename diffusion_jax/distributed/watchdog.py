"""Ends the process when no step finishes for too long."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterable, Iterator

import jax

from diffusion_jax.distributed.processes import is_multiprocess
from diffusion_jax.distributed.termination import EXIT_PEER_LOST, exit_now

__all__ = ["Watchdog", "watch_batches"]


class Watchdog:
    """A thread that ends the process with one line when no step has finished for too long.

    The limit is `seconds`, or five times the duration of the longest step after the first, if that is longer; 0 for no limit.
    A thread is needed because a process whose peer is stuck waits inside a collective, where no Python code runs.
    """

    def __init__(self, seconds: float):
        self._seconds, self._longest = seconds, 0.0
        self._num_steps = 0
        self._last: float | None = None  # None while paused
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

    def allow_duration(self, seconds: float) -> None:
        """Allows later steps to take as long as this one did."""
        self._longest = max(self._longest, seconds)

    def record_step(self) -> None:
        """Records that a step has finished, or was dispatched to the devices."""
        now = time.monotonic()
        self._num_steps += 1
        if self._last is not None and self._num_steps > 2:  # the first step also connects the processes
            self._longest = max(self._longest, now - self._last)
        self._last = now

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Sets no limit for work that may take long: compilation, pictures, checkpoints."""
        self._last = None
        try:
            yield
        finally:
            self._last = time.monotonic()

    def _watch(self) -> None:
        while not self._finished.wait(min(1.0, self._seconds / 4)):
            last, limit = self._last, max(self._seconds, 5 * self._longest)
            if last is not None and time.monotonic() - last > limit:
                peer = " or another process" if is_multiprocess() else ""
                exit_now(
                    f"process {jax.process_index()}: no step has finished for {limit:.0f} s: reading data{peer} may be "
                    "stuck, or training.stall_timeout is too short; rerun the same command to resume from the last "
                    "checkpoint",
                    EXIT_PEER_LOST,
                )


def watch_batches(batches: Iterable[int], seconds: float) -> Iterator[int]:
    """Yields `batches`, and in runs of several processes, where a peer could be stuck, limits the time of the work on each.

    The first batch has no limit, because its work includes compilation.
    """
    with Watchdog(seconds if is_multiprocess() else 0) as watchdog:
        for i, batch in enumerate(batches):
            start = time.monotonic()
            with contextlib.nullcontext() if i else watchdog.paused():
                yield batch
            watchdog.allow_duration(time.monotonic() - start)
            watchdog.record_step()
