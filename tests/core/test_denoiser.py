"""The denoiser's pipeline against formulas written by hand in float64 NumPy, and the denoiser as a pytree."""

import itertools
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import Denoiser, coordinates, editing, guidance, process, sampling, schedules
from diffusion_jax.denoiser import PREDICTIONS, convert
from diffusion_jax.measurements import Measurement
from diffusion_jax.sampling import spacing
from diffusion_jax.schedules import Transition
from helpers.gaussian_mixtures import FULL
from helpers.samplers import NAMED

KEY = jax.random.key(0)
SCHEDULE = schedules.respace(FULL, [40, 300, 620, 900])
ALPHAS, SIGMAS = np.sqrt(SCHEDULE.alpha_bar), np.sqrt(1 - SCHEDULE.alpha_bar)
X = np.array([[0.4, -1.2], [1.7, 0.1], [-0.6, 0.8]])
T = np.array([2, 0, 3])


def column(values):
    return np.asarray(values)[:, None]


# The pipeline.

Y, NULL, CFG_SCALE = np.array([1, 0, 2]), 3, np.array([2.0, -0.5, 4.0])
CENTER, GRADIENT_SCALE = np.array([[0.3, -0.4]]), np.array([1.5, 0.7, -2.0])
GRAY, MEASURED = editing.gray(2), np.array([[0.2], [-0.3], [0.9]])


def network_of(x, time, y, xp):
    return xp.tanh(0.8 * x + 0.3 * y[:, None]) * (0.6 + time[:, None] / 3000)


def network(x, time, y):
    return network_of(x, time, y, jnp)


def log_prob(x, time):
    return -0.5 * ((x - CENTER) ** 2).sum(1) * (1 + time / 500)


def gradient_of_log_prob():
    return column(GRADIENT_SCALE) * (CENTER - X) * (1 + column(SCHEDULE.timesteps[T]) / 500)


def mixed():
    conditional, unconditional = (network_of(X, SCHEDULE.timesteps[T], y, np) for y in (Y, np.full(3, NULL)))
    return (1 - column(CFG_SCALE)) * unconditional + column(CFG_SCALE) * conditional


def posterior_coefficients():
    """c_0 and c_t in mu-tilde = c_0 x_0 + c_t x_t, DDPM eq. 7."""
    before = np.append(1.0, SCHEDULE.alpha_bar[:-1])
    beta = 1 - SCHEDULE.alpha_bar / before
    c_0 = np.sqrt(before) * beta / (1 - SCHEDULE.alpha_bar)
    c_t = np.sqrt(1 - beta) * (1 - before) / (1 - SCHEDULE.alpha_bar)
    return column(c_0[T]), column(c_t[T])


def eps_of(output, prediction):
    alpha, sigma, (c_0, c_t) = column(ALPHAS[T]), column(SIGMAS[T]), posterior_coefficients()
    return {
        "eps": output,
        "x_0": (X - alpha * output) / sigma,
        "v": alpha * output + sigma * X,
        "x_prev": (X - alpha * (output - c_t * X) / c_0) / sigma,
        "score": -sigma * output,
        "flow": (X + alpha * output) / (alpha + sigma),
    }[prediction]


WRAPPERS = {
    "classifier_free": partial(guidance.classifier_free, y=Y, null_y=NULL, scale=CFG_SCALE),
    "classifier": partial(guidance.classifier, log_prob=log_prob, scale=GRADIENT_SCALE),
    "project": partial(editing.project, measurement=Measurement(GRAY, MEASURED)),
}


def wrap(denoiser, names):
    for name in names:
        denoiser = WRAPPERS[name](denoiser)
    return denoiser


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_guidance_and_projection_in_any_order_are_the_formula(prediction, x64):
    alpha, sigma = column(ALPHAS[T]), column(SIGMAS[T])
    names = [name for name in WRAPPERS if prediction != "x_prev" or name != "classifier"]
    own_eps = eps_of(mixed(), prediction)
    if "classifier" in names:
        own_eps = own_eps - sigma * gradient_of_log_prob()  # ADM eq. 14
    own_x_0 = (X - sigma * own_eps) / alpha
    x_0 = np.clip(own_x_0, -1, 1)
    x_0 = x_0 + MEASURED - x_0.mean(1, keepdims=True)
    expected = x_0, (X - alpha * x_0) / sigma, own_x_0, own_eps
    transition = SCHEDULE.transition(T, X)
    first, *others = (
        wrap(Denoiser(network, prediction=prediction), order)(X, transition) for order in itertools.permutations(names)
    )
    for found, value in zip(first, expected, strict=False):
        np.testing.assert_allclose(found, value, rtol=1e-9, atol=1e-11)
    for other in others:
        jax.tree.map(np.testing.assert_array_equal, other, first)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_mean_form_shifts_the_mean_after_the_clip(prediction, x64):
    """ADM Algorithm 1: mu + variance grad, for all predictions; the output x_prev is mu itself."""
    c_0, c_t = posterior_coefficients()
    x_0 = np.clip((X - column(SIGMAS[T]) * eps_of(mixed(), prediction)) / column(ALPHAS[T]), -1, 1)
    mean = mixed() if prediction == "x_prev" else c_0 * x_0 + c_t * X
    variance = column(SCHEDULE.transitions.fixed_large_variance[T])
    shifted = partial(guidance.classifier, log_prob=log_prob, scale=GRADIENT_SCALE, form="mean")
    free = WRAPPERS["classifier_free"]
    plain = Denoiser(network, prediction=prediction)
    for denoiser in (shifted(free(plain)), free(shifted(plain))):
        found = process.p_mean_variance(SCHEDULE, denoiser, X, T)
        np.testing.assert_allclose(found.mean, mean + variance * gradient_of_log_prob(), rtol=1e-9, atol=1e-11)
        np.testing.assert_allclose(found.x_0, x_0, rtol=1e-9, atol=1e-11)


def test_corrections_act_on_x_0_before_the_clip(x64):
    """Each correction receives the prediction before it, and the clip and the projection come after the last one."""
    alpha, sigma, seen = column(ALPHAS[T]), column(SIGMAS[T]), []

    def add(predict, x_t, level, amount):
        before = predict(x_t)
        seen.append(before)
        return before.corrected(before.x_0 + amount, x_t, level)

    corrections = partial(add, amount=0.5), partial(add, amount=-0.125)
    denoiser = Denoiser(lambda x, time: 1.5 * x, prediction="x_0", corrections=corrections)
    found = denoiser(X, SCHEDULE.at(T, X))
    for before, own in zip(seen, (1.5 * X, 1.5 * X + 0.5), strict=True):
        np.testing.assert_allclose(before.x_0, own, rtol=1e-12)
        np.testing.assert_allclose(before.eps, (X - alpha * own) / sigma, rtol=1e-9)
    own, x_0 = 1.5 * X + 0.375, np.clip(1.5 * X + 0.375, -1, 1)
    assert abs(own).max() > 1
    expected = x_0, (X - alpha * x_0) / sigma, own, (X - alpha * own) / sigma
    for value, by_formula in zip(found, expected, strict=False):
        np.testing.assert_allclose(value, by_formula, rtol=1e-9)
    projected = editing.project(denoiser, Measurement(GRAY, MEASURED))(X, SCHEDULE.at(T, X))
    np.testing.assert_allclose(projected.x_0, x_0 + MEASURED - x_0.mean(1, keepdims=True), rtol=1e-9)
    np.testing.assert_array_equal(projected.own_x_0, found.own_x_0)


def test_a_correction_can_differentiate_the_prediction(x64):
    """Posterior sampling (Chung et al. 2023): the gradient of |x_0|^2 / 2 in x_t, for x_0 = k x_t, is k^2 x_t."""

    def toward_zero(predict, x_t, level):
        before = predict(x_t)
        gradient = jax.grad(lambda x_t: 0.5 * (predict(x_t).x_0 ** 2).sum())(x_t)
        return before.corrected(before.x_0 - gradient, x_t, level)

    denoiser = Denoiser(lambda x, time: 0.7 * x, prediction="x_0", clip=False, corrections=(toward_zero,))
    np.testing.assert_allclose(denoiser(X, SCHEDULE.at(T, X)).x_0, (0.7 - 0.49) * X, rtol=1e-12)


@pytest.mark.parametrize("variance", ["fixed_large", "learned_range"])
def test_sigma_data_is_edm_s_preconditioning(variance, x64):
    def inner(x, time, y):
        output = network(x, time, y)
        return output if variance == "fixed_large" else jnp.concatenate([output, 2 * output], axis=-1)

    path, options = schedules.edm(), {"prediction": "x_0", "variance": variance, "inputs": {"y": Y}}
    level = path.at(np.array([-1.0, 0.2, 0.9]), X)
    found = Denoiser(inner, sigma_data=0.6, **options)(X, level)
    expected = Denoiser(coordinates.precondition(inner, path, 0.6), **options)(X, level)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-12), found, expected)
    # Karras et al. 2022, table 1, for y = x_0 + s eps.
    s = np.asarray(level.sigma / level.alpha)
    y, total = X / np.asarray(level.alpha), s**2 + 0.6**2
    by_formula = 0.6**2 / total * y + 0.6 * s / np.sqrt(total) * network_of(y / np.sqrt(total), level.time, Y, np)
    np.testing.assert_allclose(found.own_x_0, by_formula, rtol=1e-9)


# Steps.


@pytest.mark.parametrize("sampler", [sampling.ddim(), sampling.heun()], ids=["ddim", "heun"])
def test_rows_at_different_levels_take_their_own_steps(sampler):
    """Bit-identical to single rows, without jit, which may round a fused program differently."""
    denoiser = Denoiser(lambda x, time: x * (0.5 + time[:, None] / 2000))

    def step(x, t):
        x = jnp.asarray(x, jnp.float32)
        state = sampler.init_state(SCHEDULE, x, 4)
        return sampler.step(KEY, denoiser, x, SCHEDULE.transition(t, x), state)[:2]

    with jax.disable_jit():
        together, rows = step(X, T), [step(X[i : i + 1], T[i : i + 1]) for i in range(3)]
        scalars = [step(X[i : i + 1], T[i]) for i in range(3)]
    for single in (rows, scalars):
        jax.tree.map(np.testing.assert_array_equal, together, jax.tree.map(lambda *r: jnp.concatenate(r), *single))


def test_steps_with_swapped_levels_invert_ddim(x64):
    """For a linear eps whose paths are straight lines in y = x / alpha and s = sigma / alpha, eps = (y - m) / (s + b)."""
    m, b = 0.2, 0.5

    def straight(x, time):
        level = FULL.path.at(time, x)
        return (x / level.alpha - m) / (level.sigma / level.alpha + b)

    denoiser, step = Denoiser(straight, clip=False), partial(sampling.ddim().step, KEY)
    s, x = SIGMAS / ALPHAS, jnp.asarray(X)
    transitions = [SCHEDULE.transition(t, x) for t in (3, 2, 1)]
    for t, transition in zip((3, 2, 1), transitions, strict=True):
        x = step(denoiser, x, transition, ()).x_prev
        y = m + (X / ALPHAS[3] - m) * (s[t - 1] + b) / (s[3] + b)
        np.testing.assert_allclose(x, ALPHAS[t - 1] * y, rtol=1e-9)
    for level, target, *_ in transitions[::-1]:
        x = step(denoiser, x, Transition.between(target, level), ()).x_prev
    np.testing.assert_allclose(x, X, rtol=1e-9)


# What belongs to the network, and to which sampler.


@pytest.mark.parametrize("name", NAMED)
def test_the_mean_form_is_for_ddpm(name):
    denoiser = guidance.classifier(Denoiser(lambda x, time: x), log_prob, form="mean")
    draw = partial(sampling.sample, KEY, SCHEDULE, denoiser, jnp.asarray(X), sampling.SAMPLERS[name]())
    if name == "ddpm":
        assert np.isfinite(draw()).all()
    else:
        with pytest.raises(ValueError, match="form='mean'.*use form='eps'"):
            draw()


def test_ddpm_refuses_to_change_the_x_0_of_a_predicted_mean():
    plain = Denoiser(lambda x, time: 0.9 * x, prediction="x_prev")
    x_T, add = jnp.asarray(X), lambda predict, x_t, level: predict(x_t)
    for denoiser in (
        editing.project(plain, Measurement(GRAY, MEASURED)),
        Denoiser(plain.network, "x_prev", corrections=(add,)),
    ):
        with pytest.raises(ValueError, match=r"'x_prev'.*ddim"):
            sampling.sample(KEY, SCHEDULE, denoiser, x_T, sampling.ddpm())
        assert np.isfinite(sampling.sample(KEY, SCHEDULE, denoiser, x_T, sampling.ddim())).all()


# The denoiser as a pytree.


def apply(params, x_t, time, y):
    return params["scale"] * x_t + params["shift"][y][:, None]


def logits(weights, x_t, time):
    return x_t @ weights


def random_denoiser(seed, form="eps", clip=True):
    """A denoiser with all wrappers, whose arrays are drawn."""
    rng = np.random.default_rng(seed)
    params = {"scale": jnp.float32(rng.uniform()), "shift": jnp.asarray(rng.normal(size=4), jnp.float32)}
    denoiser = Denoiser(jax.tree_util.Partial(apply, params), clip=clip)
    denoiser = guidance.classifier_free(denoiser, rng.integers(3, size=3), NULL, float(rng.uniform(1, 4)))
    classifier = jax.tree_util.Partial(logits, rng.normal(size=(2, 5)).astype(np.float32))
    label_log_prob = guidance.class_log_prob(classifier, rng.integers(5, size=3))
    denoiser = guidance.classifier(denoiser, label_log_prob, float(rng.uniform(1, 4)), form=form)
    return editing.project(denoiser, Measurement(GRAY, rng.normal(size=(3, 1)).astype(np.float32)))


@pytest.mark.parametrize(("form", "sampler"), [("eps", sampling.ddim()), ("mean", sampling.ddpm())])
def test_new_arrays_in_a_denoiser_do_not_compile_again(form, sampler):
    draw = jax.jit(lambda denoiser, x_T: sampling.sample(KEY, SCHEDULE, denoiser, x_T, sampler))
    x_T = jnp.asarray(X, jnp.float32)
    results = [draw(random_denoiser(seed, form), x_T) for seed in range(3)]
    assert draw._cache_size() == 1
    assert all(abs(a - b).max() > 1e-3 for a, b in itertools.combinations(results, 2))
    closed_over = jax.jit(lambda x_T: sampling.sample(KEY, SCHEDULE, random_denoiser(2, form), x_T, sampler))(x_T)
    np.testing.assert_allclose(results[2], closed_over, rtol=1e-5, atol=1e-6)
    draw(random_denoiser(0, form, clip=False), x_T)
    assert draw._cache_size() == 2


def test_a_denoiser_under_vmap_grad_and_scan(x64):
    """The network is w x_t, so that x_0 = (1 - sigma w) x_t / alpha."""

    def predict(w, x_t, t):
        denoiser = Denoiser(jax.tree_util.Partial(lambda w, x, time: w * x, w), clip=False)
        return denoiser(x_t, SCHEDULE.at(t, x_t))

    factor = (1 - 0.3 * column(SIGMAS[T])) / column(ALPHAS[T])
    rows = jax.vmap(lambda x, t: predict(0.3, x[None], t).x_0[0])(X, T)
    np.testing.assert_allclose(rows, factor * X, rtol=1e-9)
    by_x, by_w = (jax.grad(lambda w, x: predict(w, x, T).x_0.sum(), i)(0.3, jnp.asarray(X)) for i in (1, 0))
    np.testing.assert_allclose(by_x, np.broadcast_to(factor, X.shape), rtol=1e-9)
    np.testing.assert_allclose(by_w, -(X * column(SIGMAS[T] / ALPHAS[T])).sum(), rtol=1e-9)
    scanned, _ = jax.lax.scan(lambda x, t: (predict(0.3, x, t).x_0, None), jnp.asarray(X), np.arange(4))
    np.testing.assert_allclose(scanned, np.prod((1 - 0.3 * SIGMAS) / ALPHAS) * X, rtol=1e-9)


def test_denoisers_stack_to_an_ensemble():
    x_t = jnp.asarray(X, jnp.float32)
    predict = jax.jit(lambda denoiser: denoiser(x_t, SCHEDULE.at(T, x_t)).x_0)
    members = [random_denoiser(seed) for seed in range(2)]
    together = jax.vmap(predict)(jax.tree.map(lambda *arrays: np.stack(arrays), *members))
    np.testing.assert_allclose(together, [predict(member) for member in members], rtol=1e-5, atol=1e-6)


# Errors of a network that predicts the score.

ERROR = 0.05


def deviation_of_errors(schedule, n=20_000):
    """The standard deviation by which errors in the score change DDIM samples of N(0, 1), whose exact score is -x."""

    def score(x, time, error):
        noise = jax.random.normal(jax.random.fold_in(KEY, (16 * time[0]).astype(int)), x.shape)
        return -x + jnp.where(schedule.path.log_snr(time[0]) < 0, error, 0.0) * noise

    @jax.jit
    def draw(x_T, error):
        denoiser = Denoiser(partial(score, error=error), prediction="score", clip=False)
        return sampling.sample(KEY, schedule, denoiser, x_T, sampling.ddim())

    x_T = jax.random.normal(jax.random.key(1), (n, 1))
    return float((draw(x_T, ERROR) - draw(x_T, 0.0)).std())


def test_errors_of_the_score_are_scaled_by_sigma_squared():
    """An error d in the score gives x_0 the error d sigma^2 / alpha."""
    levels = np.array([0.5, 1.2, 3.0])
    alpha_bar = 1 / (1 + levels**2)
    schedule = schedules.from_betas(1 - alpha_bar / np.append(1.0, alpha_bar[:-1]))
    x = jnp.asarray(X, jnp.float32)
    exact, off = (
        Denoiser(lambda x, time, d=d: -x + d, prediction="score", clip=False)(x, schedule.at(2, x)).x_0
        for d in (0.0, ERROR)
    )
    np.testing.assert_allclose(
        off - exact, np.full(X.shape, ERROR * (1 - alpha_bar[2]) / alpha_bar[2] ** 0.5), rtol=1e-4
    )
    by_score, by_eps = (spacing._error_of_samples(0.0, levels[::-1], name) for name in ("score", "eps"))
    assert by_score < 0.95 * by_eps
    assert abs(deviation_of_errors(schedule) / by_score - 1) < 0.03


def test_growing_errors_of_the_score_are_noted():
    cosine = schedules.from_betas(schedules.betas("cosine", 1000))
    schedule = schedules.respace(cosine, 50, "trailing")
    denoiser = Denoiser(lambda x, time: -x, prediction="score", clip=False)
    reason = sampling.find_error_growth(sampling.ddim(), schedule, denoiser)
    noted = float(re.search(r"score has errors of 0.05, .* sample errors of ([\d.e+]+) times", reason)[1])
    assert abs(deviation_of_errors(schedule) / noted - 1) < 0.06


@pytest.mark.parametrize("prediction", ["v", "x_0", "flow"])
def test_pure_noise_is_finite(prediction):
    path, x_t = schedules.rectified_flow(), jnp.ones((2, 3))
    noise = path.at(jnp.full(2, 1000.0), x_t)
    for wanted in ("x_0", "eps", "v", "flow"):
        total = lambda output: convert(output, x_t, noise, prediction, wanted).sum()  # noqa: B023, E731
        value, gradient = jax.value_and_grad(total)(0.5 * x_t)
        assert np.isfinite(value) and np.isfinite(gradient).all()
    np.testing.assert_allclose(convert(0.25 * x_t, x_t, noise, "flow"), 0.75)
    assert np.isnan(jax.jit(lambda level: convert(x_t, x_t, level))(noise)).all()
