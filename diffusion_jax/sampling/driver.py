"""The base class of samplers, and the sampling loop.

A `Sampler` has pure methods and no loop; `sample` runs any sampler from the noisiest index to 0 with `lax.scan`: one compiled
program, and memory that does not grow with the number of steps unless the trajectory is returned.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Int, Key, PyTree

from diffusion_jax import process
from diffusion_jax.arrays import as_float
from diffusion_jax.denoiser import Denoised, Denoiser, as_denoiser
from diffusion_jax.errors import require_number
from diffusion_jax.schedules import NoiseLevel, Schedule, Transition
from diffusion_jax.types import Batch, BatchLike, DenoiseFn


class Step(NamedTuple):
    """The result of one step: x_{t-1}, the predicted x_0, and the sampler's state for the next step."""

    x_prev: Batch
    x_0: Batch
    state: PyTree = ()


_MAX_STD = 10.0  # limit for x_T where alpha is at most 0.1; only data with a standard deviation above 100 exceed it


class Stability(NamedTuple):
    """How errors affect a sampler; `find_problem` and `find_error_growth` use it to check steps.

    order: how many network values a step combines; extrapolation enlarges their errors.
    eta: the share of ancestral noise, as `ddim`'s eta; fresh noise replaces a part of the earlier errors.
    along_eps: True if steps are straight lines in x / alpha and sigma / alpha, as in Heun's method; such steps must not span
      many octaves of sigma, so they need the spacing "log_snr". False if steps extrapolate x_0, as in DPM-Solver++ 2M.
    limit: the largest relative error of one step on Gaussian data; above it, samples are noise (measured on mixtures). None
      for no limit.
    """

    order: int = 1
    eta: float = 0.0
    along_eps: bool = False
    limit: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampler:
    """The step from x_t to x_{t-1}, as a value: samplers with equal options are equal and have equal hashes.

    A sampler is a frozen dataclass, so that it can be a static argument of `jax.jit`. It does not depend on the network: the
    meaning of the output, clip and guidance belong to the `Denoiser`. To write a sampler, derive a class and define
    `step`, and `init_state` if it has a state:

        @dataclasses.dataclass(frozen=True)
        class shrunk_ddim(sampling.Sampler):
            factor: float = 0.9

            def step(self, key, denoiser, x_t, transition, state):
                x_0, eps, *_ = denoiser(x_t, transition)
                target = transition.target
                return sampling.Step(self.factor * (target.alpha * x_0 + target.sigma * eps), x_0)

    Raises: TypeError for the arguments prediction, variance and clip, which belong to the network.
    """

    def __new__(cls, *args, **options):
        fields = {field.name for field in dataclasses.fields(cls)}
        for name in options.keys() & {"prediction", "variance", "clip"} - fields:
            value = options[name]
            raise TypeError(
                f"{cls.__name__} takes no {name}, which belongs to the network: give the sampler "
                f"diffusion_jax.Denoiser(network, {name}={value!r}) in place of the network"
            )
        return super().__new__(cls)

    def __post_init__(self):
        for field in dataclasses.fields(self):  # a NumPy float64 would promote float32 arrays under x64
            if isinstance(value := getattr(self, field.name), np.floating):
                object.__setattr__(self, field.name, float(value))

    @property
    def is_stochastic(self) -> bool:
        """Whether two samples from the same x_T differ; by default, whether `stability` has ancestral noise.

        Set `is_stochastic = True` in a class of your own that draws noise.
        """
        return self.stability is not None and self.stability.eta > 0

    @property
    def stability(self) -> Stability | None:
        """How errors affect the sampler; None if unknown, so that no steps are refused."""
        return None

    def num_calls(self, num_steps: int) -> int:
        """Returns how many times `num_steps` steps to x_0 call the network; by default once in each step.

        Define this method in a class with another number of calls; programs print the number.
        """
        return num_steps

    def init_state(self, schedule: Schedule, x_T: Batch, num_steps: int) -> PyTree:
        """Returns the state before the first of `num_steps` steps, as a pytree; () for a sampler without a state."""
        return ()

    def step(
        self,
        key: Key[Array, ""] | Key[Array, "B"],
        denoiser: Denoiser,
        x_t: Batch,
        transition: Transition,
        state: PyTree,
    ) -> Step:
        """Takes one step from x_t at `transition.level` to `transition.target`, with any number of network calls.

        The transition has one level for all rows, or one for each row. The step to `target.sigma == 0` ends at x_0.
        """
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, eq=False)
class WrappedSampler(Sampler):
    """A sampler that changes the steps of another sampler; derive a class, and define `step` with `self.sampler.step`.

    It equals only itself, because a derived class may hold arrays. A class that names the fields with its arrays in `traced`,

        @dataclasses.dataclass(frozen=True, eq=False)
        class shifted(sampling.WrappedSampler, traced=("shift",)):
            shift: jax.Array

    is a pytree: `net.sample` traces all leaves of these fields, and new arrays cause no recompilation.
    """

    sampler: Sampler

    def __init_subclass__(cls, traced: tuple[str, ...] = (), **options: Any):
        super().__init_subclass__(**options)
        if traced:
            jax.tree_util.register_pytree_node(
                cls, functools.partial(_flatten, traced), functools.partial(_unflatten, cls)
            )

    def __eq__(self, other: object) -> bool:  # the method of `Sampler` compares no fields of derived classes
        return self is other

    __hash__ = object.__hash__

    def __post_init__(self):
        super().__post_init__()
        check_sampler(self.sampler)

    @property
    def is_stochastic(self) -> bool:
        return self.sampler.is_stochastic

    @property
    def stability(self) -> Stability | None:
        return self.sampler.stability

    def num_calls(self, num_steps: int) -> int:
        return self.sampler.num_calls(num_steps)

    def init_state(self, schedule: Schedule, x_T: Batch, num_steps: int) -> PyTree:
        return self.sampler.init_state(schedule, x_T, num_steps)


def _flatten(traced: tuple[str, ...], sampler: WrappedSampler) -> tuple[list[Any], Any]:
    """Returns the children of a sampler, and its other fields. The inner sampler is a child if it is a pytree."""
    fields = {field.name: getattr(sampler, field.name) for field in dataclasses.fields(sampler)}
    if unknown := set(traced) - fields.keys():
        raise TypeError(f"{type(sampler).__name__} has no field {min(unknown)!r}: traced names fields with arrays")
    names = traced if jax.tree_util.all_leaves([sampler.sampler]) else ("sampler", *traced)
    children = [fields.pop(name) for name in names]
    others = names, tuple(fields.items())
    hash(others)  # raises TypeError for an array or a tracer here, before JAX compares it with fields of other samplers
    return children, others


def _unflatten(cls: type[WrappedSampler], others: Any, children: Sequence[Any]) -> WrappedSampler:
    """Returns a sampler without calling `__post_init__`, because JAX makes copies with other leaves, such as axes."""
    (names, fields), sampler = others, object.__new__(cls)
    for name, value in (*fields, *zip(names, children, strict=True)):
        object.__setattr__(sampler, name, value)
    return sampler


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
    """Steps from one noise level to another along a direction eps; DDIM's eq. 12 if eps is `denoised.eps`.

    The result is (alpha'/alpha) x + (sigma' - alpha' sigma/alpha) eps. The code computes it from x_0 and eps in `denoised`,
    so that the result is defined for pure noise (alpha = 0): DDIM's step, for any eps.
    """
    ratio = current.sigma / jnp.where(current.has_signal, current.alpha, 1.0)
    slope = jnp.where(current.has_signal, target.sigma - target.alpha * ratio, 0.0)
    return target.alpha * denoised.x_0 + target.sigma * denoised.eps + slope * (eps - denoised.eps)


def check_sampler(sampler: object) -> None:
    """Raises ValueError for anything but a `Sampler`, such as a name or a class, and for a class without `step`."""
    if not isinstance(sampler, Sampler):
        raise ValueError(f"sampler must be a sampler such as sampling.ddim(), got {sampler!r}")
    if type(sampler).step is Sampler.step:
        raise ValueError(f"{type(sampler).__name__} defines no step(key, denoiser, x_t, transition, state)")


def _check_step(name: str, new: Any, x_t: Batch) -> None:
    """Raises ValueError if the result of the step of sampler `name` is no `Step` with floats in the shape of x_t."""
    if not isinstance(new, Step):
        raise ValueError(f"{name}.step must return sampling.Step(x_prev, x_0, state), not a {type(new).__name__}")
    for what, value in zip(Step._fields, map(jnp.asarray, new[:2]), strict=False):
        if value.shape != x_t.shape or not jnp.issubdtype(value.dtype, jnp.floating):
            raise ValueError(f"{name}.step returned {what} {jax.typeof(value)}, not floats like x_t {jax.typeof(x_t)}")


def _check_scale(schedule: Schedule, x_T: Batch, first: int) -> None:
    """Raises ValueError for noise in EDM's scale, x_0 + sigma eps, where x_T has almost no signal; skips traced arrays."""
    if isinstance(x_T, Tracer) or isinstance(schedule.alpha_bar, Tracer) or not x_T.is_fully_addressable:
        return
    if np.asarray(schedule.alpha_bar)[first] > 0.01:  # checked before x_T is copied to the host
        return
    std = np.std(np.asarray(x_T))  # jnp would trace a constant inside of jax.jit
    if std > _MAX_STD:
        raise ValueError(
            f"x_T has standard deviation {std:.3g}, but x_t = alpha x_0 + sigma eps has about 1 at index {first}; draw x_T "
            "from N(0, I), or divide x_0 + sigma eps by jnp.sqrt(1 + sigma**2), where EDM's sigma is 80"
        )


def first_index(schedule: Schedule, start: int | np.integer | None) -> int:
    """Returns the noisiest visited index: `start`, or T - 1 for None. Raises: ValueError for an invalid index."""
    last = schedule.num_timesteps - 1
    if start is None:
        return last
    require_number("start, an index of the schedule,", start, 0, last, whole=True)
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
    denoiser: Denoiser | DenoiseFn,
    x_T: BatchLike,
    sampler: Sampler,
    *,
    start: int | np.integer | None = None,
    final_step: bool = True,
    trajectory: Literal[False] = False,
) -> Batch: ...
@overload
def sample(
    key: Key[Array, ""] | Key[Array, "B"],
    schedule: Schedule,
    denoiser: Denoiser | DenoiseFn,
    x_T: BatchLike,
    sampler: Sampler,
    *,
    start: int | np.integer | None = None,
    final_step: bool = True,
    trajectory: Literal[True] | Sequence[int] | Int[np.ndarray, "K"],
) -> tuple[Batch, Trajectory]: ...
def sample(
    key: Key[Array, ""] | Key[Array, "B"],
    schedule: Schedule,
    denoiser: Denoiser | DenoiseFn,
    x_T: BatchLike,
    sampler: Sampler,
    *,
    start: int | np.integer | None = None,
    final_step: bool = True,
    trajectory: bool | np.bool_ | Sequence[int] | Int[np.ndarray, "K"] = False,
) -> Batch | tuple[Batch, Trajectory]:
    """Draws x_0 from x_T with every step of `schedule` (DDPM Algorithm 2; respace first for fewer steps).

    Outside `jax.jit`, every call compiles the loop again. Compile it once, with everything that changes as an argument:

        @jax.jit
        def draw(key, params, x_T):
            denoiser = Denoiser(lambda x_t, time: model.apply({"params": params}, x_t, time), clip=False)
            return sampling.sample(key, schedule, denoiser, x_T, sampler)

    A `Denoiser` is a pytree and may itself be an argument.

    Args:
      key: the noise of step t is drawn with `fold_in(key, t)`. One key draws for all rows; keys [B] draw row by row, so that
        the noise of a row depends on its own key only. A sampler of your own draws with `sampling.normal(key, x_t)`.
      schedule: T steps; `schedules.respace` returns a shorter schedule.
      denoiser: a `Denoiser`, or a plain function (x_t, network time) -> eps. By default the predicted x_0 is clipped to
        [-1, 1], the range of images; data outside this range need `Denoiser(network, clip=False)`.
      x_T: usually N(0, I), also for networks in EDM's coordinates (`coordinates`).
      sampler: `ddpm()`, `dpm_solver_pp()` and so on.
      start: the index of x_T's noise level; the default is T - 1.
      final_step: False stops at index 0's noise level instead of denoising to x_0.
      trajectory: also returns x_t and the predicted x_0 at every step (True) or at the given indices t; kept values need
        memory.
    Returns: x_0, or (x_0, Trajectory); float32, or float64 for a float64 x_T.
    Raises: ValueError for an x_T that is not float, has no batch axis, or (not traced) has a standard deviation above 10
      where alpha_bar is at most 0.01; a sampler that is not a `Sampler`, has no `step`, or steps to another shape; prediction
      eps or score if the first step has alpha = 0 in float32, or a start or a kept index outside the steps.
    """
    check_sampler(sampler)
    denoiser, x_T = as_denoiser(denoiser), as_float("x_T", x_T)
    if not x_T.ndim:
        raise ValueError("x_T must have a batch axis: [B, ...]; got a single number")
    if is_batch_of_keys(key) and key.shape[0] != x_T.shape[0]:
        raise ValueError(
            f"key has {key.shape[0]} keys for {x_T.shape[0]} rows of x_T; give one key, or one for each row"
        )
    first, last = first_index(schedule, start), 0 if final_step else 1
    total = schedule.num_timesteps
    process.check_terminal_snr(schedule, denoiser.prediction, first)
    _check_scale(schedule, x_T, first)
    if isinstance(trajectory, bool | np.bool_):
        indices = np.arange(last, first + 1) if trajectory else None
    else:
        indices = np.asarray(trajectory)
        if indices.ndim != 1 or (indices.size and indices.dtype.kind not in "iu"):
            raise ValueError(f"trajectory must be True, False or a sequence of indices (int), got {trajectory!r}")
    kept = np.unique(np.array(() if indices is None else indices, np.int64))[::-1]
    if kept.size and not last <= kept[-1] <= kept[0] <= first:
        raise ValueError(f"trajectory keeps indices in {last} ... {first}, got {kept[-1]} ... {kept[0]}")
    # The row where each step's values are stored. For other steps, the row is beyond the end, where a scatter drops them.
    row = np.full(total, kept.size, np.int32)
    row[kept] = np.arange(kept.size)
    empty = jnp.zeros((kept.size, *x_T.shape), x_T.dtype)

    def step(carry, t):
        x_t, state, (all_x_t, all_x_0) = carry
        new = sampler.step(fold_in(key, t), denoiser, x_t, schedule.transition(t, x_t), state)
        _check_step(type(sampler).__name__, new, x_t)
        if kept.size:
            all_x_t = all_x_t.at[jnp.asarray(row)[t]].set(x_t, mode="drop")
            all_x_0 = all_x_0.at[jnp.asarray(row)[t]].set(new.x_0.astype(x_t.dtype), mode="drop")
        # The carry of a scan must keep its dtype, whatever dtype a sampler computes in.
        x_prev, state = jax.tree.map(_cast_like, (new.x_prev, new.state), (x_t, state))
        return (x_prev, state, (all_x_t, all_x_0)), None

    num_steps = first + 1 - last
    carry = x_T, sampler.init_state(schedule, x_T, num_steps), (empty, empty)
    (x_0, _, (all_x_t, all_x_0)), _ = jax.lax.scan(step, carry, jnp.arange(first, last - 1, -1, dtype=jnp.int32))
    return x_0 if indices is None else (x_0, Trajectory(jnp.asarray(kept, jnp.int32), all_x_t, all_x_0))


def _cast_like(new, old):
    return new.astype(old.dtype) if jnp.issubdtype(old.dtype, jnp.floating) else new
