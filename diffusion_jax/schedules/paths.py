"""Paths: the noise level as a function of a continuous time, for EDM, flow matching and continuous VP processes.

A `Path` gives the log SNR, log(alpha^2 / sigma^2) of x_t = alpha x_0 + sigma eps with alpha^2 + sigma^2 = 1, at any network
time. Rescaling x_t turns every process with Gaussian noise into such a process (`coordinates` rescales the input and output
of a network). So paths differ only in the noise level at each time, and in the time that the network receives.

    level = path.at(time, x_0)
    x_t = level.alpha * x_0 + level.sigma * eps

`from_path(path, times)` in `schedule.py` makes a `Schedule` with the noise levels at some times, for the losses of a chain
and for samplers. Conversely, `schedule.path` gives the noise levels between a schedule's steps.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import DTypeLike
from jaxtyping import Array, ArrayLike, Float, Float64, Num, Shaped

from diffusion_jax.errors import require_number
from diffusion_jax.schedules.levels import NoiseLevel, Transition

__all__ = [
    "PATHS",
    "Path",
    "cast_table",
    "edm",
    "path",
    "rectified_flow",
    "shifted",
    "vp_cosine",
    "vp_linear",
]


class Path:
    """A log SNR that decreases with the network time, made by `vp_linear`, `vp_cosine`, `edm`, `rectified_flow` or `path`.

    Paths are pytrees, so that a jitted function can have a path as an argument.

    interval: the first and last network time, between which training draws times.
    """

    interval: tuple[float, float]

    def _log_snr(self, time, xp):
        """Returns the log SNR at a time. xp: the module that computes it, jax.numpy, or numpy for float64."""
        raise NotImplementedError

    def _time(self, log_snr, xp):
        """The inverse function of `_log_snr`."""
        raise NotImplementedError

    def log_snr(self, time: Num[ArrayLike, "*shape"]) -> Float[Array | np.ndarray, "*shape"]:
        """Returns log(alpha^2 / sigma^2) at any network time.

        For float64 NumPy times, NumPy computes the result in float64, unless the path contains JAX arrays. Other times give
        JAX arrays: float32, or float64 for a float64 time with x64 on.
        """
        return self._evaluate(self._log_snr, time)

    def time_at_log_snr(self, log_snr: Num[ArrayLike, "*shape"]) -> Float[Array | np.ndarray, "*shape"]:
        """Returns the network time at which `log_snr(time)` has a given value; dtypes as `log_snr`."""
        return self._evaluate(self._time, log_snr)

    def _evaluate(self, function, x):
        is_on_host = getattr(x, "dtype", None) == np.float64 and not isinstance(x, jax.Array)
        if not is_on_host or any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(self)):
            return function(as_time(x), jnp)
        with np.errstate(divide="ignore", over="ignore"):  # infinite where there is no signal or no noise
            return np.asarray(function(x, np), np.float64)

    def _log_snr_at_ends(self) -> list[Float[Array, ""]]:
        """Returns the log SNR at both ends of `interval`, float32; traced only if the path is traced."""
        with jax.ensure_compile_time_eval():
            return [self._log_snr(jnp.asarray(end, jnp.float32), jnp) for end in self.interval]

    def at(self, time: Shaped[ArrayLike, "..."], like: Shaped[ArrayLike, "..."]) -> NoiseLevel:
        """Returns the noise level at network times, one for each row or one for all rows, in a shape that multiplies `like`.

        Shape and dtype are as in `Schedule.at`.
        Raises: ValueError for a time that is not float, or whose shape is not the start of `like`'s shape.
        """
        shape, dtype = row_shape("time", time, like)
        time = jnp.asarray(time)
        if not jnp.issubdtype(time.dtype, jnp.floating):
            raise ValueError(
                f"the time on a path must be float, a network time; got {time.dtype}, which is an index of a schedule"
            )
        time = time.astype(dtype)
        return NoiseLevel.at_log_snr(self._log_snr(time, jnp).reshape(shape), time)

    def at_log_snr(self, log_snr: Num[ArrayLike, "..."], like: Shaped[ArrayLike, "..."]) -> NoiseLevel:
        """Returns the noise level at log SNRs, with their network times; shapes and dtype as in `at`."""
        shape, dtype = row_shape("log_snr", log_snr, like)
        log_snr = jnp.asarray(log_snr, dtype)
        return NoiseLevel.at_log_snr(log_snr.reshape(shape), self._time(log_snr, jnp))

    def transition(self, t: Shaped[ArrayLike, "..."], like: Shaped[ArrayLike, "..."]) -> Transition:
        """Raises ValueError, because a path has no steps."""
        raise ValueError("a path has no steps; make the steps of a chain with schedules.from_path(path, times)")

    @property
    def num_timesteps(self) -> int:
        """Raises ValueError, as `transition`."""
        self.transition(0, 0.0)
        raise AssertionError

    @property
    def zero_terminal_snr(self) -> bool:
        """Whether the path ends in pure noise; False for a traced path."""
        _, last = self._log_snr_at_ends()
        return not isinstance(last, Tracer) and bool(np.isneginf(last))

    def check_finite_ends(self, purpose: str) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """Returns the log SNR at both ends of `interval`.

        purpose: the start of the error message. Raises: ValueError for an infinite log SNR at an end, unless it is traced.
        """
        first, last = self._log_snr_at_ends()
        for end, value in zip(self.interval, (first, last), strict=True):
            if not isinstance(value, Tracer) and not np.isfinite(value):
                raise ValueError(
                    f"{purpose} needs a finite log SNR at both ends of the path, but it is {float(value):g} at time {end:g}; "
                    "make the path with an interval=(first, last) inside its ends"
                )
        return first, last


def row_shape(
    name: str, t: Shaped[ArrayLike, "..."], like: Shaped[ArrayLike, "..."]
) -> tuple[tuple[int, ...], DTypeLike]:
    """Returns the shape in which a value for each row, or one for all rows, multiplies `like`, and the dtype of the values.

    Raises: ValueError if `like`'s shape does not start with t's shape.
    """
    t_shape, shape, dtype = jnp.shape(t), jnp.shape(like), jnp.result_type(like)
    if t_shape != shape[: len(t_shape)]:
        raise ValueError(
            f"{name} has shape {t_shape} but x has {shape}; {name} must be one value, or one for each row of x: {shape[:1]}"
        )
    is_float = jnp.issubdtype(dtype, jnp.floating)
    dtype = jnp.promote_types(dtype, jnp.float32) if is_float else jnp.result_type(float)
    return t_shape + (1,) * (len(shape) - len(t_shape)) if t_shape else (), dtype


def as_time(x: Num[ArrayLike, "*shape"]) -> Float[Array, "*shape"]:
    """Converts x to float32, or to float64 if x is float64 and x64 is on; integers become JAX's default float."""
    x = jnp.asarray(x)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else float)


def cast_table(table: Float[ArrayLike, "T"], dtype: DTypeLike) -> Float[np.ndarray, "T"] | Float[Array, "T"]:
    """Copies a schedule's table to another dtype.

    NumPy casts its own arrays, because JAX caches its copy of a NumPy array and reuses this copy after x64 is switched.
    """
    return table.astype(dtype) if isinstance(table, np.ndarray) else jnp.asarray(table, dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Interpolated(Path):
    """The path through the steps of a schedule: log alpha_bar is linear in time between steps, and constant outside."""

    timesteps: Float64[np.ndarray, "T"]
    log_alpha_bar: Float64[np.ndarray, "T"]

    @property
    def interval(self):  # pyright: ignore[reportIncompatibleVariableOverride]
        """The network times of the first step and of the last step with signal."""
        xp = np if isinstance(self.timesteps, np.ndarray) else jnp
        # Without a signal, log alpha_bar is the logarithm of the smallest float64.
        return self.timesteps[0], xp.where(self.log_alpha_bar[-1] < -700, self.timesteps[-2:][0], self.timesteps[-1])

    def _log_snr(self, time, xp):
        log_alpha_bar = self._interpolate(time, self.timesteps, self.log_alpha_bar, xp)
        return log_alpha_bar - xp.log(-xp.expm1(log_alpha_bar))

    def _time(self, log_snr, xp):
        log_alpha_bar = -xp.logaddexp(0.0, -log_snr)
        return self._interpolate(log_alpha_bar, self.log_alpha_bar[::-1], self.timesteps[::-1], xp)

    def _interpolate(self, x, xs, ys, xp):
        return xp.interp(x, cast_table(xs, x.dtype), cast_table(ys, x.dtype))


_MILLE = 1000.0  # the network time at u = 1


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _VPLinear(Path):
    beta_min: float
    beta_max: float
    interval: tuple[float, float]

    def _log_snr(self, time, xp):
        u = time / _MILLE
        return -xp.log(xp.expm1(u * (self.beta_min + u * (self.beta_max - self.beta_min) / 2)))

    def _time(self, log_snr, xp):
        integral = xp.logaddexp(0.0, -log_snr)  # the integral of beta from 0 to u, which is -log alpha_bar
        slope = self.beta_max - self.beta_min
        return _MILLE * 2 * integral / (self.beta_min + xp.sqrt(self.beta_min**2 + 2 * slope * integral))


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _VPCosine(Path):
    offset: float
    interval: tuple[float, float]

    def _log_snr(self, time, xp):
        u, unit = time / _MILLE, self._unit
        # cos^2(angle) is computed as a sine, and 1 - alpha_bar = (cos^2 first - cos^2 angle) / cos^2 first as a product,
        # because these keep their digits at the ends.
        signal = xp.sin(unit * (1 - u))
        return 2 * xp.log(signal) - xp.log(xp.sin(unit * u)) - xp.log(xp.sin(unit * (u + 2 * self.offset)))

    def _time(self, log_snr, xp):
        first = self._unit * self.offset
        signal, noise = 1 / (1 + xp.exp(-log_snr)), 1 / (1 + xp.exp(log_snr))
        angle = xp.arctan2(
            xp.sqrt(math.sin(first) ** 2 + math.cos(first) ** 2 * noise), math.cos(first) * xp.sqrt(signal)
        )
        return _MILLE * (angle / self._unit - self.offset)

    @property
    def _unit(self):
        """The angle for each unit of u + offset."""
        return math.pi / 2 / (1 + self.offset)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _EDM(Path):
    interval: tuple[float, float]

    def _log_snr(self, time, xp):
        return -8 * time

    def _time(self, log_snr, xp):
        return log_snr / -8


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _RectifiedFlow(Path):
    interval: tuple[float, float]

    def _log_snr(self, time, xp):
        tau = time / _MILLE
        return 2 * (xp.log1p(-tau) - xp.log(tau))

    def _time(self, log_snr, xp):
        return _MILLE / (1 + xp.exp(log_snr / 2))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Shifted(Path):
    path: Path
    delta_log_snr: float

    @property
    def interval(self):  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.path.interval

    def _log_snr(self, time, xp):
        return self.path._log_snr(time, xp) + self.delta_log_snr

    def _time(self, log_snr, xp):
        return self.path._time(log_snr - self.delta_log_snr, xp)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Custom(Path):
    function: Callable[[jax.Array], jax.Array]
    inverse: Callable[[jax.Array], jax.Array] | None
    interval: tuple[float, float]

    def _log_snr(self, time, xp):
        return _call(self.function, time, xp)

    def _time(self, log_snr, xp):
        return _call(self.inverse or self._bisect, log_snr, xp)

    def _bisect(self, log_snr):
        def halve(_, ends):
            low, high = ends
            middle = (low + high) / 2
            later = self.function(middle) > target
            return jnp.where(later, middle, low), jnp.where(later, high, middle)

        target = jax.lax.stop_gradient(log_snr)
        first, last = (jnp.full_like(target, end) for end in self.interval)
        low, high = jax.lax.fori_loop(0, 60, halve, (first, last))
        time = jax.lax.stop_gradient((low + high) / 2)
        # One step of Newton's method changes the time little, and gives it the gradient of the inverse function.
        value, slope = jax.jvp(self.function, (time,), (jnp.ones_like(time),))
        return time + (log_snr - value) / slope


def _call(function, x, xp):
    """Calls a function of JAX arrays; for NumPy arrays, it computes and returns a NumPy array in float64."""
    if xp is jnp:
        return function(x)
    with jax.enable_x64(True), jax.ensure_compile_time_eval():
        return np.asarray(function(jnp.asarray(x)))


def _to_interval(name: str, interval, low: float = -math.inf, high: float = math.inf) -> tuple[float, float]:
    first, last = (float(end) for end in interval)
    if not low <= first < last <= high or not math.isfinite(last - first):
        allowed = f" in {low:g} ... {high:g}" if math.isfinite(low) else ""
        raise ValueError(f"{name} must be two increasing network times{allowed}, got {interval!r}")
    return first, last


def vp_linear(beta_min: float = 0.1, beta_max: float = 20.0, *, interval: tuple[float, float] = (0.01, 1000.0)) -> Path:
    """The variance-preserving process with a linear rate beta (Song et al. 2021, VP SDE), the limit of DDPM's schedule.

    With u = time / 1000: alpha_bar = exp(-(beta_min u + (beta_max - beta_min) u^2 / 2)).
    interval: the default starts at u = 1e-5, as in the authors' training. Raises: ValueError for rates that are not
    0 < beta_min <= beta_max, and for an interval outside 0 ... 1000.
    """
    if not 0 < beta_min <= beta_max < math.inf:
        raise ValueError(f"the rates must be 0 < beta_min <= beta_max, got {beta_min} and {beta_max}")
    return _VPLinear(float(beta_min), float(beta_max), _to_interval("interval", interval, 0, _MILLE))


def vp_cosine(offset: float = 0.008, *, interval: tuple[float, float] = (0.01, 999.9)) -> Path:
    """Improved DDPM's cosine schedule in continuous time (eq. 17), without the bound 0.999 for beta.

    With u = time / 1000: alpha_bar = f(u) / f(0), f(u) = cos^2((u + offset) / (1 + offset) pi/2).
    interval: the default excludes 0 and 1000, where the log SNR is infinite. Raises: ValueError for a negative offset and an
    interval outside 0 ... 1000.
    """
    require_number("offset", offset, 0)
    return _VPCosine(float(offset), _to_interval("interval", interval, 0, _MILLE))


def edm(sigma_min: float = 0.002, sigma_max: float = 80.0) -> Path:
    """EDM's noise levels s = sigma / alpha from sigma_min to sigma_max (Karras et al. 2022); the network time is log(s) / 4.

    Raises: ValueError for levels that are not 0 < sigma_min < sigma_max.
    """
    if not 0 < sigma_min < sigma_max < math.inf:
        raise ValueError(f"the noise levels must be 0 < sigma_min < sigma_max, got {sigma_min} and {sigma_max}")
    return _EDM((math.log(sigma_min) / 4, math.log(sigma_max) / 4))


def rectified_flow(*, interval: tuple[float, float] = (0.0, 1000.0)) -> Path:
    """The straight path z = (1 - tau) x_0 + tau eps of flow matching (Lipman et al. 2023, Liu et al. 2023); time is 1000 tau.

    x_t = z / sqrt((1 - tau)^2 + tau^2), so sigma / alpha = tau / (1 - tau).
    interval: at the ends of the default the log SNR is infinite. Functions that need finite ends, such as a bound, raise
    ValueError for the default, and need an interval such as (1, 999). Raises: ValueError for an interval outside 0 ... 1000.
    """
    return _RectifiedFlow(_to_interval("interval", interval, 0, _MILLE))


def shifted(path: Path, delta_log_snr: float) -> Path:
    """Returns the path with `delta_log_snr` added to the log SNR at every time.

    Images with d times the width need a delta of 2 log(1/d) for the same signal in averaged pixels (Hoogeboom et al. 2023,
    "simple diffusion", eq. 5). SD3's shift of rectified flow from n to m pixels (Esser et al. 2024, eq. 23) is log(n / m).

    A network trained on this path gets the time of `path`, before the shift. For a network that was trained on `path` itself,
    or that gets the shifted tau, as SD3's, use `from_path(path, times)` with shifted times instead.
    """
    is_scalar = isinstance(delta_log_snr, np.generic)  # a float64 scalar would make every level float64 under x64
    return _Shifted(path, float(delta_log_snr) if is_scalar else delta_log_snr)


def path(
    log_snr: Callable[[Float[Array, "*shape"]], Float[Array, "*shape"]],
    inverse: Callable[[Float[Array, "*shape"]], Float[Array, "*shape"]] | None = None,
    *,
    interval: tuple[float, float],
) -> Path:
    """Returns a path from any log SNR, a strictly decreasing, differentiable, elementwise function of the network time.

    inverse: the network time at a log SNR; without it, the time is found by bisection.
    interval: the first and last network time.
    Raises: ValueError for an interval that is not increasing and, unless traced, for a log SNR that does not decrease on it
      and an `inverse` that does not return the time.
    """
    new = _Custom(log_snr, inverse, _to_interval("interval", interval))
    with jax.ensure_compile_time_eval():
        values = new.log_snr(jnp.linspace(*new.interval, 64, dtype=jnp.float32))
    if not isinstance(values, Tracer) and not (np.diff(np.asarray(values)) < 0).all():
        raise ValueError("log_snr must decrease strictly over the interval: the noise increases with the network time")
    if inverse is not None and not isinstance(values, Tracer):
        times = np.linspace(*new.interval, 64)[1:-1]
        found = new.time_at_log_snr(new.log_snr(times))
        error = np.abs(found - times)
        worst = int(np.argmax(np.nan_to_num(error, nan=np.inf)))
        if not error[worst] <= 1e-3 * (new.interval[1] - new.interval[0]):
            raise ValueError(
                f"inverse(log_snr(time)) must be the network time, but it is {found[worst]:g} for time {times[worst]:g}; "
                "correct it, or leave it out for an inverse by bisection"
            )
    return new


# name -> path with the published constants
PATHS: dict[str, Callable[..., Path]] = {
    "vp_linear": vp_linear,
    "vp_cosine": vp_cosine,
    "edm": edm,
    "rectified_flow": rectified_flow,
}
