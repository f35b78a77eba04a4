"""Which steps suit a sampler: the default spacing, and steps on which a sampler fails.

A solver whose step removes too much noise at once returns noise or blurred images, without an error. The noise levels alone
predict this, on Gaussian data of standard deviation 0.5 (about that of images in [-1, 1]): its probability flow has a closed
form, and so has the error of each step from the exact point. `tests/sampling/test_spacing.py` compares samples of every
sampler with the exact distribution of a mixture.
"""

from __future__ import annotations

import numpy as np

from diffusion_jax.sampling.driver import Sampler, Stability, check_sampler
from diffusion_jax.schedules import Schedule, respace
from diffusion_jax.schedules.respacing import DATA_STD

__all__ = ["default_spacing", "find_blur", "find_error_growth", "find_problem"]

_NETWORK_ERROR = 0.05  # of eps where there is much noise: that of a small trained network
# By `Stability.order`: about the norm of Adams-Bashforth weights, (3/2, -1/2) and so on, which multiplies independent errors.
_EXTRAPOLATION = {1: 1.0, 2: 1.7, 3: 2.4, 4: 3.7}


def default_spacing(sampler: Sampler, schedule: Schedule) -> str:
    """The spacing for `schedules.respace` that suits a sampler: "log_snr" if it steps along eps, otherwise "trailing".

    "log_snr" also if the errors of a network would grow on 50 steps of "trailing" (`find_error_growth`). "trailing" for all
    samplers if alpha_bar ends at 0, where the log SNR is not finite. schedule: not traced.
    Raises: ValueError for a sampler that is not a `Sampler`.
    """
    check_sampler(sampler)
    if schedule.zero_terminal_snr:
        return "trailing"
    stability = _innermost(sampler).stability
    if stability is not None and stability.along_eps:
        return "log_snr"
    fifty = respace(schedule, min(50, schedule.num_timesteps), "trailing")
    return "log_snr" if find_error_growth(sampler, fifty) else "trailing"


def find_problem(sampler: Sampler, schedule: Schedule) -> str | None:
    """The reason why `sampler` fails on the steps of `schedule`, as the end of an error message, or None.

    schedule: respaced, not traced. None for samplers without `Sampler.stability`.
    Raises: ValueError for a sampler that is not a `Sampler`.
    """
    check_sampler(sampler)
    stability, sigma = _innermost(sampler).stability, _noise_levels(schedule)
    if stability is None or stability.limit is None or len(sigma) < 2:
        return None
    errors = _step_errors(stability, sigma)
    worst = int(np.argmax(errors))
    if errors[worst] <= stability.limit:
        return None
    ratio = sigma[worst] / sigma[worst + 1]
    return (
        f"one of these {schedule.num_timesteps} steps divides the noise by {ratio:.3g}, too much at once for this sampler; "
        "its samples would be noise"
    )


def find_error_growth(sampler: Sampler, schedule: Schedule) -> str | None:
    """The reason why errors of a trained network spoil the samples, or None.

    A prediction of eps or the score with the error d gives x_0 the error d sigma / alpha. Without a clip, a step that divides
    a large sigma / alpha by a large factor takes most of this error into x, and the last step takes all of it.

    The result is exact for ddpm, ddim and order 1, for a network of data of standard deviation 1 that is exact except for
    independent errors of 0.05 of eps where sigma > alpha. The errors of samplers of order n >= 2, which extrapolate, are
    estimated as those of order 1 times a factor: 1.7 for order 2 and heun, 2.4 for order 3, 3.7 for pndm. The estimate is
    rough with fewer than about 10 steps, and with sde.

    schedule: respaced, not traced. None for samplers without `Sampler.stability`.
    Raises: ValueError for a sampler that is not a `Sampler`.
    """
    check_sampler(sampler)
    sampler = _innermost(sampler)
    stability, sigma = sampler.stability, _noise_levels(schedule)
    if stability is None or not sigma.size:
        return None
    if callable(sampler.clip) or sampler.clip or sampler.prediction not in ("eps", "score"):
        return None
    factor = _EXTRAPOLATION[stability.order]
    error = _error_of_samples(stability.eta, sigma)
    if factor * error <= 0.5:
        return None
    extrapolated = "; its extrapolation may enlarge them" if factor > 1 else ""
    return (
        f"nothing clips x_0: from a network of {sampler.prediction} with errors of {_NETWORK_ERROR:g}, these steps give "
        f"samples with errors of {error:.2g} times the standard deviation of the data{extrapolated}"
    )


def find_blur(schedule: Schedule) -> str | None:
    """The reason why the last step blurs the samples of every sampler, or None. schedule: not traced."""
    sigma = _noise_levels(schedule)[-1:]
    if not sigma.size or sigma[0] <= 2 * DATA_STD:
        return None
    return f"the last step removes noise of {sigma[0]:.3g} times the data at once, which blurs the samples"


def _innermost(sampler: Sampler) -> Sampler:
    """The sampler that takes the steps, unwrapped from samplers with a field `sampler`."""
    while isinstance(inner := getattr(sampler, "sampler", None), Sampler):
        sampler = inner
    return sampler


def _error_of_samples(eta: float, sigma: np.ndarray) -> float:
    """The standard deviation of the network's errors in samples of N(0, 1), by DDIM steps with this eta.

    In y = x / alpha, the exact x_0 is y / (1 + sigma^2) and the exact eps is sigma y / (1 + sigma^2).
    """
    high, low = sigma, np.append(sigma[1:], 0.0)
    eps_scale = low * np.sqrt(1 - eta**2 * (1 - (low / high) ** 2))  # y' = x_0 + eps_scale eps + noise
    kept = (1 + high * eps_scale) / (1 + high**2)
    kept_later = np.append(np.cumprod(kept[:0:-1])[::-1], 1.0)
    errors = np.where(high > 1, _NETWORK_ERROR * (high - eps_scale), 0.0)
    return float(np.linalg.norm(errors * kept_later))


def _noise_levels(schedule: Schedule) -> np.ndarray:
    """sigma / alpha, noisiest first; without pure noise, from which the step of every sampler is DDIM's."""
    alpha_bar = np.asarray(schedule.alpha_bar, np.float64)[::-1]
    alpha_bar = alpha_bar[alpha_bar > np.finfo(np.float64).tiny]
    return np.sqrt(1 / alpha_bar - 1)


def _step_errors(stability: Stability, sigma: np.ndarray) -> np.ndarray:
    """The relative error of each step from sigma[i] to sigma[i + 1], with exact previous values; [len(sigma) - 1]."""
    high, low = sigma[:-1], sigma[1:]
    spread = np.hypot(DATA_STD, sigma)  # x / alpha along the exact flow
    x_0, eps = DATA_STD**2 / spread, sigma / spread
    if stability.along_eps:
        euler = spread[:-1] + (low - high) * eps[:-1]
        predicted = spread[:-1] + (low - high) / 2 * (eps[:-1] + low / np.hypot(DATA_STD, low) ** 2 * euler)
    else:  # DPM-Solver++ 2M; the others extrapolate in the same way
        h = np.log(high / low)
        previous_h = np.append(np.inf, h[:-1])  # the first step does not extrapolate
        slope = np.append(0.0, np.diff(x_0)[:-1]) / previous_h
        predicted = low / high * spread[:-1] - np.expm1(-h) * (x_0[:-1] + h / 2 * slope)
    return np.abs(predicted / spread[1:] - 1)
