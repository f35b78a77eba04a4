"""Data sets whose laws are known exactly, to compare samples and likelihoods with, and one recorded series.

| `data.dataset` | spatial axes, channels | law |
|---|---|---|
| `diffusion_jax.data.synthetic:series` | 1, 2 | `SERIES`: a stationary Gaussian process |
| `diffusion_jax.data.synthetic:field` | 2, 5 | `FIELD`: a periodic Gaussian field |
| `diffusion_jax.data.synthetic:volume` | 3, 1 | `VOLUME`: a periodic Gaussian field |
| `diffusion_jax.data.synthetic:moons` | 0, 2 | `MOONS`: two half circles with noise |
| `diffusion_jax.data.synthetic:mixture` | 0, 10 | `MIXTURE`: five Gaussians of unequal weights |
| `diffusion_jax.data.synthetic:conditional` | 0, 2 | `CONDITIONAL`: a Gaussian that depends on a continuous condition |
| `diffusion_jax.data.synthetic:real_series` | 1, 1 | unknown: a recorded membrane potential |

Each has a split "train" and a split "test", with independent draws. A law has its exact covariance, spectrum, density or
conditional mean, its entropy, and `sample`.
"""

from diffusion_jax.data.synthetic.gaussian_laws import FieldLaw, SeriesLaw
from diffusion_jax.data.synthetic.sources import (
    CONDITIONAL,
    FIELD,
    MIXTURE,
    MOONS,
    NUM_EXAMPLES,
    SERIES,
    VOLUME,
    Examples,
    conditional,
    field,
    mixture,
    moons,
    real_series,
    series,
    volume,
)
from diffusion_jax.data.synthetic.vector_laws import ConditionalLaw, Estimate, MixtureLaw, MoonsLaw

__all__ = [
    "CONDITIONAL",
    "FIELD",
    "MIXTURE",
    "MOONS",
    "NUM_EXAMPLES",
    "SERIES",
    "VOLUME",
    "ConditionalLaw",
    "Estimate",
    "Examples",
    "FieldLaw",
    "MixtureLaw",
    "MoonsLaw",
    "SeriesLaw",
    "conditional",
    "field",
    "mixture",
    "moons",
    "real_series",
    "series",
    "volume",
]
