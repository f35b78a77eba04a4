"""Pictures of samples of any kind: grids of images, and figures of other arrays."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from diffusion_jax.pictures.examples import draw_examples
from diffusion_jax.pictures.files import Picture
from diffusion_jax.pictures.grids import draw_grid
from diffusion_jax.pictures.trajectories import draw_array_trajectory

__all__ = ["draw_edit", "draw_neighbors", "draw_samples", "draw_trajectory", "is_of_images"]


def is_of_images(samples: np.ndarray) -> bool:
    """Whether arrays [N, ...] are images: uint8 [N, H, W, C] with one or three channels."""
    return samples.dtype == np.uint8 and samples.ndim == 4 and samples.shape[3] in (1, 3)


def draw_samples(
    samples: np.ndarray, title: str, captions: Sequence[str] | None = None, columns: int | None = None
) -> Picture:
    """A picture of samples [N, *spatial, C]. columns: of a grid of images."""
    if is_of_images(samples):
        return draw_grid(samples, title, columns, captions)
    return draw_examples(samples, title=title, captions=captions)


def draw_edit(given: np.ndarray, results: np.ndarray, captions: Sequence[str], title: str) -> Picture:
    """A picture of given examples and, after them, the results. captions: of all of them."""
    if not is_of_images(results) and results.ndim == 2:  # a vector has no panel of its own
        return draw_examples(results, title=title + ", and what was given (data)", reference=given)
    shown = np.concatenate([given, results])
    if not is_of_images(shown) and np.isnan(given).any():
        title += "; magenta: values to be generated"
    return draw_samples(shown, title, captions, columns=min(len(shown), 10))


def draw_neighbors(
    samples: np.ndarray, numbers: Sequence[int], nearest: np.ndarray, distances: np.ndarray, title: str
) -> Picture:
    """A picture of samples [N, *spatial, C], each before its nearest examples [N, k, *spatial, C].

    numbers: of the samples in their file. distances: [N, k].
    """
    count = distances.shape[1]
    shown = np.concatenate([samples[:, None], nearest], axis=1).reshape(-1, *samples.shape[1:])
    captions = []
    for number, row in zip(numbers, distances, strict=True):
        captions += [f"sample {number}", *(f"distance {distance:.4g}" for distance in row)]
    if is_of_images(shown):
        headers = ["sample", "nearest", *(f"nearest no. {i}" for i in range(2, count + 1))]
        return draw_grid(shown, title, count + 1, captions, headers)
    title += " (after each sample)"
    return draw_examples(shown, title=title, captions=captions, columns=(count + 1) * max(1, 4 // (count + 1)))


def draw_trajectory(
    x: np.ndarray, times: np.ndarray, title: str, captions: Sequence[str] | None = None, last: str = "sample"
) -> Picture:
    """A picture of samples at several network times: a row for each sample, a column for each time.

    Args:
      x: [columns, rows, *spatial, C]. times: of the columns except the last. captions: of the rows, such as their classes.
      last: the header of the last column.
    """
    headers = [*(f"t = {time:.4g}" for time in np.asarray(times)), last]
    title += "; columns: network time t"
    if not is_of_images(x[0]):
        return draw_array_trajectory(x, headers, title=title, captions=captions)
    images = x.swapaxes(0, 1)
    rows, columns = images.shape[:2]
    below = [c for caption in captions[:rows] for c in [*[""] * (columns - 1), caption]] if captions else None
    return draw_grid(images.reshape(-1, *images.shape[2:]), title, columns, below, headers)
