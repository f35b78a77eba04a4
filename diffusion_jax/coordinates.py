"""Converts networks in the coordinates of EDM or flow matching to denoise_fns of x_t.

The process is x_t = alpha x_0 + sigma eps with alpha^2 + sigma^2 = 1. Other processes rescale x_t:

    EDM (Karras et al. 2022)                y = x_t / alpha = x_0 + s eps                        s = sigma / alpha
    flow matching (Lipman et al. 2023)      z = x_t / (alpha + sigma) = (1 - tau) x_0 + tau eps  tau = sigma / (alpha + sigma)

The functions return a denoise_fn(x_t, time) for any loss and, in a `Denoiser`, for any sampler. `path`, a `Path` or the
`Schedule` used for sampling, gives the noise level at a network time. If the network has a learned variance, the second half
of the output's channels is unchanged.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from jaxtyping import Array, ArrayLike, Float

from diffusion_jax.arrays import as_float
from diffusion_jax.denoiser import Denoiser
from diffusion_jax.schedules import NoiseLevel, Path, Schedule
from diffusion_jax.types import Batch, DenoiseFn


def _level_at(path: Path | Schedule, time: Float[Array, "B"], x_t: Batch) -> NoiseLevel:
    return (path.path if isinstance(path, Schedule) else path).at(time, x_t)


def precondition(network: DenoiseFn, path: Path | Schedule, sigma_data: float = 0.5) -> DenoiseFn:
    """Returns a denoise_fn that predicts x_0, from a network with EDM's preconditioning (Karras et al. 2022, table 1).

    With d = sigma_data, the result predicts x_0 = c_skip y + c_out F(c_in y), where c_in y = x_t / r,
    c_skip y = d^2 alpha x_t / r^2 and c_out = d sigma / r for r^2 = sigma^2 + d^2 alpha^2. For d = 1, F predicts -v.

    network: F, with an input and a target of variance 1. F is called with c_in y, the network time, which is log(s) / 4 on
      the path `schedules.edm`, and the keyword arguments of the denoise_fn.
    sigma_data: the standard deviation of x_0. Raises: ValueError for a sigma_data that is not positive.
    """
    denoiser = Denoiser(network, "x_0", sigma_data=sigma_data)

    def denoise_fn(x_t, time, **inputs):
        x_t = as_float("x_t", x_t)
        return dataclasses.replace(denoiser, inputs=inputs).output(x_t, _level_at(path, time, x_t))

    return denoise_fn


def from_edm(denoiser: Callable[[Batch, Float[Array, "B"]], ArrayLike], path: Path | Schedule) -> DenoiseFn:
    """Returns a denoise_fn that predicts x_0, from a denoiser D(y, s) of EDM or k-diffusion, with y = x_0 + s eps.

    denoiser: called with y [B, ...] and s [B]. The path must not reach pure noise, where y is not finite.
    """
    return _rescaled(denoiser, path, lambda level: level.alpha)


def from_flow(velocity: Callable[[Batch, Float[Array, "B"]], ArrayLike], path: Path | Schedule) -> DenoiseFn:
    """Returns a denoise_fn that predicts flow, from a velocity u(z, tau) = eps - x_0 at z = (1 - tau) x_0 + tau eps.

    velocity: called with z [B, ...] and tau [B]. For a network whose time runs from noise (0) to data (1), pass
    `lambda z, tau: -network(z, 1 - tau)`.
    """
    return _rescaled(velocity, path, lambda level: level.alpha + level.sigma)


def _rescaled(function, path, scale) -> DenoiseFn:
    """Returns the denoise_fn that calls function(x_t / scale, sigma / scale)."""

    def denoise_fn(x_t, time):
        x_t = as_float("x_t", x_t)
        level = _level_at(path, time, x_t)
        unit = scale(level)
        return function(x_t / unit, (level.sigma / unit).reshape(-1))

    return denoise_fn
