"""The one loop that every sampler runs in.

A `Sampler` is two pure functions and knows nothing of loops; `sample` walks any of them from the noisiest index to 0
with `lax.scan`: one compiled program, one network call traced, and memory that does not grow with the number of steps
unless the trajectory is asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from diffusion_jax.process import at
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
    """Every step in the order it was taken: t int32 [T]; x_t [T, B, ...] before the step; x_0 [T, B, ...] predicted there."""

    t: jax.Array
    x_t: jax.Array
    x_0: jax.Array


def sample(key, schedule: Schedule, denoise_fn: Callable, x_T, sampler: Sampler, *, trajectory: bool = False):
    """Draws x_0 from x_T by walking every step of `schedule` (DDPM Algorithm 2; respace first for fewer steps).

    Args:
      key: the noise of step t comes from `fold_in(key, t)`.
      schedule: T steps; `schedules.respace` makes it shorter.
      denoise_fn: (x_t float [B, ...], network time float [B]) -> output.
      x_T: float [B, ...], usually N(0, I).
      sampler: `ddpm(...)`, `ddim(...)` and so on.
      trajectory: keep x_t and the predicted x_0 of every step: T times the memory.
    Returns: x_0 float32 [B, ...] (float64 for a float64 x_T), or (x_0, Trajectory).
    Raises: ValueError where the network predicts eps or the score and alpha_bar ends at 0.
    """
    if schedule.zero_terminal_snr and sampler.prediction in ("eps", "score"):
        raise ValueError(
            f"alpha_bar is 0 at index {schedule.num_timesteps - 1}: {sampler.prediction} says nothing about x_0 there; "
            "predict v or x_0, or leave that step out with schedules.respace"
        )
    x_T = jnp.asarray(x_T)
    x_T = x_T.astype(jnp.promote_types(x_T.dtype, jnp.float32))

    def step(carry, t):
        x_t, memory = carry
        index = jnp.full(x_t.shape[:1], t)
        output = denoise_fn(x_t, at(schedule.timesteps, index, index))
        new = sampler.step(jax.random.fold_in(key, t), schedule, output, x_t, index, memory)
        carry = new.x_prev.astype(x_t.dtype), new.memory
        return carry, Trajectory(t, x_t, new.x_0.astype(x_t.dtype)) if trajectory else None

    steps = jnp.arange(schedule.num_timesteps - 1, -1, -1, dtype=jnp.int32)
    (x_0, _), kept = jax.lax.scan(step, (x_T, sampler.start(schedule, x_T)), steps)
    return (x_0, kept) if trajectory else x_0
