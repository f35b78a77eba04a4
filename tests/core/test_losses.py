"""L_simple, the bound and the hybrid against closed forms on Gaussian data, and the timestep samplers."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import Denoiser, coordinates, likelihood, losses, process, schedules, timesteps
from diffusion_jax.denoiser import PREDICTIONS, convert
from helpers.gaussian_mixtures import FULL as SCHEDULE
from helpers.gaussian_mixtures import S2, M, gaussian
from helpers.path_networks import EDM, FLOW

KEY = jax.random.key(0)


def optimal(prediction):
    """The exact minimizer for data N(M, S2) in every dimension."""
    if prediction != "x_prev":
        return gaussian(prediction)
    x_0 = gaussian("x_0")
    return lambda x, time: process.q_posterior(SCHEDULE, x_0(x, time), x, time.astype(int)).mean


def gaussian_data(n, key=0):
    return M + np.sqrt(S2) * jax.random.normal(jax.random.key(key), (n, 4))


def bounded_data(n):
    return jnp.clip(gaussian_data(n), -1, 1)  # the range of gray levels


def mean_and_error(values):
    values = np.asarray(values, np.float64)
    return values.mean(), values.std() / np.sqrt(values.size)


@pytest.mark.parametrize(
    "name",
    [
        "uniform",
        *(pytest.param(n, marks=pytest.mark.thorough) for n in ("antithetic", "stratified", "loss_second_moment")),
    ],
)
def test_the_exact_network_attains_the_minimum_of_the_eps_loss(name):
    """The optimal network's loss is the mean over t of alpha_bar s^2 / v_t."""
    sampler = timesteps.sampler_by_name(name, timesteps.loss_history(1000))
    draw = jax.jit(lambda key, x_0: losses.simple(key, SCHEDULE, optimal("eps"), x_0, timestep_sampler=sampler))
    loss, parts = draw(jax.random.key(1), gaussian_data(40_000))
    assert loss.shape == (40_000,) and parts.t.dtype == jnp.int32 and parts.t.max() < 1000
    v = SCHEDULE.alpha_bar * S2 + 1 - SCHEDULE.alpha_bar
    mean, error = mean_and_error(loss)
    assert abs(mean - (SCHEDULE.alpha_bar * S2 / v).mean()) < 4 * error


EPS_WEIGHTS = {
    "snr": lambda snr: np.ones_like(snr),
    "min_snr": lambda snr: np.minimum(snr, 5) / snr,
    "truncated_snr": lambda snr: np.maximum(snr, 1) / snr,
    "p2": lambda snr: 1 / (1 + snr),
    "edm": lambda snr: 1 + 4 / snr,
    "sigmoid": lambda snr: 1 / (1 + np.e * snr),
}


@pytest.mark.parametrize("prediction", ["flow", "x_prev"])  # slopes of all are tested with the process
def test_a_weighting_applies_to_the_eps_error_of_any_prediction(prediction):
    """For any output, the weighted loss is w(SNR) times the error of the eps that follows from the output."""
    x_0 = jax.random.normal(jax.random.key(0), (64, 3))
    off = lambda x_t, time: 1.1 * optimal(prediction)(x_t, time) + 0.1  # noqa: E731
    draw = partial(losses.simple, jax.random.key(2), SCHEDULE, off, prediction=prediction)
    found = jax.jit(lambda x_0: {name: draw(x_0, weighting=name) for name in ("none", *losses.WEIGHTINGS)})(x_0)
    for name, (loss, parts) in found.items():
        t = np.asarray(parts.t)
        eps_hat = convert(parts.output, parts.x_t, SCHEDULE.transition(t, parts.x_t), prediction, "eps")
        error = np.square(np.asarray(eps_hat - parts.eps, np.float64)).mean(-1)
        expected = parts.mse if name == "none" else EPS_WEIGHTS[name](SCHEDULE.snr[t]) * error
        np.testing.assert_allclose(loss, expected, rtol=2e-3, atol=1e-5, err_msg=name)


def test_the_constants_of_weightings():
    snr = np.array([1e-3, 0.5, 2.0, 30.0], np.float32)
    np.testing.assert_allclose(losses.min_snr_weight(snr, 2.0), np.minimum(snr, 2) / snr, rtol=1e-6)
    np.testing.assert_allclose(losses.p2_weight(snr, 0.3, 0.5), 1 / np.sqrt(0.3 + snr), rtol=1e-6)
    loss, parts = losses.simple(
        jax.random.key(0), SCHEDULE, lambda x, time: x, gaussian_data(4), weighting=lambda s: losses.p2_weight(s, 2, 3)
    )
    np.testing.assert_allclose(loss, parts.mse / (2 + SCHEDULE.snr[parts.t]) ** 3, rtol=1e-5)


INFINITE = ("truncated_snr", "edm")  # on the eps error, where alpha_bar is 0


@pytest.mark.parametrize("prediction", ["eps", "score", "v", "x_0"])
def test_weights_are_finite_where_alpha_bar_is_0(prediction):
    jsd = schedules.from_betas(schedules.betas("jsd", 10))
    last = lambda key, batch, total: (jnp.full(batch, total - 1), jnp.ones(batch))  # noqa: E731
    names = [name for name in ("none", *losses.WEIGHTINGS) if name not in INFINITE or prediction in ("v", "x_0")]
    draw = partial(losses.simple, prediction=prediction, timestep_sampler=last)
    run = jax.jit(lambda key, x: {n: draw(key, jsd, lambda x, time: 0 * x, x, weighting=n) for n in names})
    for name, (loss, parts) in run(jax.random.key(0), jnp.ones((4, 2))).items():
        assert (loss < 10).all(), name
        if name == "edm":  # at SNR 0, weight 1 / sigma_data^2 on the errors of x_0 and v
            np.testing.assert_allclose(loss, 4 * parts.mse, rtol=1e-6)
        if name == "truncated_snr":  # max(SNR, 1) on x_0, which at SNR 0 is weight 1 on v
            np.testing.assert_allclose(loss, parts.mse, rtol=1e-6)


def test_levels_and_noise_have_keys_of_their_own():
    seen = []

    def sampler(key, batch, total):
        seen.append(key)
        return jnp.zeros(batch, int), jnp.ones(batch)

    _, parts = losses.simple(KEY, SCHEDULE, lambda x, time: x, jnp.zeros((4, 3)), timestep_sampler=sampler)
    for key in (KEY, *seen):
        assert (parts.eps != jax.random.normal(key, (4, 3))).all()


def test_the_network_sees_network_time():
    short = schedules.respace(SCHEDULE, "ddim50")
    seen = []

    def denoise_fn(x_t, time):
        seen.append(time)
        return x_t

    _, parts = losses.simple(jax.random.key(0), short, denoise_fn, jnp.zeros((8, 2)))
    np.testing.assert_array_equal(seen[0], 20.0 * parts.t)


# The bound as a loss, and the hybrid.

SHORT = schedules.from_betas(schedules.betas("linear", 20, beta_start=5e-3, beta_end=0.4))


def doubled(x_t, time):
    """Some network with a learned variance."""
    return jnp.concatenate([0.4 * x_t + 0.1, jnp.tanh(x_t + 0.01 * time[:, None])], axis=-1)


@pytest.mark.parametrize("variance", ["learned", "learned_range"])
def test_the_vlb_loss_estimates_the_bound(variance):
    x_0 = gaussian_data(100_000)
    denoiser = Denoiser(doubled, variance=variance, clip=False)
    loss, parts = jax.jit(lambda key: losses.vlb(key, SHORT, denoiser, x_0, gray_levels=None))(jax.random.key(0))
    bits = likelihood.bits_per_dim(jax.random.key(1), SHORT, denoiser, x_0, tables=False, gray_levels=None)
    mean, error = mean_and_error(loss)
    whole, whole_error = mean_and_error(bits.total - bits.prior)
    assert abs(mean - whole) < 4 * np.hypot(error, whole_error) and error < 0.02 * whole
    np.testing.assert_allclose(loss, parts.vlb, rtol=1e-6)


@pytest.mark.thorough
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_in_the_hybrid_the_bound_trains_only_the_variance(prediction):
    """The gradient with respect to the predicted mean equals L_simple's; with respect to the variance, the weighted
    vlb's."""
    x_0 = bounded_data(16)

    def learned(network):
        return Denoiser(network, prediction=prediction, variance="learned_range", clip=False)

    def gradient(loss):
        def total(offset):
            return loss(jax.random.key(0), SHORT, learned(lambda x, t: doubled(x, t) + offset), x_0)[0].sum()

        by_mean, by_variance = jnp.split(jax.jit(jax.grad(total))(jnp.zeros((16, 8))), 2, axis=-1)
        return np.asarray(by_mean), np.asarray(by_variance)

    hybrid, simple, bound = gradient(losses.hybrid), gradient(losses.simple), gradient(losses.vlb)
    # Two programs: each gradient is a difference of float32 numbers, rounded to 2^-24 of the larger, a few times.
    rounding = 1e-6 * abs(simple[0]).max()
    np.testing.assert_allclose(hybrid[0], simple[0], rtol=1e-6, atol=rounding)
    assert 0.001 * abs(bound[0]).max() > 10 * rounding  # the bound's gradient would be visible
    assert (simple[1] == 0).all()
    np.testing.assert_allclose(hybrid[1], 0.001 * bound[1], rtol=1e-5, atol=1e-9)
    loss, parts = losses.hybrid(jax.random.key(0), SHORT, learned(doubled), x_0, vlb_weight=0.5)
    np.testing.assert_allclose(loss, parts.mse + 0.5 * parts.vlb, rtol=1e-6)


def test_the_terms_of_the_hybrid_and_their_weights():
    """Improved DDPM's code: MSE + one term in bits times T / 1000. A weighting applies to the MSE, importance to both."""
    options = {
        "weighting": lambda snr: 7.0 + 0 * snr,
        "timestep_sampler": lambda key, batch, total: (jnp.arange(batch), 3.0 + jnp.arange(batch)),
    }
    x_0 = bounded_data(16)
    run = jax.jit(
        lambda key, x: (
            losses.hybrid(key, SHORT, doubled, x),
            losses.hybrid(key, SHORT, doubled, x, vlb_weight=0.5, **options),
        )
    )
    (loss, parts), (weighted, aux) = run(jax.random.key(0), x_0)
    denoiser = Denoiser(doubled, variance="learned_range", clip=False)
    term, _ = jax.jit(likelihood.bound_term)(SHORT, denoiser, x_0, parts.x_t, parts.t)
    np.testing.assert_allclose(loss, parts.mse + term * 20 / 1000, rtol=1e-6)
    np.testing.assert_allclose(parts.mse, np.square(parts.eps - parts.output[:, :4]).mean(1), rtol=1e-5)
    np.testing.assert_allclose(weighted, (3 + np.arange(16)) * (7 * aux.mse + 0.5 * aux.vlb), rtol=1e-6)


def first_step(key, batch, total):
    return jnp.zeros(batch, jnp.int32), jnp.ones(batch)


@pytest.mark.parametrize("sampler", [first_step, timesteps.uniform])
def test_the_bound_s_gradients_are_finite_at_the_edges(sampler):
    """In float32: black and white 8-bit images, a thousand cosine steps, and a mean far from the data."""
    schedule = schedules.from_betas(schedules.betas("cosine", 1000))
    x_0 = jnp.where(jax.random.bernoulli(jax.random.key(0), shape=(512, 3)), 1.0, -1.0)

    @jax.jit
    @jax.value_and_grad
    def total(w):
        network = lambda x, t: w * doubled(x, t)  # noqa: E731
        return losses.vlb(jax.random.key(1), schedule, network, x_0, timestep_sampler=sampler)[0].mean()

    for w in (-3.0, 0.0, 1.0):
        assert np.isfinite(total(w)).all()


# Importance sampling of timesteps.


@pytest.mark.thorough
def test_importance_sampling_is_unbiased_and_has_less_variance():
    """The weighted estimate of the bound equals the uniform estimate within error bars, with less variance."""
    x_0 = gaussian_data(60_000)
    run = jax.jit(
        lambda key, sampler_history: losses.vlb(
            key, SHORT, doubled, x_0, gray_levels=None, timestep_sampler=timesteps.loss_second_moment(sampler_history)
        )
    )
    history = timesteps.loss_history(20)
    uniform, _ = run(jax.random.key(0), history)
    for seed in range(3):
        _, parts = run(jax.random.key(seed), history)
        history = timesteps.record(history, parts.t[:4000], parts.vlb[:4000])
    weighted, parts = run(jax.random.key(9), history)
    p = timesteps.step_probabilities(history)
    assert p.max() > 2 / 20 and abs(float(p.sum()) - 1) < 1e-6
    np.testing.assert_allclose(parts.importance, 1 / (20 * np.asarray(p)[parts.t]), rtol=1e-6)
    (a, error_a), (b, error_b) = mean_and_error(uniform), mean_and_error(weighted)
    assert abs(a - b) < 4 * np.hypot(error_a, error_b) and error_b < 0.9 * error_a
    # Also for a step that is almost never drawn: the frequencies equal the probabilities.
    counts = np.bincount(np.asarray(parts.t), minlength=20)
    assert (abs(counts - 60_000 * p) < 5 * np.sqrt(60_000 * p) + 1).all()


@pytest.mark.parametrize(
    ("schedule", "options", "words"),
    [
        (schedules.edm(), {"draw": "log_normal", "timestep_sampler": "uniform"}, "give timestep_sampler alone"),
        (SCHEDULE, {"draw": "uniform"}, "draw=uniform needs a path"),
        (schedules.edm(), {"timestep_sampler": first_step}, "it returned indices of steps"),
    ],
)
def test_a_timestep_sampler_that_does_not_fit_is_refused(schedule, options, words):
    with pytest.raises(ValueError, match=words):
        losses.simple(jax.random.key(0), schedule, lambda x_t, time: x_t, jnp.zeros((3, 2)), **options)


# Losses on paths.


def fixed(time):
    """A draw that always returns one time."""
    return lambda key, batch_size, path: (jnp.full(batch_size, time), jnp.zeros(batch_size))


@pytest.mark.parametrize("sigma", [0.002, 0.1, 1.0, 80.0])
def test_the_loss_of_edm_is_one_for_a_network_of_zeros(sigma):
    """For x_0 ~ N(0, d^2), the best F is 0 and the weighted loss is 1 at every level (Karras et al. 2022)."""
    d = 0.5
    x_0 = d * jax.random.normal(KEY, (20_000, 4))
    denoise_fn = coordinates.precondition(lambda x, time: jnp.zeros_like(x), EDM, d)
    draw = fixed(np.log(sigma) / 4)
    loss, _ = losses.simple(jax.random.key(1), EDM, denoise_fn, x_0, prediction="x_0", weighting="edm", draw=draw)
    assert abs(loss.mean() - 1) < 4 * loss.std() / np.sqrt(loss.size)


ERRORS = {  # eps error over the error of each prediction
    "eps": lambda alpha, sigma: 1.0,
    "x_0": lambda alpha, sigma: (alpha / sigma) ** 2,
    "v": lambda alpha, sigma: alpha**2,
    "flow": lambda alpha, sigma: (alpha / (alpha + sigma)) ** 2,
    "score": lambda alpha, sigma: sigma**2,
}


@pytest.mark.parametrize("weighting", losses.WEIGHTINGS)
@pytest.mark.parametrize("prediction", ERRORS)
def test_weights_on_every_error(weighting, prediction):
    x_0 = jax.random.normal(KEY, (32, 4))
    loss, aux = losses.simple(
        KEY, FLOW, lambda x, time: 0.3 * x + 0.1, x_0, prediction=prediction, weighting=weighting, draw="logit_normal"
    )
    at = FLOW.at(aux.t, aux.mse)
    alpha, sigma = np.asarray(at.alpha, np.float64), np.asarray(at.sigma, np.float64)
    weight = EPS_WEIGHTS[weighting]((alpha / sigma) ** 2) * ERRORS[prediction](alpha, sigma)
    np.testing.assert_allclose(loss, weight * aux.mse, rtol=1e-5)
