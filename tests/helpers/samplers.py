"""Every sampler by name, with each of its options off its default in one of the rows; all take the common options, too."""

from functools import partial

import jax.numpy as jnp
import numpy as np

from diffusion_jax import sampling


def shift(x_t, time):
    return 0.1 * x_t * jnp.expand_dims(time, tuple(range(1, x_t.ndim)))


CHURN = {"churn": np.float64(5.0), "churn_range": (np.float64(0.1), 20.0), "churn_noise": np.float64(1.1)}
MAKERS = {
    "ddpm": sampling.ddpm,
    "ddpm small": partial(sampling.ddpm, "fixed_small"),
    "ddpm shifted": partial(sampling.ddpm, mean_shift=shift),
    "ddim": sampling.ddim,
    "ddim eta": partial(sampling.ddim, np.float64(0.5)),
    "ddim own eps": partial(sampling.ddim, clipped_eps=False),
    "euler": sampling.euler,
    "euler_ancestral": sampling.euler_ancestral,
    "heun": sampling.heun,
    "heun churn": partial(sampling.heun, churn=10),
    "heun churn range": partial(sampling.heun, **CHURN),
    "pndm": sampling.pndm,
    "plms": partial(sampling.pndm, runge_kutta=False),
}
for order in (1, 2, 3):
    dpm_solver_pp, deis, unipc = (
        partial(make, order) for make in (sampling.dpm_solver_pp, sampling.deis, sampling.unipc)
    )
    MAKERS |= {
        f"dpm_solver_pp {order}": dpm_solver_pp,
        f"dpm_solver_pp {order} sde": partial(dpm_solver_pp, sde=True),
        f"dpm_solver_pp {order} singlestep": partial(dpm_solver_pp, singlestep=True),
        f"dpm_solver_pp {order} all": partial(dpm_solver_pp, sde=True, singlestep=True, lower_order_final=False),
        f"deis {order}": deis,
        f"deis {order} full": partial(deis, lower_order_final=False),
        f"unipc {order}": unipc,
        f"unipc {order} bh1": partial(unipc, variant="bh1", lower_order_final=False),
    }
METHODS = [  # where all rows would take too long
    *("ddpm", "ddim", "euler", "euler_ancestral", "heun", "heun churn", "pndm", "plms"),
    *("dpm_solver_pp 2", "dpm_solver_pp 3 sde", "dpm_solver_pp 3 singlestep", "deis 3", "unipc 3"),
]
NOISY = ("ddpm", "eta", "ancestral", "churn", "sde", "all")


def is_deterministic(name):
    """Whether a sampler of that name draws no noise."""
    return not any(word in name for word in NOISY)
