"""Denoising diffusion probabilistic models in JAX.

Importing the package brings the pure core, which needs jax and numpy alone. Networks, data and the training program
are imported by name: `diffusion_jax.models`, `.data`, `.training`, `.runs`.
"""

from diffusion_jax import editing, guidance, likelihood, losses, process, sampling, schedules, timesteps

__version__ = "0.1.1"

__all__ = ["editing", "guidance", "likelihood", "losses", "process", "sampling", "schedules", "timesteps"]
