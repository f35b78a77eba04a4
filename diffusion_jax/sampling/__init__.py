"""Samplers: pure functions from noise to images, and back.

`driver` holds the loop, `levels` what solvers read, `spacing` which steps suit which sampler, each other file a family of
steps.
"""

from diffusion_jax.sampling.ancestral import ddim, ddpm, euler, euler_ancestral
from diffusion_jax.sampling.driver import Sampler, Step, Trajectory, sample
from diffusion_jax.sampling.exponential import deis, dpm_solver_pp, unipc
from diffusion_jax.sampling.inversion import encode
from diffusion_jax.sampling.runge_kutta import heun, pndm
from diffusion_jax.sampling.spacing import default_spacing, find_blur, find_problem

__all__ = [
    "Sampler",
    "Step",
    "Trajectory",
    "ddim",
    "ddpm",
    "default_spacing",
    "deis",
    "dpm_solver_pp",
    "encode",
    "euler",
    "euler_ancestral",
    "find_blur",
    "find_problem",
    "heun",
    "pndm",
    "sample",
    "unipc",
]
