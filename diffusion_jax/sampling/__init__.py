"""Samplers: pure functions from noise to images. `driver` holds the loop, each other file a family of steps."""

from diffusion_jax.sampling.ancestral import ddim, ddpm
from diffusion_jax.sampling.driver import Sampler, Step, Trajectory, sample

__all__ = ["Sampler", "Step", "Trajectory", "ddim", "ddpm", "sample"]
