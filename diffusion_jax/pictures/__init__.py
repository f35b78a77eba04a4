"""Draws every picture that a run writes; the modes only call these functions.

`draw_*` return a picture: uint8 [H, W, C], or a Matplotlib figure, which `to_array` converts. `save` writes both as PNG, and
`to_pillow` converts an array to a Pillow image.
Axes have labels with units, and images have captions, such as class, network time or distance. All pictures of a run get the
same `Channels`, so that their axes and colors agree.
"""

from diffusion_jax.images import is_of_images
from diffusion_jax.pictures.channels import UNKNOWN, Channels
from diffusion_jax.pictures.figures import draw_bound_terms, draw_curves, draw_rate_distortion
from diffusion_jax.pictures.grids import Picture, as_text, draw_grid, save, to_array, to_pillow
from diffusion_jax.pictures.posterior import draw_calibration, draw_posterior
from diffusion_jax.pictures.samples import Examples, draw_edit, draw_neighbors, draw_samples, draw_trajectory

__all__ = [
    "UNKNOWN",
    "Channels",
    "Examples",
    "Picture",
    "as_text",
    "draw_bound_terms",
    "draw_calibration",
    "draw_curves",
    "draw_edit",
    "draw_grid",
    "draw_neighbors",
    "draw_posterior",
    "draw_rate_distortion",
    "draw_samples",
    "draw_trajectory",
    "is_of_images",
    "save",
    "to_array",
    "to_pillow",
]
