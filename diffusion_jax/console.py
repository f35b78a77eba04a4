"""Terminal output of a run: single lines, and a progress bar with speed and remaining time."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import datetime
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax

from diffusion_jax.denoiser import Denoiser
from diffusion_jax.distributed.processes import log
from diffusion_jax.errors import shorten_middle, visible


@contextlib.contextmanager
def log_compilation(program: str) -> Iterator[None]:
    """Logs that `program` is being compiled, and how long the block took."""
    log(f"Compiling {program} ...")
    start = time.perf_counter()
    yield
    log(f"Compiled {program} in {time.perf_counter() - start:.1f} s.")


def log_parameters(init: Callable[[jax.Array], Mapping[str, Any]]) -> None:
    """Logs the number of parameters in each level, the layers whose names start with the same two words, such as `down_0`.

    init: key -> {layer: parameters}, with the layers in the order of execution; only shapes are computed.
    """
    levels: collections.Counter[str] = collections.Counter()

    def count(key: jax.Array) -> None:  # counts in here, because JAX sorts the keys of a returned dict
        for layer, params in init(key).items():
            levels["_".join(layer.split("_")[:2])] += sum(leaf.size for leaf in jax.tree.leaves(params))

    jax.eval_shape(count, jax.random.key(0))
    for level, size in levels.items():
        log(f"  {level:12} {size:13,} parameters {size / levels.total():7.1%}")


def format_duration(seconds: float) -> str:
    """Formats a duration as 1:02 or 3:04:05, or above two days as "5 days"."""
    if seconds > 48 * 3600:
        return f"{seconds / 86400:,.0f} days"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def format_time(seconds: float) -> str:
    """Formats seconds since 1970 as a date and time."""
    return f"{datetime.datetime.fromtimestamp(seconds, datetime.UTC):%Y-%m-%d %H:%M:%S} UTC"


def is_interactive() -> bool:
    """Returns whether this process is process 0 and writes to a terminal."""
    return jax.process_index() == 0 and sys.stdout.isatty()


class ProgressBar:
    """A progress bar in a terminal; a log file gets at most one line every ten seconds, and a final line."""

    _SECONDS_BETWEEN_LINES, _TITLE_WIDTH = 10, 36  # title, bar, counts and remaining time fit into 80 columns

    def __init__(self, title: str, total: int, done: int = 0):
        self._title, self._total = shorten_middle(visible(title), self._TITLE_WIDTH), total
        self._initial: float = done
        self._start_time = time.perf_counter()
        self._last_line, self._rich = self._start_time, None
        if is_interactive():
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn  # only a bar needs rich
            from rich.table import Column

            columns = [
                TextColumn("{task.description}", markup=False),
                BarColumn(None, table_column=Column(ratio=1)),
                MofNCompleteColumn(),
            ]
            self._rich = Progress(*columns, TextColumn("{task.fields[note]}", markup=False), expand=True)
            self._task = self._rich.add_task(self._title, total=total, completed=done, note="")

    def __enter__(self) -> ProgressBar:
        if self._rich:
            self._rich.start()
        return self

    def __exit__(self, *_) -> None:
        if self._rich:
            self._rich.stop()

    def start_clock(self, done: float) -> None:
        """Excludes the time until now, and the `done` items finished by now, from the speed."""
        self._initial, self._start_time = done, time.perf_counter()

    def update(self, done: float, note: str = "") -> None:
        """Shows that `done` items are finished; a bar also shows fractions. note: other values to show (loss, speed)."""
        now = time.perf_counter()
        notes = [note] if note else []
        if done > self._initial:
            seconds = (now - self._start_time) / (done - self._initial) * (self._total - done)
            notes = [f"{format_duration(seconds)} left", *notes]
        if self._rich:
            self._rich.update(self._task, completed=done, note=visible("  ".join(notes)))
        elif now - self._last_line >= self._SECONDS_BETWEEN_LINES or done == self._total:
            self._last_line = now
            log("  ".join([f"{self._title} {done}/{self._total} ({100 * done // self._total}%)", *notes]))


class CallCounter:
    """Advances a progress bar at each denoiser call within a batch; active only for a single CPU device at a terminal.

    An active counter makes the compiled program call the host at each denoiser call. JAX does not cache such a program, so
    each launch compiles it. num_calls: the number of denoiser calls for a batch.
    """

    def __init__(self, num_calls: int):
        self._num_calls, self._is_compiled = num_calls, False
        self._is_active = is_interactive() and jax.default_backend() == "cpu" and jax.device_count() == 1

    def begin(self, bar: ProgressBar, done: int, size: int) -> None:
        """Restarts the count of calls, for a batch of `size` samples that follows `done` finished samples."""
        self._bar, self._done, self._size, self._calls = bar, done, size, 0

    def wrap(self, denoiser: Denoiser) -> Denoiser:
        """Returns a denoiser that counts its calls; the same denoiser if the counter is not active."""
        return dataclasses.replace(denoiser, stages=(*denoiser.stages, self._stage)) if self._is_active else denoiser

    def _stage(self, evaluate: Callable, x_t, level, inputs):
        jax.debug.callback(self._count)
        return evaluate(x_t, level, inputs)

    def _count(self) -> None:
        self._calls = min(self._calls + 1, self._num_calls)
        done = self._done + self._size * self._calls / self._num_calls
        if not self._is_compiled:
            self._is_compiled = True
            self._bar.start_clock(done)
        self._bar.update(done)


def progress_over(title: str) -> Callable[[Iterable[int], int], Iterator[int]]:
    """Returns a function (chunk sizes, total) -> chunk sizes that shows how many of the `total` examples are finished."""

    def show(sizes: Iterable[int], total: int) -> Iterator[int]:
        done = 0
        with ProgressBar(title, total) as bar:
            for size in sizes:
                yield size
                done += size
                bar.update(done)

    return show
