"""Every picture that a run writes is drawn here; the modules that run a mode only call these functions.

`draw_*` return a picture: uint8 [H, W, C], or a Matplotlib figure, which `to_array` converts. `save` writes either as PNG.
Every picture has a title; axes have labels with units, and images have captions, such as their class, network time or
distance. Only `draw_frame`, for the report, has no text.
"""

from diffusion_jax.pictures.curves import draw_against_steps, draw_bound_terms, draw_rate_distortion
from diffusion_jax.pictures.examples import draw_examples
from diffusion_jax.pictures.files import Picture, save, to_array
from diffusion_jax.pictures.frames import draw_frame
from diffusion_jax.pictures.grids import as_text, draw_grid
from diffusion_jax.pictures.samples import draw_edit, draw_neighbors, draw_samples, draw_trajectory, is_of_images
from diffusion_jax.pictures.statistics import draw_autocorrelation, draw_histograms, draw_spectra

__all__ = [
    "Picture",
    "as_text",
    "draw_against_steps",
    "draw_autocorrelation",
    "draw_bound_terms",
    "draw_edit",
    "draw_examples",
    "draw_frame",
    "draw_grid",
    "draw_histograms",
    "draw_neighbors",
    "draw_rate_distortion",
    "draw_samples",
    "draw_spectra",
    "draw_trajectory",
    "is_of_images",
    "save",
    "to_array",
]
