"""Diffusion posterior sampling, a method that does not draw from the posterior, to compare with `posterior`."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.denoiser import Denoiser
from diffusion_jax.measurements import Measurement
from diffusion_jax.sampling import Step, WrappedSampler
from diffusion_jax.schedules import Transition
from diffusion_jax.types import Batch


@dataclasses.dataclass(frozen=True, eq=False)
class dps(WrappedSampler, traced=("measurement", "zeta")):
    """Diffusion posterior sampling (Chung et al. 2023, Algorithm 1): subtracts zeta grad |y - A D| after each step.

    Wraps any other sampler; the paper uses `ddpm` with 1,000 steps. The norm is taken per example, and D is clipped, as in
    the paper's code. Samples fit y, but do not follow the posterior: their mean and standard deviation depend on zeta and the
    number of steps. zeta: the factor of the gradient; the paper uses 0.3 to 1. Raises: ValueError as `Measurement.check`.
    """

    measurement: Measurement
    zeta: float | np.floating = 1.0

    def __post_init__(self):
        super().__post_init__()
        self.measurement.check()

    def num_calls(self, num_steps: int) -> int:
        return self.sampler.num_calls(num_steps) + num_steps

    def step(self, key, denoiser: Denoiser, x_t: Batch, transition: Transition, state: Any) -> Step:
        new = self.sampler.step(key, denoiser, x_t, transition, state)

        def distance(x_t):
            residual = self.measurement.residual(denoiser(x_t, transition).x_0)
            squares = jnp.sum(jnp.square(residual), axis=tuple(range(1, residual.ndim)))
            # The square root has no gradient at 0, where A D = y.
            return jnp.sum(jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1.0)), 0.0))

        return new._replace(x_prev=new.x_prev - jnp.asarray(self.zeta, x_t.dtype) * jax.grad(distance)(x_t))
