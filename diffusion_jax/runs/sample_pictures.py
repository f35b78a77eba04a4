"""Pictures of samples of any kind: grids of images, and figures of other arrays."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from diffusion_jax.runs import array_pictures, figure_panels, pictures, trajectory_pictures
from diffusion_jax.runs.batch_sampler import SampleTrajectory

__all__ = ["draw_edit", "draw_samples", "draw_trajectory", "is_of_images"]


def is_of_images(samples: np.ndarray) -> bool:
    """Whether arrays [N, ...] are images: uint8 [N, H, W, C] with one or three channels."""
    return samples.dtype == np.uint8 and samples.ndim == 4 and samples.shape[3] in (1, 3)


def draw_samples(
    samples: np.ndarray, title: str, captions: Sequence[str] | None = None, columns: int | None = None
) -> np.ndarray:
    """A picture uint8 [H, W, C] of samples [N, *spatial, C]. columns: of a grid of images."""
    if is_of_images(samples):
        return pictures.grid(samples, columns, captions=captions, title=title)
    return figure_panels.render(array_pictures.draw_examples(samples, title=title, captions=captions))


def draw_edit(given: np.ndarray, results: np.ndarray, captions: Sequence[str], title: str) -> np.ndarray:
    """A picture uint8 [H, W, C] of given examples and, after them, the results. captions: of all of them."""
    if not is_of_images(results) and results.ndim == 2:  # a vector has no panel of its own
        title += ", and what was given (data)"
        return figure_panels.render(array_pictures.draw_examples(results, title=title, reference=given))
    shown = np.concatenate([given, results])
    return draw_samples(shown, title, captions, columns=min(len(shown), 10))


def draw_trajectory(trajectory: SampleTrajectory, title: str, captions: Sequence[str] | None = None) -> np.ndarray:
    """A picture uint8 [H, W, C] of samples being denoised: a row for each sample, a column for each network time t.

    captions: of the rows, such as their classes.
    """
    if not is_of_images(trajectory.x[0]):
        headers = pictures.time_headers(trajectory.times, "sample")
        return figure_panels.render(
            trajectory_pictures.draw_trajectory(trajectory.x, headers, title=title, captions=captions)
        )
    headers, images = pictures.time_headers(trajectory.times), trajectory.x.swapaxes(0, 1)
    rows, columns = images.shape[:2]
    below = [c for caption in captions[:rows] for c in [*[""] * (columns - 1), caption]] if captions else None
    title += "; columns: network time t"
    return pictures.grid(images.reshape(-1, *images.shape[2:]), columns, below, headers, title)
