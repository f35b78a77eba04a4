"""Data whose score is known, a Gaussian and mixtures, as networks of (x_t, network time)."""

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax import schedules

FULL = schedules.from_betas(schedules.betas("linear", 1000))
M, S2 = 0.3, 0.25
MEANS, VARIANCES, WEIGHTS = np.array([-0.8, 0.5]), np.array([0.05, 0.1]), np.array([0.4, 0.6])


def as_prediction(eps, x, alpha, sigma, prediction, x_0=None):
    """Converts `eps` to a network output with this prediction; x_0 is needed if alpha may be 0."""
    x_0 = (x - sigma * eps) / alpha if x_0 is None else x_0
    return {"eps": eps, "x_0": x_0, "v": alpha * eps - sigma * x_0, "score": -eps / sigma, "flow": eps - x_0}[
        prediction
    ]


def levels(time, schedule=FULL, ndim=2):
    """(alpha, sigma) at network times [B], for an x with ndim axes."""
    log_snr = schedule.path.log_snr(time)[(...,) + (None,) * (ndim - 1)]
    return jnp.sqrt(jax.nn.sigmoid(log_snr)), jnp.sqrt(jax.nn.sigmoid(-log_snr))


def gaussian(prediction="eps", schedule=FULL, mean=M, variance=S2):
    """N(mean, variance) in every dimension; x [B, ...]."""

    def denoise_fn(x, time):
        alpha, sigma = levels(time, schedule, x.ndim)
        slope = (x - alpha * mean) / (alpha**2 * variance + sigma**2)
        return as_prediction(sigma * slope, x, alpha, sigma, prediction, mean + alpha * variance * slope)

    return denoise_fn


def mixture(prediction="eps", schedule=FULL, variances=VARIANCES):
    """Two Gaussians in every dimension, independently; x [B, D]."""

    def denoise_fn(x, time):
        alpha, sigma = levels(time, schedule)
        # Copies in NumPy: JAX keeps the float32 copy of an array and reuses it after x64 is switched on.
        means, spreads, log_weights = (values.astype(alpha.dtype) for values in (MEANS, variances, np.log(WEIGHTS)))
        away = x[..., None] - alpha[..., None] * means
        spread = alpha[..., None] ** 2 * spreads + sigma[..., None] ** 2
        weights = jax.nn.softmax(log_weights - 0.5 * jnp.log(spread) - 0.5 * away**2 / spread, axis=-1)
        x_0 = (weights * (means + alpha[..., None] * spreads / spread * away)).sum(-1)
        return as_prediction(sigma * (weights * away / spread).sum(-1), x, alpha, sigma, prediction, x_0)

    return denoise_fn
