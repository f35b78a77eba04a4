"""The calls of the train step in flight, and traces of them for XProf."""

from __future__ import annotations

import collections
import time
from collections.abc import Callable
from typing import Any

import jax

from diffusion_jax.console import log
from diffusion_jax.run_dir import RunDir

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
    """Traces the sixth to the tenth call of the train step for XProf into the work directory; the first calls fill caches.

    workdir: None for no trace.
    """

    _FIRST_CALL, _END = 5, 10

    def __init__(self, workdir: RunDir | None):
        self._workdir, self._num_calls, self._is_tracing = workdir, 0, False

    def call(self, step: int, function: Callable[..., Any], *arguments: Any) -> Any:
        """The result of `function`, the train step from `step` on."""
        if self._workdir and self._num_calls == self._FIRST_CALL:
            jax.profiler.start_trace(str(self._workdir.path))
            self._is_tracing = True
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            result = function(*arguments)
        self._num_calls += 1
        if self._num_calls == self._END:
            self.stop(result)
        return result

    def stop(self, result: Any = None) -> None:
        """Ends the trace, if there is one, after `result` is computed."""
        if self._workdir and self._is_tracing:
            jax.block_until_ready(result)
            jax.profiler.stop_trace()
            self._is_tracing = False
            self._workdir.upload(self._workdir / "plugins")
            log(f"A trace of the train step: xprof --logdir={self._workdir} (pip install xprof).")
