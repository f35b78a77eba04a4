"""Time measurements of the train loop: how the time is spent, and traces for XProf."""

from __future__ import annotations

import contextlib
import pathlib
import time
from collections.abc import Iterator
from typing import NamedTuple

import jax

from diffusion_jax.runs.console import log

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
    """Traces the sixth to the tenth call of the train step into `directory`, for XProf; None: never."""

    _CALLS = range(5, 10)  # the first calls fill caches

    def __init__(self, directory: pathlib.Path | None):
        self._directory, self._call, self._is_tracing = directory, 0, False

    def __enter__(self) -> TraceProfile:
        return self

    def __exit__(self, *_) -> None:
        if self._is_tracing:  # the run ended before the tenth call
            self._stop()

    def annotate(self, step: int) -> jax.profiler.StepTraceAnnotation:
        """The context of one call."""
        if self._directory and self._call == self._CALLS.start:
            jax.profiler.start_trace(str(self._directory))
            self._is_tracing = True
        return jax.profiler.StepTraceAnnotation("train", step_num=step)

    def count_call(self, state) -> None:
        """Counts a call that has been made, and stops the trace after the last one. state: its result."""
        self._call += 1
        if self._is_tracing and self._call == self._CALLS.stop:
            jax.block_until_ready(state)
            self._stop()

    def _stop(self) -> None:
        jax.profiler.stop_trace()
        self._is_tracing = False
        log(f"A trace of the train step: xprof --logdir={self._directory} (pip install xprof).")
