"""Samplers: pure functions from noise to images, and back.

`driver` has the base class and the loop, `ancestral` and `solvers` have the samplers, and `spacing` helps to choose steps.
`SAMPLERS` maps config names to samplers. The setting `sampling.<name>` sets the sampler argument with the same name.
"""

import inspect
from collections.abc import Callable

from diffusion_jax.sampling.ancestral import consistency, ddim, ddpm, encode, euler, euler_ancestral
from diffusion_jax.sampling.driver import Sampler, Stability, Step, Trajectory, WrappedSampler, normal, sample
from diffusion_jax.sampling.solvers import deis, dpm_solver_pp, heun, plms, pndm, unipc
from diffusion_jax.sampling.spacing import default_spacing, find_blur, find_error_growth, find_problem

__all__ = [
    "SAMPLERS",
    "Sampler",
    "Stability",
    "Step",
    "Trajectory",
    "WrappedSampler",
    "consistency",
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
    "normal",
    "plms",
    "pndm",
    "sample",
    "samplers_with",
    "unipc",
]

SAMPLERS: dict[str, Callable[..., Sampler]] = {
    "ddpm": ddpm,
    "ddim": ddim,
    "euler": euler,
    "euler_ancestral": euler_ancestral,
    "heun": heun,
    "dpm_solver_pp": dpm_solver_pp,
    "unipc": unipc,
    "deis": deis,
    "pndm": pndm,
    "plms": plms,
    "consistency": consistency,
}


def samplers_with(argument: str) -> list[str]:
    """Returns the names in `SAMPLERS` whose samplers have this argument."""
    return [name for name, make in SAMPLERS.items() if argument in arguments_of(make)]


def arguments_of(make_sampler: Callable[..., Sampler]) -> set[str]:
    """Returns the names of the arguments of a sampler's constructor: a value of `SAMPLERS`, or your own class."""
    return set(inspect.signature(make_sampler).parameters)
