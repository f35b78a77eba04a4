"""What a person sees while a run works: short lines, and a bar with speed and time left."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterable, Iterator

import jax
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


def say(text: str) -> None:
    """One line, from process 0 only."""
    if jax.process_index() == 0:
        print(text, flush=True)


@contextlib.contextmanager
def compiling(what: str) -> Iterator[None]:
    """Says that a program is being compiled, and how long it took."""
    say(f"Compiling {what} ...")
    start = time.perf_counter()
    yield
    say(f"Compiled {what} in {time.perf_counter() - start:.1f} s.")


def clock(seconds: float) -> str:
    """1:02 or 3:04:05."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


class Bar:
    """A progress bar in a terminal; elsewhere (a log file) a line at most every ten seconds, and at the end."""

    def __init__(self, what: str, total: int, done: int = 0):
        self._what, self._total, self._start, self._began = what, total, done, time.perf_counter()
        self._last_line, self._note = self._began, ""
        self._rich = None
        if jax.process_index() == 0 and sys.stdout.isatty():
            columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()]
            self._rich = Progress(*columns, TextColumn("{task.fields[note]}"))
            self._task = self._rich.add_task(what, total=total, completed=done, note="")

    def __enter__(self) -> Bar:
        if self._rich:
            self._rich.start()
        return self

    def __exit__(self, *_) -> None:
        if self._rich:
            self._rich.stop()

    def update(self, done: int, note: str = "") -> None:
        """`done` of the total are finished; `note` says what else is worth seeing (loss, speed)."""
        self._note = note or self._note
        if self._rich:
            self._rich.update(self._task, completed=done, note=self._note)
            return
        now = time.perf_counter()
        if now - self._last_line < 10 and done < self._total:
            return
        self._last_line = now
        left = (now - self._began) / max(done - self._start, 1) * (self._total - done)
        say(
            f"{self._what} {done}/{self._total} ({100 * done // self._total}%)  {clock(left)} left  {self._note}".rstrip()
        )

    def over(self, sizes: Iterable[int]) -> Iterator[int]:
        """Passes the sizes of finished chunks through and shows their sum."""
        with self:
            done = self._start
            for size in sizes:
                yield size
                done += size
                self.update(done)


def bar_over(what: str):
    """A function (sizes, total) -> sizes that shows how many of `total` images the chunks of those sizes hold so far."""
    return lambda sizes, total: Bar(what, total).over(sizes)
