"""The pictures of a run for the page: samples during training, denoising, samples by class, memorization, and others."""

from __future__ import annotations

import pathlib
import zipfile
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from diffusion_jax import pictures
from diffusion_jax.data.numpy_files import map_array
from diffusion_jax.report.collect import RunFiles, modified_time, sample_files
from diffusion_jax.report.embed import Budget, Picture
from diffusion_jax.runs.sampling_conditions import class_captions

__all__ = ["Captioned", "Frames", "class_rows", "denoising", "even_subset", "other_pictures", "training_samples"]

MAX_TRAINING_FRAMES = 24
_MAX_CLASSES, _IMAGES_OF_A_CLASS = 20, 8
_MAX_PICTURES = 30
_READ_ERRORS = (OSError, ValueError, KeyError, zipfile.BadZipFile)
TRAJECTORY = "_trajectory"


class Captioned(NamedTuple):
    """A picture with its title and what it shows."""

    picture: Picture
    caption: str


class Frames(NamedTuple):
    """Pictures to step through: {caption: the pictures of a frame}. names: of the pictures of a frame. note: "" or more."""

    names: tuple[str, ...]
    frames: list[tuple[str, tuple[Picture, ...]]]
    note: str


def even_subset(count: int, most: int) -> list[int]:
    """At most `most` numbers of 0 ... count - 1, evenly spread, with both ends."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int)).tolist() if count else []


def training_samples(run: RunFiles, budget: Budget, newest_only: bool = False) -> Frames | None:
    """The pictures samples/train_step*.png in order."""
    prefix = "train_step"
    paths = sorted((run.directory / "samples").glob(f"{prefix}*.png"))
    paths = [path for path in paths if path.stem.removeprefix(prefix).isdecimal()]
    chosen = paths[-1:] if newest_only else [paths[i] for i in even_subset(len(paths), MAX_TRAINING_FRAMES)]
    limit, frames = budget.left // max(len(chosen), 1), []
    for path in chosen:
        picture = _embed(budget, path, limit, run.notes)
        if picture:
            frames.append((f"after {int(path.stem.removeprefix(prefix)):,} training steps", (picture,)))
    note = f"{len(frames)} of {len(paths)} pictures are in this file." if len(frames) < len(paths) else ""
    return Frames(("samples",), frames, note) if frames else None


def denoising(run: RunFiles, budget: Budget) -> tuple[Frames | None, Captioned | None]:
    """(the frames of the newest *_trajectory.npz, the newest picture of a trajectory if there are no frames)."""
    paths = [path for path in (run.directory / "samples").glob(f"*{TRAJECTORY}.npz") if ".partial." not in path.name]
    for path in sorted(paths, key=modified_time, reverse=True)[:1]:
        try:
            with np.load(path, allow_pickle=False) as arrays:
                samples = arrays["samples"][None]
                x_t, x_0 = (np.concatenate([arrays[name], samples]) for name in ("x_t", "x_0"))
                captions = [f"network time t = {time:.4g}" for time in arrays["times"]]
            return _denoising_frames(path.name, x_t, x_0, [*captions, "finished samples"], budget), None
        except _READ_ERRORS as error:
            run.notes.append(f"{path.name} could not be read: {error}")
    for path in sorted((run.directory / "samples").glob(f"*{TRAJECTORY}.png"), key=modified_time)[-1:]:
        picture = _embed(budget, path, None, run.notes)
        return None, Captioned(picture, path.name) if picture else None
    return None, None


def _denoising_frames(name: str, x_t: np.ndarray, x_0: np.ndarray, captions: Sequence[str], budget: Budget) -> Frames:
    """x_t [frames, rows, ...] and the x_0 that the network predicts there."""
    limit, frames, names = (
        budget.left // (2 * len(x_t)),
        [],
        ("x_t, the noisy sample", "x_0, as the network predicts it"),
    )
    for caption, *both in zip(captions, x_t, x_0, strict=True):
        drawn = [budget.embed(pictures.draw_frame(x, x_t[-1]), limit) for x in both]
        if None not in drawn:
            frames.append((caption, tuple(drawn)))
    return Frames(names, frames, f"Samples of {name}.")


def class_rows(run: RunFiles, budget: Budget) -> tuple[list[Captioned], str]:
    """(a row of the newest samples of each class, what was left out); without classes, none."""
    for path in sample_files(run.directory):
        try:
            images, labels = map_array(path, "arr_0"), np.asarray(map_array(path, "arr_1"))
        except _READ_ERRORS:  # samples without labels
            return [], ""
        if not pictures.is_of_images(images):
            return [], ""
        present = np.unique(labels)
        shown = present[:_MAX_CLASSES]
        captions, rows = class_captions(shown, run.class_names), []
        for label, caption in zip(shown, captions, strict=True):
            chosen = np.flatnonzero(labels == label)[:_IMAGES_OF_A_CLASS]
            picture = budget.embed(pictures.draw_grid(np.asarray(images[chosen]), columns=len(chosen)))
            if picture:
                rows.append(Captioned(picture, caption))
        left_out = len(present) - len(rows)
        note = f"Samples of {path.name}."
        return rows, note + (f" {left_out} other classes are not in this file." if left_out else "")
    return [], ""


def other_pictures(
    run: RunFiles, budget: Budget, is_wanted: Callable[[str], bool], captions: dict[str, str] | None = None
) -> tuple[list[Captioned], list[str]]:
    """(the other pictures of the directory and of samples/, the newest first; the names of those that found no room)."""
    paths = [*run.directory.glob("*.png"), *(run.directory / "samples").glob("*.png")]
    paths = [path for path in paths if ".partial." not in path.name and is_wanted(path.name)]
    paths = sorted(paths, key=lambda path: (-modified_time(path), path.name))
    shown, left_out = [], [path.name for path in paths[_MAX_PICTURES:]]
    paths = paths[:_MAX_PICTURES]
    for number, path in enumerate(paths):
        limit = 2 * budget.left // max(len(paths) - number, 2)
        picture = _embed(budget, path, limit, run.notes)
        if picture:
            shown.append(Captioned(picture, (captions or {}).get(path.name, path.name)))
        else:
            left_out.append(path.name)
    return shown, left_out


def _embed(budget: Budget, path: pathlib.Path, limit: int | None, notes: list[str]) -> Picture | None:
    try:
        return budget.embed(path, limit)
    except (OSError, ValueError, SyntaxError) as error:  # Pillow raises SyntaxError for some damaged files
        notes.append(f"{path.name} could not be read: {error}")
        return None
