"""Denoising diffusion probabilistic models in JAX.

`import diffusion_jax` loads the pure core, which needs only jax, numpy and jaxtyping. Import networks, data and the training
program explicitly: `diffusion_jax.models`, `.data`, `.training`, `.runs`.
"""

from diffusion_jax import (
    coordinates,
    covariances,
    denoiser,
    draws,
    editing,
    guidance,
    likelihood,
    losses,
    measurements,
    posterior,
    process,
    sampling,
    schedules,
    timesteps,
    types,
)
from diffusion_jax.denoiser import Denoiser
from diffusion_jax.types import Clip, DenoiseFn, LevelDraw, TimestepSampler

__version__ = "0.4.0.dev0"

__all__ = [
    "Clip",
    "DenoiseFn",
    "Denoiser",
    "LevelDraw",
    "TimestepSampler",
    "coordinates",
    "covariances",
    "denoiser",
    "draws",
    "editing",
    "guidance",
    "likelihood",
    "losses",
    "measurements",
    "posterior",
    "process",
    "sampling",
    "schedules",
    "timesteps",
    "types",
]
