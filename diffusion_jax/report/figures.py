"""Curves and pictures of the page.

Curves show the log of a run, reduced to intervals. Pictures show samples during training, denoising, and other files.
"""

from __future__ import annotations

import base64
import collections
import io
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from diffusion_jax import pictures
from diffusion_jax.evaluation.features import sample_files
from diffusion_jax.report.collect import RunFiles
from diffusion_jax.runs.logging import SCALARS, describe_scalar
from diffusion_jax.untrusted import open_npz, read_image


def even_subset(count: int, most: int) -> list[int]:
    """Returns at most `most` numbers in 0 ... count - 1, evenly spread, with both ends; the last alone if `most` is 1."""
    return np.unique(np.linspace(count - 1, 0, min(count, most)).round().astype(int)).tolist() if count else []


# ---- Curves

Chart = dict[str, Any]  # as report.js draws it
MAX_POINTS = 600  # points in a line

_MAX_OTHER_CHARTS = 12


def training_charts(logs: Mapping[str, Sequence[Mapping[str, Any]]], max_points: int = MAX_POINTS) -> list[Chart]:
    """Returns the charts of logs {run: lines}: first the charts in `SCALARS`, then charts of other numbers.

    For several runs, each number has its own chart, with a line for each run.
    """
    sizes = collections.Counter(scalar.chart for scalar in SCALARS.values())
    found = dict.fromkeys(name for lines in logs.values() for line in lines for name in line if name != "step")
    others = [name for name in found if name not in SCALARS][:_MAX_OTHER_CHARTS]
    charts: dict[str, Chart] = {}
    for name in [*(name for name, scalar in SCALARS.items() if scalar.chart), *others]:
        scalar = describe_scalar(name)
        label = name if scalar.label in (name, name.replace("_", " ")) else f"{name}: {scalar.label}"
        title = f"{scalar.chart}, {label}" if len(logs) > 1 and sizes[scalar.chart] > 1 else scalar.chart
        for run, (run_name, lines) in enumerate(logs.items()):
            x, y = _column(lines, name)
            if len(x):
                empty = {"title": title, "y": scalar.unit, "log": scalar.is_log, "series": []}
                line = {"run": run, "name": name, "label": run_name if len(logs) > 1 else label}
                charts.setdefault(title, empty)["series"].append(line | make_series(x, y, max_points))
    return list(charts.values())


def run_clock(lines: Sequence[Mapping[str, Any]], max_points: int = MAX_POINTS) -> dict[str, list[float]]:
    """Returns at most `max_points` steps, and the seconds of training until each step; empty lists if no time is logged."""
    steps, step_seconds = _column(lines, "step_seconds")
    seconds = np.cumsum(np.maximum(step_seconds, 0) * np.diff(steps, prepend=0))
    chosen = even_subset(len(steps), max_points)
    return {"steps": _rounded(steps[chosen], 12), "seconds": _rounded(seconds[chosen])}


def _column(lines: Sequence[Mapping[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns the steps, rising, and the finite values of a number in the log."""
    points = [(line["step"], line[name]) for line in lines if isinstance(line.get(name), int | float)]
    points = sorted(point for point in points if math.isfinite(point[1]))
    x, y = np.array(points, np.float64).reshape(-1, 2).T
    return x, y


def make_series(x: np.ndarray, y: np.ndarray, max_points: int = MAX_POINTS) -> dict[str, Any]:
    """Returns a line with at most `max_points` points: x, mean, minimum and maximum over each interval. x increases."""
    low, high = y, y
    if len(x) > max_points:
        starts = np.unique(np.linspace(0, len(x), max_points, endpoint=False).astype(int))
        counts = np.diff([*starts, len(x)])
        x, y = np.add.reduceat(x, starts) / counts, np.add.reduceat(y, starts) / counts
        low, high = np.minimum.reduceat(low, starts), np.maximum.reduceat(high, starts)
    series = {"x": _rounded(x, 8), "mean": _rounded(y)}
    if (low < high).any():
        series |= {"low": _rounded(low), "high": _rounded(high)}
    return series


def _rounded(values: np.ndarray, digits: int = 5) -> list[float]:
    """Rounds numbers to `digits` significant digits, for the page's JSON."""
    return [float(f"{value:.{digits}g}") for value in values]


# ---- Pictures

_PICTURES = ("*.png", "calibration/*.png", "samples/**/*.png")
_PREFIX = "train_step"  # of the names of pictures drawn during training
_MAX_TRAINING_FRAMES = 12
# For compressed pictures: the longest side in pixels (the page shows frames at most 544 high), and the WebP quality.
_MAX_SIDE, _FRAME_SIDE, _QUALITY = 1200, 600, 82
_SMALL = 20_000  # bytes; smaller pictures are not compressed
_MAX_PIXELS = 100_000_000  # of all pictures in a section, before they are made smaller
_MAX_TRAJECTORY = 2**30  # bytes
_READ_ERRORS = (OSError, ValueError)


Picture = dict[str, Any]  # src: a data URI; width, height: pixels; caption: what the picture shows


class Budget:
    """Limits the bytes and pixels of a section's pictures. notes: a list that gets a line for each unreadable file."""

    def __init__(self, num_bytes: int, notes: list[str]):
        self.left, self.pixels_left, self._notes = num_bytes, _MAX_PIXELS, notes

    def embed(self, source: pathlib.Path | np.ndarray, caption: str, side: int = _MAX_SIDE) -> Picture | None:
        """Embeds a file, or uint8 [H, W, C], as a picture; None if the budget is used up or the file cannot be read.

        side: the longest side in pixels if the picture is compressed, because its PNG is large.
        """
        try:
            if isinstance(source, np.ndarray):
                image = pictures.to_pillow(source)
            else:
                image = read_image(source, self.pixels_left)
                self.pixels_left -= image.width * image.height
            kind, content = "png", _encode(image, "PNG")
        except _READ_ERRORS as error:
            self._notes.append(f"{getattr(source, 'name', caption)} could not be read: {error}")
            return None
        if len(content) > _SMALL:
            image = image.convert("RGB")
            image.thumbnail((side, side))
            kind, content = "webp", _encode(image, "WEBP")
        if len(content) > self.left:
            return None
        self.left -= len(content)
        uri = f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
        return {"src": uri, "width": image.width, "height": image.height, "caption": caption}


def _encode(image: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, quality=_QUALITY)
    return buffer.getvalue()


def newest_samples(run: RunFiles, budget: Budget) -> Picture | None:
    """Returns the newest picture of samples beside training examples, None if there is no picture that can be read."""
    paths = sample_files(run.directory, "samples/*.png")[:3]
    return next((picture for path in paths if (picture := budget.embed(path, _file_name(path)))), None)


def training_samples(runs: Mapping[str, RunFiles], budget: Budget) -> list[dict[str, Any]]:
    """Returns pictures samples/train_step*.png to step through, at all steps that the runs share or at each run's newest."""
    found: list[dict[int, pathlib.Path]] = []
    for run in runs.values():
        paths = sample_files(run.directory, f"samples/{_PREFIX}*.png")
        numbers = [path.stem.removeprefix(_PREFIX) for path in paths]
        found.append({int(n): path for n, path in zip(numbers, paths, strict=True) if n.isdecimal()})
    shared = sorted(set.intersection(*map(set, found)))
    moments = [[step] * len(found) for step in shared] or ([[*map(max, found)]] if all(found) else [])
    frames = []
    for steps in [moments[i] for i in reversed(even_subset(len(moments), _MAX_TRAINING_FRAMES // len(found) or 1))]:
        caption = f"after {' and '.join(f'{step:,}' for step in dict.fromkeys(steps))} training steps"
        drawn = [budget.embed(paths[step], caption, _FRAME_SIDE) for step, paths in zip(steps, found, strict=True)]
        if None not in drawn:
            frames.insert(0, (caption, drawn))  # the newest are embedded first
    note = f"The same noise at every step{' and in each run' * (len(found) > 1)}, so that only the network changes."
    note += f" {len(frames)} of {len(moments)} pictures are in this file." if len(frames) < len(moments) else ""
    return _frames(list(runs) if len(runs) > 1 else ["samples"], frames, note, -1)


def denoising(run: RunFiles, budget: Budget) -> list[dict[str, Any]]:
    """Returns the frames of the newest samples/trajectories/*.npz; [] if it has no images."""
    path, *_ = sample_files(run.directory, "samples/trajectories/*.npz") or [None]
    if path is None:
        return []
    try:
        with open_npz(path, _MAX_TRAJECTORY) as arrays:
            samples = arrays["samples"]
            x_t, x_0 = (np.concatenate([arrays[name], samples[None]]) for name in ("x_t", "x_0"))
            captions = [f"network time t = {time:.4g}" for time in arrays["times"]]
    except _READ_ERRORS as error:
        run.notes.append(f"{path.name} could not be read: {error}")
        return []
    if not pictures.is_of_images(samples):
        return []  # `other_pictures` shows the trajectory's PNG
    frames = []
    for caption, *both in zip([*captions, "finished samples"], x_t, x_0, strict=True):
        drawn = [budget.embed(pictures.draw_grid(images), caption, _FRAME_SIDE) for images in both]
        if None not in drawn:
            frames.append((caption, drawn))
    return _frames(["x_t, the noisy sample", "x_0, as the network predicts it"], frames, f"Samples of {path.name}.", 0)


def _frames(names: list[str], frames: list[tuple[str, list[Any]]], note: str, start: int) -> list[dict[str, Any]]:
    """Returns pictures to step through. names: titles of a frame's pictures. frames: (caption, pictures). note: a text."""
    block = {"names": names, "captions": [caption for caption, _ in frames], "images": [drawn for _, drawn in frames]}
    return [{"frames": block | {"start": start % len(frames)}}, {"text": note}] if frames else []


def other_pictures(run: RunFiles, budget: Budget, shown: Picture | None) -> tuple[list[Picture], list[str]]:
    """Returns (other pictures, in the order of `_PICTURES`, each newest first; names of pictures left out)."""
    paths = [path for pattern in _PICTURES for path in sample_files(run.directory, pattern)]
    paths = [path for path in paths if not path.name.startswith(_PREFIX)]
    paths = [path for path in paths if shown is None or _file_name(path) != shown["caption"]]
    embedded = [(path.name, budget.embed(path, _file_name(path))) for path in paths]
    return [picture for _, picture in embedded if picture], [name for name, picture in embedded if not picture]


def _file_name(path: pathlib.Path) -> str:
    """Returns the caption of a file; report.js describes the names that this program writes."""
    return f"{path.parent.name}/{path.name}"
