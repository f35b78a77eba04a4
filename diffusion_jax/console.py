"""Terminal output of a run: single lines, and a progress bar with speed and remaining time."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping

import jax

from diffusion_jax.distributed.processes import log


@contextlib.contextmanager
def log_compilation(program: str) -> Iterator[None]:
    """Logs that `program` is being compiled, and how long the block took."""
    log(f"Compiling {program} ...")
    start = time.perf_counter()
    yield
    log(f"Compiled {program} in {time.perf_counter() - start:.1f} s.")


_Row = dataclasses.make_dataclass("_Row", ["level", "arrays", "parameters", "share"])  # of the parameter table


def log_parameters(params: Mapping) -> None:
    """Logs a table of the network's parameters with one row for each level, such as `down_0` or `mid_block`.

    params: {layer: parameters}, arrays or their shapes. The first two words of a layer name are its level.
    """
    from clu import parameter_overview  # imports Flax, which is slow; a rejected command line does not need it

    levels: dict[str, list[int]] = collections.defaultdict(list)
    for name, leaf in parameter_overview.flatten_dict(dict(params)).items():
        levels["_".join(name.partition("/")[0].split("_")[:2])].append(leaf.size)
    total = sum(map(sum, levels.values()))
    rows = [_Row(name, len(sizes), sum(sizes), f"{sum(sizes) / total:.1%}") for name, sizes in sorted(levels.items())]
    log(parameter_overview.make_table(rows))


def format_duration(seconds: float) -> str:
    """Formats seconds as 1:02 or 3:04:05, and more than two days as "5 days"."""
    if seconds > 48 * 3600:
        return f"{seconds / 86400:,.0f} days"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


class ProgressBar:
    """A progress bar in a terminal; a log file gets at most one line every ten seconds, and a final line."""

    _SECONDS_BETWEEN_LINES = 10

    def __init__(self, title: str, total: int, done: int = 0):
        self._title, self._total, self._initial, self._start_time = title, total, done, time.perf_counter()
        self._last_line, self._rich = self._start_time, None
        if jax.process_index() == 0 and sys.stdout.isatty():
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn  # errors need no bar

            columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()]
            self._rich = Progress(*columns, TextColumn("{task.fields[note]}"))
            self._task = self._rich.add_task(title, total=total, completed=done, note="")

    def __enter__(self) -> ProgressBar:
        if self._rich:
            self._rich.start()
        return self

    def __exit__(self, *_) -> None:
        if self._rich:
            self._rich.stop()

    def update(self, done: int, note: str = "") -> None:
        """Shows that `done` items are finished. note: other values to show (loss, speed)."""
        now = time.perf_counter()
        notes = [note] if note else []
        if done > self._initial:
            seconds = (now - self._start_time) / (done - self._initial) * (self._total - done)
            notes = [f"{format_duration(seconds)} left", *notes]
        if self._rich:
            self._rich.update(self._task, completed=done, note="  ".join(notes))
        elif now - self._last_line >= self._SECONDS_BETWEEN_LINES or done == self._total:
            self._last_line = now
            log("  ".join([f"{self._title} {done}/{self._total} ({100 * done // self._total}%)", *notes]))


def progress_over(title: str) -> Callable[[Iterable[int], int], Iterator[int]]:
    """Returns a function (sizes, total) -> sizes that shows progress: the summed chunk sizes out of `total` examples."""

    def show(sizes: Iterable[int], total: int) -> Iterator[int]:
        done = 0
        with ProgressBar(title, total) as bar:
            for size in sizes:
                yield size
                done += size
                bar.update(done)

    return show
