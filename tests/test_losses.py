"""L_simple against closed forms on Gaussian data, for which the best network is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import losses, process, schedules, timesteps

SCHEDULE = schedules.from_betas(schedules.betas("linear", 1000))
M, S2 = 0.3, 0.25  # data N(M, S2) in every dimension


def optimal(prediction, schedule=SCHEDULE):
    """The exact minimiser: E[x_0 | x_t] for Gaussian data, expressed as what is predicted."""

    def denoise_fn(x_t, time):
        t = time.astype(jnp.int32)
        alpha_bar = process.at(schedule.alpha_bar, t, x_t)
        x_0 = M + jnp.sqrt(alpha_bar) * S2 * (x_t - jnp.sqrt(alpha_bar) * M) / (alpha_bar * S2 + 1 - alpha_bar)
        if prediction == "x_0":
            return x_0
        if prediction == "x_prev":
            return process.q_posterior(schedule, x_0, x_t, t).mean
        convert = {"eps": process.to_eps, "v": process.to_v, "score": process.to_score}[prediction]
        return convert(schedule, x_0, x_t, t, "x_0")

    return denoise_fn


def gaussian_data(n, key=0):
    return M + np.sqrt(S2) * jax.random.normal(jax.random.key(key), (n, 4))


def mean_and_error(values):
    values = np.asarray(values, np.float64)
    return values.mean(), values.std() / np.sqrt(values.size)


@pytest.mark.parametrize("sampler", timesteps.SAMPLERS)
def test_least_eps_loss(sampler):
    """The optimal network's loss is the mean over t of alpha_bar s^2 / v_t."""
    draw = jax.jit(
        lambda key, x_0: losses.simple(key, SCHEDULE, optimal("eps"), x_0, timestep_sampler=timesteps.SAMPLERS[sampler])
    )
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
}


@pytest.mark.parametrize("weighting", EPS_WEIGHTS)
@pytest.mark.parametrize("prediction", process.PREDICTIONS)
def test_a_weighting_is_one_of_the_eps_error_whatever_is_predicted(weighting, prediction):
    """With any output, the weighted loss is w(SNR) times the error of the eps that the output stands for."""
    x_0 = jax.random.normal(jax.random.key(0), (64, 3))
    off = lambda x_t, time: 1.1 * optimal(prediction)(x_t, time) + 0.1  # noqa: E731
    loss, parts = losses.simple(jax.random.key(2), SCHEDULE, off, x_0, prediction=prediction, weighting=weighting)
    t = np.asarray(parts.t)
    eps_hat = process.to_eps(SCHEDULE, parts.output, parts.x_t, parts.t, prediction)
    error = np.square(np.asarray(eps_hat - parts.eps, np.float64)).mean(-1)
    np.testing.assert_allclose(loss, EPS_WEIGHTS[weighting](SCHEDULE.snr[t]) * error, rtol=2e-3, atol=1e-5)


def test_without_weighting_the_error_of_what_is_predicted():
    x_0 = gaussian_data(20_000)
    a, one_minus = SCHEDULE.alpha_bar, 1 - SCHEDULE.alpha_bar
    least_x_0 = S2 * one_minus / (a * S2 + one_minus)
    for prediction, least in [("x_0", least_x_0), ("v", least_x_0 * (1 + SCHEDULE.snr))]:
        loss, _ = losses.simple(jax.random.key(3), SCHEDULE, optimal(prediction), x_0, prediction=prediction)
        mean, error = mean_and_error(loss)
        assert abs(mean - least.mean()) < 4 * error, prediction


def test_weights_stay_finite_where_alpha_bar_is_0():
    jsd = schedules.from_betas(schedules.betas("jsd", 10))
    last = lambda key, batch, total: (jnp.full(batch, total - 1), jnp.ones(batch))  # noqa: E731
    for weighting in (None, *losses.WEIGHTINGS):
        loss, parts = losses.simple(
            jax.random.key(0),
            jsd,
            lambda x, time: 0 * x,
            jnp.ones((4, 2)),
            prediction="v",
            weighting=weighting,
            timestep_sampler=last,
        )
        assert np.isfinite(loss).all()
        if weighting == "truncated_snr":  # max(SNR, 1) on x_0, which at SNR 0 is weight 1 on v
            np.testing.assert_allclose(loss, parts.mse, rtol=1e-6)


def test_importance_weights_and_callables_multiply():
    twice = lambda key, batch, total: (jnp.arange(batch), jnp.full(batch, 2.0))  # noqa: E731
    loss, parts = losses.simple(
        jax.random.key(0),
        SCHEDULE,
        lambda x, time: 0 * x,
        jnp.ones((4, 2)),
        weighting=lambda snr: 3.0 + 0 * snr,
        timestep_sampler=twice,
    )
    np.testing.assert_allclose(loss, 6 * parts.mse, rtol=1e-6)
    np.testing.assert_array_equal(parts.t, np.arange(4))


def test_the_network_sees_network_time_and_its_gradient_flows():
    short = schedules.respace(SCHEDULE, "ddim50")
    seen = []

    def denoise_fn(x_t, time):
        seen.append(time)
        return x_t

    _, parts = losses.simple(jax.random.key(0), short, denoise_fn, jnp.zeros((8, 2)))
    np.testing.assert_array_equal(seen[0], 20.0 * parts.t)
    grad = jax.grad(
        lambda w: losses.simple(jax.random.key(0), short, lambda x, time: w * x, jnp.zeros((8, 2)))[0].mean()
    )(0.5)
    assert np.isfinite(grad) and grad != 0


def test_learned_variance_channels_do_not_enter():
    x_0 = gaussian_data(8)
    plain, _ = losses.simple(jax.random.key(0), SCHEDULE, lambda x, time: 0.3 * x, x_0)
    doubled, _ = losses.simple(jax.random.key(0), SCHEDULE, lambda x, time: jnp.concatenate([0.3 * x, x + 7], -1), x_0)
    np.testing.assert_array_equal(plain, doubled)


def test_bad_arguments():
    x_0, keep = jnp.zeros((2, 3)), lambda x, time: x
    with pytest.raises(ValueError, match="known: none, snr"):
        losses.simple(jax.random.key(0), SCHEDULE, keep, x_0, weighting="p3")
    with pytest.raises(ValueError, match="known: eps"):
        losses.simple(jax.random.key(0), SCHEDULE, keep, x_0, prediction="noise")
    with pytest.raises(ValueError, match="keep the shape"):
        losses.simple(jax.random.key(0), SCHEDULE, lambda x, time: x[:, :1], x_0)
    with pytest.raises(ValueError, match="keep the shape"):
        losses.simple(jax.random.key(0), SCHEDULE, lambda x, time: jnp.concatenate([x, x[:, :1]], -1), x_0)
    with pytest.raises(ValueError, match="float, images in"):
        losses.simple(jax.random.key(0), SCHEDULE, keep, jnp.zeros((2, 3), jnp.uint8))


@pytest.mark.parametrize("name", timesteps.SAMPLERS)
def test_timesteps_are_uniform(name):
    """Chi-squared over 10 bins from independent batches; each draw alone must be uniform."""
    sampler, batches = timesteps.SAMPLERS[name], 4000
    t, weight = jax.vmap(lambda key: sampler(key, 5, 10))(jax.random.split(jax.random.key(0), batches))
    assert t.shape == (batches, 5) and (weight == 1).all() and t.min() >= 0 and t.max() <= 9
    for column in range(5):
        counts = np.bincount(np.asarray(t[:, column]), minlength=10)
        assert ((counts - batches / 10) ** 2 / (batches / 10)).sum() < 33.7  # P(chi2_9 > 33.7) = 1e-4


def test_antithetic_pairs_and_strata():
    t, _ = timesteps.antithetic(jax.random.key(0), 7, 100)
    np.testing.assert_array_equal(t[:3] + t[4:], 99)
    for seed in range(20):
        t, _ = timesteps.stratified(jax.random.key(seed), 8, 80)
        np.testing.assert_array_equal(np.sort(np.asarray(t) // 10), np.arange(8))  # one in each eighth
