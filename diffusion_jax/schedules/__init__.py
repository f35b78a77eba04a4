"""Noise schedules: how much of x_0 remains in x_t.

A schedule starts as `betas` (float64 [T], the variances of q(x_t | x_{t-1})) and becomes a `Schedule`, which holds every
table that the posterior, the losses and the samplers read. `respace` selects some steps and returns a shorter `Schedule` with
the same `alpha_bar` at these steps.

A `Path` is the noise level at every network time, without steps; `from_path` makes a `Schedule` from levels on a path.

The index and the network time are distinct. The index `t` (int32, 0-based, index 0 is the papers' t = 1) reads the tables.
The network time (float, in the unit of training) is `schedule.timesteps[t]`, the only time that a network receives.
`level = schedule.at(t, x)` is the noise level at index t in a shape that multiplies x: level.alpha * x_0 + level.sigma * eps
is x_t. `schedule.transition(t, x)` is the step from x_t to x_{t-1}.
"""

from diffusion_jax.schedules.levels import NoiseLevel, Transition
from diffusion_jax.schedules.paths import (
    PATHS,
    Path,
    cast_table,
    edm,
    path,
    rectified_flow,
    shifted,
    vp_cosine,
    vp_linear,
)
from diffusion_jax.schedules.respacing import SPACINGS, edm_steps, respace
from diffusion_jax.schedules.schedule import (
    SCHEDULES,
    Schedule,
    betas,
    from_betas,
    from_path,
    rescale_zero_terminal_snr,
)

__all__ = [
    "PATHS",
    "SCHEDULES",
    "SPACINGS",
    "NoiseLevel",
    "Path",
    "Schedule",
    "Transition",
    "betas",
    "cast_table",
    "edm",
    "edm_steps",
    "from_betas",
    "from_path",
    "path",
    "rectified_flow",
    "rescale_zero_terminal_snr",
    "respace",
    "shifted",
    "vp_cosine",
    "vp_linear",
]
