"""The default spacing for a sampler, and checks for steps on which a sampler fails.

A step that removes too much noise at once returns noise or blurred images, without an error. For Gaussian data, noise levels
alone predict this failure, because the probability flow and the error of each step have closed forms. The checks need the
data's standard deviation: `find_problem` assumes 0.5, about the value for images in [-1, 1], `find_error_growth` assumes 1,
and `find_blur` takes an argument. `tests/sampling/test_spacing.py` compares every sampler's samples with a mixture's exact
distribution.
"""

from __future__ import annotations

import numpy as np

from diffusion_jax.denoiser import Denoiser, as_denoiser
from diffusion_jax.errors import require_number
from diffusion_jax.sampling.driver import Sampler, Stability, check_sampler
from diffusion_jax.schedules import Schedule, respace
from diffusion_jax.schedules.respacing import DATA_STD
from diffusion_jax.types import DenoiseFn

_MIN_WIDTH = 0.9  # `find_blur` reports samples below this share of the data's standard deviation
_NETWORK_ERROR = 0.05  # error in eps at high noise, measured on a small trained network
# `Stability.order` -> the factor by which extrapolation enlarges independent errors. The factor is about the norm of the
# Adams-Bashforth weights, which are (3/2, -1/2) for order 2.
_EXTRAPOLATION = {1: 1.0, 2: 1.7, 3: 2.4, 4: 3.7}


def default_spacing(
    sampler: Sampler, schedule: Schedule, denoiser: Denoiser | DenoiseFn, *, is_continuous: bool = False
) -> str:
    """Returns the spacing for `schedules.respace` that suits a sampler and its data, "log_snr" or "trailing".

    It is "trailing" if alpha_bar ends at 0, because few steps of "log_snr" would leave pure noise too fast. Otherwise it is
    "log_snr" for continuous data and a sampler of order 2 or more with a limit of its steps, because "trailing" makes narrow
    directions narrower (`benchmarks/spacing.py`); if the sampler steps along eps; and if network errors would grow on 50
    steps of "trailing" (`find_error_growth`). In all other cases it is "trailing".

    schedule: not traced. is_continuous: True for float arrays, False for images with gray levels.
    Raises: ValueError for a sampler that is not a `Sampler`.
    """
    check_sampler(sampler)
    stability = sampler.stability
    if schedule.zero_terminal_snr:
        return "trailing"
    if stability is not None and stability.along_eps:
        return "log_snr"
    if is_continuous and stability is not None and stability.order > 1 and stability.limit is not None:
        return "log_snr"
    fifty = respace(schedule, min(50, schedule.num_timesteps), "trailing")
    return "log_snr" if find_error_growth(sampler, fifty, denoiser) else "trailing"


def find_problem(sampler: Sampler, schedule: Schedule) -> str | None:
    """Returns why `sampler` fails on the steps in `schedule`, as the end of an error message, or None.

    schedule: respaced, not traced. Samplers without `Sampler.stability` give None.
    Raises: ValueError for a sampler that is not a `Sampler`.
    """
    check_sampler(sampler)
    stability, sigma = sampler.stability, _noise_levels(schedule)
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


def find_error_growth(sampler: Sampler, schedule: Schedule, denoiser: Denoiser | DenoiseFn) -> str | None:
    """Returns why errors of a trained network spoil the samples, or None.

    An error d in the predicted eps gives x_0 the error d sigma / alpha; an error d in the score gives d sigma^2 / alpha.
    Without a clip, a step that divides a large sigma / alpha by a large factor moves most of this error into x, and the last
    step moves all of it into x.

    The result is exact for ddpm, ddim and order 1, for data with standard deviation 1 and a network that is exact except for
    independent errors of 0.05 in its output where sigma > alpha. Samplers with order n >= 2 extrapolate; their errors are
    estimated as the order-1 errors times a factor: 1.7 for order 2 and heun, 2.4 for order 3, 3.7 for pndm. The estimate is
    rough with fewer than about 10 steps, and with sde.

    schedule: respaced, not traced. denoiser: as `sample`. Samplers without `Sampler.stability` give None.
    Raises: ValueError for a sampler that is not a `Sampler`.
    """
    check_sampler(sampler)
    denoiser = as_denoiser(denoiser)
    stability, sigma = sampler.stability, _noise_levels(schedule)
    if stability is None or not sigma.size:
        return None
    if denoiser.clip or denoiser.prediction not in ("eps", "score"):
        return None
    factor = _EXTRAPOLATION[stability.order]
    error = _error_of_samples(stability.eta, sigma, denoiser.prediction)
    if factor * error <= 0.5:
        return None
    extrapolated = "; its extrapolation may enlarge them" if factor > 1 else ""
    return (
        f"nothing clips x_0: if a network's {denoiser.prediction} has errors of {_NETWORK_ERROR:g}, these steps give "
        f"sample errors of {error:.2g} times the data's standard deviation{extrapolated}"
    )


def find_blur(schedule: Schedule, data_std: float = 1.0) -> str | None:
    """Returns why the last step blurs samples, whatever the sampler, or None.

    The last step returns the network's x_0, the mean of all data that agree with x_t. For an exact network on Gaussian data,
    samples have 1 / sqrt(1 + (sigma / (alpha data_std))^2) times the data's standard deviation, with sigma and alpha of the
    last step. The result is None if this ratio is at least 0.9.

    schedule: respaced, not traced. data_std: the standard deviation of x_0, or of its narrowest detail; the default is for
    standardized data. It cannot be derived from the schedule or the network.
    Raises: ValueError for a data_std that is not positive.
    """
    require_number("data_std", data_std, 0, above=True)
    sigma = _noise_levels(schedule)[-1:]
    width = 1 / np.hypot(1, sigma / data_std)
    if not sigma.size or width[0] >= _MIN_WIDTH:
        return None
    return (
        f"the last step removes noise of {sigma[0] / data_std:.3g} times the data's standard deviation at once and blurs the "
        f"samples: they are {width[0]:.2g} times as wide as the data"
    )


def _error_of_samples(eta: float, sigma: np.ndarray, prediction: str) -> float:
    """Returns the standard deviation that a network's errors cause in samples of N(0, 1), drawn by DDIM with this eta.

    In y = x / alpha, the exact x_0 is y / (1 + sigma^2) and the exact eps is sigma y / (1 + sigma^2).
    """
    high, low = sigma, np.append(sigma[1:], 0.0)
    eps_scale = low * np.sqrt(1 - eta**2 * (1 - (low / high) ** 2))  # y' = x_0 + eps_scale eps + noise
    kept = (1 + high * eps_scale) / (1 + high**2)
    kept_later = np.append(np.cumprod(kept[:0:-1])[::-1], 1.0)
    errors = np.where(high > 1, _NETWORK_ERROR * (high - eps_scale), 0.0)
    if prediction == "score":  # eps = -sigma score
        errors = errors * high / np.hypot(1, high)
    return float(np.linalg.norm(errors * kept_later))


def _noise_levels(schedule: Schedule) -> np.ndarray:
    """Returns sigma / alpha, noisiest first, without pure noise, where every sampler takes DDIM's step."""
    alpha_bar = np.asarray(schedule.alpha_bar, np.float64)[::-1]
    alpha_bar = alpha_bar[alpha_bar > np.finfo(np.float64).tiny]
    return np.sqrt(1 / alpha_bar - 1)


def _step_errors(stability: Stability, sigma: np.ndarray) -> np.ndarray:
    """Returns the relative error [len(sigma) - 1] of each step from sigma[i] to sigma[i + 1], given exact previous values."""
    high, low = sigma[:-1], sigma[1:]
    spread = np.hypot(DATA_STD, sigma)  # x / alpha along the exact flow
    x_0, eps = DATA_STD**2 / spread, sigma / spread
    if stability.along_eps:
        euler = spread[:-1] + (low - high) * eps[:-1]
        predicted = spread[:-1] + (low - high) / 2 * (eps[:-1] + low / np.hypot(DATA_STD, low) ** 2 * euler)
    else:  # DPM-Solver++ 2M; other samplers extrapolate in the same way
        h = np.log(high / low)
        previous_h = np.append(np.inf, h[:-1])  # the first step does not extrapolate
        slope = np.append(0.0, np.diff(x_0)[:-1]) / previous_h
        predicted = low / high * spread[:-1] - np.expm1(-h) * (x_0[:-1] + h / 2 * slope)
    return np.abs(predicted / spread[1:] - 1)
