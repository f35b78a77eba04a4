"""The process against Bayes in float64, closed forms for Gaussian and two-point data, and inverse functions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import Denoiser, process, schedules
from diffusion_jax.denoiser import PREDICTIONS, QUANTITIES, convert, dynamic_threshold

NAMES = list(schedules.SCHEDULES)
SCHEDULES = {name: schedules.from_betas(schedules.betas(name, 1000)) for name in NAMES}


def draw(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def numpy_tables(name):
    """alpha_bar, and alpha_bar one step earlier, from the betas alone."""
    alpha_bar = np.cumprod(1 - schedules.betas(name, 1000))
    return alpha_bar, np.append(1.0, alpha_bar[:-1])


@pytest.mark.parametrize("name", NAMES)
def test_forward_process_composes(name, x64):
    """Steps from x_0 on have the moments of q(x_t | x_0) in DDPM eq. 4."""
    schedule, t, x_0 = SCHEDULES[name], jnp.arange(1000), np.tile(draw((1, 3)), (1000, 1))
    mean, variance = process.q_mean_variance(schedule, x_0, t)
    mean_prev, variance_prev = np.append(x_0[:1], mean[:-1], 0), np.append(0 * x_0[:1], variance[:-1], 0)
    step_mean, step_variance = process.q_step_mean_variance(schedule, mean_prev, t)
    np.testing.assert_allclose(step_mean, mean, atol=1e-12)
    beta = schedules.betas(name, 1000)[:, None]
    np.testing.assert_allclose((1 - beta) * variance_prev + step_variance, variance, rtol=1e-10)


def test_draws_are_the_mean_plus_the_deviation_times_eps(x64):
    schedule, t, x, eps = SCHEDULES["linear"], jnp.arange(1000), draw((1000, 2), 5), draw((1000, 2), 6)
    for sample, moments in (
        (process.q_sample, process.q_mean_variance),
        (process.q_step, process.q_step_mean_variance),
    ):
        mean, variance = moments(schedule, x, t)
        np.testing.assert_allclose(sample(schedule, x, t, eps), mean + np.sqrt(variance) * eps, rtol=1e-12, atol=1e-12)
    outside = process.q_sample(schedule, x[:2], jnp.array([-1, 1000]), eps[:2])
    assert np.isnan(outside).all()  # never the value at another index
    for beyond in (
        np.array([2**32, -(2**32)]),
        np.array([2**32, 2**64 - 1], np.uint64),
    ):  # int32 wraps them to 0 and -1
        for sample in (process.q_sample, jax.jit(process.q_sample)):
            assert np.isnan(sample(schedule, x[:2], jnp.asarray(beyond), eps[:2])).all()


@pytest.mark.parametrize("name", NAMES)
def test_posterior_is_bayes(name, x64):
    """Against the product of the two densities, completed to a square, over a whole chain but its degenerate ends."""
    schedule = SCHEDULES[name]
    _, prev = numpy_tables(name)
    last = 998 if name == "jsd" else 999  # jsd's last step keeps no information: precision 0, tested below
    t = np.arange(1, last + 1)
    x_0, x_t = draw((t.size, 2), 1), draw((t.size, 2), 2)
    beta = schedules.betas(name, 1000)[t][:, None]
    precision = 1 / (1 - prev[t][:, None]) + (1 - beta) / beta
    mean = (np.sqrt(prev[t])[:, None] * x_0 / (1 - prev[t][:, None]) + np.sqrt(1 - beta) * x_t / beta) / precision
    posterior = process.q_posterior(schedule, x_0, x_t, jnp.asarray(t))
    np.testing.assert_allclose(posterior.mean, mean, rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(posterior.variance, np.broadcast_to(1 / precision, mean.shape), rtol=1e-8)
    np.testing.assert_allclose(posterior.log_variance, np.broadcast_to(-np.log(precision), mean.shape), atol=1e-8)


@pytest.mark.parametrize("name", NAMES)
def test_posterior_at_the_ends(name):
    schedule = SCHEDULES[name]
    x_0, x_t = jnp.array([[0.3]]), jnp.array([[-1.2]])
    first = process.q_posterior(schedule, x_0, x_t, jnp.array([0]))
    np.testing.assert_allclose(first.mean, x_0, rtol=1e-6)
    assert first.variance[0, 0] == 0
    np.testing.assert_allclose(first.log_variance[0, 0], np.log(schedule.transitions.posterior_variance[1]), rtol=1e-6)
    if name == "jsd":  # x_T is pure noise: the posterior is q(x_{T-1} | x_0)
        end = process.q_posterior(schedule, x_0, x_t, jnp.array([999]))
        mean, variance = process.q_mean_variance(schedule, x_0, jnp.array([998]))
        np.testing.assert_allclose(end.mean, mean, rtol=1e-5)
        np.testing.assert_allclose(end.variance, variance, rtol=1e-5)


def known(output, *args, **fields):
    """A denoiser whose network returns this output."""
    return Denoiser(lambda x_t, time: output, *args, **fields)


def everything(name, t, shape):
    """x_0, x_t and each of the six quantities, from NumPy alone."""
    alpha_bar, prev = numpy_tables(name)
    x_0, eps = draw(shape, 3), draw(shape, 4)
    a, s = (np.sqrt(v[t]).reshape(-1, *(1,) * (x_0.ndim - 1)) for v in (alpha_bar, 1 - alpha_bar))
    x_t = a * x_0 + s * eps
    beta = schedules.betas(name, 1000)[t].reshape(a.shape)
    before = prev[t].reshape(a.shape)
    x_prev = beta * np.sqrt(before) / s**2 * x_0 + np.sqrt(1 - beta) * (1 - before) / s**2 * x_t
    v, flow = a * eps - s * x_0, eps - x_0
    return x_t, {"x_0": x_0, "eps": eps, "v": v, "score": -eps / s, "flow": flow, "x_prev": x_prev}


@pytest.mark.parametrize("name", ["linear", "cosine", "jsd"])
@pytest.mark.parametrize("source", PREDICTIONS)
def test_every_conversion_at_every_step(name, source, x64):
    t = np.arange(999 if name == "jsd" and source in ("eps", "score") else 1000)
    x_t, values = everything(name, t, (t.size, 2, 1))

    @jax.jit
    def convert_all(output, x_t, t):
        transition = SCHEDULES[name].transition(t, x_t)
        return {target: convert(output, x_t, transition, source, target) for target in PREDICTIONS}

    # x_prev holds x_0 times a coefficient as small as beta, so some digits are lost on the way back.
    tolerance = 1e-6 if source == "x_prev" else 1e-8
    for target, found in convert_all(values[source], x_t, t).items():
        np.testing.assert_allclose(found, values[target], rtol=tolerance, atol=tolerance)


def test_eps_is_refused_at_a_step_without_signal():
    schedule, x = SCHEDULES["jsd"], jnp.ones((2, 1))
    noise, signal = (schedule.at(jnp.array([3, last]), x) for last in (999, 998))
    for prediction in ("eps", "score"):
        for wanted in ("x_0", "v", "flow"):
            with pytest.raises(ValueError, match="does not determine x_0"):
                convert(x, x, noise, prediction, wanted)
            assert np.isfinite(convert(x, x, signal, prediction, wanted)).all()
        traced = jax.jit(lambda at, p=prediction: convert(x, x, at, p))(noise)
        assert np.isfinite(traced[0, 0]) and np.isnan(traced[1, 0])
    np.testing.assert_allclose(convert(x, x, noise, "v")[1], -1.0)


@pytest.mark.parametrize("name", [n for n in NAMES if n != "jsd"])
@pytest.mark.parametrize("prediction", ["eps", "x_0", "v", "x_prev"])
def test_p_mean_is_the_posterior_of_its_x_0(name, prediction, x64):
    t = np.array([0, 1, 2, 500, 999])
    x_t, values = everything(name, t, (5, 3))
    denoiser = known(values[prediction], prediction, clip=False)
    reverse = process.p_mean_variance(SCHEDULES[name], denoiser, x_t, jnp.asarray(t))
    np.testing.assert_allclose(reverse.mean, values["x_prev"], rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(reverse.x_0, values["x_0"], rtol=1e-5, atol=1e-5)
    if prediction == "eps":  # DDPM eq. 11
        beta = schedules.betas(name, 1000)[t][:, None]
        s = np.sqrt(1 - np.cumprod(1 - schedules.betas(name, 1000)))[t][:, None]
        np.testing.assert_allclose(
            reverse.mean, (x_t - beta / s * values["eps"]) / np.sqrt(1 - beta), rtol=1e-6, atol=1e-8
        )


def test_clipping_acts_on_x_0_and_is_switchable():
    schedule, t = SCHEDULES["linear"], jnp.array([500])
    x_t = jnp.array([[0.5, -0.5]])
    big = jnp.array([[3.0, -0.2]])
    clipped = process.p_mean_variance(schedule, known(big, "x_0"), x_t, t)
    np.testing.assert_allclose(clipped.x_0, [[1.0, -0.2]])
    exact = process.q_posterior(schedule, jnp.array([[1.0, -0.2]]), x_t, t).mean
    np.testing.assert_allclose(clipped.mean, exact, rtol=1e-6)
    free = process.p_mean_variance(schedule, known(big, "x_0", clip=False), x_t, t)
    np.testing.assert_allclose(free.x_0, big)
    half = process.p_mean_variance(schedule, known(big, "x_0", clip=lambda x_0: x_0 / 2), x_t, t)
    np.testing.assert_allclose(half.x_0, big / 2)
    # A directly predicted mean is not clipped, only the reported x_0.
    direct = process.p_mean_variance(schedule, known(big, "x_prev"), x_t, t)
    np.testing.assert_allclose(direct.mean, big)
    assert abs(direct.x_0).max() <= 1


def test_variances():
    schedule, t = SCHEDULES["linear"], jnp.array([0, 1, 700])
    x = jnp.zeros((3, 2))
    beta, small = schedule.betas, schedule.transitions.posterior_variance
    fixed = {v: process.p_mean_variance(schedule, known(x, variance=v), x, t) for v in ("fixed_small", "fixed_large")}
    for name, reverse in fixed.items():  # in place of the denoiser's own
        other = process.p_mean_variance(schedule, lambda x_t, time: x_t, x, t, name)
        np.testing.assert_array_equal(other.variance, reverse.variance)
    np.testing.assert_allclose(fixed["fixed_small"].variance[:, 0], [small[1], small[1], small[700]], rtol=1e-5)
    np.testing.assert_allclose(fixed["fixed_large"].variance[:, 0], [small[1], beta[1], beta[700]], rtol=1e-5)
    for reverse in fixed.values():
        np.testing.assert_allclose(jnp.exp(reverse.log_variance), reverse.variance, rtol=1e-6)
    np.testing.assert_allclose(fixed["fixed_large"].log_variance[0, 0], -9.816725, atol=1e-5)
    values = jnp.stack([jnp.full((3,), -1.0), jnp.full((3,), 1.0)], axis=-1)
    output = jnp.concatenate([x, values], -1)
    ranged = process.p_mean_variance(schedule, known(output, variance="learned_range"), x, t)
    np.testing.assert_allclose(ranged.variance[:, 0], [small[1], small[1], small[700]], rtol=1e-5)
    np.testing.assert_allclose(ranged.variance[:, 1], beta[[0, 1, 700]], rtol=1e-5)
    learned = known(output, variance="learned")
    np.testing.assert_allclose(process.p_mean_variance(schedule, learned, x, t).log_variance, values)
    with pytest.raises(ValueError, match="'fixed_small' is for a network with a fixed variance"):
        process.p_mean_variance(schedule, learned, x, t, "fixed_small")


def test_the_dynamic_threshold_uses_all_axes_of_each_example():
    """Images: s is the quantile over height, width and channels, 1 at least, and not over some of these axes."""
    x_0 = draw((3, 5, 4, 2), 8) * np.array([0.1, 1.0, 4.0])[:, None, None, None]
    s = np.maximum([np.quantile(abs(one).ravel(), 0.9) for one in x_0], 1.0)[:, None, None, None]
    assert (s[0] == 1) and (s[1:] > 1).all()
    np.testing.assert_allclose(dynamic_threshold(0.9)(jnp.float32(x_0)), np.clip(x_0, -s, s) / s, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_slope_of_a_quantity_is_the_derivative_of_eps(prediction):
    schedule = schedules.from_betas(schedules.betas("linear", 20))
    rng = np.random.default_rng(0)
    x_0, eps = (jnp.asarray(rng.standard_normal((20, 3)), jnp.float32) for _ in range(2))
    at = schedule.transition(jnp.arange(20), x_0)
    x_t, quantity = at.alpha * x_0 + at.sigma * eps, QUANTITIES[prediction]
    output = quantity.value(x_0, eps, x_t, at)
    found, slope = jax.jvp(lambda output: quantity.eps(output, x_t, at), (output,), (jnp.ones_like(output),))
    np.testing.assert_allclose(found[2:], eps[2:], atol=2e-4)
    np.testing.assert_allclose(quantity.x_0(output, x_t, at), x_0, atol=2e-4)
    np.testing.assert_allclose(np.broadcast_to(quantity.slope(at), slope.shape), slope, rtol=1e-5)
