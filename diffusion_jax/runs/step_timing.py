"""Time measurements of the train loop: how the time is spent, and traces for XProf."""

from __future__ import annotations

import contextlib
import pathlib
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax

from diffusion_jax.runs.console import log
from diffusion_jax.storage import locations

__all__ = ["LoopTimer", "StepTimes", "TraceProfile"]


class StepTimes(NamedTuple):
    """seconds: of a window of steps. The rest are fractions of them.

    compute: the devices train. data_wait: the loop waits for data. logging: lines, pictures and checkpoints.
    """

    seconds: float
    compute: float
    data_wait: float
    logging: float


class LoopTimer:
    """Measures how the time since the last line of the log was spent."""

    def __init__(self):
        self._start()

    def _start(self) -> None:
        self._start_time, self._spent = time.perf_counter(), {"data_wait": 0.0, "logging": 0.0}

    @contextlib.contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Counts the time of the block as `name`, "data_wait" or "logging"."""
        start = time.perf_counter()
        yield
        self._spent[name] += time.perf_counter() - start

    def restart(self) -> StepTimes:
        """The times since the last call."""
        seconds = time.perf_counter() - self._start_time
        fractions = {name: spent / seconds for name, spent in self._spent.items()}
        self._start()
        return StepTimes(seconds, 1 - sum(fractions.values()), **fractions)


class TraceProfile:
    """Traces five calls of the train step for XProf, into the work directory: at the start, or on demand.

    On demand: after SIGUSR1, or after `check_request` has found a file PROFILE in the directory. directory: None on all
    processes but 0, which trace nothing. at_start: traces the sixth to the tenth call; the first calls fill caches.
    """

    _FIRST_CALL, _NUM_CALLS = 5, 5

    def __init__(self, directory: pathlib.Path | None, at_start: bool):
        self._directory, self._call, self._end = directory, 0, None
        self._start = self._FIRST_CALL if at_start else None
        self._earlier_handler: Any = None

    def __enter__(self) -> TraceProfile:
        if self._directory and hasattr(signal, "SIGUSR1") and threading.current_thread() is threading.main_thread():
            self._earlier_handler = signal.signal(signal.SIGUSR1, lambda *_: self.request())
        return self

    def __exit__(self, *_) -> None:
        if self._earlier_handler is not None:
            signal.signal(signal.SIGUSR1, self._earlier_handler)
        if self._end is not None:  # the run ended before the last call
            self._stop()

    def request(self) -> None:
        """Traces the next calls, unless some are traced already."""
        if self._directory and self._end is None:
            self._start = self._call

    def check_request(self) -> None:
        """Requests a trace if there is a file PROFILE, which is removed."""
        if self._directory and locations.take(self._directory / "PROFILE"):
            self.request()

    def annotate(self, step: int) -> jax.profiler.StepTraceAnnotation:
        """The context of one call."""
        if self._directory and self._start is not None and self._call >= self._start:
            jax.profiler.start_trace(str(self._directory))
            self._start, self._end = None, self._call + self._NUM_CALLS
        return jax.profiler.StepTraceAnnotation("train", step_num=step)

    def count_call(self, state) -> None:
        """Counts a call that has been made, and stops the trace after the last one. state: its result."""
        self._call += 1
        if self._end is not None and self._call >= self._end:
            jax.block_until_ready(state)
            self._stop()

    def _stop(self) -> None:
        jax.profiler.stop_trace()
        self._end = None
        assert self._directory
        locations.written(self._directory / "plugins")
        log(f"A trace of the train step: xprof --logdir={self._directory} (pip install xprof).")
