"""The calls of the train step in flight, and traces of them for XProf."""

from __future__ import annotations

import collections
import contextlib
import pathlib
import time
from collections.abc import Callable

import jax

from diffusion_jax.runs.console import log
from diffusion_jax.storage import locations

__all__ = ["StepsInFlight", "TraceProfile"]


class StepsInFlight:
    """The calls of the train step that were dispatched and may not have finished: about a second of work.

    jax returns from a call before the devices have computed it, and queues tens of calls, also on CPUs. Without a limit, a
    run that is stopped would compute all of them before it saves, and its progress would be that of the queue.

    finished: the step after the last call that has finished.
    """

    _SECONDS = 1.0  # hides pauses of the host, and is short for whoever stops the run
    _MAX_CALLS = 32  # as many as jax queues on CPUs
    _SLOW_CALL = 5.0  # seconds; the first call also loads the program, which hardly matters then

    def __init__(self, step: int, clock: Callable[[], float] = time.perf_counter):
        self.finished = self._first = step
        self._calls: collections.deque[tuple[int, jax.Array]] = collections.deque()
        self._clock, self._last_time, self._limit = clock, 0.0, 0.0  # the limit is a number of steps
        self._timed_seconds, self._timed_steps = 0.0, 0

    def add(self, step: int, output: jax.Array) -> None:
        """Adds a call. step: after the call. output: an array of the call, which no later call donates."""
        if not self._calls:
            self._last_time = self._clock()  # the devices were idle
        self._calls.append((step, output))

    def wait(self) -> None:
        """Waits until no more steps are in flight than finish in about a second."""
        self._wait(self._limit)

    def drain(self) -> None:
        """Waits until all calls have finished."""
        self._wait(0)

    def seconds_per_step(self) -> float | None:
        """The mean duration of the finished steps without those of the first call; None before a second is measured."""
        return self._timed_seconds / self._timed_steps if self._timed_seconds > 1 else None

    def _wait(self, limit: float) -> None:
        before, num_calls = self.finished, 0
        while self._calls and (
            self._calls[-1][0] - self.finished > limit
            or len(self._calls) > self._MAX_CALLS
            or self._calls[0][1].is_ready()  # pyright: ignore[reportAttributeAccessIssue]
        ):
            self.finished, output = self._calls.popleft()
            jax.block_until_ready(output)
            num_calls += 1
        if not num_calls:
            return
        now, steps = self._clock(), self.finished - before
        seconds, self._last_time = now - self._last_time, now
        # At most one call more than before: calls that finished during a pause of the host look short.
        self._limit = min(self._SECONDS * steps / max(seconds, 1e-6), self._limit + steps / num_calls)
        if before > self._first or seconds > self._SLOW_CALL:
            self._timed_seconds, self._timed_steps = self._timed_seconds + seconds, self._timed_steps + steps


class TraceProfile:
    """Traces five calls of the train step for XProf, into the work directory.

    directory: None on all processes but 0, which trace nothing. at_start: traces the sixth to the tenth call; the first calls
    fill caches.
    """

    _FIRST_CALL, _NUM_CALLS = 5, 5

    def __init__(self, directory: pathlib.Path | None, at_start: bool):
        self._directory, self._calls_left = directory, 0
        self._calls_before = self._FIRST_CALL if at_start else None

    def __enter__(self) -> TraceProfile:
        return self

    def __exit__(self, *_) -> None:
        if self._calls_left:  # the run ended before the last call
            self._stop()

    def check_request(self) -> None:
        """Traces the next calls if there is a file PROFILE in the directory, which is removed."""
        if self._directory and not self._calls_left:
            with contextlib.suppress(OSError):
                (self._directory / "PROFILE").unlink()
                self._calls_before = 0

    def annotate(self, step: int) -> jax.profiler.StepTraceAnnotation:
        """The context of one call."""
        if self._directory and self._calls_before == 0:
            jax.profiler.start_trace(str(self._directory))
            self._calls_left = self._NUM_CALLS
        self._calls_before = self._calls_before - 1 if self._calls_before else None
        return jax.profiler.StepTraceAnnotation("train", step_num=step)

    def count_call(self, state) -> None:
        """Counts a call that has been made, and stops the trace after the last one. state: its result."""
        if self._calls_left:
            self._calls_left -= 1
            if not self._calls_left:
                jax.block_until_ready(state)
                self._stop()

    def _stop(self) -> None:
        jax.profiler.stop_trace()
        self._calls_left = 0
        assert self._directory
        locations.written(self._directory / "plugins")
        log(f"A trace of the train step: xprof --logdir={self._directory} (pip install xprof).")
