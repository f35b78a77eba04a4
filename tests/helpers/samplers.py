"""Every sampler by name; each option differs from the default in one row."""

from functools import partial

import numpy as np

from diffusion_jax import sampling

CHURN = {"churn": np.float64(5.0), "churn_range": (np.float64(0.1), 20.0), "churn_noise": np.float64(1.1)}
# Without `consistency`, which takes other networks.
NAMED = {name: make for name, make in sampling.SAMPLERS.items() if name != "consistency"}
MAKERS = NAMED | {
    "ddpm small": partial(sampling.ddpm, "fixed_small"),
    "ddim eta": partial(sampling.ddim, np.float64(0.5)),
    "ddim own eps": partial(sampling.ddim, clipped_eps=False),
    "heun churn": partial(sampling.heun, churn=10),
    "heun churn range": partial(sampling.heun, **CHURN),
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
    *NAMED,
    *("heun churn", "dpm_solver_pp 3 sde", "dpm_solver_pp 3 singlestep", "deis 3", "unipc 3"),
]


def is_deterministic(name):
    """Whether the sampler with this name draws no noise."""
    return not MAKERS[name]().is_stochastic
