"""Guidance against the exact conditional eps of Gaussian classes, for every prediction."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import Denoiser, guidance, schedules
from helpers.gaussian_mixtures import FULL, as_prediction, levels

KEY = jax.random.key(0)
MEANS, S2 = np.array([[-0.6, 0.3], [0.5, 0.4], [0.1, -0.7]]), 0.04  # three classes in the plane, equally likely
NULL = 3


def class_logits(x, time):
    """log q(x_t | y) up to a constant: the exact noise-aware classifier's logits."""
    alpha, sigma = levels(time)
    away = x[:, None] - alpha[..., None] * MEANS
    return -0.5 * (away**2).sum(-1) / (alpha**2 * S2 + sigma**2)


def network(prediction="eps", learned=False):
    """(x_t, time, y) -> the exact output for class y, or for all classes at the null label."""

    def denoise_fn(x, time, y):
        alpha, sigma = levels(time)
        spread = alpha**2 * S2 + sigma**2
        each = sigma[..., None] * (x[:, None] - alpha[..., None] * MEANS) / spread[..., None]  # [B, classes, 2]
        weights = jax.nn.softmax(class_logits(x, time))
        mean = (weights[..., None] * each).sum(1)
        own = jnp.take_along_axis(each, jnp.minimum(y, 2)[:, None, None], axis=1)[:, 0]
        output = as_prediction(jnp.where((y == NULL)[:, None], mean, own), x, alpha, sigma, prediction)
        return jnp.concatenate([output, jnp.sin(output)], axis=-1) if learned else output

    return denoise_fn


PREDICTIONS = ("eps", "x_0", "v", "score", "flow")
Y = jnp.array([0, 1, 2, 1, 0])
X_T = np.random.default_rng(3).standard_normal((5, 2))
TIME = np.array([1.0, 200.0, 431.5, 700.0, 999.0])


def output(denoiser, x, time):
    """The output at network times, one for each row or one for all."""
    x = jnp.asarray(x)
    return denoiser.output(x, FULL.path.at(jnp.asarray(time, x.dtype), x))


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_classifier_free_guidance_is_a_mixture_of_the_halves_of_one_call(prediction):
    calls, exact = [], jax.jit(network(prediction, learned=True))

    def kept(x, time, y):
        calls.append(exact(x, time, y))
        return calls[-1]

    both = exact(np.tile(X_T, (2, 1)), np.tile(TIME, 2), np.append(Y, np.full(5, NULL)))
    conditional, unconditional = both[:5], both[5:]
    for scale, half in ((1.0, conditional), (0.0, unconditional), (3.0, None)):
        guided = output(guidance.classifier_free(kept, Y, NULL, scale), X_T, TIME)
        np.testing.assert_array_equal(calls.pop(), both)
        if half is not None:  # to the bit
            np.testing.assert_array_equal(guided[:, :2], half[:, :2])
        np.testing.assert_array_equal(guided[:, 2:], conditional[:, 2:])  # the conditional variance at any scale
        expected = unconditional[:, :2] + scale * (conditional - unconditional)[:, :2]
        np.testing.assert_allclose(guided[:, :2], expected, rtol=1e-4, atol=1e-5)
    assert not calls  # one for each


def images_of(x, time, y):
    """A network of images [B, H, W, C] that depends on the label."""
    return x * (1 + y[:, None, None, None]) + jnp.sin(3 * x)


def test_a_scale_for_each_row_and_an_interval():
    """Outside the interval the scale is 1; a scale of shape [B] or [B, 1, 1, 1]."""
    x = jnp.broadcast_to(X_T[:, None, None], (5, 3, 2, 2))
    scales = jnp.array([0.0, 4.0, 3.0, -1.0, 2.0])

    def draw(scale, interval):
        return output(guidance.classifier_free(images_of, Y, NULL, scale, interval=interval), x, TIME)

    inside = np.array([False, True, True, True, False])
    for interval, s in ((None, scales), ((200, 700), np.where(inside, scales, 1.0))):
        expected = x * ((1 - s) * (1 + NULL) + s * (1 + np.asarray(Y)))[:, None, None, None] + np.sin(3 * x)
        for scale in (scales, scales[:, None, None, None]):
            np.testing.assert_allclose(draw(scale, interval), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(jax.jit(lambda *ends: draw(scales, ends))(200.0, 700.0), expected, rtol=1e-5, atol=1e-6)


def test_rescaling_has_the_spread_of_the_conditional_output():
    x, y, time = jax.random.normal(KEY, (3, 4, 4, 2)), jnp.array([0, 1, 2]), jnp.zeros(3)
    spread = lambda x: np.std(np.asarray(x), axis=(1, 2, 3))  # noqa: E731
    plain, part, full = (
        output(guidance.classifier_free(images_of, y, NULL, 5.0, rescale=rescale), x, time)
        for rescale in (0.0, 0.7, 1.0)
    )
    np.testing.assert_allclose(spread(full), spread(images_of(x, time, y)), rtol=1e-5)
    np.testing.assert_allclose(part, 0.7 * full + 0.3 * plain, rtol=1e-4, atol=1e-5)


def test_a_null_label_that_labels_of_8_bits_cannot_hold():
    seen = []

    def kept(x, time, **inputs):
        seen.append(inputs)
        return x

    x = jnp.ones((2, 1))
    output(guidance.classifier_free(kept, np.array([0, 255], np.uint8), 256, 2.0), x, 0)
    np.testing.assert_array_equal(seen[0]["y"], [0, 255, 256, 256])
    conditions = {"y": jnp.array([1, 2]), "condition": jnp.ones((2, 3))}
    nulls = {"y": 10, "condition": jnp.nan}
    output(guidance.classifier_free(kept, conditions, nulls, 2.0), x, 0)
    np.testing.assert_array_equal(seen[1]["y"], [1, 2, 10, 10])
    np.testing.assert_array_equal(np.isnan(seen[1]["condition"]).all(axis=1), [False, False, True, True])
    assert seen[1]["y"].dtype == jnp.int32 and seen[1]["condition"].dtype == jnp.float32


def test_rescaling_does_not_change_constant_outputs():
    x, y = jnp.ones((2, 4, 4, 1)), jnp.array([0, 2])

    def constant(x, time, y):
        return jnp.broadcast_to(1.0 + y[:, None, None, None], x.shape)

    with jax.debug_nans(True):  # no division by a standard deviation of 0
        guided = output(guidance.classifier_free(constant, y, 3, 5.0, rescale=1.0), x, 0)
    np.testing.assert_allclose(guided[:, 0, 0, 0], [-4 * 4 + 5 * 1, -4 * 4 + 5 * 3])


@pytest.mark.parametrize(
    "prediction", ["v", *(pytest.param(each, marks=pytest.mark.thorough) for each in PREDICTIONS if each != "v")]
)
def test_classifier_guidance_at_scale_1_is_the_conditional_network(prediction, x64):
    """The learned variance comes from the unconditional network."""
    exact, null = network(prediction, learned=True), jnp.full(5, NULL)
    log_prob = guidance.class_log_prob(class_logits, Y)
    unconditional = Denoiser(exact, prediction=prediction, inputs={"y": null}, variance="learned_range")
    guided = output(guidance.classifier(unconditional, log_prob), X_T, TIME)
    expected = np.append(exact(X_T, TIME, Y)[:, :2], exact(X_T, TIME, null)[:, 2:], axis=1)
    np.testing.assert_allclose(guided, expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("x64_on", [False, True])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_classifier_guidance_at_zero_terminal_snr(prediction, x64_on):
    """At alpha_bar = 0, x_t has no information about y, so no gradient, however large, shifts the output."""
    with jax.enable_x64(x64_on):
        jsd, x = schedules.from_betas(schedules.betas("jsd", 10)), jnp.asarray(X_T, float)
        half = Denoiser(lambda x, time: 0.5 * x, prediction=prediction)
        classifier = guidance.classifier(half, lambda x, time: 100 * x.sum(1), 2.0)
        guided = jax.jit(lambda x, t: classifier.output(x, jsd.at(t, x)))
        np.testing.assert_allclose(guided(x, 9), 0.5 * x, rtol=1e-6)
        curved = guidance.classifier(half, lambda x, time: -(x**2).sum(1), 2.0)
        gradient = jax.grad(lambda x: curved.output(x, jsd.at(9, x)).sum())(x)
        np.testing.assert_allclose(gradient, 0.5, rtol=1e-6)
        before = guided(x, 8) - 0.5 * x
        assert np.isfinite(before).all() and (abs(before) > 10).all()
