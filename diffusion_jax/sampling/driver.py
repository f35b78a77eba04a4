"""The one loop that every sampler runs in.

A `Sampler` has two pure methods and no loop; `sample` runs any of them from the noisiest index to 0 with `lax.scan`: one
compiled program, and memory that does not grow with the number of steps unless the trajectory is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.process import PREDICTIONS, VARIANCES, as_float, check_terminal_snr
from diffusion_jax.schedules import Schedule


class Step(NamedTuple):
    """One step's result: x_prev [B, ...], the x_0 predicted on the way, and the sampler's own memory."""

    x_prev: jax.Array
    x_0: jax.Array
    memory: Any = ()


class Sampler:
    """How x_t becomes x_{t-1}: a value, equal to another with the same options, that hashes and prints them.

    The samplers of this package are frozen dataclasses, so that one can be a static argument of `jax.jit`. For a sampler of
    your own, derive another and define `step`, and `start` if it carries a memory:

        @dataclasses.dataclass(frozen=True)
        class shrunk_ddim(sampling.Sampler):
            factor: float = 0.9
            prediction: str = "eps"

            def step(self, key, schedule, denoise_fn, x_t, t, memory):
                new = sampling.ddim(prediction=self.prediction).step(key, schedule, denoise_fn, x_t, t, memory)
                return sampling.Step(self.factor * new.x_prev, new.x_0)

    prediction: what the network's output stands for; `sample` refuses what the schedule cannot serve.
    """

    prediction: str = "eps"

    def __post_init__(self):
        """Raises: ValueError for an unknown prediction or variance."""
        if self.prediction not in PREDICTIONS:
            raise ValueError(f"unknown prediction {self.prediction!r}; known: {', '.join(PREDICTIONS)}")
        variance = getattr(self, "variance", VARIANCES[0])
        if variance not in VARIANCES:
            raise ValueError(f"unknown variance {variance!r}; known: {', '.join(VARIANCES)}")

    def _floats(self, *names: str) -> None:
        """Makes numbers Python floats: a NumPy float64 would promote float32 arrays under x64."""
        for name in names:
            object.__setattr__(self, name, float(getattr(self, name)))

    def start(self, schedule: Schedule, x_T: jax.Array, num_steps: int) -> Any:
        """The memory before the first of `num_steps` steps, a pytree of arrays; () for a sampler without one."""
        return ()

    def step(self, key, schedule: Schedule, denoise_fn: Callable, x_t: jax.Array, t: jax.Array, memory: Any) -> Step:
        """One step from x_t float [B, ...] at index t, int32 []; it calls the network as often as it needs."""
        raise NotImplementedError(f"{type(self).__name__} defines no step(key, schedule, denoise_fn, x_t, t, memory)")


class Trajectory(NamedTuple):
    """The kept steps in the order they were taken: t int32 [K]; x_t [K, B, ...] before each step; x_0 predicted there."""

    t: jax.Array
    x_t: jax.Array
    x_0: jax.Array


def sample(
    key,
    schedule: Schedule,
    denoise_fn: Callable,
    x_T,
    sampler: Sampler,
    *,
    start: int | None = None,
    final_step: bool = True,
    trajectory: bool | Sequence[int] = False,
    progress: Callable[[int], None] | None = None,
):
    """Draws x_0 from x_T by walking every step of `schedule` (DDPM Algorithm 2; respace first for fewer steps).

    Called outside `jax.jit` it compiles its loop at every call. Compile it once instead, with all that changes as arguments:

        @jax.jit
        def draw(key, params, x_T):
            denoise_fn = lambda x_t, time: model.apply({"params": params}, x_t, time)
            return sampling.sample(key, schedule, denoise_fn, x_T, sampler)

    Args:
      key: the noise of step t comes from `fold_in(key, t)`.
      schedule: T steps; `schedules.respace` makes it shorter.
      denoise_fn: (x_t float [B, ...], network time float [B]) -> output.
      x_T: float [B, ...], usually N(0, I).
      sampler: `ddpm(...)`, `dpm_solver_pp(...)` and so on.
      start: the index whose noise level x_T has; T - 1 unless given.
      final_step: False stops at the noise level of index 0 instead of denoising it to x_0.
      trajectory: also return x_t and the predicted x_0 at every step (True) or at chosen indices t; memory for those only.
      progress: called on the host with the number of steps taken, as they finish (out of order, perhaps); None puts nothing
        into the program.
    Returns: x_0 float32 [B, ...] (float64 for a float64 x_T), or (x_0, Trajectory).
    Raises: ValueError for an x_T that is not float, where the network predicts eps or the score and the first step has
      alpha_bar = 0, or for a start or a kept index outside of what is walked.
    """
    x_T = as_float("x_T", x_T)

    total = schedule.num_timesteps
    first, last = total - 1 if start is None else start, 0 if final_step else 1
    if not isinstance(first, int | np.integer) or not 0 <= first < total:
        raise ValueError(f"start={start} must be an index of the schedule, 0 ... {total - 1}")
    if first == total - 1:  # the one step where alpha_bar may be 0
        check_terminal_snr(schedule, sampler.prediction)
    if isinstance(trajectory, bool | np.bool_):
        trajectory = range(last, first + 1) if trajectory else None
    kept = np.unique(np.array(() if trajectory is None else trajectory, np.int32))[::-1]
    if kept.size and not last <= kept[-1] <= kept[0] <= first:
        raise ValueError(f"trajectory keeps indices in {last} ... {first}, got {kept[-1]} ... {kept[0]}")
    # Where each step's values go; the last + 1, which is dropped, for steps that are not kept.
    row = np.full(total, kept.size, np.int32)
    row[kept] = np.arange(kept.size)
    empty = jnp.zeros((kept.size, *x_T.shape), x_T.dtype)

    def step(carry, t):
        x_t, memory, (all_x_t, all_x_0) = carry
        new = sampler.step(jax.random.fold_in(key, t), schedule, denoise_fn, x_t, t, memory)
        if kept.size:
            all_x_t = all_x_t.at[jnp.asarray(row)[t]].set(x_t, mode="drop")
            all_x_0 = all_x_0.at[jnp.asarray(row)[t]].set(new.x_0.astype(x_t.dtype), mode="drop")
        if progress is not None:
            jax.debug.callback(progress, first + 1 - t)
        # What a loop carries keeps its dtype, whatever a sampler computed in.
        x_prev, memory = jax.tree.map(_as_before, (new.x_prev, new.memory), (x_t, memory))
        return (x_prev, memory, (all_x_t, all_x_0)), None

    steps = jnp.arange(first, last - 1, -1, dtype=jnp.int32)
    (x_0, _, (all_x_t, all_x_0)), _ = jax.lax.scan(
        step, (x_T, sampler.start(schedule, x_T, first + 1 - last), (empty, empty)), steps
    )
    return x_0 if trajectory is None else (x_0, Trajectory(jnp.asarray(kept), all_x_t, all_x_0))


def _as_before(new, old):
    return new.astype(old.dtype) if jnp.issubdtype(old.dtype, jnp.floating) else new
