"""The base class of samplers, and the sampling loop.

A `Sampler` has pure methods and no loop; `sample` runs any sampler from the noisiest index to 0 with `lax.scan`: one compiled
program, and memory that does not grow with the number of steps unless the trajectory is returned.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, TypeAlias, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Int, Key, PyTree

from diffusion_jax import process
from diffusion_jax.schedules import NoiseLevel, Schedule, check_chain
from diffusion_jax.types import Batch, BatchLike, Clip, DenoiseFn

__all__ = [
    "Denoised",
    "Sampler",
    "Stability",
    "Step",
    "StepFn",
    "Trajectory",
    "call_network",
    "check_sampler",
    "ddim_step",
    "first_index",
    "fold_in",
    "normal",
    "sample",
    "split",
]


class Denoised(NamedTuple):
    """The network's prediction: x_0 after the clip, and eps, by default computed from the clipped x_0."""

    x_0: Batch
    eps: Batch


class Step(NamedTuple):
    """The result of one step: x_{t-1}, the predicted x_0, and the sampler's state for the next step."""

    x_prev: Batch
    x_0: Batch
    state: PyTree = ()


_MAX_STD = 10.0  # of x_T with a signal below 0.1: only data with a standard deviation above 100 give more
StepFn: TypeAlias = Callable[..., Step]  # with the arguments of `Sampler.step`


class Stability(NamedTuple):
    """How errors affect a sampler; `find_problem` and `find_error_growth` use it to check steps.

    order: how many network values a step combines; extrapolation enlarges their errors.
    eta: the share of ancestral noise, as `ddim`'s eta; noise replaces errors.
    along_eps: True if steps are straight lines in x / alpha and sigma / alpha, as in Heun's method; such steps must not span
      many octaves of sigma, so they need the spacing "log_snr". False if steps extrapolate x_0, as in DPM-Solver++ 2M.
    limit: the largest relative error of one step, on Gaussian data, for which samples are not noise, measured on mixtures;
      None for no limit.
    """

    order: int = 1
    eta: float = 0.0
    along_eps: bool = False
    limit: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampler:
    """The step from x_t to x_{t-1}, as a value: samplers with equal options are equal and have equal hashes.

    A sampler is a frozen dataclass, so that it can be a static argument of `jax.jit`. To write your own, derive a class and
    define `step`, and `init_state` if it has a state:

        @dataclasses.dataclass(frozen=True)
        class shrunk_ddim(sampling.Sampler):
            factor: float = 0.9

            def step(self, key, schedule, denoise_fn, x_t, t, state):
                x_0, eps = self.denoise(schedule, denoise_fn, x_t, t)
                at = schedule.at(t, x_t)
                return sampling.Step(self.factor * (at.alpha_prev * x_0 + at.sigma_prev * eps), x_0)

    prediction, variance, clip: as `process.p_mean_variance`; clip=False for data outside [-1, 1]. With a learned variance,
      the output has a second half of the channels, which all samplers but `ddpm` ignore.
    Raises: ValueError for an unknown prediction or variance, or for prediction "x_prev", which is defined only at the steps
      of a schedule, with `calls_between_steps`. `sample` raises ValueError if the prediction does not suit the schedule.
    """

    prediction: str = "eps"
    variance: str = "fixed_large"
    clip: Clip = True

    def __post_init__(self):
        for field in dataclasses.fields(self):  # a NumPy float64 would promote float32 arrays under x64
            if isinstance(value := getattr(self, field.name), np.floating):
                object.__setattr__(self, field.name, float(value))
        if self.prediction not in process.PREDICTIONS:
            raise ValueError(f"unknown prediction {self.prediction!r}; known: {', '.join(process.PREDICTIONS)}")
        if self.variance not in process.VARIANCES:
            raise ValueError(f"unknown variance {self.variance!r}; known: {', '.join(process.VARIANCES)}")
        if self.prediction == "x_prev" and self.calls_between_steps:
            raise ValueError(
                f"{type(self).__name__} calls the network between the schedule's steps, where 'x_prev' is not defined; "
                "use ddim, or another prediction"
            )

    @property
    def is_stochastic(self) -> bool:
        """Whether two samples from the same x_T differ; by default, whether `stability` has ancestral noise."""
        return self.stability is not None and self.stability.eta > 0

    @property
    def calls_between_steps(self) -> bool:
        """Whether the network is also called at noise levels between the steps of the schedule."""
        return False

    @property
    def stability(self) -> Stability | None:
        """How errors affect the sampler; None if unknown, so that no steps are refused."""
        return None

    def init_state(self, schedule: Schedule, x_T: Batch, num_steps: int) -> PyTree:
        """Returns the state before the first of `num_steps` steps, as a pytree; () for a sampler without a state."""
        return ()

    def step(
        self,
        key: Key[Array, ""] | Key[Array, "B"],
        schedule: Schedule,
        denoise_fn: DenoiseFn,
        x_t: Batch,
        t: Int[Array, ""],
        state: PyTree,
    ) -> Step:
        """Takes one step from x_t at index t, with any number of network calls."""
        raise NotImplementedError(f"{type(self).__name__} defines no step(key, schedule, denoise_fn, x_t, t, state)")

    def loops(self, num_steps: int, final_step: bool) -> Sequence[tuple[StepFn, int]]:
        """Returns the consecutive loops of `sample`: (function with `step`'s arguments, number of steps) each.

        By default one loop over `step`. A sampler whose first or last steps make other network calls has a loop for each kind
        of step, because a branch inside a loop makes a GPU wait for the host. final_step: whether the last step ends at x_0.
        """
        return [(self.step, num_steps)]

    def denoise(
        self, schedule: Schedule, denoise_fn: DenoiseFn, x_t: Batch, t: Int[Array, ""], clipped_eps: bool = True
    ) -> Denoised:
        """Calls the network at index t. clipped_eps: False keeps the network's own eps when x_0 is clipped."""
        output, _ = process.split_variance(call_network(schedule, denoise_fn, x_t, t), x_t, self.variance)
        x_0 = process.clip_x_0(process.to_x_0(schedule, output, x_t, t, self.prediction), self.clip)
        source = (x_0, "x_0") if clipped_eps else (output, self.prediction)
        return Denoised(x_0, process.to_eps(schedule, source[0], x_t, t, source[1]))

    def denoise_between_steps(
        self,
        schedule: Schedule,
        denoise_fn: DenoiseFn,
        x: Batch,
        level: NoiseLevel,
        time: Float[Array, ""] | None = None,
    ) -> Denoised:
        """Calls the network at any noise level of the training grid; time: the level's network time, if it is known.

        Raises: ValueError for the prediction x_prev.
        """
        time = schedule.time_at_log_snr(level.log_snr) if time is None else time
        output = denoise_fn(x, jnp.full(x.shape[:1], time.astype(x.dtype)))
        output = process.as_float("the output of denoise_fn", output).astype(x.dtype)
        output, _ = process.split_variance(output, x, self.variance)
        x_0 = process.clip_x_0(process.x_0_at(level.alpha, level.sigma, output, x, self.prediction), self.clip)
        return Denoised(x_0, (x - level.alpha * x_0) / level.sigma)


def call_network(
    schedule: Schedule, denoise_fn: DenoiseFn, x_t: Batch, t: Int[Array, ""]
) -> Float[Array, "B *output_shape"]:
    """Returns the network's output at index t, in the dtype of x_t."""
    output = denoise_fn(x_t, jnp.full(x_t.shape[:1], schedule.at(t, x_t).time))
    return process.as_float("the output of denoise_fn", output).astype(x_t.dtype)


def is_batch_of_keys(key: Key[Array, "..."]) -> bool:
    """Whether `key` is [B], a key for each row. Raises: ValueError for more axes."""
    is_typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)  # an old-style uint32 key is one key
    if is_typed and key.ndim > 1:
        raise ValueError(f"key must be one key, or one for each row [B]; got shape {key.shape}")
    return is_typed and key.ndim == 1


def fold_in(key: Key[Array, "..."], number: int | Int[Array, ""]) -> Key[Array, "..."]:
    """`jax.random.fold_in`, for one key or for [B] keys."""
    if is_batch_of_keys(key):
        return jax.vmap(jax.random.fold_in, (0, None))(key, number)
    return jax.random.fold_in(key, number)


def split(key: Key[Array, "..."]) -> tuple[Key[Array, "..."], Key[Array, "..."]]:
    """`jax.random.split` in two, for one key or for [B] keys."""
    first, second = jax.vmap(jax.random.split, out_axes=1)(key) if is_batch_of_keys(key) else jax.random.split(key)
    return first, second


def normal(key: Key[Array, "..."], like: Batch) -> Batch:
    """Draws N(0, I) in the shape and dtype of `like`; keys [B] draw row by row, so that rows do not depend on each other."""
    if is_batch_of_keys(key):
        return jax.vmap(lambda key, row: jax.random.normal(key, row.shape, row.dtype))(key, like)
    return jax.random.normal(key, like.shape, like.dtype)


def ddim_step(denoised: Denoised, eps: Batch, current: NoiseLevel, target: NoiseLevel) -> Batch:
    """Steps from one noise level to another along a direction eps; DDIM's eq. 12 if eps is the network's own.

    (alpha'/alpha) x + (sigma' - alpha' sigma/alpha) eps, written in terms of the network's own x_0 and eps, so that the step
    is defined for pure noise (alpha = 0), where it is DDIM's step for any eps.
    """
    slope = jnp.where(
        current.alpha > 1e-10, target.sigma - target.alpha * current.sigma / jnp.maximum(current.alpha, 1e-10), 0.0
    )
    return target.alpha * denoised.x_0 + target.sigma * denoised.eps + slope * (eps - denoised.eps)


def check_sampler(sampler: object) -> None:
    """Raises ValueError for anything but a `Sampler`, such as a name or a class."""
    if not isinstance(sampler, Sampler):
        raise ValueError(f"sampler must be a sampler such as sampling.ddim(), got {sampler!r}")


def _check_scale(schedule: Schedule, x_T: Batch, first: int) -> None:
    """Raises ValueError for noise in EDM's scale, x_0 + sigma eps, where x_T has almost no signal; traced arrays pass."""
    if isinstance(x_T, Tracer) or isinstance(schedule.alpha_bar, Tracer) or not x_T.is_fully_addressable:
        return
    if np.asarray(schedule.alpha_bar)[first] > 0.01:  # before x_T is copied to the host
        return
    std = np.std(np.asarray(x_T))  # jnp would trace a constant inside of jax.jit
    if std > _MAX_STD:
        raise ValueError(
            f"x_T has standard deviation {std:.3g}, but x_t = alpha x_0 + sigma eps has about 1 at index {first}; draw x_T "
            "from N(0, I), or divide x_0 + sigma eps by jnp.sqrt(1 + sigma**2), where EDM's sigma is 80"
        )


def first_index(schedule: Schedule, start: int | np.integer | None) -> int:
    """Returns the noisiest visited index: `start`, or T - 1 for None. Raises: ValueError for an invalid index."""
    check_chain(schedule, "a sampler")
    last = schedule.num_timesteps - 1
    if start is None:
        return last
    if isinstance(start, bool) or not isinstance(start, int | np.integer) or not 0 <= start <= last:
        raise ValueError(f"start={start!r} must be an index of the schedule, 0 ... {last}")
    return int(start)


class Trajectory(NamedTuple):
    """The kept steps in sampling order: the index t, x_t before the step, and the x_0 predicted at x_t."""

    t: Int[Array, "K"]
    x_t: Float[Array, "K B *shape"]
    x_0: Float[Array, "K B *shape"]


@overload
def sample(
    key: Key[Array, ""] | Key[Array, "B"],
    schedule: Schedule,
    denoise_fn: DenoiseFn,
    x_T: BatchLike,
    sampler: Sampler,
    *,
    start: int | np.integer | None = None,
    final_step: bool = True,
    trajectory: Literal[False] = False,
    progress: Callable[[int], None] | None = None,
) -> Batch: ...
@overload
def sample(
    key: Key[Array, ""] | Key[Array, "B"],
    schedule: Schedule,
    denoise_fn: DenoiseFn,
    x_T: BatchLike,
    sampler: Sampler,
    *,
    start: int | np.integer | None = None,
    final_step: bool = True,
    trajectory: Literal[True] | Sequence[int] | Int[np.ndarray, "K"],
    progress: Callable[[int], None] | None = None,
) -> tuple[Batch, Trajectory]: ...
def sample(
    key: Key[Array, ""] | Key[Array, "B"],
    schedule: Schedule,
    denoise_fn: DenoiseFn,
    x_T: BatchLike,
    sampler: Sampler,
    *,
    start: int | np.integer | None = None,
    final_step: bool = True,
    trajectory: bool | np.bool_ | Sequence[int] | Int[np.ndarray, "K"] = False,
    progress: Callable[[int], None] | None = None,
) -> Batch | tuple[Batch, Trajectory]:
    """Draws x_0 from x_T with every step of `schedule` (DDPM Algorithm 2; respace first for fewer steps).

    Outside `jax.jit`, every call compiles the loop again. Compile it once, with everything that changes as an argument:

        @jax.jit
        def draw(key, params, x_T):
            denoise_fn = lambda x_t, time: model.apply({"params": params}, x_t, time)
            return sampling.sample(key, schedule, denoise_fn, x_T, sampler)

    Args:
      key: the noise of step t is drawn with `fold_in(key, t)`. One key draws for all rows; keys [B] draw row by row, so that
        the noise of a row depends on its own key only. A sampler of your own draws with `sampling.normal(key, x_t)`.
      schedule: T steps; `schedules.respace` returns a shorter schedule.
      x_T: usually N(0, I), also for networks in EDM's coordinates (`coordinates`).
      sampler: `ddpm(...)`, `dpm_solver_pp(...)` and so on. By default the predicted x_0 is clipped to [-1, 1], the range of
        images; data outside this range need `clip=False`.
      start: the index of x_T's noise level; the default is T - 1.
      final_step: False stops at index 0's noise level instead of denoising to x_0.
      trajectory: also returns x_t and the predicted x_0 at every step (True) or at the given indices t; kept values need
        memory.
      progress: called on the host with the number of finished steps, not always in order; None adds nothing to the program.
    Returns: x_0, or (x_0, Trajectory); float32, or float64 for a float64 x_T.
    Raises: ValueError for an x_T that is not float, has no batch axis, or (not traced) has a standard deviation above 10
      where alpha_bar is at most 0.01; a sampler that is not a `Sampler`, prediction eps or score if the first step has
      alpha = 0 in float32, or a start or a kept index outside the steps.
    """
    check_sampler(sampler)
    x_T = process.as_float("x_T", x_T)
    if not x_T.ndim:
        raise ValueError("x_T must have a batch axis: [B, ...]; got a single number")
    if is_batch_of_keys(key) and key.shape[0] != x_T.shape[0]:
        raise ValueError(
            f"key has {key.shape[0]} keys for {x_T.shape[0]} rows of x_T; give one key, or one for each row"
        )
    first, last = first_index(schedule, start), 0 if final_step else 1
    total = schedule.num_timesteps
    process.check_terminal_snr(schedule, sampler.prediction, first)
    _check_scale(schedule, x_T, first)
    if isinstance(trajectory, bool | np.bool_):
        indices = np.arange(last, first + 1) if trajectory else None
    else:
        indices = np.asarray(trajectory)
        if indices.ndim != 1 or (indices.size and indices.dtype.kind not in "iu"):
            raise ValueError(f"trajectory must be True, False or a sequence of indices (int), got {trajectory!r}")
    kept = np.unique(np.array(() if indices is None else indices, np.int32))[::-1]
    if kept.size and not last <= kept[-1] <= kept[0] <= first:
        raise ValueError(f"trajectory keeps indices in {last} ... {first}, got {kept[-1]} ... {kept[0]}")
    # The row for each step's values; steps that are not kept have an index beyond the end, where a scatter drops them.
    row = np.full(total, kept.size, np.int32)
    row[kept] = np.arange(kept.size)
    empty = jnp.zeros((kept.size, *x_T.shape), x_T.dtype)

    def step(step_fn, carry, t):
        x_t, state, (all_x_t, all_x_0) = carry
        new = step_fn(fold_in(key, t), schedule, denoise_fn, x_t, t, state)
        if kept.size:
            all_x_t = all_x_t.at[jnp.asarray(row)[t]].set(x_t, mode="drop")
            all_x_0 = all_x_0.at[jnp.asarray(row)[t]].set(new.x_0.astype(x_t.dtype), mode="drop")
        if progress is not None:
            jax.debug.callback(progress, first + 1 - t)
        # The carry of a scan must keep its dtype, whatever dtype a sampler computes in.
        x_prev, state = jax.tree.map(_cast_like, (new.x_prev, new.state), (x_t, state))
        return (x_prev, state, (all_x_t, all_x_0)), None

    num_steps = first + 1 - last
    carry, t = (x_T, sampler.init_state(schedule, x_T, num_steps), (empty, empty)), first
    for step_fn, length in sampler.loops(num_steps, final_step):
        if length:
            steps = jnp.arange(t, t - length, -1, dtype=jnp.int32)
            carry, _ = jax.lax.scan(functools.partial(step, step_fn), carry, steps)
        t -= length
    x_0, _, (all_x_t, all_x_0) = carry
    return x_0 if indices is None else (x_0, Trajectory(jnp.asarray(kept), all_x_t, all_x_0))


def _cast_like(new, old):
    return new.astype(old.dtype) if jnp.issubdtype(old.dtype, jnp.floating) else new
