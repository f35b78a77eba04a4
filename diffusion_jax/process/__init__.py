"""The Gaussian diffusion process: q(x_t | x_0), q(x_{t-1} | x_t, x_0), p(x_{t-1} | x_t), and conversions of predictions.

Everything here is a pure function of arrays and a `Schedule`. Shapes: x_0, x_t, eps and network outputs are float
[B, ...] (images are [B, H, W, C] in [-1, 1]); t is int32 [B], the 0-based index of the papers' t = 1 ... T. A scalar t
applies to every row, and to an unbatched x under `vmap`. An index outside 0 ... T - 1 gives NaN, never another index's value.

Results are float32, or float64 for float64 arrays under x64; lower precisions are promoted before any arithmetic. All
functions raise ValueError for images that are not float, and for a t whose shape is neither [] nor [B].

The prediction of a network is one of five quantities. Given x_t, each determines the others, because
x_t = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) eps (DDPM eq. 4):

    eps      the noise itself (DDPM section 3.2)
    x_0      the clean image
    v        sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x_0 (Salimans & Ho 2022, section 4)
    x_prev   the mean of x_{t-1} (DDPM section 3.2, mu-tilde)
    score    grad log q(x_t) = -eps / sqrt(1 - alpha_bar) (Song et al. 2021)
"""

from diffusion_jax.process.arrays import as_batch, as_float, lookup, network_time, promote
from diffusion_jax.process.forward import Gaussian, q_mean_variance, q_posterior, q_sample, q_step, q_step_mean_variance
from diffusion_jax.process.predictions import PREDICTIONS, check_terminal_snr, eps_at, to_eps, to_score, to_v, to_x_0
from diffusion_jax.process.reverse import (
    VARIANCES,
    Reverse,
    clip_x_0,
    dynamic_threshold,
    p_mean_variance,
    split_variance,
)

__all__ = [
    "PREDICTIONS",
    "VARIANCES",
    "Gaussian",
    "Reverse",
    "as_batch",
    "as_float",
    "check_terminal_snr",
    "clip_x_0",
    "dynamic_threshold",
    "eps_at",
    "lookup",
    "network_time",
    "p_mean_variance",
    "promote",
    "q_mean_variance",
    "q_posterior",
    "q_sample",
    "q_step",
    "q_step_mean_variance",
    "split_variance",
    "to_eps",
    "to_score",
    "to_v",
    "to_x_0",
]
