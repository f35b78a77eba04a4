"""`--mode=status`: shows the state of a work directory on one screen; it writes nothing, so it is safe during training."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict

from diffusion_jax import data
from diffusion_jax.console import format_duration, format_time
from diffusion_jax.errors import UserError, visible, wrap
from diffusion_jax.run_dir import RunDir, committed_steps, open_run_dir
from diffusion_jax.runs.logging import compute_goodput, read_launches, read_metrics
from diffusion_jax.storage.downloads import MANIFEST

_BARS = "▁▂▃▄▅▆▇█"
_SHOWN_LOSSES = 40


def report(config: ConfigDict, workdir: RunDir | str | os.PathLike) -> str:
    """Returns a work directory's state as lines of text."""
    workdir = open_run_dir(workdir, read_only=True)
    try:
        rows = describe(config, workdir, read_metrics(workdir), time.time())
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        raise UserError(
            f"a log in {workdir} holds invalid values ({error}); --mode=report shows the other files"
        ) from error
    width = max(map(len, rows))
    text = "\n".join(f"{name:{width}}  {visible(value)}" for name, value in rows.items())
    return wrap(text, shutil.get_terminal_size().columns)


def describe(
    config: ConfigDict, workdir: RunDir, lines: list[dict[str, Any]], now: float | None = None
) -> dict[str, str]:
    """Returns the state of a work directory as {name: text}. lines: the result of `read_metrics`. now: None omits ages."""
    num_steps = config.training.num_steps
    saved, holder = committed_steps(workdir / "checkpoints"), workdir.find_holder()
    launches = read_launches(workdir)
    finished = [launch["last_step"] for launch in launches[-1:] if holder]  # log lines may be an hour apart
    step = max([line["step"] for line in lines] + saved + finished, default=0)
    state = "not running; rerun its command to resume" if lines or step else "nothing was trained yet"
    if holder:
        state = f"training: {holder} holds the lock"
    elif step >= num_steps:
        state = "finished"
    rows = {"directory": str(workdir), "state": state}
    if not holder and launches and "stopped_by" in launches[-1]:
        rows["last stop"] = f"{format_time(launches[-1]['end'])}, {launches[-1]['stopped_by']}"
    rows["progress"] = f"step {step:,} of {num_steps:,} ({100 * step // num_steps}%)"
    timed = [line for line in lines if "step_seconds" in line]
    if timed:
        seconds = timed[-1]["step_seconds"]
        rows["speed"] = f"{1 / seconds:.3g} steps/s, {timed[-1]['images_per_second']:,.5g} {data.noun(config.data)}/s"
        if step < num_steps:
            rows["time left"] = f"{format_duration((num_steps - step) * seconds)} at this speed"
    rows["checkpoint"] = "none yet"
    if saved:
        written = (workdir / "checkpoints" / str(saved[-1]) / MANIFEST).stat().st_mtime
        rows["checkpoint"] = f"step {saved[-1]:,}, {format_time(written)}"
        rows["checkpoint"] += "" if now is None else f", {format_duration(now - written)} ago"
    losses = [line["loss"] for line in lines if "loss" in line]
    if losses:
        rows["loss"] = f"{losses[-1]:.4g}  {sparkline(losses)}"
    if launches:
        fractions, wall_seconds = compute_goodput(launches)
        spent = f"{format_duration(wall_seconds)} in {len(launches)} launch{'es' * (len(launches) != 1)}"
        others = sorted(((share, part) for part, share in fractions.items() if part != "train"), reverse=True)
        shown = [f"{part} {100 * share:.1f}%" for share, part in others if share >= 0.0005]
        rows["goodput"] = f"{100 * fractions['train']:.1f}% of {spent} in training steps"
        rows["goodput"] += f"; {', '.join(shown)}" if shown else ""
    return rows


def sparkline(values: Sequence[float]) -> str:
    """Draws the last values as bars, one character each, scaled from the minimum to the maximum."""
    shown = list(values)[-_SHOWN_LOSSES:]
    low, high = min(shown), max(shown)
    scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BARS[round((value - low) * scale)] for value in shown)
