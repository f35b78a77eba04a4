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
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from diffusion_jax import pictures
from diffusion_jax.evaluation.features import sample_files
from diffusion_jax.report.collect import RunFiles
from diffusion_jax.runs.logging import SCALARS, describe_scalar
from diffusion_jax.untrusted import open_npz, read_image


def even_subset(count: int, most: int) -> list[int]:
    """Returns at most `most` numbers in 0 ... count - 1, evenly spread, including both ends."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int)).tolist() if count else []


# ---- Curves

Chart = dict[str, Any]  # as report.js draws it
MAX_POINTS = 600  # points in a line

_MAX_OTHER_CHARTS = 12


def training_charts(logs: Mapping[str, Sequence[Mapping[str, Any]]], max_points: int = MAX_POINTS) -> list[Chart]:
    """Returns the charts of the logs of runs, {run: lines}: one for each chart in `SCALARS`, then of other numbers.

    For several runs, each number has its own chart, with a line for each run.
    """
    logs = {run: sorted(lines, key=lambda line: line["step"]) for run, lines in logs.items()}
    sizes = collections.Counter(scalar.chart for scalar in SCALARS.values())
    found = dict.fromkeys(name for lines in logs.values() for line in lines for name in line if name != "step")
    others = [name for name in found if name not in SCALARS][:_MAX_OTHER_CHARTS]
    charts: dict[str, Chart] = {}
    for name in [*(name for name, scalar in SCALARS.items() if scalar.chart), *others]:
        scalar = describe_scalar(name)
        title = f"{scalar.chart}: {scalar.label}" if len(logs) > 1 and sizes[scalar.chart] > 1 else scalar.chart
        for run, lines in logs.items():
            points = [(line["step"], line[name]) for line in lines if isinstance(line.get(name), int | float)]
            points = [point for point in points if math.isfinite(point[1])]
            if points:
                x, y = np.array(points, np.float64).T
                empty = {"title": title, "x": "training step", "y": scalar.unit, "log": scalar.is_log, "series": []}
                label = run if len(logs) > 1 else scalar.label
                charts.setdefault(title, empty)["series"].append(make_series(label, x, y, max_points))
    return list(charts.values())


def make_series(label: str, x: np.ndarray, y: np.ndarray, max_points: int = MAX_POINTS) -> dict[str, Any]:
    """Returns a line with at most `max_points` points: x, mean, minimum and maximum over each interval. x increases."""
    low, high = y, y
    series: dict[str, Any] = {"label": label, "values": len(x)}
    if len(x) > max_points:
        starts = np.unique(np.linspace(0, len(x), max_points, endpoint=False).astype(int))
        counts = np.diff([*starts, len(x)])
        x, y = np.add.reduceat(x, starts) / counts, np.add.reduceat(y, starts) / counts
        low, high = np.minimum.reduceat(low, starts), np.maximum.reduceat(high, starts)
    series |= {"x": _rounded(x, 8), "mean": _rounded(y)}
    if (low < high).any():
        series |= {"low": _rounded(low), "high": _rounded(high)}
    return series


def _rounded(values: np.ndarray, digits: int = 5) -> list[float]:
    """Rounds numbers to `digits` significant digits, for the page's JSON."""
    return [float(f"{value:.{digits}g}") for value in values]


# ---- Pictures

_PREFIX = "train_step"  # file names of pictures during training
_MAX_TRAINING_FRAMES = 12
# For compressed pictures: the longest side in pixels (the page shows frames at most 544 high), and the WebP quality.
_MAX_SIDE, _FRAME_SIDE, _QUALITY = 1200, 600, 82
_SMALL = 20_000  # bytes; smaller pictures are not compressed
_MAX_PIXELS = 100_000_000  # of all pictures in a section, before they are made smaller
_MAX_TRAJECTORY = 2**30  # bytes
_READ_ERRORS = (OSError, ValueError)


class Picture(NamedTuple):
    """A picture inside the page. src: a data URI. caption: what the picture shows."""

    src: str
    width: int
    height: int
    caption: str


class Frames(NamedTuple):
    """Pictures to step through. names: names of the pictures in a frame. frames: (caption, pictures). note: explanation."""

    names: tuple[str, ...]
    frames: list[tuple[str, tuple[Picture, ...]]]
    note: str


class Budget:
    """Limits the bytes and pixels of a section's pictures. notes: gets a line for each file that cannot be read."""

    def __init__(self, num_bytes: int, notes: list[str]):
        self.left, self.pixels_left, self._notes = num_bytes, _MAX_PIXELS, notes

    def embed(self, source: pathlib.Path | np.ndarray, caption: str, side: int = _MAX_SIDE) -> Picture | None:
        """Embeds a file, or uint8 [H, W, C], as a picture; None if the budget is used up or the file cannot be read.

        side: the longest side of a compressed picture, if the PNG is large.
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
        return Picture(f"data:image/{kind};base64,{base64.b64encode(content).decode()}", *image.size, caption)


def _encode(image: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, quality=_QUALITY)
    return buffer.getvalue()


def training_samples(run: RunFiles, budget: Budget, most: int = _MAX_TRAINING_FRAMES) -> Frames | None:
    """Returns the pictures samples/train_step*.png in order, at most `most`."""
    paths = sorted(sample_files(run.directory, f"samples/{_PREFIX}*.png"), reverse=True)
    paths = [path for path in paths if path.stem.removeprefix(_PREFIX).isdecimal()]
    frames = []
    for path in [paths[i] for i in even_subset(len(paths), most)]:  # newest first
        caption = f"after {int(path.stem.removeprefix(_PREFIX)):,} training steps"
        picture = budget.embed(path, caption, _FRAME_SIDE)
        if picture:
            frames.insert(0, (caption, (picture,)))
    note = "The same noise at every step, so that only the network changes."
    note += f" {len(frames)} of {len(paths)} pictures are in this file." if len(frames) < len(paths) else ""
    return Frames(("samples",), frames, note) if frames else None


def denoising(run: RunFiles, budget: Budget) -> Frames | None:
    """Returns the frames of the newest samples/trajectories/*.npz, or None if it has no images."""
    path, *_ = sample_files(run.directory, "samples/trajectories/*.npz") or [None]
    if path is None:
        return None
    try:
        with open_npz(path, _MAX_TRAJECTORY) as arrays:
            samples = arrays["samples"]
            x_t, x_0 = (np.concatenate([arrays[name], samples[None]]) for name in ("x_t", "x_0"))
            captions = [f"network time t = {time:.4g}" for time in arrays["times"]]
    except _READ_ERRORS as error:
        run.notes.append(f"{path.name} could not be read: {error}")
        return None
    if not pictures.is_of_images(samples):
        return None  # `other_pictures` shows its picture
    names, frames = ("x_t, the noisy sample", "x_0, as the network predicts it"), []
    for caption, *both in zip([*captions, "finished samples"], x_t, x_0, strict=True):
        drawn = [budget.embed(pictures.draw_grid(images), caption, _FRAME_SIDE) for images in both]
        if None not in drawn:
            frames.append((caption, tuple(drawn)))
    return Frames(names, frames, f"Samples of {path.name}.") if frames else None


def other_pictures(run: RunFiles, budget: Budget) -> tuple[list[Picture], list[str]]:
    """Returns (other pictures in the directory and below samples/, newest first; names of pictures beyond the budget)."""
    paths = [path for pattern in ("*.png", "samples/**/*.png") for path in sample_files(run.directory, pattern)]
    paths = [path for path in paths if not path.name.startswith(_PREFIX)]
    embedded = [(path.name, budget.embed(path, path.name)) for path in paths]
    return [picture for _, picture in embedded if picture], [name for name, picture in embedded if not picture]
