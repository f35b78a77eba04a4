"""What happened to a run: its launches, kills, restores, repeated steps, and checkpoints that were not used."""

from __future__ import annotations

import datetime
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from diffusion_jax.runs.console import format_duration

__all__ = ["Event", "checkpoint_events", "launch_events"]


class Event(NamedTuple):
    """One line of the list. when: a time in UTC, or "" if it is not known. kind: one or two words."""

    when: str
    kind: str
    text: str


def _time(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S")


def launch_events(launches: Sequence[Mapping[str, Any]], num_steps: int | None, is_running: bool) -> list[Event]:
    """The events that the launches of goodput.json show. num_steps: of the config; None if it is not known."""
    events = []
    for number, launch in enumerate(launches, 1):
        following = launches[number] if number < len(launches) else None
        first, last = launch["first_step"], launch["last_step"]
        if first:
            events.append(Event(_time(launch["start"]), "restore", f"Launch {number} continues from step {first:,}."))
        else:
            events.append(Event(_time(launch["start"]), "launch", f"Launch {number} starts from step 0."))
        is_finished = num_steps is not None and last >= num_steps
        if following is None and is_running and not is_finished:
            events.append(Event(_time(launch["end"]), "running", f"The last line of the log is of step {last:,}."))
        else:
            events.append(_end(launch, following, number, is_finished))
    return events


def _end(launch: Mapping[str, Any], following: Mapping[str, Any] | None, number: int, is_finished: bool) -> Event:
    when, last = _time(launch["end"]), launch["last_step"]
    reason = f" Reason: {launch['stopped_by']}" if "stopped_by" in launch else ""
    duration = format_duration(launch["end"] - launch["start"])
    if following is None:
        if is_finished and not reason:
            return Event(when, "finished", f"Launch {number} reached the last step, {last:,}, after {duration}.")
        text = f"The last line of launch {number} is of step {last:,}, after {duration}.{reason}"
        return Event(when, "ended early", text)
    repeated = last - following["first_step"]
    if repeated > 0:
        text = f"Launch {number} was lost after step {last:,}, after {duration}; {repeated:,} steps were done again."
        return Event(when, "failed" if reason else "killed", text + reason)
    text = f"Launch {number} ended at step {last:,}, after {duration}; no logged step was done again."
    return Event(when, "ended", text + reason)


def checkpoint_events(directory: pathlib.Path) -> list[Event]:
    """Damaged checkpoints that were set aside, and saves that did not finish."""
    events = []
    for path in sorted(directory.glob("*")) if directory.is_dir() else ():
        if path.name.endswith(".unreadable"):
            kind, text = (
                "set aside",
                f"The checkpoint {path.name.partition('.')[0]} was damaged and is {path.name} now.",
            )
        elif path.name.endswith(".partial") or "orbax-checkpoint-tmp" in path.name:  # the latter of earlier versions
            kind, text = "refused save", f"A save did not finish: {path.name}."
        else:
            continue
        try:
            when = _time(path.stat().st_mtime)
        except OSError:  # a run in progress has just renamed or removed it
            continue
        events.append(Event(when, kind, text))
    return events
