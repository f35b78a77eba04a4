"""The one loop that every sampler runs in.

A `Sampler` is two pure functions and knows nothing of loops; `sample` walks any of them from the noisiest index to 0
with `lax.scan`: one compiled program, one network call traced, and memory that does not grow with the number of steps
unless the trajectory is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.process import at, check_terminal_snr
from diffusion_jax.schedules import Schedule


class Step(NamedTuple):
    """One step's result: x_prev [B, ...], the x_0 predicted on the way, and the sampler's own memory."""

    x_prev: jax.Array
    x_0: jax.Array
    memory: Any = ()


class Sampler(NamedTuple):
    """How x_t becomes x_{t-1}.

    step: (key, schedule, output, x_t, t int32 [B], memory) -> Step, where `output` is the network's at (x_t, t).
    start: (schedule, x_T) -> memory, what a multistep method carries from step to step; () for most.
    prediction: what the network's output stands for; the driver refuses what the schedule cannot serve.
    """

    step: Callable[..., Step]
    start: Callable[[Schedule, jax.Array], Any]
    prediction: str


class Trajectory(NamedTuple):
    """The kept steps in the order they were taken: t int32 [K]; x_t [K, B, ...] before each step; x_0 predicted there."""

    t: jax.Array
    x_t: jax.Array
    x_0: jax.Array


def sample(
    key, schedule: Schedule, denoise_fn: Callable, x_T, sampler: Sampler, *, trajectory: bool | Sequence[int] = False
):
    """Draws x_0 from x_T by walking every step of `schedule` (DDPM Algorithm 2; respace first for fewer steps).

    Args:
      key: the noise of step t comes from `fold_in(key, t)`.
      schedule: T steps; `schedules.respace` makes it shorter.
      denoise_fn: (x_t float [B, ...], network time float [B]) -> output.
      x_T: float [B, ...], usually N(0, I).
      sampler: `ddpm(...)`, `ddim(...)` and so on.
      trajectory: also return x_t and the predicted x_0 at every step (True) or at chosen indices t; memory for those only.
    Returns: x_0 float32 [B, ...] (float64 for a float64 x_T), or (x_0, Trajectory).
    Raises: ValueError where the network predicts eps or the score and alpha_bar ends at 0, or for a kept index outside
      0 ... T - 1.
    """
    check_terminal_snr(schedule, sampler.prediction)
    x_T = jnp.asarray(x_T)
    x_T = x_T.astype(jnp.promote_types(x_T.dtype, jnp.float32))

    total = schedule.num_timesteps
    if isinstance(trajectory, bool | np.bool_):
        trajectory = range(total) if trajectory else None
    kept = np.unique(np.array(() if trajectory is None else trajectory, np.int32))[::-1]
    if kept.size and not 0 <= kept[-1] <= kept[0] < total:
        raise ValueError(f"trajectory keeps indices in 0 ... {total - 1}, got {kept[-1]} ... {kept[0]}")
    row = np.full(
        total, kept.size, np.int32
    )  # where each step's values go; the last + 1, which is dropped, for the others
    row[kept] = np.arange(kept.size)
    empty = jnp.zeros((kept.size, *x_T.shape), x_T.dtype)

    def step(carry, t):
        x_t, memory, (all_x_t, all_x_0) = carry
        index = jnp.full(x_t.shape[:1], t)
        output = denoise_fn(x_t, at(schedule.timesteps, index, index))
        new = sampler.step(jax.random.fold_in(key, t), schedule, output, x_t, index, memory)
        if kept.size:
            all_x_t = all_x_t.at[jnp.asarray(row)[t]].set(x_t, mode="drop")
            all_x_0 = all_x_0.at[jnp.asarray(row)[t]].set(new.x_0.astype(x_t.dtype), mode="drop")
        return (new.x_prev.astype(x_t.dtype), new.memory, (all_x_t, all_x_0)), None

    steps = jnp.arange(total - 1, -1, -1, dtype=jnp.int32)
    (x_0, _, (all_x_t, all_x_0)), _ = jax.lax.scan(step, (x_T, sampler.start(schedule, x_T), (empty, empty)), steps)
    return x_0 if trajectory is None else (x_0, Trajectory(jnp.asarray(kept), all_x_t, all_x_0))
