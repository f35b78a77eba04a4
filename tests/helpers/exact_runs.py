"""Runs of a network that is exact for correlated Gaussian data, so that posteriors are known in closed form."""

import numpy as np

from diffusion_jax import data
from diffusion_jax.config import default
from helpers.work_directories import untrained

OFFSET, SCALE = np.array([300.0, -2.0]), np.array([10.0, 0.5])
NETWORK = """
import jax.numpy as jnp
import numpy as np
from diffusion_jax import schedules

COVARIANCE = {covariance!r}
NOISE, EVERY = {noise!r}, {every}  # of the condition, which has every third or second number of an example


def network(shapes):
    path = schedules.vp_linear()
    prior = jnp.asarray(COVARIANCE)
    size = len(COVARIANCE)

    def apply(params, x_t, time, condition=None):
        level = path.at(time[0], x_t)
        # E[x_0 | x_t, condition], with precisions
        precision = jnp.linalg.inv(prior) + (level.alpha / level.sigma) ** 2 * jnp.eye(size)
        right = level.alpha / level.sigma**2 * x_t.reshape(-1, size)
        if condition is not None:
            seen = jnp.eye(size)[::EVERY]
            precision += seen.T @ seen / NOISE**2
            right += condition.reshape(len(condition), -1) @ seen / NOISE**2
        return jnp.linalg.solve(precision, right.T).T.reshape(x_t.shape) + 0 * params["unused"]

    return lambda key: {{"unused": jnp.zeros(1)}}, apply
"""


def covariance(shape):
    """The covariance of the numbers of an example [*spatial, C] in network units: it falls with the distance."""
    position = np.stack(np.unravel_index(np.arange(np.prod(shape)), shape), axis=1)
    distance = np.linalg.norm((position[:, None] - position)[..., :-1], axis=-1)
    return np.exp(-distance / 3) * np.where(position[:, None, -1] == position[:, -1], 1.0, 0.5)


def exact_run(root, shape, noise=None, count=400, is_field=False):
    """Writes a run, and train.npz and test.npz in data units; returns its config.

    noise: of the condition that the network takes, in network units; None for an unconditional network. is_field: whether the
    condition is channel 0 of two, at every position, instead of a vector with every third number.
    """
    every = 2 if is_field else 3
    prior, rng, size = covariance(shape), np.random.default_rng(0), int(np.prod(shape))
    offset, scale = OFFSET[: shape[-1]], SCALE[: shape[-1]]
    (root / "exact.py").write_text(NETWORK.format(covariance=prior.tolist(), noise=noise, every=every))
    for name in ("train", "test"):
        x = (rng.standard_normal((count, size)) @ np.linalg.cholesky(prior).T).reshape(count, *shape)
        if name == "train":  # its moments are those of the distribution, so the normalization is exact
            x -= x.reshape(-1, shape[-1]).mean(axis=0)
            x /= x.reshape(-1, shape[-1]).std(axis=0)
        seen = {}
        if noise is not None:
            y = x.reshape(count, size)[:, ::every] + noise * rng.standard_normal((count, len(range(0, size, every))))
            seen = {"condition": (y.reshape(count, *shape[:-1], 1) if is_field else y).astype(np.float32)}
        np.savez(root / f"{name}.npz", x=(offset + scale * x).astype(np.float64), **seen)
    config = default()
    config.data.update(dataset="arrays", data_dir=str(root / "train.npz"), image_size=shape[:-1], channels=shape[-1])
    config.data.update(levels=None, random_flip=False)
    config.model.update(kind=f"{root / 'exact.py'}:network", num_classes=0, dropout=0.0)
    if is_field:
        config.model.condition_channels = 1
    elif noise is not None:
        config.model.condition_features = len(range(0, size, 3))
    config.diffusion.update(path="vp_linear", prediction="x_0", num_timesteps=1000)
    config.sampling.update(sampler="dpm_solver_pp", steps=50, spacing="log_snr", use_ema=False)
    config.evaluation.update(data_dir=str(root / "test.npz"), num_samples=0, likelihood=False, use_ema=False)
    untrained(root / "run", config, data.load(config.data))
    return config
