"""Draws every picture that a run writes; the modes only call these functions.

`draw_*` return a picture: uint8 [H, W, C], or a Matplotlib figure, which `to_array` converts. `save` writes both as PNG.
Axes have labels with units, and images have captions, such as class, network time or distance.
"""

from diffusion_jax.images import is_of_images
from diffusion_jax.pictures.figures import (
    draw_bound_terms,
    draw_curves,
    draw_edit,
    draw_neighbors,
    draw_rate_distortion,
    draw_samples,
    draw_trajectory,
)
from diffusion_jax.pictures.grids import Picture, as_text, draw_grid, save, to_array

__all__ = [
    "Picture",
    "as_text",
    "draw_bound_terms",
    "draw_curves",
    "draw_edit",
    "draw_grid",
    "draw_neighbors",
    "draw_rate_distortion",
    "draw_samples",
    "draw_trajectory",
    "is_of_images",
    "save",
    "to_array",
]
