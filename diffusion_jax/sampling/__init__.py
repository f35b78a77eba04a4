"""Samplers: pure functions from noise to images, and back.

`driver` has the base class and the loop, `spacing` the choice of steps, and each other module a family of samplers.
`SAMPLERS` has the samplers of the config by name. An argument of a sampler that has the name of a setting
`sampling.<name>` of a config is set by it.
"""

import inspect
from collections.abc import Callable

from diffusion_jax.sampling import ancestral, exponential, runge_kutta
from diffusion_jax.sampling.ancestral import ddim, ddpm, euler, euler_ancestral
from diffusion_jax.sampling.driver import Denoised, Sampler, Stability, Step, StepFn, Trajectory, sample
from diffusion_jax.sampling.exponential import deis, dpm_solver_pp, unipc
from diffusion_jax.sampling.inversion import encode
from diffusion_jax.sampling.runge_kutta import heun, plms, pndm
from diffusion_jax.sampling.spacing import default_spacing, find_blur, find_error_growth, find_problem

__all__ = [
    "SAMPLERS",
    "Denoised",
    "Sampler",
    "Stability",
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
    "plms",
    "pndm",
    "sample",
    "samplers_with",
    "unipc",
]

SAMPLERS: dict[str, Callable[..., Sampler]] = {
    "ddpm": ancestral.ddpm,
    "ddim": ancestral.ddim,
    "euler": ancestral.euler,
    "euler_ancestral": ancestral.euler_ancestral,
    "heun": runge_kutta.heun,
    "dpm_solver_pp": exponential.dpm_solver_pp,
    "unipc": exponential.unipc,
    "deis": exponential.deis,
    "pndm": runge_kutta.pndm,
    "plms": runge_kutta.plms,
}


def samplers_with(argument: str) -> list[str]:
    """The names in `SAMPLERS` of the samplers with this argument."""
    return [name for name, make in SAMPLERS.items() if argument in inspect.signature(make).parameters]
