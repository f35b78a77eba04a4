"""The probability-flow ODE's likelihood on Gaussian data, whose density at every step is known, and compared with the
bound."""

import functools

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from diffusion_jax import Denoiser, coordinates, likelihood, schedules
from diffusion_jax.evaluation import ode_likelihood
from helpers.decoder import scipy_log_prob
from helpers.gaussian_mixtures import FULL as SCHEDULE
from helpers.gaussian_mixtures import S2, M, gaussian

V = SCHEDULE.alpha_bar * S2 + 1 - SCHEDULE.alpha_bar
exact = gaussian()


def data(n, d=4):
    return M + np.sqrt(S2) * jax.random.normal(jax.random.key(0), (n, d))


@pytest.mark.thorough
@pytest.mark.parametrize("prediction", ["eps", "x_0", "v", "score"])
def test_the_density_of_a_gaussian(prediction):
    """Within 1e-3 nats per dimension of log N(x; m, s^2); the noise at index 0 and the tolerance cause smaller errors."""
    x = data(64)
    run = jax.jit(
        lambda x: ode_likelihood.log_density(
            jax.random.key(1), SCHEDULE, Denoiser(gaussian(prediction), prediction=prediction), x
        )
    )
    density = run(x)
    expected = scipy.stats.norm(M, np.sqrt(S2)).logpdf(x).sum(-1)
    assert abs(np.mean(density.log_density - expected)) / 4 < 1e-3
    # Every example, against the ODE's exact result: N(0, I) pushed through the closed-form map.
    scale, a = np.sqrt(V[0] / V[-1]), SCHEDULE.transitions.level.alpha
    pushed = scipy.stats.norm(a[0] * M - scale * a[-1] * M, scale).logpdf(x).sum(-1)
    np.testing.assert_allclose(density.log_density, pushed, atol=4e-4)
    mapped = a[-1] * M + (np.asarray(x) - a[0] * M) / scale
    np.testing.assert_allclose(density.x_T, mapped, atol=2e-4)
    assert 5 < density.num_steps < 200


@pytest.mark.thorough
@pytest.mark.parametrize("trace", ["exact", "hutchinson"])
@pytest.mark.parametrize("shape", [(2,), (3, 2), (2, 2, 2), (2, 1, 2, 2)])
def test_arrays_of_every_shape_in_the_units_of_the_data(shape, trace):
    """Correlated channels with scales of 0.1 and 30, at every position: N(0, I) pushed through a map that stretches along
    each covariance eigenvector, times the standardization's Jacobian."""
    covariance, scale, n = np.array([[0.5, 0.3], [0.3, 0.8]]), np.array([0.1, 30.0]), 6
    eigenvalues, basis = np.linalg.eigh(covariance)
    standard = np.random.default_rng(0).normal(size=(n, *shape)) * np.sqrt(eigenvalues) @ basis.T
    first, last = (a * eigenvalues + 1 - a for a in SCHEDULE.alpha_bar[[0, -1]])
    along = scipy.stats.norm(0, np.sqrt(first / last)).logpdf(standard @ basis).reshape(n, -1)
    expected = -along.mean(1) / np.log(2) + np.log2(scale).mean()
    exact_density = scipy.stats.multivariate_normal(np.zeros(2), covariance * np.outer(scale, scale))
    of_data = -exact_density.logpdf(standard * scale).reshape(n, -1).mean(1) / 2 / np.log(2)
    np.testing.assert_allclose(expected, of_data, atol=5e-3)

    def network(x, time):
        log_snr = SCHEDULE.path.log_snr(time)[0]
        a, s2 = jax.nn.sigmoid(log_snr), jax.nn.sigmoid(-log_snr)
        return jnp.sqrt(s2) * ((x @ basis) / (a * eigenvalues + s2)) @ basis.T

    # Every trace's average over probes has a standard deviation below 1 bit per dimension / sqrt(probes).
    bits, _ = ode_likelihood.bits_per_dim(
        jax.random.key(0),
        SCHEDULE,
        network,
        standard.astype(np.float32),
        dequantization="none",
        trace="exact" if trace == "exact" else 256,
    )
    assert bits.shape == (n,)
    found = bits + likelihood.standardization_bits(scale)
    np.testing.assert_allclose(found, expected, atol=1e-3 if trace == "exact" else 0.2)


@pytest.mark.thorough
def test_discrete_likelihood_has_its_closed_form_and_bounds_the_truth():
    """Images with 17 levels, whose true probability is a Gaussian's mass in each cell; the model's density is Gaussian."""
    levels, width = 17, 2 / 16
    grid = np.arange(levels) * width - 1
    log_p = np.asarray(likelihood.decoder_log_prob(grid, np.full(levels, M), np.full(levels, np.log(S2)), levels))
    x_0 = np.random.default_rng(0).choice(grid, p=np.exp(log_p) / np.exp(log_p).sum(), size=(20_000, 4))
    run = functools.partial(
        ode_likelihood.bits_per_dim, jax.random.key(0), SCHEDULE, exact, gray_levels=levels, trace="exact"
    )
    bits, _ = jax.jit(run)(x_0.astype(np.float32))
    scale, a = np.sqrt(V[0] / V[-1]), SCHEDULE.transitions.level.alpha
    squares = (x_0 - (a[0] * M - scale * a[-1] * M)) ** 2 + width**2 / 12
    nats = -np.log(width) + 0.5 * np.log(2 * np.pi * scale**2) + squares / (2 * scale**2)
    difference = np.asarray(bits, np.float64) - nats.mean(1) / np.log(2)
    error = difference.std() / np.sqrt(len(x_0))
    assert abs(difference.mean()) < 4 * error + 1e-4 and error < 0.01
    entropy = -log_p[np.round((x_0 + 1) / width).astype(int)].mean() / np.log(2)
    assert bits.mean() > entropy


@pytest.mark.thorough
def test_images_a_rounding_off_their_level_count_as_it():
    """The digits' 17 levels, as uint8 has them."""
    levels = np.round(np.arange(17) * 255 / 16)
    run = lambda x: ode_likelihood.bits_per_dim(  # noqa: E731
        jax.random.key(0), SCHEDULE, exact, x, gray_levels=17, trace="exact"
    )[0]
    stored, even = (levels / 127.5 - 1)[:, None], (np.arange(17) / 8 - 1)[:, None]
    assert abs(stored - even).max() > 1e-3
    np.testing.assert_allclose(run(stored.astype(np.float32)), run(even.astype(np.float32)), rtol=1e-5, atol=1e-5)


@pytest.mark.thorough
def test_a_chain_that_ends_at_zero_snr_ends_one_step_before():
    full = schedules.from_betas(np.append(SCHEDULE.betas, 1.0))
    run = functools.partial(
        ode_likelihood.log_density, jax.random.key(1), denoiser=Denoiser(gaussian("v"), prediction="v"), x=data(8)
    )
    np.testing.assert_allclose(run(full).log_density, run(SCHEDULE).log_density, atol=1e-3)


@pytest.mark.thorough
def test_a_respaced_schedule_has_the_likelihood_of_the_whole_one():
    """The respaced schedule's index 0 may have more noise (trailing), and its last index a signal (leading); the ODE ends at
    neither index. The result is compared with N(0, I) pushed through the closed-form map of all 1000 steps, and for a start
    at another time with the map from that time."""
    x, scale, a = data(8), np.sqrt(V[0] / V[-1]), SCHEDULE.transitions.level.alpha
    pushed = scipy.stats.norm(a[0] * M - scale * a[-1] * M, scale).logpdf(x).sum(-1)
    run = functools.partial(ode_likelihood.log_density, jax.random.key(1), denoiser=exact, x=x, trace="exact")
    for spacing in ("trailing", "leading"):
        short = schedules.respace(SCHEDULE, 10, spacing=spacing)
        np.testing.assert_allclose(run(short).log_density, pushed, atol=4e-4)
        bits, _ = ode_likelihood.bits_per_dim(jax.random.key(1), short, exact, x, dequantization="none", trace="exact")
        np.testing.assert_allclose(bits, -pushed / 4 / np.log(2), atol=4e-4)
    scale = np.sqrt(V[99] / V[-1])
    from_there = scipy.stats.norm(a[99] * M - scale * a[-1] * M, scale).logpdf(x).sum(-1)
    np.testing.assert_allclose(run(SCHEDULE, time=99).log_density, from_there, atol=4e-4)
    assert abs(from_there - pushed).mean() > 0.01


@pytest.mark.parametrize(
    ("steps", "trace"), [(10, "hutchinson"), pytest.param(None, "exact", marks=pytest.mark.thorough)]
)
def test_variational_dequantization_of_a_traced_schedule(steps, trace):
    """256 levels in three dimensions: -log p(x_1) + log q(x_1 | x_0) - log P(x_0 | x_1) in float64, for the same draws of
    x_1 at index 0, where a trailing schedule has more noise. The network's Jacobian is diagonal, so the trace along any
    vector of signs is exact."""
    schedule = SCHEDULE if steps is None else schedules.respace(SCHEDULE, steps, spacing="trailing")
    key, width = jax.random.key(3), 2 / 255
    x_0 = (np.round((np.clip(data(6, 3), -0.9, 0.9) + 1) / width) * width - 1).astype(np.float32)
    run = functools.partial(
        ode_likelihood.bits_per_dim,
        denoiser=Denoiser(exact, variance="fixed_small"),
        dequantization="variational",
        trace="exact" if trace == "exact" else 3,
    )
    bits, _ = jax.jit(lambda schedule: run(key, schedule, x_0=x_0))(schedule)
    a, noise, *_ = (values[0] for values in schedule.transitions.level)
    eps = np.asarray(jax.random.normal(jax.random.split(key)[0], x_0.shape), np.float64)
    x_1, v = a * x_0 + noise * eps, a**2 * S2 + noise**2
    scale = np.sqrt(v / V[-1])
    log_p = scipy.stats.norm(a * M - scale * SCHEDULE.transitions.level.alpha[-1] * M, scale).logpdf(x_1).sum(-1)
    log_q = scipy.stats.norm(a * x_0, noise).logpdf(x_1).sum(-1)
    mean, sd = M + a * S2 / v * (x_1 - a * M), np.exp(0.5 * schedule.transitions.posterior_log_variance[0])
    mean = np.clip(mean, -1, 1)  # the mean at index 0 is the predicted x_0, which is clipped
    decoder = scipy_log_prob(x_0.astype(np.float64), mean, sd, 256).sum(-1)
    assert (decoder < -0.5).all()
    np.testing.assert_allclose(bits, (log_q - log_p - decoder) / 3 / np.log(2), atol=1e-3)


# A mixture of isotropic Gaussians in the plane, with mean 0.
CENTERS, SPREADS = np.array([[1.0, 0.2], [-0.4, 0.6], [-0.6, -0.8]]), np.array([0.2, 0.05, 0.1])


def denoiser(y, s):
    """EDM's D(y; s) for the mixture: E[x_0 | y = x_0 + s eps], for one y [2]."""
    away, spread = y - CENTERS, SPREADS + s**2
    shares = jax.nn.softmax(-0.5 * (away**2).sum(-1) / spread - jnp.log(spread))
    return y - s**2 * (shares / spread) @ away


def velocity(z, tau):
    """Flow matching's u(z, tau), the mean of eps - x_0 given z = (1 - tau) x_0 + tau eps."""
    return (z - denoiser(z / (1 - tau), tau / (1 - tau))) / tau


def log_density_by_diffrax(derivative, start, end, x, last_variance):
    """log p(x), [B], from the ODE dx/dt = f(x, t), d log p / dt = -div f, and p = N(0, last_variance) at the end."""

    def with_divergence(t, state, _):
        return derivative(state[0], t), jnp.trace(jax.jacfwd(derivative)(state[0], t))

    def of_row(row):
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(with_divergence),
            diffrax.Tsit5(),
            t0=start,
            t1=end,
            dt0=None,
            y0=(row, jnp.zeros(())),
            stepsize_controller=diffrax.PIDController(rtol=1e-8, atol=1e-8),
        )
        last, divergence = (value[0] for value in solution.ys)
        return divergence - 0.5 * last @ last / last_variance - jnp.log(2 * jnp.pi * last_variance)

    return jax.jit(jax.vmap(of_row))(x)


@pytest.mark.thorough
@pytest.mark.usefixtures("x64")
def test_others_coordinates_give_the_same_likelihoods():
    """diffrax solves dy/ds and dz/dtau, with the papers' formulas and exact divergences; paths with the same ends must
    agree."""
    s = np.array([0.01, 80.0])
    tau, alpha = s / (1 + s), 1 / np.sqrt(1 + s**2)
    rng = np.random.default_rng(0)
    x = CENTERS[rng.integers(3, size=6)] + 0.4 * rng.normal(size=(6, 2))

    # x = alpha y = k z in two dimensions; the last x has the density N(0, I).
    of_y = log_density_by_diffrax(lambda y, s: (y - denoiser(y, s)) / s, *s, x / alpha[0], alpha[1] ** -2)
    by_edm = of_y - 2 * np.log(alpha[0])
    k = 1 / np.sqrt(tau**2 + (1 - tau) ** 2)
    by_flow = log_density_by_diffrax(velocity, *tau, x / k[0], k[1] ** -2) - 2 * np.log(k[0])
    np.testing.assert_allclose(by_edm, by_flow, atol=2e-6)

    # The ODE ends at the interval's ends, not at steps; at the outer steps if the ends are infinite.
    edm, whole = schedules.edm(*s), schedules.rectified_flow()
    inner = schedules.rectified_flow(interval=(1000 * tau[0], 1000 * tau[1]))
    of_edm, of_inner = coordinates.from_edm(jax.vmap(denoiser), edm), coordinates.from_flow(jax.vmap(velocity), inner)
    of_whole = coordinates.from_flow(jax.vmap(velocity), whole)
    for path, times, network, prediction in (
        (edm, np.array([0.0, 0.5]), of_edm, "x_0"),
        (inner, np.array([300.0, 500.0]), of_inner, "flow"),
        (whole, 1000 * tau, of_whole, "flow"),
    ):
        density = ode_likelihood.log_density(
            jax.random.key(0),
            schedules.from_path(path, times),
            Denoiser(network, prediction=prediction),
            jnp.asarray(x),
            trace="exact",
            tolerance=1e-8,
        )
        np.testing.assert_allclose(density.log_density, by_edm, atol=2e-6)

    # The exact density, up to the difference between N(0, I) and the mixture with the last noise.
    parts = zip(alpha[0] * CENTERS, alpha[0] ** 2 * SPREADS + 1 - alpha[0] ** 2, strict=True)
    exact_density = np.mean([scipy.stats.multivariate_normal(*part).pdf(x) for part in parts], axis=0)
    np.testing.assert_allclose(by_edm, np.log(exact_density), atol=1e-3)


def test_the_ode_of_a_path_with_infinite_ends_ends_at_the_outer_steps_with_noise_and_signal():
    """log(sigma / alpha) = log(tau / (1 - tau)) of flow matching is infinite at tau = 0 and 1."""
    for times in ([1.0, 500.0, 900.0], [1.0, 900.0, 1000.0]):
        schedule = schedules.from_path(schedules.rectified_flow(), times)
        ends = ode_likelihood._finite_ends(schedule, jnp.float32)
        np.testing.assert_allclose(ends, [np.log(0.001 / 0.999), np.log(9)], rtol=1e-5)


@pytest.mark.thorough
def test_bad_arguments_and_a_solver_that_gives_up(unchecked_annotations):
    x, key = jnp.zeros((2, 3)), jax.random.key(0)
    assert np.isnan(ode_likelihood.log_density(key, SCHEDULE, exact, data(4), max_steps=3).log_density).all()
    for options, words in (
        ({"dequantization": "flow"}, "known: uniform, variational, none"),
        ({"gray_levels": None}, "gray_levels=None"),
        ({"x_0": x + 3, "dequantization": "variational"}, "value 3, outside of"),
        *(({"tolerance": tolerance}, "above 0") for tolerance in (0, float("nan"))),
    ):
        with pytest.raises(ValueError, match=words):
            ode_likelihood.bits_per_dim(key, SCHEDULE, exact, **{"x_0": x} | options)
    x = jnp.zeros((2, 3, 4))
    for shape in ((2, 3, 1), (1, 3, 4), (3, 4), (2, 1, 4), (2, 3, 5), ()):  # some of these shapes would broadcast
        with pytest.raises(ValueError, match=r"must return \(2, 3, 4\), but it returned "):
            ode_likelihood.log_density(key, SCHEDULE, lambda x, t, s=shape: jnp.zeros(s), x)
