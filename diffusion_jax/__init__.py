"""Denoising diffusion probabilistic models in JAX.

`import diffusion_jax` loads the pure core, which needs jax, numpy and jaxtyping only. Import networks, data and the training
program by name: `diffusion_jax.models`, `.data`, `.training`, `.runs`.
"""

from diffusion_jax import editing, guidance, likelihood, losses, process, sampling, schedules, timesteps, types
from diffusion_jax.types import Clip, DenoiseFn, TimestepSampler

__version__ = "0.2.0"

__all__ = [
    "Clip",
    "DenoiseFn",
    "TimestepSampler",
    "editing",
    "guidance",
    "likelihood",
    "losses",
    "process",
    "sampling",
    "schedules",
    "timesteps",
    "types",
]
