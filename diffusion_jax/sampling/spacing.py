"""Which steps suit a sampler: the spacing used where none is given, and steps on which a sampler fails.

A solver that steps over too much of the noise at once draws noise or blur, without an error. Whether it does follows from
the noise levels alone, on Gaussian data of standard deviation 0.5 (about that of images in [-1, 1]): its probability flow is
known, so the error of each step taken from the exact point is too. `tests/sampling/test_spacing.py` compares samples of every
sampler with the exact distribution of a mixture.
"""

from __future__ import annotations

import numpy as np

from diffusion_jax.sampling.driver import Sampler
from diffusion_jax.sampling.exponential import dpm_solver_pp, unipc
from diffusion_jax.sampling.runge_kutta import heun, pndm
from diffusion_jax.schedules import Schedule

_SD = 0.5  # of the data


def default_spacing(sampler: Sampler, schedule: Schedule) -> str:
    """The spacing for `schedules.respace` that suits a sampler: "log_snr" for heun and pndm, "trailing" for others.

    Also "trailing" where alpha_bar ends at 0, which has no finite log SNR.
    """
    return "log_snr" if isinstance(_innermost(sampler), heun | pndm) and not schedule.zero_terminal_snr else "trailing"


def find_problem(sampler: Sampler, schedule: Schedule) -> str | None:
    """Why `sampler` fails on the steps of `schedule`, in words that follow "sampler: "; None where it does not.

    schedule: concrete, respaced. Only samplers of this package are judged.
    """
    sampler = _innermost(sampler)
    limit = _limit(sampler)
    sigma = _noise_levels(schedule)
    if limit is None or len(sigma) < 2:
        return None
    errors = _step_errors(sampler, sigma)
    worst = int(np.argmax(errors))
    if errors[worst] <= limit:
        return None
    ratio = sigma[worst] / sigma[worst + 1]
    return (
        f"one of these {schedule.num_timesteps} steps divides the noise by {ratio:.3g}, too much at once for this sampler; "
        "its samples would be noise"
    )


def find_blur(schedule: Schedule) -> str | None:
    """Why the last of these steps blurs every sampler's samples, in words; None where it does not. schedule: concrete."""
    sigma = _noise_levels(schedule)[-1:]
    if not sigma.size or sigma[0] <= 2 * _SD:
        return None
    return f"the last step removes noise of {sigma[0]:.3g} times the image at once, which blurs the samples"


def _innermost(sampler: Sampler) -> Sampler:
    """The sampler that takes the steps, inside of those that wrap another as their field `sampler`."""
    while isinstance(getattr(sampler, "sampler", None), Sampler):
        sampler = sampler.sampler
    return sampler


def _limit(sampler: Sampler) -> float | None:
    """The largest relative error of one step, above which samples are noise; measured on mixtures, see the test."""
    if isinstance(sampler, heun | pndm):
        return 0.5
    if isinstance(sampler, dpm_solver_pp) and (sampler.singlestep or (sampler.sde and sampler.order == 3)):
        return 0.1 if sampler.order == 3 else None
    if isinstance(sampler, dpm_solver_pp | unipc) and sampler.order > 1:
        return 0.3
    return None


def _noise_levels(schedule: Schedule) -> np.ndarray:
    """sigma / alpha, the noisiest first, without pure noise, from which all samplers step as DDIM does."""
    alpha_bar = np.asarray(schedule.alpha_bar, np.float64)[::-1]
    alpha_bar = alpha_bar[alpha_bar > 0]
    return np.sqrt(1 / alpha_bar - 1)


def _step_errors(sampler: Sampler, sigma: np.ndarray) -> np.ndarray:
    """[len(sigma) - 1], the relative error of each step from sigma[i] to sigma[i + 1], the exact values known before."""
    high, low = sigma[:-1], sigma[1:]
    spread = np.hypot(_SD, sigma)  # x / alpha along the exact flow
    x_0, eps = _SD**2 / spread, sigma / spread
    if isinstance(sampler, heun | pndm):
        euler = spread[:-1] + (low - high) * eps[:-1]
        got = spread[:-1] + (low - high) / 2 * (eps[:-1] + low / np.hypot(_SD, low) ** 2 * euler)
    else:  # DPM-Solver++ 2M, whose extrapolation the others share
        h = np.log(high / low)
        before = np.append(np.inf, h[:-1])  # the first step extrapolates nothing
        slope = np.append(0.0, np.diff(x_0)[:-1]) / before
        got = low / high * spread[:-1] - np.expm1(-h) * (x_0[:-1] + h / 2 * slope)
    return np.abs(got / spread[1:] - 1)
