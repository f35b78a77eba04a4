"""The variances of the published noise schedules."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from jaxtyping import Float64

__all__ = ["SCHEDULES", "betas"]


def _linear(num_timesteps, beta_start, beta_end):
    return np.linspace(beta_start, beta_end, num_timesteps)


def _quadratic(num_timesteps, beta_start, beta_end):
    return np.linspace(beta_start**0.5, beta_end**0.5, num_timesteps) ** 2


def _sigmoid(num_timesteps, beta_start, beta_end):
    return beta_start + (beta_end - beta_start) / (1 + np.exp(-np.linspace(-6, 6, num_timesteps)))


def _constant(num_timesteps, beta_start, beta_end):
    return np.full(num_timesteps, beta_end)


def _jsd(num_timesteps, beta_start, beta_end):
    return 1 / np.linspace(num_timesteps, 1, num_timesteps)


def _warmup(fraction):
    def warmup_betas(num_timesteps, beta_start, beta_end):
        warm = int(num_timesteps * fraction)
        return np.concatenate([np.linspace(beta_start, beta_end, warm), np.full(num_timesteps - warm, beta_end)])

    return warmup_betas


def _cosine(num_timesteps, beta_start, beta_end):
    f = np.cos((np.arange(num_timesteps + 1) / num_timesteps + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1 - f[1:] / f[:-1], 0.999)


# name -> (number of timesteps, beta_start, beta_end) -> betas float64 [T]
SCHEDULES: dict[str, Callable[[int, float, float], np.ndarray]] = {
    "linear": _linear,
    "cosine": _cosine,
    "quadratic": _quadratic,
    "sigmoid": _sigmoid,
    "constant": _constant,
    "jsd": _jsd,
    "warmup10": _warmup(0.1),
    "warmup50": _warmup(0.5),
}


def betas(
    name: str, num_timesteps: int | np.integer, *, beta_start: float = 1e-4, beta_end: float = 0.02
) -> Float64[np.ndarray, "T"]:
    """The variances beta_t of q(x_t | x_{t-1}) for t = 1 ... T.

    T is `num_timesteps`; start and end are `beta_start` and `beta_end`, whose defaults are DDPM's (section 4):

    | name | beta_t | source |
    |---|---|---|
    | linear | linspace(start, end) | DDPM section 4 |
    | cosine | min(1 - f(t)/f(t-1), 0.999), f(t) = cos^2((t/T + 0.008)/1.008 pi/2); no start and end | Improved DDPM eq. 17 |
    | quadratic | linspace(sqrt(start), sqrt(end))^2 | DDPM's code, "quad" |
    | sigmoid | start + (end - start) sigmoid(linspace(-6, 6)) | DDIM's code |
    | constant | end | DDPM's code, "const" |
    | jsd | 1/T, 1/(T-1), ..., 1; no start and end; alpha_bar ends at 0 | Sohl-Dickstein et al. section 2.4.1; DDPM's code |
    | warmup10, warmup50 | linear over the first 10% (50%), then end | DDPM's code |

    start and end are not scaled with T. Improved DDPM's linear schedule for T != 1000 is `beta_start=0.1 / T,
    beta_end=20 / T`.

    Returns: float64 [T].
    Raises: ValueError for an unknown name, T < 1, or a start or end outside (0, 1].
    """
    if name not in SCHEDULES:
        raise ValueError(f"unknown schedule {name!r}; known: {', '.join(SCHEDULES)}")
    if not isinstance(num_timesteps, int | np.integer) or num_timesteps < 1:
        raise ValueError(f"num_timesteps must be a whole number of at least 1, got {num_timesteps!r}")
    if not (0 < beta_start <= 1 and 0 < beta_end <= 1):
        raise ValueError(f"beta_start and beta_end must lie in (0, 1], got {beta_start} and {beta_end}")
    return SCHEDULES[name](int(num_timesteps), float(beta_start), float(beta_end))
