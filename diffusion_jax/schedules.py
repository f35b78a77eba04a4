"""Noise schedules: how fast the forward process forgets x_0.

Imports nothing else from this package. A schedule starts as `betas` (float64 [T], the variances of q(x_t | x_{t-1})) and
becomes a `Schedule`: one value that holds every table the posterior, the losses and the samplers read. `respace` picks some
of its steps and gives a shorter `Schedule` with the same `alpha_bar` at the kept ones.

Two times are never mixed. The index `t` (int32, 0-based, index 0 is the papers' t = 1) reads the tables. The network
time (float, the unit the network was trained on) is `schedule.timesteps[t]` and is all that a `denoise_fn` ever sees.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np


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
    def betas(num_timesteps, beta_start, beta_end):
        warm = int(num_timesteps * fraction)
        return np.concatenate([np.linspace(beta_start, beta_end, warm), np.full(num_timesteps - warm, beta_end)])

    return betas


def _cosine(num_timesteps, beta_start, beta_end):
    f = np.cos((np.arange(num_timesteps + 1) / num_timesteps + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1 - f[1:] / f[:-1], 0.999)


_BETAS: dict[str, Callable] = {
    "linear": _linear,
    "cosine": _cosine,
    "quadratic": _quadratic,
    "sigmoid": _sigmoid,
    "constant": _constant,
    "jsd": _jsd,
    "warmup10": _warmup(0.1),
    "warmup50": _warmup(0.5),
}


def betas(name: str, num_timesteps: int, *, beta_start: float = 1e-4, beta_end: float = 0.02) -> np.ndarray:
    """The variances beta_t of q(x_t | x_{t-1}) for t = 1 ... T.

    With T = `num_timesteps`, from `beta_start` to `beta_end`, whose defaults are DDPM's (section 4):

    | name | beta_t | source |
    |---|---|---|
    | linear | linspace(start, end) | DDPM section 4 |
    | cosine | min(1 - f(t)/f(t-1), 0.999), f(t) = cos^2((t/T + 0.008)/1.008 pi/2); no end points | Improved DDPM eq. 17 |
    | quadratic | linspace(sqrt(start), sqrt(end))^2 | DDPM's code, "quad" |
    | sigmoid | start + (end - start) sigmoid(linspace(-6, 6)) | DDIM's code |
    | constant | end | DDPM's code, "const" |
    | jsd | 1/T, 1/(T-1), ..., 1; no end points; alpha_bar ends at 0 | Sohl-Dickstein et al. section 2.4.1; DDPM's code |
    | warmup10, warmup50 | linear over the first 10% (50%), then end | DDPM's code |

    The end points are not scaled with T. Improved DDPM's linear schedule for T != 1000 is `beta_start=0.1 / T,
    beta_end=20 / T`.

    Returns: float64 [T].
    Raises: ValueError for an unknown name, T < 1, or end points outside (0, 1].
    """
    if name not in _BETAS:
        raise ValueError(f"unknown schedule {name!r}; known: {', '.join(_BETAS)}")
    if not isinstance(num_timesteps, int | np.integer) or num_timesteps < 1:
        raise ValueError(f"num_timesteps must be a whole number of at least 1, got {num_timesteps!r}")
    if not (0 < beta_start <= 1 and 0 < beta_end <= 1):
        raise ValueError(f"beta_start and beta_end must lie in (0, 1], got {beta_start} and {beta_end}")
    return _BETAS[name](int(num_timesteps), float(beta_start), float(beta_end))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Schedule:
    """Every table of a noise schedule; build one with `from_betas` or `respace`.

    A pytree whose leaves are float64 NumPy arrays [T], cast to the images' dtype where they meet traced code (float32 in
    a schedule that a jitted function returned; `respace` takes it too). Index t runs from 0 (the papers' t = 1) to T - 1.
    With alpha_t = 1 - beta_t:

    timesteps: the network's time at each index.
    betas: beta_t, the variance of q(x_t | x_{t-1}).
    alpha_bar, alpha_bar_prev: prod_{s<=t} alpha_s, and the same one step earlier (1 at index 0).
    sqrt_alpha_bar, sqrt_one_minus_alpha_bar: mean factor and standard deviation of q(x_t | x_0), DDPM eq. 4.
    sqrt_one_minus_alpha_bar_prev: the latter one step earlier (0 at index 0); 1 - alpha_bar_prev would cancel in float32.
    snr: alpha_bar / (1 - alpha_bar).
    posterior_variance: beta-tilde_t of DDPM eq. 7; 0 at index 0.
    posterior_log_variance: its logarithm, where index 0 (log 0) takes the value of index 1, as Ho's and OpenAI's code
      do (ln = -9.8167 for linear-1000). A schedule of one step has no index 1 and takes log beta there.
    posterior_mean_coef_x_0, posterior_mean_coef_x_t: mu-tilde_t = c_0 x_0 + c_t x_t, DDPM eq. 7.
    fixed_large_variance: beta_t, and at index 0 the posterior variance of index 1 (OpenAI's repair of DDPM's code,
      whose variance and log variance disagree there).
    grid_timesteps, grid_log_alpha_bar: the training grid, which respacing keeps, for `log_snr(time)` between the steps.
    zero_terminal_snr: static; True when alpha_bar ends at 0, where eps says nothing about x_0.
    """

    timesteps: np.ndarray
    betas: np.ndarray
    alpha_bar: np.ndarray
    alpha_bar_prev: np.ndarray
    sqrt_alpha_bar: np.ndarray
    sqrt_one_minus_alpha_bar: np.ndarray
    sqrt_one_minus_alpha_bar_prev: np.ndarray
    snr: np.ndarray
    posterior_variance: np.ndarray
    posterior_log_variance: np.ndarray
    posterior_mean_coef_x_0: np.ndarray
    posterior_mean_coef_x_t: np.ndarray
    fixed_large_variance: np.ndarray
    grid_timesteps: np.ndarray
    grid_log_alpha_bar: np.ndarray
    zero_terminal_snr: bool = dataclasses.field(metadata={"static": True})

    @property
    def num_timesteps(self) -> int:
        """T, the number of steps of this (perhaps respaced) schedule."""
        return self.betas.shape[0]

    def log_snr(self, time):
        """log(alpha_bar / (1 - alpha_bar)) at any network time: log alpha_bar is interpolated linearly on the training
        grid, held beyond its ends.

        time: float [...]; returns float [...], float32 at least. Equals log(snr) at `timesteps`.
        """
        time = _as_float(time)
        log_alpha_bar = _interpolate(time, self.grid_timesteps, self.grid_log_alpha_bar)
        return log_alpha_bar - jnp.log(-jnp.expm1(log_alpha_bar))

    def time_at_log_snr(self, log_snr):
        """The network time at which `log_snr(time)` has a given value; the inverse of `log_snr`. Shapes as there."""
        log_alpha_bar = -jax.nn.softplus(-_as_float(log_snr))
        return _interpolate(log_alpha_bar, self.grid_log_alpha_bar[::-1], self.grid_timesteps[::-1])


def _as_float(x) -> jax.Array:
    """float32, float64 where x is float64 and x64 is on; numbers that are not float take JAX's default."""
    x = jnp.asarray(x)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else float)


def cast_table(table, dtype):
    """A schedule's table in another dtype, as a copy.

    NumPy casts its own arrays: JAX keeps what it made of one and reuses it where x64 has been switched since.
    """
    return table.astype(dtype) if isinstance(table, np.ndarray) else jnp.asarray(table, dtype)


def _interpolate(x, xs, ys) -> jax.Array:
    return jnp.interp(x, cast_table(xs, x.dtype), cast_table(ys, x.dtype))


def _tables(alpha_bar, one_minus_alpha_bar, betas, timesteps, grid) -> Schedule:
    """Every table from alpha_bar, all in float64. one_minus_alpha_bar: given, for alpha_bar near 1 has few digits of it."""
    alpha_bar_prev = np.append(1.0, alpha_bar[:-1])
    one_minus_alpha_bar_prev = np.append(0.0, one_minus_alpha_bar[:-1])
    posterior_variance = betas * one_minus_alpha_bar_prev / one_minus_alpha_bar
    # q(x_{t-1} | x_t, x_0) is a point at index 0; a network that is asked for the log variance there gets that of its
    # neighbor.
    at_0 = posterior_variance[1] if len(betas) > 1 else betas[0]
    return Schedule(
        timesteps=timesteps,
        betas=betas,
        alpha_bar=alpha_bar,
        alpha_bar_prev=alpha_bar_prev,
        sqrt_alpha_bar=np.sqrt(alpha_bar),
        sqrt_one_minus_alpha_bar=np.sqrt(one_minus_alpha_bar),
        sqrt_one_minus_alpha_bar_prev=np.sqrt(one_minus_alpha_bar_prev),
        snr=alpha_bar / one_minus_alpha_bar,
        posterior_variance=posterior_variance,
        posterior_log_variance=np.log(np.append(at_0, posterior_variance[1:])),
        posterior_mean_coef_x_0=betas * np.sqrt(alpha_bar_prev) / one_minus_alpha_bar,
        posterior_mean_coef_x_t=np.sqrt(1 - betas) * one_minus_alpha_bar_prev / one_minus_alpha_bar,
        fixed_large_variance=np.append(at_0, betas[1:]),
        grid_timesteps=grid[0],
        grid_log_alpha_bar=grid[1],
        zero_terminal_snr=bool(alpha_bar[-1] == 0),
    )


def from_betas(betas: Sequence[float] | np.ndarray, timesteps: Sequence[float] | np.ndarray | None = None) -> Schedule:
    """A Schedule from the forward variances (DDPM eq. 2 and 4).

    Args:
      betas: [T], each in (0, 1]; only the last may be 1.
      timesteps: [T], the network's time at each index, increasing; 0 ... T - 1 unless given.
    Raises: ValueError where that does not hold.
    """
    betas = np.asarray(betas, np.float64)
    if betas.ndim != 1 or betas.size == 0:
        raise ValueError(f"betas must be one row of at least one number, got shape {betas.shape}")
    bad = ~((1 - betas < 1) & (betas <= 1))  # a beta that vanishes beside 1 would leave alpha_bar at 1
    if bad.any() or (betas[:-1] == 1).any():
        t = int(np.argmax(bad if bad.any() else betas == 1))
        raise ValueError(f"betas must lie in (0, 1), the last in (0, 1]; betas[{t}] is {betas[t]}")
    timesteps = np.arange(betas.size, dtype=np.float64) if timesteps is None else np.asarray(timesteps, np.float64)
    if timesteps.shape != betas.shape or not (np.diff(timesteps) > 0).all() or not np.isfinite(timesteps).all():
        raise ValueError(
            f"timesteps must be {betas.size} increasing numbers, one for each beta, got shape {timesteps.shape}"
        )
    alpha_bar = np.cumprod(1 - betas)
    # A chain that ends in pure noise has log alpha_bar = -inf there; a finite floor keeps the interpolation finite.
    log_alpha_bar = np.log(np.maximum(alpha_bar, np.finfo(np.float64).tiny))
    return _tables(alpha_bar, 1 - alpha_bar, betas, timesteps, grid=(timesteps, log_alpha_bar))


def _ddim_indices(count: int, num_timesteps: int) -> np.ndarray:
    """OpenAI's "ddimN": the whole stride that visits exactly N steps from 0 (DDIM section 4.2)."""
    for stride in range(1, num_timesteps + 1):
        if len(range(0, num_timesteps, stride)) == count:
            return np.arange(0, num_timesteps, stride)
    reachable = {len(range(0, num_timesteps, stride)) for stride in range(1, num_timesteps + 1)}
    near = sorted(reachable, key=lambda n: abs(n - count))[:2]
    raise ValueError(
        f"no whole stride visits {count} of {num_timesteps} steps; nearest that work: "
        + ", ".join(f"ddim{n}" for n in near)
    )


def _section_indices(counts: list[int], num_timesteps: int) -> np.ndarray:
    """OpenAI's "a,b,c": equal sections of the chain, a, b and c evenly spread steps in each (Improved DDPM section 4)."""
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


_SPACINGS: dict[str, Callable[[int, int], np.ndarray]] = {
    "leading": lambda count, total: np.arange(count) * (total // count),
    "trailing": lambda count, total: np.round(total - np.arange(count) * (total / count)).astype(int)[::-1] - 1,
    "linspace": lambda count, total: np.round(np.linspace(0, total - 1, count)).astype(int),
    "quadratic": lambda count, total: (np.linspace(0, (0.8 * total) ** 0.5, count) ** 2).astype(int),
    "openai": lambda count, total: _section_indices([count], total),
}


_GAUSSIAN_SD = 0.5  # of images in [-1, 1], roughly (EDM's sigma_data)


def _karras(position, sigma_min, sigma_max):
    return (sigma_max ** (1 / 7) + position * (sigma_min ** (1 / 7) - sigma_max ** (1 / 7))) ** 7


def _even_log_snr(position, sigma_min, sigma_max):
    return sigma_max * (sigma_min / sigma_max) ** position


def _even_angle(position, sigma_min, sigma_max):
    low, high = np.arctan(sigma_min / _GAUSSIAN_SD), np.arctan(sigma_max / _GAUSSIAN_SD)
    return _GAUSSIAN_SD * np.tan(high + position * (low - high))


# Spacings of the noise level sigma = sqrt((1 - alpha_bar) / alpha_bar), from the noisiest (position 0) to the cleanest (1).
_LEVEL_SPACINGS: dict[str, Callable] = {"karras": _karras, "log_snr": _even_log_snr, "gaussian": _even_angle}


SPACINGS = (*_SPACINGS, *_LEVEL_SPACINGS)  # the names that `respace` takes


def _check_count(steps, total):
    if isinstance(steps, bool) or not isinstance(steps, int | np.integer) or not 1 <= steps <= total:
        raise ValueError(f"the number of steps must be a whole number in 1 ... {total}, got {steps!r}")


def _indices(steps, spacing, total) -> np.ndarray:
    if isinstance(steps, str):
        text = steps.removeprefix("ddim")
        counts = text.split(",")
        if not all(part.strip().isdecimal() for part in counts) or (text != steps and len(counts) > 1):
            raise ValueError(f"cannot read the spacing {steps!r}; write 'ddim50', '250' or '10,15,20'")
        if text != steps:
            return _ddim_indices(int(text), total)
        return _section_indices([int(part) for part in counts], total)
    if np.ndim(steps) == 0:
        _check_count(steps, total)
        return _SPACINGS[spacing](int(steps), total)
    indices = np.asarray(steps)
    if indices.ndim != 1 or indices.size == 0 or not np.issubdtype(indices.dtype, np.integer):
        raise ValueError(
            f"explicit steps must be one row of numbers, indices (int) or network times (float), got shape {indices.shape} "
            f"of {indices.dtype}"
        )
    return np.sort(indices)


def _levels(schedule: Schedule, count: int, spacing: str) -> np.ndarray:
    """log alpha_bar [count], noisiest last, of a spacing that lies between the schedule's steps."""
    _check_count(count, schedule.num_timesteps)
    if schedule.zero_terminal_snr:
        raise ValueError(
            f"spacing {spacing!r} needs a finite noise level at the end, but alpha_bar ends at 0; use 'trailing', or leave "
            "the last step out"
        )
    alpha_bar, one_minus_alpha_bar = (values[[0, -1]] for values in _precise_alpha_bar(schedule))
    sigma_min, sigma_max = np.sqrt(one_minus_alpha_bar / alpha_bar)
    sigma = _LEVEL_SPACINGS[spacing](np.arange(count) / max(count - 1, 1), sigma_min, sigma_max)[::-1]
    return -np.log1p(sigma**2)


def _precise_alpha_bar(schedule: Schedule) -> tuple[np.ndarray, np.ndarray]:
    """(alpha_bar, 1 - alpha_bar), float64 [T]. Of a schedule whose tables became float32, which a call of jit does, they come
    from the SNR, where both have kept their digits."""
    alpha_bar = np.asarray(schedule.alpha_bar)
    if alpha_bar.dtype == np.float64:
        return alpha_bar, 1 - alpha_bar
    snr = np.asarray(schedule.snr, np.float64)
    return snr / (1 + snr), 1 / (1 + snr)


def _kept_betas(schedule: Schedule, indices, alpha_bar) -> np.ndarray:
    """1 - alpha_bar_i / alpha_bar_{i-1} of the kept steps; from the skipped betas, where the quotient has lost its digits."""
    if np.asarray(schedule.alpha_bar).dtype == np.float64:
        return 1 - alpha_bar / np.append(1.0, alpha_bar[:-1])
    betas = np.asarray(schedule.betas, np.float64)
    starts = np.append(0, indices[:-1] + 1)
    return np.array([1 - np.prod(1 - betas[a : b + 1]) for a, b in zip(starts, indices, strict=True)])


def _between(schedule: Schedule, steps, spacing: str | None):
    """(timesteps, log alpha_bar), float64 [S], of levels between the schedule's steps; None if `steps` asks for indices."""
    grid_times, grid_logs = (
        np.asarray(table, np.float64) for table in (schedule.grid_timesteps, schedule.grid_log_alpha_bar)
    )
    if spacing in _LEVEL_SPACINGS and np.ndim(steps) == 0 and not isinstance(steps, str):
        logs = _levels(schedule, steps, spacing)
        return np.interp(logs, grid_logs[::-1], grid_times[::-1]), logs
    if np.ndim(steps) == 1 and np.size(steps) and np.issubdtype(np.asarray(steps).dtype, np.floating):
        times = np.sort(np.asarray(steps, np.float64))
        if not (grid_times[0] <= times[0] and times[-1] <= grid_times[-1]):
            raise ValueError(
                f"network times must lie in {grid_times[0]:g} ... {grid_times[-1]:g}, got {times[0]:g} ... {times[-1]:g}"
            )
        return times, np.interp(times, grid_times, grid_logs)
    return None


def respace(
    schedule: Schedule, steps: str | int | Sequence[int] | Sequence[float] | np.ndarray, spacing: str | None = None
) -> Schedule:
    """A shorter schedule that visits some of the steps and keeps alpha_bar there (Improved DDPM section 4, eq. 19).

    Args:
      schedule: the one to shorten, T steps.
      steps: one of
        "ddimN": N steps with a whole stride from index 0 (at T = 1000 "ddim25" is 0, 40, ..., 960);
        "N" or "a,b,c": OpenAI's sections, N (a, b, c) steps spread over the whole chain (over each third), its ends
        included; an int S, spread as `spacing` says:
            leading    0, T//S, 2 (T//S), ..., the default
            trailing   ..., T - 1 - T/S, T - 1, rounded
            linspace   S rounded numbers from 0 to T - 1
            quadratic  int(linspace(0, sqrt(0.8 T), S)^2), DDIM's code for CIFAR-10
            openai     as the string "S"
          or even in some function of sigma = sqrt((1 - alpha_bar) / alpha_bar), from the schedule's largest to its smallest,
          at levels between its steps, whose network times are fractions:
            karras     sigma^(1/7) (Karras et al. 2022, eq. 5)
            log_snr    log sigma (DPM-Solver section 3.3)
            gaussian   arctan(sigma / 0.5), where DDIM makes the least error on Gaussian data of standard deviation 0.5
              (Sabour et al. 2024, section 3.1, find it for its own bound);
        or a list of your own, in any order: indices (int), or network times (float).
      spacing: for an int only, which strings and lists do not take.

    Returns: a Schedule of the kept steps with beta_i = 1 - alpha_bar_i / alpha_bar_{i-1} (alpha_bar itself is copied to
      the bit, or interpolated as in `Schedule.log_snr`), and `timesteps` those of the kept steps. Of a schedule that crossed
      jit, whose tables are float32, the betas keep float32's digits, but for network times close to each other.
    Raises: ValueError for a string that cannot be read, a count that does not fit, an index or time outside the schedule, a
      repeated step, an unknown spacing, a spacing for steps that are not an int, or one of the last three spacings where
      alpha_bar ends at 0.
    """
    known = (*_SPACINGS, *_LEVEL_SPACINGS)
    if spacing is not None and spacing not in known:
        raise ValueError(f"unknown spacing {spacing!r}; known: {', '.join(known)}")
    if spacing is not None and (isinstance(steps, str) or np.ndim(steps) > 0):
        raise ValueError(
            f"spacing {spacing!r} is for a number of steps, but {steps!r} has a spacing of its own; leave it out"
        )
    spacing = spacing or "leading"
    between = _between(schedule, steps, spacing)
    if between is not None:
        timesteps, logs = between
        # The grid holds the logarithm of the smallest float64 where alpha_bar is 0.
        alpha_bar, one_minus_alpha_bar = np.where(logs < -700, 0.0, np.exp(logs)), -np.expm1(logs)
        betas = -np.expm1(np.diff(logs, prepend=0.0))
    else:
        total = schedule.num_timesteps
        indices = _indices(steps, spacing, total)
        if indices[0] < 0 or indices[-1] >= total:
            raise ValueError(f"steps must lie in 0 ... {total - 1}, got {indices[0]} ... {indices[-1]}")
        timesteps = np.asarray(schedule.timesteps, np.float64)[indices]
        alpha_bar, one_minus_alpha_bar = (values[indices] for values in _precise_alpha_bar(schedule))
        betas = _kept_betas(schedule, indices, alpha_bar)
    repeated = timesteps[1:][np.diff(timesteps) <= 0]
    if repeated.size:
        raise ValueError(
            f"{steps!r} (spacing {spacing!r}) visits step {repeated[0]:g} twice; ask for fewer steps or another spacing"
        )
    grid = tuple(np.asarray(table, np.float64) for table in (schedule.grid_timesteps, schedule.grid_log_alpha_bar))
    return _tables(alpha_bar, one_minus_alpha_bar, betas, timesteps, grid)
