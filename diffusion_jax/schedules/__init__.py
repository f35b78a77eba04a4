"""Noise schedules: how much of x_0 remains in x_t.

A schedule starts as `betas` (float64 [T], the variances of q(x_t | x_{t-1})) and becomes a `Schedule`, which holds every
table that the posterior, the losses and the samplers read. `respace` selects some steps and returns a shorter `Schedule` with
the same `alpha_bar` at these steps.

The index and the network time are distinct. The index `t` (int32, 0-based, index 0 is the papers' t = 1) reads the tables.
The network time (float, in the unit of training) is `schedule.timesteps[t]`, the only time that a `denoise_fn` receives.
`at = schedule.at(t, x)` has the values at index t in a shape that multiplies x: at.alpha * x_0 + at.sigma * eps is x_t.
"""

from diffusion_jax.schedules.respacing import SPACINGS, respace
from diffusion_jax.schedules.schedule import (
    SCHEDULES,
    NoiseLevel,
    Schedule,
    ScheduleStep,
    betas,
    cast_table,
    from_betas,
)

__all__ = [
    "SCHEDULES",
    "SPACINGS",
    "NoiseLevel",
    "Schedule",
    "ScheduleStep",
    "betas",
    "cast_table",
    "from_betas",
    "respace",
]
