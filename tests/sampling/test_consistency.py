"""Consistency networks (Song et al. 2023) and their sampler, against float64 NumPy and in closed form for Gaussian data."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import Denoiser, editing, guidance, losses, measurements, sampling, schedules
from diffusion_jax.measurements import Measurement

D, LOW, TOP = 0.4, 0.002, 80.0
KEY = jax.random.key(0)


def denoiser(network, **fields):
    return Denoiser(network, "x_0", clip=False, **{"sigma_data": D, "sigma_min": LOW} | fields)


def steps_at(*sigmas):
    """The schedule that visits these ratios sigma / alpha."""
    return schedules.respace(schedules.edm_steps(40), [np.log(sigma) / 4 for sigma in sigmas])


def scaled(network, y, s):
    """The paper's f(y, s) = c_skip y + c_out F(c_in y, time) (appendix C), in float64."""
    c_skip, c_out = D**2 / ((s - LOW) ** 2 + D**2), D * (s - LOW) / np.sqrt(s**2 + D**2)
    return c_skip * y + c_out * network(y / np.sqrt(s**2 + D**2), np.log(s) / 4)


@pytest.mark.parametrize("sigmas", [(TOP,), (TOP, 1.38), (TOP, 5.0, 0.3)])
def test_samples_are_those_of_the_papers_algorithm(sigmas, x64):
    def network(x, time, xp=np):
        return xp.sin(2 * x) + 0.3 * time

    schedule = steps_at(*sigmas)
    x_T = jax.random.normal(jax.random.key(1), (3, 4, 2), jnp.float64)
    ours = sampling.sample(
        KEY,
        schedule,
        denoiser(lambda x, time: network(x, time.reshape(-1, 1, 1), jnp)),
        x_T,
        sampling.consistency(),
    )
    y = np.asarray(x_T) * np.sqrt(1 + TOP**2)
    for i, (s, following) in enumerate(zip(sigmas, (*sigmas[1:], LOW), strict=True)):
        noise = jax.random.normal(jax.random.fold_in(KEY, len(sigmas) - 1 - i), x_T.shape, x_T.dtype)
        y = scaled(network, y, s) + np.sqrt(following**2 - LOW**2) * np.asarray(noise)
    np.testing.assert_allclose(ours, y, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("sigmas", [(TOP,), (TOP, 2.0)])
def test_the_exact_network_of_gaussian_data_gives_their_variance(sigmas, x64):
    """f(y, s) = y sqrt((d^2 + sigma_min^2) / (d^2 + s^2)); the start has the variance 1 + 80^2 in place of d^2 + 80^2."""

    def network(x, time):
        s = jnp.exp(4 * time)[:, None]
        y = x * jnp.sqrt(s**2 + D**2)
        exact = y * jnp.sqrt((D**2 + LOW**2) / (D**2 + s**2))
        c_out = D * (s - LOW) / jnp.sqrt(s**2 + D**2)
        return (exact - D**2 / ((s - LOW) ** 2 + D**2) * y) / c_out

    x_T = jax.random.normal(jax.random.key(2), (1, 200_000), jnp.float64)
    x_0 = np.asarray(sampling.sample(KEY, steps_at(*sigmas), denoiser(network), x_T, sampling.consistency()))
    assert abs(x_0.var() / (D**2 + LOW**2) - 1) < 4 * np.sqrt(2 / x_0.size) + 2e-4
    # At sigma_min, the network returns its input, whatever F is.
    level = schedules.edm_steps(40).at(0, x_T)
    output = denoiser(lambda x, time: 7.0 + x).output(x_T, level)
    np.testing.assert_allclose(output, x_T / level.alpha, rtol=1e-12, atol=1e-12)


def test_a_projection_holds_in_the_last_step(x64):
    y = jnp.array([[0.3, -0.2, 0.0, 0.0, 0.0]])
    known = measurements.masked(np.arange(5) < 2)
    network = editing.project(denoiser(lambda x, time: x), Measurement(known, y, 0.0))
    x_T = jax.random.normal(jax.random.key(3), (1, 5), jnp.float64)
    x_0 = sampling.sample(KEY, steps_at(TOP, 1.0), network, x_T, sampling.consistency())
    np.testing.assert_allclose(x_0[:, :2], y[:, :2], atol=1e-12)
    assert (np.abs(x_0[:, 2:]) > 1e-3).all()


def test_other_samplers_and_networks_are_refused(x64):
    x, schedule, taken = jnp.ones((2, 3)), steps_at(TOP, 1.0), denoiser(lambda x, time: x)
    for sampler in (sampling.ddim(), sampling.heun(), sampling.ddpm()):
        with pytest.raises(ValueError, match="use the sampler consistency"):
            sampling.sample(KEY, schedule, taken, x, sampler)
    with pytest.raises(ValueError, match="sigma_min.*without corrections"):
        sampling.sample(KEY, schedule, denoiser(lambda x, time: x, sigma_min=0.0), x, sampling.consistency())
    guided = guidance.classifier(taken, lambda x, time: jnp.sum(x, axis=1), form="mean")
    with pytest.raises(ValueError, match="without a mean shift"):
        sampling.sample(KEY, schedule, guided, x, sampling.consistency())
    with pytest.raises(ValueError, match="sigma_min"):
        losses.simple(KEY, schedule, taken, x)
    for fields in ({"sigma_min": -1.0}, {"sigma_data": None}):
        with pytest.raises(ValueError, match="sigma_min="):
            denoiser(lambda x, time: x, **fields)
