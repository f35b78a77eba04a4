"""Shorter schedules that visit some steps of a longer schedule."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Num

from diffusion_jax.errors import require_known, require_number
from diffusion_jax.schedules.paths import Interpolated, Path, edm
from diffusion_jax.schedules.schedule import Schedule, at_log_snr, from_path, from_tables


def _ddim_indices(count: int, num_timesteps: int) -> np.ndarray:
    """Returns the indices of OpenAI's "ddimN": the integer stride that visits exactly N steps from 0 (DDIM section 4.2)."""
    stride_of = {len(range(0, num_timesteps, stride)): stride for stride in range(num_timesteps, 0, -1)}
    if count in stride_of:
        return np.arange(0, num_timesteps, stride_of[count])
    nearest = sorted(stride_of, key=lambda n: (abs(n - count), n))[:2]
    raise ValueError(
        f"no integer stride visits {count} of {num_timesteps} steps; use {' or '.join(f'ddim{n}' for n in nearest)}"
    )


def _section_indices(counts: list[int], num_timesteps: int) -> np.ndarray:
    """Returns the indices of OpenAI's "a,b,c": equal sections with a, b and c evenly spread steps (Improved DDPM sec. 4)."""
    if len(counts) > num_timesteps:
        raise ValueError(f"{len(counts)} sections do not fit into {num_timesteps} steps")
    size, extra = divmod(num_timesteps, len(counts))
    start, indices = 0, []
    for i, count in enumerate(counts):
        length = size + (i < extra)
        require_number(f"the number of steps in section {i}", count, 1, length, whole=True)
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


def _uniform_angle(position, sigma_min, sigma_max):
    low, high = np.arctan(sigma_min / DATA_STD), np.arctan(sigma_max / DATA_STD)
    return DATA_STD * np.tan(high + position * (low - high))


# Spacings of sigma = sqrt((1 - alpha_bar) / alpha_bar), from the noisiest (position 0) to the cleanest (position 1).
_SIGMA_SPACINGS: dict[str, Callable[[np.ndarray, np.float64, np.float64], np.ndarray]] = {
    "karras": _karras,
    "log_snr": lambda position, sigma_min, sigma_max: sigma_max * (sigma_min / sigma_max) ** position,
    "gaussian": _uniform_angle,
}


SPACINGS = (*_INDEX_SPACINGS, *_SIGMA_SPACINGS)  # the names that `respace` accepts


def _read_text(text: str) -> tuple[int | list[int], str]:
    """Returns the steps and the spacing of OpenAI's strings "ddimN", "N" and "a,b,c"."""
    numbers = text.removeprefix("ddim")
    counts = numbers.split(",")
    is_ddim = numbers != text
    if not all(count.strip().isdecimal() for count in counts) or (is_ddim and len(counts) > 1):
        raise ValueError(f"cannot read the spacing {text!r}; write 'ddim50', '250' or '10,15,20'")
    counts = [int(count) for count in counts]
    return (counts[0], "openai_ddim") if is_ddim else (counts, "openai")


def _spaced(schedule: Schedule, count, spacing: str) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
    """Returns `count` steps with a named spacing: indices, or (network times, log SNR) between indices.

    If the schedule ends in pure noise, the last level is pure noise, and the other levels end at the last step with signal.
    """
    total = schedule.num_timesteps
    require_number("the number of steps", count, 1, total, whole=True)
    if count == 1 < total and spacing in ("leading", "linspace", "quadratic"):
        raise ValueError(
            f"one step of spacing {spacing!r} would be index 0, which is almost without noise; use 'trailing'"
        )
    if spacing in _INDEX_SPACINGS:
        return _INDEX_SPACINGS[spacing](int(count), total)
    is_noise = schedule.zero_terminal_snr and total > 1
    number = int(count) - is_noise
    alpha_bar = schedule.alpha_bar[[0, -1 - is_noise]]
    ends = np.sqrt((1 - alpha_bar) / alpha_bar)
    sigma = _SIGMA_SPACINGS[spacing](np.arange(number) / max(number - 1, 1), *ends)[::-1]
    log_snr = np.append(-2 * np.log(sigma), [-np.inf] * is_noise)
    return np.where(np.isfinite(log_snr), schedule.path.time_at_log_snr(log_snr), schedule.timesteps[-1]), log_snr


def _chosen(schedule: Schedule, steps) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
    """Returns explicit steps in increasing order: indices, or (network times, log SNR)."""
    steps = np.sort(np.asarray(steps))
    if steps.ndim != 1 or steps.size == 0 or steps.dtype.kind not in "iuf":
        raise ValueError(
            "explicit steps must be a one-dimensional array of indices (int) or network times (float), got shape "
            f"{steps.shape} of {steps.dtype}"
        )
    times = steps.astype(np.float64)
    is_time = steps.dtype.kind == "f"
    low, high = 0, schedule.num_timesteps - 1
    if is_time:
        low, high = schedule.path.interval[0], max(schedule.path.interval[1], schedule.timesteps[-1])
    if not (low <= times[0] and times[-1] <= high):
        name = "network times" if is_time else "steps"
        raise ValueError(f"{name} must lie in {low:g} ... {high:g}, got {times[0]:g} ... {times[-1]:g}")
    return (times, np.asarray(schedule.path.log_snr(times))) if is_time else steps


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
        "N" or "a,b,c": OpenAI's sections: N steps over the schedule, or a, b and c steps over its thirds, ends included;
        an int S, with one of these spacings for the indices:
            trailing   ..., T - 1 - T/S, T - 1, rounded; the default
            leading    0, T//S, 2 (T//S), ...
            linspace   S rounded numbers from 0 to T - 1
            quadratic  int(linspace(0, sqrt(0.8 T), S)^2), DDIM's code for CIFAR-10
            openai     as the string "S"
            openai_ddim  as the string "ddimS"
          or with a spacing that is uniform in a function of sigma = sqrt((1 - alpha_bar) / alpha_bar), from the largest sigma
          to the smallest. These steps lie between the schedule's steps, so their network times are fractions:
            karras     sigma^(1/7) (Karras et al. 2022, eq. 5)
            log_snr    log sigma (DPM-Solver section 3.3)
            gaussian   arctan(sigma / 0.5), for which DDIM has the smallest error on Gaussian data with standard deviation 0.5
              (Sabour et al. 2024, section 3.1, derive it for their own bound).
          If alpha_bar ends at 0, the last step is pure noise, and the step before it is the last step with signal;
        several ints with the spacing "openai", as the string "a,b,c";
        or explicit steps, in any order: indices (int), or network times (float).
      spacing: only for an int, or for the sections of "openai"; strings and explicit steps define their own spacing.

    Returns: a Schedule with these steps and beta_i = 1 - alpha_bar_i / alpha_bar_{i-1}. alpha_bar is bit-identical to the
      schedule's; at steps between indices it comes from the path.
    Raises: ValueError for an invalid string, a count that does not fit, an index outside the schedule, a network time outside
      both the path's interval and the schedule's steps, a repeated step, an unknown spacing, a spacing for steps that are not
      an int, one step with "leading", "linspace" or "quadratic", or tables that are not float64.
    """
    if isinstance(schedule, Path):
        schedule.transition(0, 0.0)  # raises
    if not isinstance(schedule.alpha_bar, np.ndarray) or schedule.alpha_bar.dtype != np.float64:
        raise ValueError(
            "respace needs the float64 tables of a schedule, and a jitted function has rounded or traced them; respace the "
            "schedule outside of jax.jit"
        )
    if spacing is not None:
        require_known("spacing", spacing, SPACINGS)
    if spacing is not None and (isinstance(steps, str) or (np.ndim(steps) > 0 and spacing != "openai")):
        raise ValueError(
            f"spacing {spacing!r} is for a number of steps, but {steps!r} defines its own spacing; leave it out"
        )
    described = f"{steps!r} (spacing {spacing or 'trailing'!r})"
    if isinstance(steps, str):
        steps, spacing = _read_text(steps)
    if np.ndim(steps) == 0:
        found = _spaced(schedule, steps, spacing or "trailing")
    elif spacing == "openai":
        found = _section_indices(np.asarray(steps).tolist(), schedule.num_timesteps)
    else:
        found = _chosen(schedule, steps)
    timesteps = found[0] if isinstance(found, tuple) else schedule.timesteps[found]
    repeated = timesteps[1:][np.diff(timesteps) <= 0]
    if repeated.size:
        raise ValueError(f"{described} visits step {repeated[0]:g} twice; use fewer steps or another spacing")
    if isinstance(found, tuple):
        return at_log_snr(schedule.path, *found)
    alpha_bar = schedule.alpha_bar[found]
    if isinstance(schedule.path, Interpolated):
        betas = 1 - alpha_bar / np.append(1.0, alpha_bar[:-1])
        return from_tables(alpha_bar, 1 - alpha_bar, betas, timesteps, schedule.path)
    # 1 - alpha_bar has no correct digits where a path is almost clean.
    noise = np.asarray(schedule.transitions.level.sigma)[found] ** 2
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
    require_number("num_steps", num_steps, 2, whole=True)
    require_number("rho", rho, 0, above=True)
    path = edm(sigma_min, sigma_max)
    sigma = _karras(np.linspace(1, 0, int(num_steps)), sigma_min, sigma_max, rho)
    return from_path(path, path.time_at_log_snr(-2 * np.log(sigma)))
