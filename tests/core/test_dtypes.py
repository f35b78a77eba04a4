"""Results are float32 for float32, bfloat16 and float16, and float64 for float64 under x64; other arrays are refused.

Every public function of the core that takes arrays has a row here. Most rows compute shapes alone (`jax.eval_shape`).
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import (
    Denoiser,
    arrays,
    coordinates,
    editing,
    guidance,
    likelihood,
    losses,
    process,
    sampling,
    schedules,
    timesteps,
)
from diffusion_jax.denoiser import PREDICTIONS, VARIANCES, clip_x_0, convert, dynamic_threshold, split_variance
from diffusion_jax.measurements import Measurement
from helpers.samplers import MAKERS, METHODS

KEY = jax.random.key(0)
FULL = schedules.from_betas(schedules.betas("linear", 20))
T, Y, NULL = jnp.array([0, 7], jnp.int32), jnp.array([0, 2]), 3
MASK, HALF = np.array([True, False, True]), editing.average_pool(2)


def network(x, time, y=None):
    """A bfloat16 network, which checks that the time has the dtype of the rule."""
    assert time.dtype == x.dtype, f"x_t is {x.dtype}, the network time {time.dtype}"
    return (0.3 * x + 0.01 * time[:, None, None, None]).astype(jnp.bfloat16)


def exact(x, time, y=None):
    """A network with float64 constants, whose dtype must not spread under x64."""
    return jnp.asarray(np.float64(0.3) * x, jnp.promote_types(x.dtype, jnp.result_type(float)))


def doubled(x, time):
    """A network with a learned variance."""
    return jnp.concatenate([network(x, time), x.astype(jnp.bfloat16)], axis=-1)


def logits(x, time):
    """A bfloat16 classifier for three classes."""
    return (x.mean(axis=(1, 2)) + time[:, None]).astype(jnp.bfloat16)


def shifted():
    """The network with a classifier that shifts the mean."""
    return guidance.classifier(network, guidance.class_log_prob(logits, Y), np.float64(2), form="mean")


def times(x):
    """Network times, as a caller makes them."""
    return jnp.asarray(FULL.timesteps)[T].astype(jnp.promote_types(x.dtype, jnp.float32))


def low(x):
    """A value like a network's output: bfloat16, unless images are float64."""
    return x if x.dtype == jnp.float64 else x.astype(jnp.bfloat16)


def alone(x):
    """Numbers [4] from the images."""
    return x[0, 0, :, 0]


CASES = {
    "arrays.as_batch": lambda x: arrays.as_batch("x", x),
    "arrays.as_float": lambda x: arrays.as_float("x", x),
    "arrays.promote": lambda x: arrays.promote(x=x, y=x),
    "schedules.Schedule.at": lambda x: FULL.at(T, x),
    "schedules.Schedule.transition": lambda x: FULL.transition(T, x)[:-1],
    "schedules.Path.at": lambda x: FULL.path.at(times(x), x),
    "schedules.Path.at_log_snr": lambda x: FULL.path.at_log_snr(np.float64(0.3), x),
    "schedules.Transition.between": lambda x: schedules.Transition.between(FULL.at(T, x), FULL.at(T - 1, x)),
    "process.q_mean_variance": lambda x: process.q_mean_variance(FULL, x, T),
    "process.q_sample": lambda x: process.q_sample(FULL, x, T, x),
    "process.q_step_mean_variance": lambda x: process.q_step_mean_variance(FULL, x, T),
    "process.q_step": lambda x: process.q_step(FULL, x, T, x),
    "process.q_posterior": lambda x: process.q_posterior(FULL, x, x, T),
    "process.p_mean_variance": lambda x: [
        process.p_mean_variance(FULL, Denoiser(doubled if "learned" in v else f, p, v), x, T)
        for f in (network, exact)
        for p in PREDICTIONS
        for v in VARIANCES
    ],
    "denoiser.convert": lambda x: [
        convert(low(x), x, FULL.transition(T, x), p, wanted) for p in PREDICTIONS for wanted in PREDICTIONS
    ],
    "denoiser.Denoiser": lambda x: [
        Denoiser(f, **fields)(x, FULL.at(T, x))
        for f in (network, exact)
        for fields in (
            {"clip": dynamic_threshold(np.float64(0.9)), "inputs": {"y": Y}},
            {"prediction": "x_0", "sigma_data": np.float64(0.5), "clip": False},
            {"prediction": "v", "clip": lambda x: low(x)},
        )
    ],
    "denoiser.split_variance": lambda x: split_variance(jnp.concatenate([x, x], -1), x, "learned"),
    "denoiser.clip_x_0": lambda x: [clip_x_0(x, clip) for clip in (True, False, lambda x: low(x))],
    "denoiser.dynamic_threshold": lambda x: dynamic_threshold()(x),
    "schedules.Path.log_snr": lambda x: FULL.path.log_snr(alone(x)),
    "schedules.Path.time_at_log_snr": lambda x: FULL.path.time_at_log_snr(alone(x)),
    **{f"losses, weighting {name}": lambda x, f=f: f(alone(x)) for name, f in losses.WEIGHTINGS.items()},
    "losses.edm_weight": lambda x: losses.edm_weight(alone(x), np.float64(0.3)),
    "schedules.shifted": lambda x: schedules.shifted(schedules.edm(), np.float64(-2)).at(0 * times(x), x),
    "coordinates.precondition": lambda x: coordinates.precondition(exact, schedules.edm(), np.float64(0.3))(
        x, 0 * times(x)
    ),
    "losses.simple": lambda x: [
        losses.simple(KEY, FULL, f, x, prediction=prediction, weighting=weighting, timestep_sampler=timestep_sampler)
        for f, timestep_sampler in [(network, "uniform"), (exact, lambda key, b, n: (jnp.zeros(b, int), np.ones(b)))]
        for prediction, weighting in [
            *((prediction, None) for prediction in PREDICTIONS),
            *(("x_prev", weighting) for weighting in losses.WEIGHTINGS),
            ("score", lambda snr: snr * np.float64(2)),
        ]
    ],
    "losses.vlb": lambda x: losses.vlb(KEY, FULL, doubled, x),
    "losses.hybrid": lambda x: losses.hybrid(KEY, FULL, doubled, x, weighting="p2", vlb_weight=np.float64(0.1)),
    "losses.continuous_vlb": lambda x: losses.continuous_vlb(KEY, schedules.edm(), network, x),
    "losses.classify": lambda x: losses.classify(KEY, FULL, logits, x, Y),
    "likelihood.gaussian_kl": lambda x: likelihood.gaussian_kl(x, 0.0, low(x), 1),
    "likelihood.decoder_log_prob": lambda x: [
        likelihood.decoder_log_prob(x, low(x), low(x), levels, cdf) for levels in (None, 256) for cdf in likelihood.CDFS
    ],
    "likelihood.prior_term": lambda x: likelihood.prior_term(FULL, x),
    "likelihood.bound_term": lambda x: [likelihood.bound_term(FULL, f, x, x, T) for f in (network, exact)],
    "likelihood.bits_per_dim": lambda x: [
        likelihood.bits_per_dim(KEY, FULL, f, x, strata=strata, tables=tables)
        for f, strata, tables in [(network, None, True), (exact, 2, True), (network, None, False)]
    ],
    "likelihood.standardization_bits": lambda x: likelihood.standardization_bits(alone(x)),
    "likelihood.rate_distortion": lambda x: likelihood.rate_distortion(alone(x)[0], alone(x), alone(x)),
    "guidance.classifier_free": lambda x: [
        guidance.classifier_free(f, Y, NULL, np.float64(1.5), rescale=np.float64(0.5), interval=(2, 5))(
            x, FULL.at(T, x)
        )
        for f in (network, exact)
    ],
    "guidance.class_log_prob": lambda x: guidance.class_log_prob(logits, Y)(x, times(x)),
    "guidance.classifier": lambda x: [
        guidance.classifier(Denoiser(f, p), guidance.class_log_prob(logits, Y), np.float64(2))(x, FULL.at(T, x))
        for f in (network, exact)
        for p in ("eps", "x_0", "v", "score", "flow")
    ],
    "guidance.classifier, mean": lambda x: process.p_mean_variance(FULL, shifted(), x, T),
    "editing.project": lambda x: editing.project(network, Measurement(HALF, HALF.measure(x)))(x, FULL.at(T, x)),
    "editing.slerp": lambda x: editing.slerp(x, x + 1, np.float64(0.3)),
    "editing.gray": lambda x: [editing.gray().measure(x), editing.gray().invert(x[..., :1])],
    "editing.average_pool": lambda x: [HALF.measure(x), HALF.invert(x)],
    "editing.masked": lambda x: [editing.masked(MASK).measure(x), editing.masked(MASK).invert(x)],
}

SAMPLING = {
    f"sampling.{name}": lambda x, make=MAKERS[name]: [
        sampling.sample(KEY, FULL, f, x, make(), trajectory=True) for f in (network, exact)
    ]
    for name in METHODS
}
SAMPLING |= {
    "guidance.classifier with ddpm": lambda x: sampling.sample(KEY, FULL, shifted(), x, sampling.ddpm()),
    "sampling.encode": lambda x: [
        sampling.encode(FULL, f, x, order=order) for f in (network, exact) for order in (1, 2)
    ],
    "editing.sdedit": lambda x: editing.sdedit(KEY, FULL, network, x, sampling.dpm_solver_pp()),
    "editing.replacement": lambda x: sampling.sample(
        KEY, FULL, network, x, editing.replacement(sampling.unipc(), x, MASK)
    ),
    "editing.repaint": lambda x: editing.repaint(KEY, FULL, network, x, MASK, resamplings=2, jump=5),
    "editing.interpolate": lambda x: [
        editing.interpolate(KEY, FULL, network, x, x + 1, np.linspace(0, 1, 3), sampling.ddim(), t=t) for t in (None, 9)
    ],
}

# With x64, a float64 constant would show, and bfloat16 is promoted as float16 is.
DTYPES = [("bfloat16", True), ("float32", True), ("float64", True)]
DTYPES += [pytest.param(dtype, False, marks=pytest.mark.thorough) for dtype in ("float16", "float32")]


@pytest.mark.parametrize(("dtype", "x64"), DTYPES)
@pytest.mark.parametrize("name", CASES | SAMPLING)
def test_results_are_float32_or_float64_by_the_rule(name, dtype, x64):
    with jax.enable_x64(x64):
        results = jax.eval_shape((CASES | SAMPLING)[name], jax.ShapeDtypeStruct((2, 4, 4, 3), dtype))
        found = {leaf.dtype for leaf in jax.tree.leaves(results) if jnp.issubdtype(leaf.dtype, jnp.floating)}
        assert found == {jnp.dtype("float64" if dtype == "float64" else "float32")}
        whole = {leaf.dtype for leaf in jax.tree.leaves(results) if jnp.issubdtype(leaf.dtype, jnp.integer)}
        assert whole <= {jnp.dtype("int32"), jnp.dtype("int64")}


@pytest.mark.thorough
@pytest.mark.parametrize("name", CASES)
def test_low_precision_is_promoted_before_arithmetic(name):
    """Results for bfloat16 arrays equal the results for the same values in float32."""
    x = jnp.asarray(np.linspace(-1, 1, 96).reshape(2, 4, 4, 3), jnp.bfloat16)
    found, expected = (jax.tree.leaves(jax.jit(CASES[name])(x)) for x in (x, x.astype(jnp.float32)))
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


INTEGERS_ARE_NUMBERS = ("likelihood.gaussian_kl", *(name for name in CASES if name.startswith("schedules.")))


@pytest.mark.usefixtures("unchecked_annotations")
@pytest.mark.parametrize("dtype", ["uint8", "int32"])
@pytest.mark.parametrize("name", [name for name in CASES | SAMPLING if name not in INTEGERS_ARE_NUMBERS])
def test_arrays_that_are_not_float_are_refused(name, dtype):
    advice = "; images are float" if dtype == "uint8" else ""
    with pytest.raises(ValueError, match=f"must be float; got {dtype}{advice}"):
        (CASES | SAMPLING)[name](jnp.full((2, 4, 4, 3), 200, dtype))


def test_x64_changes_no_draw():
    """The same int32 timesteps, float32 weights and noise for float32 images in both modes."""
    x_0, drawn = np.full((4, 2, 2, 1), 0.25, np.float32), []
    for x64 in (False, True):
        with jax.enable_x64(x64):
            samplers = [
                timesteps.sampler_by_name(name, timesteps.loss_history(20))
                for name in ("uniform", "antithetic", "stratified", "loss_second_moment")
            ]
            for t, weight in jax.eval_shape(lambda s=samplers: [sampler(KEY, 5, 20) for sampler in s]):
                assert (t.dtype, weight.dtype) == (jnp.int32, jnp.float32)
            simple = partial(losses.simple, KEY, FULL, lambda x, time: 0 * x)
            draws = jax.jit(lambda x, s=samplers, f=simple: [f(x, timestep_sampler=sampler) for sampler in s])(x_0)
            drawn.append([np.asarray(leaf) for leaf in jax.tree.leaves(draws)])
    for off, on in zip(*drawn, strict=True):
        np.testing.assert_allclose(on, off, rtol=1e-6)


@pytest.mark.parametrize("x64", [False, True])
def test_the_history_is_float32_and_int32(x64):
    with jax.enable_x64(x64):
        history = jax.eval_shape(lambda: timesteps.record(timesteps.loss_history(20, 2), T, jnp.asarray([0.5, 2.0])))
        assert [leaf.dtype for leaf in history] == [jnp.float32, jnp.int32]
        assert jax.eval_shape(timesteps.step_probabilities, history).dtype == jnp.float32
