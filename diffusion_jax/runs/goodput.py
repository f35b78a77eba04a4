"""Goodput: the fraction of the wall time since a run's first launch that its steps took, and where the rest went.

goodput.json of the work directory has an entry for each launch, which is rewritten once a minute.
"""

from __future__ import annotations

import contextlib
import json
import math
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from diffusion_jax.errors import DiffusionJaxError, LeaseLostError, StorageError, shorten
from diffusion_jax.files import write_text
from diffusion_jax.runs.devices import describe_environment

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

    Time inside `measure` counts for the part that it names. Other time counts for `start`, and after `begin` for `train`.
    """

    def __init__(self, workdir: pathlib.Path, clock: Callable[[], float] = time.time):
        self._workdir, self._clock, self._start = workdir, clock, clock()
        self._seconds, self._part, self._since = dict.fromkeys(PARTS, 0.0), "start", self._start
        self._written = -math.inf
        self._launches: list[dict[str, Any]] = [{}]  # the last is this one

    def begin(self, step: int) -> None:
        """Sets the step that the launch starts from; from now on, what is not measured is `train`."""
        this = {"start": self._start, "first_step": step, "last_step": step, "environment": describe_environment()}
        self._launches = [*read_launches(self._workdir), this]
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

    def record(self, step: int, is_last: bool = False) -> None:
        """Records that a step is finished, and writes the file at most once a minute unless `is_last`."""
        self._launches[-1]["last_step"] = step
        now = self._clock()
        if is_last or now - self._written > _SECONDS_BETWEEN_WRITES:
            self._launches[-1] |= {"end": now, "seconds": {part: round(s, 3) for part, s in self.seconds().items()}}
            write_text(self._workdir / _FILE, json.dumps(self._launches) + "\n")
            self._written = now

    def goodput(self) -> float:
        """The goodput of the run up to now."""
        this = self._launches[-1] | {"end": self._clock(), "seconds": self.seconds()}
        return _goodput([*self._launches[:-1], this]).fractions["train"]

    def stop(self, error: BaseException) -> None:
        """Records the error that ends the launch, but not in a bucket that caused it. Errors of writing are ignored."""
        if isinstance(error, StorageError | LeaseLostError):
            return
        is_message = isinstance(error, DiffusionJaxError) or not isinstance(error, Exception)
        text = str(error) if is_message else f"{type(error).__name__}: {error}"
        self._launches[-1]["stopped_by"] = shorten(" ".join(text.split()) or type(error).__name__, 300)
        with contextlib.suppress(Exception):
            self.record(self._launches[-1]["last_step"], is_last=True)


def read_goodput(workdir: pathlib.Path) -> Goodput | None:
    """The goodput of a run up to the end of its last launch; None without a launch that wrote its times."""
    launches = read_launches(workdir)
    return _goodput(launches) if launches else None


def read_launches(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """The launches of a run that finished a step or failed, as goodput.json has them; [] if there are none."""
    with contextlib.suppress(OSError, ValueError):
        return json.loads((workdir / _FILE).read_text())
    return []


def _goodput(launches: list[dict[str, Any]]) -> Goodput:
    totals = dict.fromkeys([*PARTS, "repeated", "idle"], 0.0)
    for launch, following in zip(launches, [*launches[1:], None], strict=True):
        for part in PARTS:
            totals[part] += launch["seconds"][part]
        if following is None:
            break
        totals["idle"] += max(following["start"] - launch["end"], 0.0)
        steps = launch["last_step"] - launch["first_step"]
        if steps:
            lost = min(max(launch["last_step"] - following["first_step"], 0), steps)
            totals["repeated"] += launch["seconds"]["train"] * lost / steps
    totals["train"] -= totals["repeated"]
    wall = max(sum(totals.values()), 1e-9)
    return Goodput({part: seconds / wall for part, seconds in totals.items()}, wall, len(launches))
