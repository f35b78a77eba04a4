"""Arrays and options of a wrong kind are refused with one clear line, not computed with."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import (
    editing,
    guidance,
    images,
    labels,
    likelihood,
    losses,
    process,
    sampling,
    schedules,
    timesteps,
)

pytestmark = pytest.mark.usefixtures("unchecked_annotations")

KEY = jax.random.key(0)
FULL = schedules.from_betas(schedules.betas("linear", 20))
JSD = schedules.from_betas(schedules.betas("jsd", 20))
T = jnp.array([0, 7])
PIXELS = np.full((2, 4, 4, 3), 200, np.uint8)
X = jnp.zeros((2, 4, 4, 3))


def network(x, time):
    return 0.3 * x


@pytest.mark.whole
@pytest.mark.parametrize(
    "function",
    [
        lambda x, t: FULL.at(t, x).time,
        lambda x, t: process.q_mean_variance(FULL, x, t),
        lambda x, t: process.q_posterior(FULL, x, x, t),
        lambda x, t: process.to_x_0(FULL, x, x, t, "x_0"),
        lambda x, t: process.p_mean_variance(FULL, x, x, t),
        lambda x, t: likelihood.bound_term(FULL, x, x, x, t),
    ],
)
def test_indices_of_another_shape(function):
    x = jnp.ones((1, 3))
    for t in (jnp.arange(5), jnp.zeros((1, 1), int), jnp.zeros((0,), int)):
        if t.shape != x.shape[: t.ndim]:
            with pytest.raises(ValueError, match=r"t must be one index, or one for each row of x: \(1,\)"):
                function(x, t)
    with pytest.raises(ValueError, match="t must be int, an index of the schedule; got float32"):
        function(x, jnp.zeros(1))
    function(x, jnp.array([3]))
    function(x, jnp.int32(3))
    jax.vmap(function)(jnp.ones((5, 3)), jnp.arange(5))


@pytest.mark.parametrize("clip", ["no", 1, None])
def test_a_clip_is_a_bool_or_a_function(clip):
    with pytest.raises(ValueError, match="clip must be True, False or a function of x_0, got"):
        process.p_mean_variance(FULL, X, X, T, clip=clip)
    assert process.p_mean_variance(FULL, 5 + X, X, T, "x_0", clip=np.bool_(True)).x_0.max() == 1


def logits(x, time):
    return jnp.stack([x.mean((1, 2, 3)), 0 * time, 1 + 0 * time], axis=-1)


def test_labels_of_class_log_prob():
    time = jnp.zeros(2)
    expected = np.log(np.exp([0.0, 1.0]) / np.exp([0.0, 0.0, 1.0]).sum())
    np.testing.assert_allclose(guidance.class_log_prob(logits, jnp.array([0, 2]))(X, time), expected, rtol=1e-6)
    for bad in (3, -1):
        with pytest.raises(ValueError, match=rf"labels must lie in 0 \.\.\. 2, got {bad}"):
            guidance.class_log_prob(logits, jnp.array([0, bad]))(X, time)
        traced = jax.jit(lambda y: guidance.class_log_prob(logits, y)(X, time))(jnp.array([0, bad]))
        np.testing.assert_allclose(traced[0], expected[0], rtol=1e-6)
        assert np.isnan(traced[1])
    with pytest.raises(ValueError, match="labels must be int"):
        guidance.class_log_prob(logits, jnp.array([0.0, 1.0]))(X, time)
    with pytest.raises(ValueError, match=r"y has shape \(1,\) but there are 2 rows of logits"):
        guidance.class_log_prob(logits, jnp.array([1]))(X, time)


@pytest.mark.parametrize(("dtype", "num_classes"), [("uint8", 256), ("uint8", 1000), ("int8", 128), ("uint16", 256)])
def test_labels_of_8_and_16_bits_keep_their_classes(dtype, num_classes):
    y = np.array([0, 5, 100, 127], dtype)
    for found in (labels.in_range(y, num_classes), jax.jit(lambda y: labels.in_range(y, num_classes))(y)):
        np.testing.assert_array_equal(found, [0, 5, 100, 127])
    if dtype == "int8":
        np.testing.assert_array_equal(
            jax.jit(lambda y: labels.in_range(y, 128))(np.array([-1, 127], dtype)), [128, 127]
        )


DDPM = sampling.ddpm(clip=False)
ROWS, LABELS = np.random.default_rng(0).standard_normal((8, 5)), jnp.array([0, 1])
HALF = X[..., :1] > 0


def repaint(mask=HALF, sampler=None, jump=5, **options):
    return editing.repaint(KEY, FULL, network, X, mask, sampler, jump=jump, **options)


def interpolate(y=X, **options):
    return editing.interpolate(KEY, FULL, network, X, y, [0.5], sampling.ddim(), t=3, **options)


def guided(y=LABELS, null=3, scale=2.0, **options):
    return guidance.classifier_free(lambda x, time, y: x, y, null, scale, **options)(X, jnp.zeros(2))


def classify(y):
    return losses.classify(KEY, FULL, logits, X, np.array(y))


OF_ANOTHER_KIND = {
    "encode start": (lambda: sampling.encode(FULL, network, X, start=3.5), "start=3.5 must be an index"),
    "encode order": (lambda: sampling.encode(FULL, network, X, order=2.0), "order must be 1 or 2, got 2.0"),
    "x_0 of encode": (lambda: sampling.encode(FULL, network, 1.0), "x_0 must have a batch axis"),
    "trajectory": (
        lambda: sampling.sample(KEY, FULL, network, X, DDPM, trajectory=[1.7]),
        r"indices \(int\), got \[1.7\]",
    ),
    "one index": (lambda: sampling.sample(KEY, FULL, network, X, DDPM, trajectory=3), "sequence of indices"),
    "start": (lambda: sampling.sample(KEY, FULL, network, X, DDPM, start=True), "start=True must be an index"),
    "x_T": (lambda: sampling.sample(KEY, FULL, network, 1.0, DDPM), "x_T must have a batch axis"),
    "a name": (lambda: sampling.sample(KEY, FULL, network, X, "ddim"), r"such as sampling.ddim\(\), got 'ddim'"),
    "default_spacing": (lambda: sampling.default_spacing(sampling.heun, FULL), "must be a sampler such as"),
    "replacement": (lambda: editing.replacement("ddim", X, HALF), "must be a sampler such as"),
    "state": (lambda: repaint(sampler=sampling.dpm_solver_pp()), "which has a state; use ddpm"),
    "resamplings": (lambda: repaint(resamplings=2.5), "whole numbers of at least 1, got 2.5"),
    "no resamplings": (lambda: repaint(resamplings=0), "at least 1, got 0"),
    "jump": (lambda: repaint(jump=5.0), "whole numbers of at least 1, got 10 and 5.0"),
    "long jump": (lambda: repaint(jump=20), "jump=20 must be below the 20 steps of the schedule"),
    "mask rows": (lambda: repaint(np.ones((3, 4, 4, 3))), "does not broadcast to that of x_0"),
    "mask size": (lambda: repaint(np.ones((5, 4, 3))), "does not broadcast to that of x_0"),
    "mask axes": (lambda: jax.jit(repaint)(np.ones((1, 2, 4, 4, 3))), "does not broadcast to that of x_0"),
    "mask of replacement": (lambda: editing.replacement(DDPM, X, np.ones((5, 4, 3))), "does not broadcast to that of"),
    "mask of bytes": (lambda: repaint(np.array([0, 255, 0], np.uint8)), "a mask holds 1 where .* 0 elsewhere, got 255"),
    "mask of halves": (lambda: editing.masked(np.array([0.0, 0.5, 1.0])), "a mask holds 1 where .* elsewhere, got 0.5"),
    "pool": (lambda: editing.average_pool(3).measure(X), "4x4 cannot be divided into squares of 3"),
    "strength": (lambda: editing.sdedit(KEY, FULL, network, X, DDPM, strength=1.1), "strength must lie in"),
    "encoding": (lambda: interpolate(order=2), "interpolate does not take order with t=3"),
    "shapes": (lambda: interpolate(X[:1]), r"x has shape \(2, 4, 4, 3\) but y has \(1, 4, 4, 3\)"),
    "guidance interval": (lambda: guided(interval=(7, 5)), r"low <= high, got \(7, 5\)"),
    "guidance rescale": (lambda: guided(rescale=5), r"0 \.\.\. 1, got 5"),
    "guidance scale": (
        lambda: guided(scale=jnp.ones((2, 2))),
        r"scale has shape \(2, 2\); it must be one number, or one for each of 2 rows",
    ),
    "null label": (lambda: guided(null=10.7), "null_y must be int, as y is; got float"),
    "one label": (lambda: classify([1]), "give each a label"),
    "labels of rows": (lambda: classify([[0], [1]]), "give each a label"),
    "spacing of text": (
        lambda: schedules.respace(FULL, "10", "karras"),
        "spacing 'karras' is for a number of steps, but '10' defines its own spacing",
    ),
    "spacing of times": (lambda: schedules.respace(FULL, [1.5, 2.5], "log_snr"), "'log_snr' is for a number of steps"),
    "unknown spacing": (lambda: schedules.respace(FULL, 5, "bogus"), "unknown spacing 'bogus'; known: leading, trail"),
    "to_uint8": (lambda: images.to_uint8(PIXELS), "must be float in \\[-1, 1\\], not uint8; uint8 images need no conv"),
}


@pytest.mark.parametrize("name", OF_ANOTHER_KIND)
def test_options_of_another_kind_are_refused(name):
    call, words = OF_ANOTHER_KIND[name]
    with pytest.raises(ValueError, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("output", [(X, {}), None, {"eps": X}])
def test_a_network_that_returns_no_array_is_refused(output):
    def network(x, time, y=None):
        return output

    for call in (
        lambda: sampling.sample(KEY, FULL, network, X, sampling.ddim()),
        lambda: sampling.sample(KEY, FULL, network, X, sampling.heun(churn=1.0)),
        lambda: sampling.encode(FULL, network, X),
        lambda: losses.simple(KEY, FULL, network, X),
        lambda: losses.vlb(KEY, FULL, network, X),
        lambda: likelihood.bits_per_dim(KEY, FULL, network, X),
        lambda: guidance.classifier_free(network, LABELS, 3, 2.0)(X, jnp.zeros(2)),
    ):
        with pytest.raises(
            ValueError, match=f"output of denoise_fn must be one float array; got {type(output).__name__}"
        ):
            call()


@pytest.mark.parametrize("prediction", ["eps", "score"])
def test_the_bound_is_refused_for_eps_at_zero_terminal_snr(prediction):
    """x_0 of eps is unknown at the last step; under jit, where t cannot be seen, that was NaN."""

    def doubled(x, time):
        return jnp.concatenate([x, x], -1)

    for loss in (losses.vlb, losses.hybrid):
        with pytest.raises(ValueError, match="does not determine x_0 there"):
            jax.jit(lambda key, loss=loss: loss(key, JSD, doubled, X, prediction=prediction))(KEY)
        for t in (0, 19):
            last = lambda key, b, n, t=t: (jnp.full(b, t), jnp.ones(b))  # noqa: E731
            assert np.isfinite(loss(KEY, JSD, doubled, X, prediction="v", timestep_sampler=last)[0]).all()
    with pytest.raises(ValueError, match="does not determine x_0 there"):
        losses.simple(KEY, JSD, network, X, prediction=prediction, weighting="truncated_snr")
    last = lambda key, b, n: (jnp.full(b, n - 1), jnp.ones(b))  # noqa: E731
    for weighting in (None, "snr", "min_snr", "p2"):
        loss, _ = losses.simple(KEY, JSD, network, X, prediction=prediction, weighting=weighting, timestep_sampler=last)
        assert (np.asarray(loss) < 10).all()


def test_timestep_samplers_by_name():
    for name in timesteps.SAMPLERS:
        for loss in (losses.simple, losses.vlb, losses.hybrid):
            f = network if loss is losses.simple else lambda x, time: jnp.concatenate([0.3 * x, x], -1)
            if timesteps.needs_history(name):
                with pytest.raises(
                    ValueError, match=rf"needs a history of the losses; use timesteps.{name}\(history\)"
                ):
                    loss(KEY, FULL, f, X, timestep_sampler=name)
                continue
            by_name, by_function = (
                loss(KEY, FULL, f, X, timestep_sampler=sampler)[1].t for sampler in (name, timesteps.SAMPLERS[name])
            )
            np.testing.assert_array_equal(by_name, by_function)
    with pytest.raises(ValueError, match="unknown timestep_sampler 'even'; known: uniform, antithetic, stratified"):
        losses.simple(KEY, FULL, network, X, timestep_sampler="even")


@pytest.mark.parametrize("shape", [(2, 1), (1,), (1, 2), (3,)])
def test_weights_that_are_not_one_for_each_example(shape):
    """A weight [B, 1] would broadcast a loss [B] to [B, B]. One number for all examples is a weight of each."""
    sampler = lambda key, batch, total: (T, jnp.full(shape, 2.0))  # noqa: E731
    weighting = lambda snr: jnp.full(shape, 2.0)  # noqa: E731
    doubled = lambda x, time: jnp.concatenate([x, x], -1)  # noqa: E731
    for options, words in (
        ({"timestep_sampler": sampler}, "the weights of timestep_sampler"),
        ({"weighting": weighting}, "the result of weighting"),
        ({"timestep_sampler": lambda key, batch, total: (jnp.zeros(shape, int), 1.0)}, "the timesteps"),
    ):
        with pytest.raises(ValueError, match=rf"{words}.* must have shape \[2\].*got \[{shape[0]}"):
            losses.simple(KEY, FULL, network, X[:, 0, 0], **options)
        with pytest.raises(ValueError, match=rf"{words}.* must have shape \[2\]"):
            losses.hybrid(KEY, FULL, doubled, X, **options)
    for sampler in (lambda key, batch, total: (T, 2.0), lambda key, batch, total: (T, np.full(2, 2.0))):
        weighted, aux = losses.simple(KEY, FULL, network, X, timestep_sampler=sampler, weighting=lambda snr: 3.0)
        np.testing.assert_allclose(weighted, 6 * aux.mse, rtol=1e-6)
        assert weighted.shape == aux.importance.shape == aux.t.shape == (2,)


@pytest.mark.parametrize("x", [jnp.zeros(3), 1.0])
def test_one_vector_without_a_batch_axis(x):
    logits_fn = lambda x_t, time: jnp.zeros((len(x_t), 5))  # noqa: E731
    for take in (
        lambda x: losses.simple(KEY, FULL, network, x),
        lambda x: losses.vlb(KEY, FULL, network, x, variance="fixed_small"),
        lambda x: losses.classify(KEY, FULL, logits_fn, x, jnp.zeros(3, int)),
        lambda x: likelihood.bits_per_dim(KEY, FULL, network, x),
    ):
        with pytest.raises(ValueError, match=r"x_0 must have a batch axis, vectors \[B, C\].*x_0\[None\]"):
            take(x)
