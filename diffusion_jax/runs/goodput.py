"""Goodput: the fraction of the wall time since a run's first launch that its steps took, and where the rest went.

goodput.json of the work directory has an entry for each launch, which is rewritten at every line of the log, so that a kill
loses at most one interval.
"""

from __future__ import annotations

import contextlib
import json
import math
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from diffusion_jax.errors import DiffusionJaxError, LeaseLostError, StorageError, shorten
from diffusion_jax.files import write_text
from diffusion_jax.storage.locations import find_mirror

__all__ = ["PARTS", "Goodput", "LaunchTimes", "read_goodput", "read_launches"]

_FILE = "goodput.json"
_SECONDS_BETWEEN_WRITES = 60.0
# The parts of a launch. start: reading and checking. input: the loop waits for data. output: lines and pictures.
PARTS: tuple[str, ...] = ("train", "start", "compile", "restore", "save", "input", "output")


class Goodput(NamedTuple):
    """fractions: of the wall time since the first launch, by part; their sum is 1.

    train is the goodput: steps that count. repeated: steps that were lost in a kill and done again. idle: between launches.
    """

    fractions: dict[str, float]
    wall_seconds: float
    num_launches: int


class LaunchTimes:
    """Measures one launch on process 0, and writes it to goodput.json. clock: returns seconds since 1970.

    Every moment counts for one part: that of the innermost `measure`, otherwise `start`, or `train` after `begin`.
    """

    def __init__(self, workdir: pathlib.Path, clock: Callable[[], float] = time.time):
        self._path, self._clock, self._start = workdir / _FILE, clock, clock()
        self._seconds, self._part, self._since = dict.fromkeys(PARTS, 0.0), "start", self._start
        self._first_step = self._step = 0
        self._written = -math.inf
        self._earlier: list[dict[str, Any]] = []
        self._environment: Mapping[str, Any] | None = None
        self._stopped_by = ""

    def begin(self, step: int, environment: Mapping[str, Any] | None = None) -> None:
        """Notes the step that the launch starts from; from now on, what is not measured is `train`.

        environment: what the launch runs with, which goodput.json stores.
        """
        self._first_step = self._step = step
        self._environment = environment
        self._earlier = _read(self._path)
        self._count_as("train")

    @contextlib.contextmanager
    def measure(self, part: str) -> Iterator[None]:
        """Counts the time of the block as a part, without the blocks inside that are measured themselves."""
        outer = self._count_as(part)
        try:
            yield
        finally:
            self._count_as(outer)

    def _count_as(self, part: str) -> str:
        """Counts the time from now on as a part. Returns: the part that was counted until now."""
        now, before = self._clock(), self._part
        self._seconds[before] += now - self._since
        self._part, self._since = part, now
        return before

    def seconds(self) -> dict[str, float]:
        """The seconds of each part up to now."""
        self._count_as(self._part)
        return dict(self._seconds)

    def write_each_minute(self, step: int) -> None:
        """Writes the times up to a step if the last time was a minute ago: lines of the log may be further apart."""
        if self._clock() - self._written > _SECONDS_BETWEEN_WRITES:
            self.write(step)

    def write(self, step: int, is_last: bool = False) -> float:
        """Writes the times up to a step, to a bucket at most once a minute unless `is_last`.

        Returns: the goodput of the run.
        """
        self._step = step
        launches = [*self._earlier, self._entry()]
        if is_last or not find_mirror(self._path) or self._clock() - self._written > _SECONDS_BETWEEN_WRITES:
            write_text(self._path, json.dumps(launches) + "\n")
            self._written = self._clock()
        return _goodput(launches, self._clock()).fractions["train"]

    def stop(self, error: BaseException) -> None:
        """Notes the error that ends the launch, but not in a bucket that caused it. Errors of writing are ignored."""
        if isinstance(error, StorageError | LeaseLostError):
            return
        is_message = isinstance(error, DiffusionJaxError) or not isinstance(error, Exception)
        text = str(error) if is_message else f"{type(error).__name__}: {error}"
        self._stopped_by = shorten(" ".join(text.split()) or type(error).__name__, 300)
        with contextlib.suppress(Exception):
            self.write(self._step, is_last=True)

    def _entry(self) -> dict[str, Any]:
        times = {"start": self._start, "end": self._clock(), "first_step": self._first_step, "last_step": self._step}
        entry = times | {"seconds": {part: round(seconds, 3) for part, seconds in self.seconds().items()}}
        entry |= {"environment": dict(self._environment)} if self._environment else {}
        return entry | ({"stopped_by": self._stopped_by} if self._stopped_by else {})


def read_goodput(workdir: pathlib.Path, now: float | None = None) -> Goodput | None:
    """The goodput of a run up to now, or up to the end of its last launch; None without a launch that logged a line."""
    launches = read_launches(workdir)
    return _goodput(launches, launches[-1]["end"] if now is None else now) if launches else None


def read_launches(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """The launches of a run that logged a line or failed, as goodput.json has them; [] if there are none."""
    return _read(workdir / _FILE)


def _read(path: pathlib.Path) -> list[dict[str, Any]]:
    with contextlib.suppress(OSError, ValueError):
        return json.loads(path.read_text())
    return []


def _goodput(launches: list[dict[str, Any]], now: float) -> Goodput:
    totals = dict.fromkeys([*PARTS, "repeated", "idle"], 0.0)
    for launch, following in zip(launches, [*launches[1:], None], strict=True):
        seconds = launch["seconds"]
        for part in PARTS:
            totals[part] += seconds[part]
        end = now if following is None else following["start"]
        totals["idle"] += max(end - launch["end"], 0.0)
        steps = launch["last_step"] - launch["first_step"]
        if following is not None and steps:
            lost = min(max(launch["last_step"] - following["first_step"], 0), steps)
            totals["repeated"] += seconds["train"] * lost / steps
    totals["train"] -= totals["repeated"]
    wall = max(sum(totals.values()), 1e-9)
    return Goodput({part: seconds / wall for part, seconds in totals.items()}, wall, len(launches))
