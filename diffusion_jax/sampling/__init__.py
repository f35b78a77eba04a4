"""Samplers: pure functions from noise to images, and back.

`driver` has the loop, `noise_levels` the network calls and coefficients of the solvers, `spacing` the choice of steps,
and each other module a family of samplers.
"""

from diffusion_jax.sampling.ancestral import ddim, ddpm, euler, euler_ancestral
from diffusion_jax.sampling.driver import Sampler, Step, StepFn, Trajectory, sample
from diffusion_jax.sampling.exponential import deis, dpm_solver_pp, unipc
from diffusion_jax.sampling.inversion import EncodeOptions, encode
from diffusion_jax.sampling.runge_kutta import heun, pndm
from diffusion_jax.sampling.spacing import default_spacing, find_blur, find_error_growth, find_problem

__all__ = [
    "EncodeOptions",
    "Sampler",
    "Step",
    "StepFn",
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
    "find_error_growth",
    "find_problem",
    "heun",
    "pndm",
    "sample",
    "unipc",
]
