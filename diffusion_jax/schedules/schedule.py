"""Published beta schedules, the `Schedule` with the tables that follow from betas, and the values at one step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import ArrayLike, Float64, Num, Shaped

from diffusion_jax.arrays import as_array
from diffusion_jax.errors import require_known, require_number
from diffusion_jax.schedules.levels import NoiseLevel, Transition
from diffusion_jax.schedules.paths import Interpolated, Path, cast_table, row_shape


def _warmup(fraction):
    def warmup_betas(num_timesteps, beta_start, beta_end):
        warm = int(num_timesteps * fraction)
        return np.concatenate([np.linspace(beta_start, beta_end, warm), np.full(num_timesteps - warm, beta_end)])

    return warmup_betas


def _cosine(num_timesteps, beta_start, beta_end):
    f = np.cos((np.arange(num_timesteps + 1) / num_timesteps + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1 - f[1:] / f[:-1], 0.999)


MAX_TIMESTEPS = 1_000_000  # the tables of more steps would fill the memory

# name -> (number of timesteps, beta_start, beta_end) -> betas float64 [T]
SCHEDULES: dict[str, Callable[[int, float, float], np.ndarray]] = {
    "linear": lambda count, start, end: np.linspace(start, end, count),
    "cosine": _cosine,
    "quadratic": lambda count, start, end: np.linspace(start**0.5, end**0.5, count) ** 2,
    "sigmoid": lambda count, start, end: start + (end - start) / (1 + np.exp(-np.linspace(-6, 6, count))),
    "constant": lambda count, start, end: np.full(count, end),
    "jsd": lambda count, start, end: 1 / np.linspace(count, 1, count),
    "warmup10": _warmup(0.1),
    "warmup50": _warmup(0.5),
}


def betas(
    name: str, num_timesteps: int | np.integer, *, beta_start: float = 1e-4, beta_end: float = 0.02
) -> Float64[np.ndarray, "T"]:
    """Returns the variances beta_t of q(x_t | x_{t-1}) for t = 1 ... T.

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
    Raises: ValueError for an unknown name, T outside 1 ... 1,000,000, or a start or end outside (0, 1].
    """
    require_known("schedule", name, SCHEDULES)
    require_number("num_timesteps", num_timesteps, 1, MAX_TIMESTEPS, whole=True)
    require_number("beta_start", beta_start, 0, 1, above=True)
    require_number("beta_end", beta_end, 0, 1, above=True)
    return SCHEDULES[name](int(num_timesteps), float(beta_start), float(beta_end))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Schedule:
    """The steps of a chain; build it with `from_betas`, `from_path` or `respace`.

    It is a pytree whose leaves are float64 NumPy arrays [T]; `at` and `transition` return their values in the dtype of the
    argument `like`. Index t runs from 0 (the papers' t = 1) to T - 1.

    transitions: the steps from x_t to x_{t-1}, as tables.
    alpha_bar: the product of 1 - beta up to t.
    path: the noise level at any network time, unchanged by respacing.
    zero_terminal_snr: static; True when alpha_bar ends at 0, where eps contains no information about x_0, or so close to 0
      that its square root is 0 in float32.

    For a chain of betas and its respacings, the decoder p(x_0 | x_1), at index 0, has the posterior variance of index 1, as
    in Ho's and OpenAI's code (its log is -9.8167 for the linear schedule with T = 1000); with one step it is beta. The
    levels of a `Path` may be so close that this variance is far below the uncertainty of x_0 given x_1. Schedules from a path
    have sigma_0^2 / alpha_0^2 instead, the variance of x_0 given x_1 if the distribution of x_0 is smooth and much wider.
    """

    transitions: Transition
    alpha_bar: Float64[np.ndarray, "T"]
    path: Path
    zero_terminal_snr: bool = dataclasses.field(metadata={"static": True})

    @property
    def num_timesteps(self) -> int:
        """T, the number of steps in this schedule, also after respacing."""
        return self.alpha_bar.shape[0]

    @property
    def timesteps(self) -> Any:
        """The network time at each index."""
        return self.transitions.level.time

    @property
    def betas(self) -> Any:
        """beta_t, the variance of q(x_t | x_{t-1}), DDPM eq. 2."""
        return self.transitions.beta

    @property
    def snr(self) -> Any:
        """alpha_bar / (1 - alpha_bar)."""
        return self.alpha_bar / self.transitions.level.sigma**2

    def __repr__(self) -> str:
        """Returns one line: the number of steps, and the ends of two tables; for traced or stacked tables, their shape."""
        betas = self.betas
        if isinstance(betas, Tracer) or not isinstance(betas, np.ndarray | jax.Array) or betas.ndim != 1:
            return f"Schedule(betas of shape {getattr(betas, 'shape', None)})"
        (first, last), (high, low) = (np.asarray(table)[[0, -1]] for table in (self.timesteps, self.alpha_bar))
        return (
            f"Schedule(num_timesteps={self.num_timesteps}, timesteps {first:g} ... {last:g}, "
            f"alpha_bar {high:.6g} ... {low:.6g})"
        )

    def at(self, t: Shaped[ArrayLike, "..."], like: Shaped[ArrayLike, "..."]) -> NoiseLevel:
        """Returns the noise level at index t, one for each row or one for all rows, in a shape that multiplies `like`.

            level = schedule.at(t, x_0)
            x_t = level.alpha * x_0 + level.sigma * eps          # DDPM eq. 4

        The shape is [B, 1, ..., 1] for t [B] and like [B, ...], and [] for a single t. The dtype is the dtype of a float
        `like`, at least float32; for an int `like`, it is float32, or float64 under x64. Values are NaN where t lies
        outside 0 ... T - 1. Raises: ValueError for a t that is not int or (NumPy, Python) not int32, or in another shape.
        """
        return self._read(self.transitions.level, t, like)

    def transition(self, t: Shaped[ArrayLike, "..."], like: Shaped[ArrayLike, "..."]) -> Transition:
        """Returns the step from x_t to x_{t-1}; arguments, shapes and errors as `at`."""
        return self._read(self.transitions, t, like)._replace(path=self.path)

    def _read(self, tables, t, like):
        t = as_array("t", t)
        if not jnp.issubdtype(t.dtype, jnp.integer):
            raise ValueError(f"t must be int, an index of the schedule; got {t.dtype}")
        shape, dtype = row_shape("t", t, like)
        if t.dtype.itemsize > 4:  # the gather would wrap an index beyond int32 to another index
            t = jnp.where(t.astype(jnp.int32) == t, t, -1).astype(jnp.int32)

        def read(path, table):
            table = jnp.asarray(cast_table(table, dtype))
            values = table.at[t].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
            is_time = path[-1].name == "time"  # time keeps t's shape
            return values if is_time or shape == values.shape else values.reshape(shape)

        return jax.tree_util.tree_map_with_path(read, tables)


def _noise_levels(alpha_bar: np.ndarray, one_minus_alpha_bar: np.ndarray, time: np.ndarray) -> NoiseLevel:
    alpha, sigma = np.sqrt(alpha_bar), np.sqrt(one_minus_alpha_bar)
    # The bound 1e-22 keeps the log SNR finite without noise or signal: its log is about -50, and 1 + exp(-50) == 1.
    log_snr = 2 * (np.log(np.maximum(alpha, 1e-22)) - np.log(np.maximum(sigma, 1e-22)))
    return NoiseLevel(alpha, sigma, log_snr, time)  # pyright: ignore[reportArgumentType]


def from_tables(
    alpha_bar: np.ndarray,
    one_minus_alpha_bar: np.ndarray,
    betas: np.ndarray,
    timesteps: np.ndarray,
    path: Path,
) -> Schedule:
    """Builds a Schedule from its independent tables, float64 [T] each, and its path.

    one_minus_alpha_bar is an argument because 1 - alpha_bar loses digits where alpha_bar is near 1.
    """
    before = np.append(1.0, alpha_bar[:-1]), np.append(0.0, one_minus_alpha_bar[:-1])
    posterior_variance = betas * before[1] / one_minus_alpha_bar
    if isinstance(path, Interpolated):
        decoder_variance = posterior_variance[1] if len(betas) > 1 else betas[0]
    else:
        decoder_variance = one_minus_alpha_bar[0] / alpha_bar[0] if alpha_bar[0] > 0 else betas[0]
    tables: dict[str, Any] = {
        "level": _noise_levels(alpha_bar, one_minus_alpha_bar, timesteps),
        "target": _noise_levels(*before, np.append(timesteps[:1], timesteps[:-1])),
        "beta": betas,
        "posterior_variance": posterior_variance,
        "posterior_log_variance": np.log(np.append(decoder_variance, posterior_variance[1:])),
        "posterior_mean_coef_x_0": betas * np.sqrt(before[0]) / one_minus_alpha_bar,
        "posterior_mean_coef_x_t": np.sqrt(1 - betas) * before[1] / one_minus_alpha_bar,
        "fixed_large_variance": np.append(decoder_variance, betas[1:]),
    }
    is_noise = bool(np.sqrt(alpha_bar[-1]) < np.finfo(np.float32).tiny)
    return Schedule(Transition(**tables), alpha_bar, path, is_noise)


def from_betas(
    betas: Sequence[float] | Num[ArrayLike, "T"], timesteps: Sequence[float] | Num[ArrayLike, "T"] | None = None
) -> Schedule:
    """Builds a Schedule from the forward variances (DDPM eq. 2 and 4).

    Args:
      betas: [T], each in (0, 1]; only the last may be 1.
      timesteps: [T], the network time at each index, increasing; the default is 0 ... T - 1.
    Raises: ValueError for betas or timesteps that do not meet these conditions, and for betas whose alpha_bar underflows
      float64 before the last step.
    """
    betas = np.asarray(betas, np.float64)
    if betas.ndim != 1 or betas.size == 0:
        raise ValueError(f"betas must be a one-dimensional array of at least one number, got shape {betas.shape}")
    bad = ~((1 - betas < 1) & (betas <= 1))  # with 1 - beta == 1 in float64, alpha_bar would stay 1
    if bad.any() or (betas[:-1] == 1).any():
        t = int(np.argmax(bad if bad.any() else betas == 1))
        raise ValueError(f"betas must lie in (0, 1), the last in (0, 1]; betas[{t}] is {betas[t]}")
    timesteps = np.arange(betas.size, dtype=np.float64) if timesteps is None else np.asarray(timesteps, np.float64)
    if timesteps.shape != betas.shape or not (np.diff(timesteps) > 0).all() or not np.isfinite(timesteps).all():
        raise ValueError(
            f"timesteps must be {betas.size} finite, increasing numbers, one for each beta, got shape {timesteps.shape}"
        )
    alpha_bar = np.cumprod(1 - betas)
    underflows = alpha_bar[:-1] < np.finfo(np.float64).tiny
    if underflows.any():
        raise ValueError(
            f"alpha_bar, the product of 1 - betas, underflows at index {int(np.argmax(underflows))} of {betas.size}; use "
            "smaller betas or fewer steps (for a linear schedule of T steps beta_start=0.1 / T and beta_end=20 / T)"
        )
    # A schedule that ends in pure noise has log alpha_bar = -inf at the end; a lower bound keeps the interpolation finite.
    log_alpha_bar = np.log(np.maximum(alpha_bar, np.finfo(np.float64).tiny))
    path = Interpolated(timesteps, log_alpha_bar)
    return from_tables(alpha_bar, 1 - alpha_bar, betas, timesteps, path)


def rescale_zero_terminal_snr(betas: Sequence[float] | Num[ArrayLike, "T"]) -> Float64[np.ndarray, "T"]:
    """Returns betas whose alpha_bar ends at 0, so that training includes pure noise, where sampling starts (Lin et al. 2023).

    sqrt(alpha_bar) is shifted so that the last value is 0, and scaled so that the first value is kept. The network must
    predict v, x_0 or flow. betas: [T], T at least 2. Raises: ValueError as `from_betas`, and for one step.
    """
    signal = np.sqrt(from_betas(betas).alpha_bar)
    if len(signal) < 2:
        raise ValueError("a schedule of one step cannot keep its first noise level and end in pure noise")
    alpha_bar = ((signal - signal[-1]) * signal[0] / (signal[0] - signal[-1])) ** 2
    return 1 - alpha_bar / np.append(1.0, alpha_bar[:-1])


def from_path(path: Path, times: Sequence[float] | Num[ArrayLike, "T"]) -> Schedule:
    """Builds a Schedule with a path's noise levels at some network times, a chain of T steps.

    The schedule keeps the path: samplers that call the network between steps, and respacing, find exact network times.

    times: [T], increasing, in the path's interval; only the last may lie outside, in pure noise, where the log SNR is -inf.
    Raises: ValueError for other times, and for times whose log SNR does not decrease or is not finite.
    """
    times = np.asarray(times, np.float64)
    if times.ndim != 1 or not times.size or not np.isfinite(times).all() or not (np.diff(times) > 0).all():
        raise ValueError(
            f"times must be a one-dimensional array of finite, increasing numbers, got shape {times.shape}"
        )
    log_snr, (first, last) = np.asarray(path.log_snr(times)), path.interval
    # An interpolated path has log alpha_bar = log of the smallest float64 instead of -inf.
    inner = times[: -1 if log_snr[-1] < -700 else None]
    rounding = 1e-6 * (last - first)
    outside = inner[(inner < first - rounding) | (inner > last + rounding)]
    if outside.size:
        raise ValueError(
            f"times must lie in the path's interval, {first:g} ... {last:g}, but one is {outside[0]:g}; for noise levels "
            "sigma / alpha use times = path.time_at_log_snr(-2 * np.log(levels))"
        )
    return at_log_snr(path, times, log_snr)


def at_log_snr(path: Path, times: np.ndarray, log_snr: np.ndarray) -> Schedule:
    """Builds the Schedule with a path's log SNR at its network times, float64 [T] each. Raises: ValueError as `from_path`."""
    if not (np.diff(log_snr) < 0).all() or not np.isfinite(log_snr[:-1]).all() or not log_snr[-1] < np.inf:
        bad = int(np.argmax(~np.isfinite(log_snr) | (np.diff(log_snr, prepend=np.inf) >= 0)))
        raise ValueError(
            f"the log SNR must be finite and decrease from each time to the next, but it is {log_snr[bad]:g} at time "
            f"{times[bad]:g}"
        )
    log_alpha_bar = -np.logaddexp(0.0, -log_snr)
    # Where alpha_bar is 0, an interpolated path has the logarithm of the smallest float64.
    alpha_bar = np.where(log_alpha_bar < -700, 0.0, np.exp(log_alpha_bar))
    betas = -np.expm1(np.diff(log_alpha_bar, prepend=0.0))
    return from_tables(alpha_bar, -np.expm1(log_alpha_bar), betas, times, path)
