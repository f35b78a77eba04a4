"""Ends the process when no step finishes for too long."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterable, Iterator

import jax

from diffusion_jax.distributed.processes import EXIT_PEER_LOST, exit_now, is_multiprocess

__all__ = ["Watchdog", "watch_batches"]


class Watchdog:
    """A thread that ends the process with one line when no step has finished for too long.

    The limit is `seconds`, or five times the duration of the longest step, if that is longer; 0 for no limit. The first step
    has none, because it may include a compilation and connects the processes. A thread is needed because a process whose
    peer is stuck waits inside a collective, where no Python code runs.
    """

    def __init__(self, seconds: float):
        self._seconds, self._longest = seconds, 0.0
        self._last, self._is_limited = 0.0, False
        self._finished = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="watchdog")

    def __enter__(self) -> Watchdog:
        self._last = time.monotonic()
        if self._seconds:
            self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._finished.set()
        if self._seconds:
            self._thread.join()

    def record_step(self) -> None:
        """Records that a step has finished, or was dispatched to the devices."""
        now = time.monotonic()
        self._longest, self._last, self._is_limited = max(self._longest, now - self._last), now, True

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Sets no limit for work that may take long: pictures, checkpoints."""
        was_limited, self._is_limited = self._is_limited, False
        try:
            yield
        finally:
            self._last, self._is_limited = time.monotonic(), was_limited

    def _watch(self) -> None:
        while not self._finished.wait(min(1.0, self._seconds / 4)):
            last, limit = self._last, max(self._seconds, 5 * self._longest)
            if self._is_limited and time.monotonic() - last > limit:
                peer = " or another process" if is_multiprocess() else ""
                exit_now(
                    f"process {jax.process_index()}: no step has finished for {limit:.0f} s: reading data{peer} may be "
                    "stuck, or training.stall_timeout is too short; rerun the same command to resume from the last "
                    "checkpoint",
                    EXIT_PEER_LOST,
                )


def watch_batches(batches: Iterable[int], seconds: float) -> Iterator[int]:
    """Yields `batches`; in runs of several processes, where a peer could be stuck, limits the time of the work on each."""
    with Watchdog(seconds if is_multiprocess() else 0) as watchdog:
        for batch in batches:
            yield batch
            watchdog.record_step()
