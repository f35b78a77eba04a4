"""Shorter schedules that visit some steps of a longer schedule."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Num

from diffusion_jax.schedules.paths import Interpolated, Path, edm
from diffusion_jax.schedules.schedule import Schedule, at_log_snr, from_path, from_tables

__all__ = ["DATA_STD", "SPACINGS", "edm_steps", "respace"]


def _ddim_indices(count: int, num_timesteps: int) -> np.ndarray:
    """OpenAI's "ddimN": the integer stride that visits exactly N steps from 0 (DDIM section 4.2)."""
    for stride in range(1, num_timesteps + 1):
        if len(range(0, num_timesteps, stride)) == count:
            return np.arange(0, num_timesteps, stride)
    reachable = {len(range(0, num_timesteps, stride)) for stride in range(1, num_timesteps + 1)}
    nearest = sorted(reachable, key=lambda n: abs(n - count))[:2]
    raise ValueError(
        f"no integer stride visits {count} of {num_timesteps} steps; use {' or '.join(f'ddim{n}' for n in nearest)}"
    )


def _section_indices(counts: list[int], num_timesteps: int) -> np.ndarray:
    """OpenAI's "a,b,c": equal sections of the schedule with a, b and c evenly spread steps (Improved DDPM section 4)."""
    if not all(isinstance(count, int) for count in counts):
        raise ValueError(f"the numbers of steps in the sections must be whole numbers, got {counts}")
    if len(counts) > num_timesteps:
        raise ValueError(f"{len(counts)} sections do not fit into {num_timesteps} steps")
    size, extra = divmod(num_timesteps, len(counts))
    start, indices = 0, []
    for i, count in enumerate(counts):
        length = size + (i < extra)
        if not 1 <= count <= length:
            raise ValueError(f"section {i} has {length} steps; its count must lie in 1 ... {length}, got {count}")
        stride = (length - 1) / (count - 1) if count > 1 else 1
        # The stride is added up, not multiplied, so that halves round as in OpenAI's code.
        indices += [start + round(x) for x in np.cumsum([0.0] + [stride] * (count - 1)).tolist()]
        start += length
    return np.array(indices)


_INDEX_SPACINGS: dict[str, Callable[[int, int], np.ndarray]] = {
    "leading": lambda count, total: np.arange(count) * (total // count),
    "trailing": lambda count, total: np.round(total - np.arange(count) * (total / count)).astype(int)[::-1] - 1,
    "linspace": lambda count, total: np.round(np.linspace(0, total - 1, count)).astype(int),
    "quadratic": lambda count, total: (np.linspace(0, (0.8 * total) ** 0.5, count) ** 2).astype(int),
    "openai": lambda count, total: _section_indices([count], total),
    "openai_ddim": _ddim_indices,
}


DATA_STD = 0.5  # standard deviation of images in [-1, 1], roughly (EDM's sigma_data)


def _karras(position, sigma_min, sigma_max, rho=7.0):
    return (sigma_max ** (1 / rho) + position * (sigma_min ** (1 / rho) - sigma_max ** (1 / rho))) ** rho


def _uniform_log_snr(position, sigma_min, sigma_max):
    return sigma_max * (sigma_min / sigma_max) ** position


def _uniform_angle(position, sigma_min, sigma_max):
    low, high = np.arctan(sigma_min / DATA_STD), np.arctan(sigma_max / DATA_STD)
    return DATA_STD * np.tan(high + position * (low - high))


# Spacings of sigma = sqrt((1 - alpha_bar) / alpha_bar), from the noisiest (position 0) to the cleanest (position 1).
_SIGMA_SPACINGS: dict[str, Callable[[np.ndarray, np.float64, np.float64], np.ndarray]] = {
    "karras": _karras,
    "log_snr": _uniform_log_snr,
    "gaussian": _uniform_angle,
}


SPACINGS = (*_INDEX_SPACINGS, *_SIGMA_SPACINGS)  # the names that `respace` accepts


def _check_count(steps, total):
    if isinstance(steps, bool) or not isinstance(steps, int | np.integer) or not 1 <= steps <= total:
        raise ValueError(f"the number of steps must be a whole number in 1 ... {total}, got {steps!r}")


def _select_indices(steps, spacing: str, total: int) -> np.ndarray:
    """Returns the sorted indices that `steps` describes."""
    if isinstance(steps, str):
        text = steps.removeprefix("ddim")
        counts = text.split(",")
        if not all(count.strip().isdecimal() for count in counts) or (text != steps and len(counts) > 1):
            raise ValueError(f"cannot read the spacing {steps!r}; write 'ddim50', '250' or '10,15,20'")
        if text != steps:
            return _ddim_indices(int(text), total)
        return _section_indices([int(count) for count in counts], total)
    if np.ndim(steps) == 0:
        _check_count(steps, total)
        if steps == 1 < total and spacing in ("leading", "linspace", "quadratic"):
            raise ValueError(
                f"one step of spacing {spacing!r} would be index 0, which is almost without noise; use 'trailing'"
            )
        return _INDEX_SPACINGS[spacing](int(steps), total)
    if spacing == "openai":
        return _section_indices(np.asarray(steps).tolist(), total)
    indices = np.asarray(steps)
    if indices.ndim != 1 or indices.size == 0 or not np.issubdtype(indices.dtype, np.integer):
        raise ValueError(
            "explicit steps must be a one-dimensional array of indices (int) or network times (float), got shape "
            f"{indices.shape} of {indices.dtype}"
        )
    return np.sort(indices)


def _spaced_log_snr(schedule: Schedule, count: int, spacing: str) -> np.ndarray:
    """Returns the log SNR [count], noisiest last, with sigma spaced as named.

    If the schedule ends in pure noise, so does the result, and sigma is spaced up to the last step with signal.
    """
    _check_count(count, schedule.num_timesteps)
    is_noise = schedule.zero_terminal_snr and schedule.num_timesteps > 1
    number = count - is_noise
    alpha_bar = schedule.alpha_bar[[0, -1 - is_noise]]
    sigma_min, sigma_max = np.sqrt((1 - alpha_bar) / alpha_bar)
    sigma = _SIGMA_SPACINGS[spacing](np.arange(number) / max(number - 1, 1), sigma_min, sigma_max)[::-1]
    return np.append(-2 * np.log(sigma), [-np.inf] * is_noise)


def _levels_between_steps(schedule: Schedule, steps, spacing: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Returns (timesteps, log SNR), float64 [S], if `steps` lie between indices; None if `steps` are indices."""
    if spacing in _SIGMA_SPACINGS and np.ndim(steps) == 0 and not isinstance(steps, str):
        log_snr = _spaced_log_snr(schedule, steps, spacing)
        times = schedule.path.time_on_host(log_snr)
        return np.where(np.isfinite(log_snr), times, schedule.timesteps[-1]), log_snr
    if spacing != "openai" and np.ndim(steps) == 1 and np.size(steps) and np.asarray(steps).dtype.kind == "f":
        timesteps = np.sort(np.asarray(steps, np.float64))
        first, last = schedule.path.interval[0], max(schedule.path.interval[1], schedule.timesteps[-1])
        if not (first <= timesteps[0] and timesteps[-1] <= last):
            raise ValueError(
                f"network times must lie in {first:g} ... {last:g}, got {timesteps[0]:g} ... {timesteps[-1]:g}"
            )
        return timesteps, schedule.path.log_snr_on_host(timesteps)
    return None


def _check_repeated(timesteps: np.ndarray, steps, spacing: str) -> None:
    repeated = timesteps[1:][np.diff(timesteps) <= 0]
    if repeated.size:
        raise ValueError(
            f"{steps!r} (spacing {spacing!r}) visits step {repeated[0]:g} twice; use fewer steps or another spacing"
        )


def respace(
    schedule: Schedule,
    steps: str | int | np.integer | Sequence[int] | Sequence[float] | Num[np.ndarray, "S"],
    spacing: str | None = None,
) -> Schedule:
    """Returns a shorter schedule that visits some of the steps and keeps their alpha_bar (Improved DDPM section 4, eq. 19).

    Args:
      schedule: the schedule to shorten, T steps.
      steps: one of
        "ddimN": N steps with an integer stride from index 0 (at T = 1000 "ddim25" is 0, 40, ..., 960);
        "N" or "a,b,c": OpenAI's sections, N (a, b, c) steps spread over the schedule (over each third), its ends included;
        an int S, with one of these spacings for the indices:
            trailing   ..., T - 1 - T/S, T - 1, rounded; the default
            leading    0, T//S, 2 (T//S), ...
            linspace   S rounded numbers from 0 to T - 1
            quadratic  int(linspace(0, sqrt(0.8 T), S)^2), DDIM's code for CIFAR-10
            openai     as the string "S"
            openai_ddim  as the string "ddimS"
          or, uniformly in a function of sigma = sqrt((1 - alpha_bar) / alpha_bar) from the schedule's largest sigma to its
          smallest. These steps lie between the schedule's own, so their network times are fractions:
            karras     sigma^(1/7) (Karras et al. 2022, eq. 5)
            log_snr    log sigma (DPM-Solver section 3.3)
            gaussian   arctan(sigma / 0.5), where DDIM has the smallest error on Gaussian data with standard deviation 0.5
              (Sabour et al. 2024, section 3.1, derive it for their own bound).
          If alpha_bar ends at 0, the last step is pure noise, and the others reach to the last step with signal;
        several ints with the spacing "openai", as the string "a,b,c";
        or explicit steps, in any order: indices (int), or network times (float).
      spacing: only for an int, or for the sections of "openai"; strings and explicit steps define their own.

    Returns: a Schedule with these steps and beta_i = 1 - alpha_bar_i / alpha_bar_{i-1}. alpha_bar is bit-identical to the
      schedule's, or the path's at steps between indices.
    Raises: ValueError for an invalid string, a count that does not fit, an index or time outside the schedule, a repeated
      step, an unknown spacing, a spacing for steps that are not an int, one step with "leading", "linspace" or "quadratic",
      or tables that are not float64.
    """
    if isinstance(schedule, Path):
        schedule.transition(0, 0.0)  # raises
    if not isinstance(schedule.alpha_bar, np.ndarray) or schedule.alpha_bar.dtype != np.float64:
        raise ValueError(
            "respace needs the float64 tables of a schedule, and a jitted function has rounded or traced them; respace the "
            "schedule outside of jax.jit"
        )
    if spacing is not None and spacing not in SPACINGS:
        raise ValueError(f"unknown spacing {spacing!r}; known: {', '.join(SPACINGS)}")
    if spacing is not None and (isinstance(steps, str) or (np.ndim(steps) > 0 and spacing != "openai")):
        raise ValueError(
            f"spacing {spacing!r} is for a number of steps, but {steps!r} defines its own spacing; leave it out"
        )
    spacing = spacing or "trailing"
    levels = _levels_between_steps(schedule, steps, spacing)
    if levels is not None:
        timesteps, log_snr = levels
        _check_repeated(timesteps, steps, spacing)
        return at_log_snr(schedule.path, timesteps, log_snr)
    total = schedule.num_timesteps
    indices = _select_indices(steps, spacing, total)
    if indices[0] < 0 or indices[-1] >= total:
        raise ValueError(f"steps must lie in 0 ... {total - 1}, got {indices[0]} ... {indices[-1]}")
    timesteps, alpha_bar = schedule.timesteps[indices], schedule.alpha_bar[indices]
    _check_repeated(timesteps, steps, spacing)
    if isinstance(schedule.path, Interpolated):
        betas = 1 - alpha_bar / np.append(1.0, alpha_bar[:-1])
        return from_tables(alpha_bar, 1 - alpha_bar, betas, timesteps, schedule.path)
    noise = (
        np.asarray(schedule.transitions.level.sigma)[indices] ** 2
    )  # 1 - alpha_bar has no digits where a path is almost clean
    with np.errstate(divide="ignore"):  # the logarithm of 0 in pure noise
        betas = -np.expm1(np.diff(np.log1p(-noise), prepend=0.0))
    return from_tables(alpha_bar, noise, betas, timesteps, schedule.path)


def edm_steps(num_steps: int = 18, *, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> Schedule:
    """Returns EDM's sampling steps (Karras et al. 2022, eq. 5), for `sampling.heun()`: sigma^(1/rho) is evenly spaced.

    EDM's sigma is the ratio sigma / alpha of a level. The schedule is variance preserving: x_T is N(0, I), which is
    sqrt(1 + sigma_max^2) times N(0, I) in EDM's units, x_t / alpha. EDM starts from sigma_max times N(0, I), which is
    x_T = sigma_max / sqrt(1 + sigma_max^2) * noise, 0.99992 * noise at 80. `coordinates.from_edm` converts EDM's networks.

    The network time is log(sigma) / 4, as on the path `edm(sigma_min, sigma_max)`.
    Raises: ValueError for less than 2 steps, a rho that is not above 0, or levels that are not 0 < sigma_min < sigma_max.
    """
    if isinstance(num_steps, bool) or not isinstance(num_steps, int | np.integer) or num_steps < 2:
        raise ValueError(f"num_steps must be a whole number of at least 2, got {num_steps!r}")
    if not rho > 0:
        raise ValueError(f"rho must be above 0, got {rho}")
    path = edm(sigma_min, sigma_max)
    sigma = _karras(np.linspace(1, 0, int(num_steps)), sigma_min, sigma_max, rho)
    return from_path(path, path.time_on_host(-2 * np.log(sigma)))
