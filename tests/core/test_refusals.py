"""Arrays and options of a wrong kind raise a one-line error."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import (
    Denoiser,
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
from diffusion_jax.denoiser import clip_x_0, convert, dynamic_threshold
from diffusion_jax.errors import require_number
from diffusion_jax.measurements import Measurement

pytestmark = pytest.mark.usefixtures("unchecked_annotations")

KEY = jax.random.key(0)
FULL = schedules.from_betas(schedules.betas("linear", 20))
JSD = schedules.from_betas(schedules.betas("jsd", 20))
T = jnp.array([0, 7])
PIXELS = np.full((2, 4, 4, 3), 200, np.uint8)
X = jnp.zeros((2, 4, 4, 3))


def network(x, time):
    return 0.3 * x


@pytest.mark.thorough
@pytest.mark.parametrize(
    "function",
    [
        lambda x, t: FULL.at(t, x).time,
        lambda x, t: process.q_mean_variance(FULL, x, t),
        lambda x, t: process.q_posterior(FULL, x, x, t),
        lambda x, t: FULL.transition(t, x).beta,
        lambda x, t: process.p_mean_variance(FULL, network, x, t),
        lambda x, t: likelihood.bound_term(FULL, network, x, x, t),
    ],
)
def test_indices_of_another_shape(function):
    x = jnp.ones((1, 3))
    for t in (jnp.arange(5), jnp.zeros((1, 1), int), jnp.zeros((0,), int)):
        if t.shape != x.shape[: t.ndim]:
            with pytest.raises(ValueError, match=r"t must be one value, or one for each row of x: \(1,\)"):
                function(x, t)
    with pytest.raises(ValueError, match="t must be int, an index of the schedule; got float32"):
        function(x, jnp.zeros(1))
    function(x, jnp.array([3]))
    function(x, jnp.int32(3))
    jax.vmap(function)(jnp.ones((5, 3)), jnp.arange(5))


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


def doubled(x, time):
    """A network with a learned variance."""
    return jnp.concatenate([0.3 * x, x], axis=-1)


class CountsSteps(sampling.Sampler):
    def init_state(self, schedule, x_T, num_steps):
        return {"steps": jnp.int32(0)}

    def step(self, key, denoiser, x_t, transition, state):
        return sampling.Step(x_t, x_t, {"steps": state["steps"] + 1})


LABELS, MASK = jnp.array([0, 1]), X[..., :1] > 0
AT, DDPM = FULL.at(T, X), sampling.ddpm()
NOISE, V = jax.random.normal(KEY, (1000, 2)), Denoiser(network, "v", clip=False)
UNCLIPPED = Denoiser(network, clip=False)
EDM = schedules.from_path(schedules.edm(), np.linspace(np.log(0.002), np.log(80), 20) / 4)
BOUND = partial(likelihood.bits_per_dim, KEY, FULL)
GUIDED = partial(guidance.classifier_free, network, LABELS)
LOG_PROB = guidance.class_log_prob(logits, LABELS)
OF_19_STEPS = timesteps.loss_second_moment(timesteps.loss_history(19))
GRAY_ONLY = Measurement(editing.gray(), X[..., :1])
DRAW = partial(sampling.sample, KEY, FULL)
SAMPLE, SIMPLE = partial(DRAW, network), partial(losses.simple, KEY, FULL, network)
ENCODE, REPAINT = partial(sampling.encode, FULL, network), partial(editing.repaint, KEY, FULL, network)
INTERPOLATE = partial(editing.interpolate, KEY, FULL, network, X)
NO_BATCH = r"x_0 must have a batch axis, vectors \[B, C\].*x_0\[None\]"
WITH_A_NETWORK = [
    lambda f: sampling.sample(KEY, FULL, f, X, sampling.ddim()),
    lambda f: sampling.sample(KEY, FULL, f, X, sampling.heun(churn=1.0)),
    lambda f: sampling.encode(FULL, f, X),
    lambda f: losses.simple(KEY, FULL, f, X),
    lambda f: losses.vlb(KEY, FULL, f, X),
    lambda f: likelihood.bits_per_dim(KEY, FULL, f, X),
    lambda f: guidance.classifier_free(f, LABELS, 3, 2.0)(X, AT),
    lambda f: process.p_mean_variance(FULL, f, X, T),
]
WITH_A_MASK = [partial(REPAINT, X, jump=5), partial(editing.replacement, sampling.ddim(), X)]


def case(words, function, *args, **options):
    """A call and the words in its error."""
    return partial(function, *args, **options), words


RESPACE = partial(schedules.respace, schedules.from_betas(schedules.betas("linear", 1000)))
REFUSED = [
    # schedules
    *(
        case(words, schedules.from_betas, betas)
        for betas, words in (
            ([0.1, 0.0], r"betas\[1\] is 0"),
            ([0.1, 1.5], r"betas\[1\]"),
            ([1.0, 0.1], r"betas\[0\] is 1"),
            ([np.nan, 0.1], r"betas\[0\] is nan"),
            ([1e-17, 0.1], r"betas\[0\] is 1e-17"),
            ([], "one"),
            (np.full(100_000, 0.01), r"underflows at index \d+ of 100000; use smaller betas or fewer steps"),
        )
    ),
    *(case("increasing", schedules.from_betas, [0.1, 0.2], timesteps=times) for times in ([0, np.nan], [3, 3])),
    case("known: linear", schedules.betas, "lineal", 10),
    case(r"num_timesteps must be a whole number in \[1, ", schedules.betas, "linear", 0),
    case(r"beta_end .* in \(0, 1\]", schedules.betas, "linear", 10, beta_end=2.0),
    case(r"beta_start .* in \(0, 1\]", schedules.betas, "linear", 10, beta_start=0.0),
    # respacing
    case("use ddim334 or ddim250", RESPACE, "ddim300"),
    case(r"whole number in \[1, 1000\], got 0", RESPACE, "ddim0"),
    *(case("write", RESPACE, steps) for steps in ("10,,5", "")),
    case(r"section 0 must be a whole number in \[1, 1000\]", RESPACE, "2000"),
    case(r"section 1 must be a whole number in \[1, 333\], got 0", RESPACE, "10,0,5"),
    case("21 sections do not fit into 20 steps", schedules.respace, FULL, ",".join(21 * "1")),
    case("whole number", RESPACE, 2.5),
    case("whole number", RESPACE, 1001, "karras"),
    case("visits step 1 twice", RESPACE, [1, 1]),
    *(case("0 ... 999", RESPACE, steps) for steps in ([-1, 4], [1000])),
    case("explicit steps", RESPACE, []),
    case("network times must lie in 0 ... 999", RESPACE, [0.5, 999.5]),
    case("visits step 0.5 twice", RESPACE, [0.5, 0.5]),
    case("fewer steps or another spacing", RESPACE, 900, "quadratic"),
    *(case(f"one step of spacing '{s}' would be index 0", RESPACE, 1, s) for s in ("leading", "linspace", "quadratic")),
    case("spacing 'karras' is for a number of steps, but '10' defines its own spacing", RESPACE, "10", "karras"),
    case("spacing 'trailing' is for a number of steps", RESPACE, [1, 2, 3], "trailing"),
    case("spacing 'log_snr' is for a number of steps", RESPACE, [1.5, 2.5], "log_snr"),
    *(case("unknown spacing 'bogus'; known: leading, tr", RESPACE, steps, "bogus") for steps in (5, [1, 2, 3])),
    case("respace the schedule outside of jax.jit", lambda: schedules.respace(jax.jit(lambda s: s)(FULL), 10)),
    # process
    *(
        case(f"{name} must fit into int32, .*, got -?{2**32}$", call, beyond)
        for name, call in {
            "t": lambda t: process.q_sample(FULL, X[:1], t, X[:1]),
            "the times of timestep_sampler": lambda t: SIMPLE(X[:1], timestep_sampler=lambda *_: (t, jnp.ones(1))),
            "y": lambda y: guidance.classifier_free(network, y, 3, 2.0),
            "null_y": lambda null: GUIDED(null[0], 2.0),
        }.items()
        for beyond in (np.array([2**32]), np.array([-(2**32)]), np.array([2**32], np.uint64))
    ),
    case("t must fit into int32", FULL.at, [2**32], X[:1]),
    case("t must fit into int32", FULL.transition, np.int64(2**32), X),
    case("t must fit into int32", timesteps.record, timesteps.loss_history(20), np.array([2**32]), np.ones(1)),
    case("must be equal", process.q_sample, FULL, X, T, X[..., :1]),
    # denoisers
    case("twice the channels", Denoiser(network, variance="learned_range"), X, AT),
    case("twice the channels", Denoiser(doubled, variance="fixed_small"), X, AT),
    case("known: fixed_small", Denoiser, network, variance="fixed"),
    case("unknown prediction 'noise'; known: eps", Denoiser, network, "noise"),
    case("True, False or a function of x_0, got 1", Denoiser, network, clip=1),
    case("sigma_data must be a number above 0, got 0", Denoiser, network, "x_0", sigma_data=0),
    case("with sigma_data the network predicts x_0, not 'v'", Denoiser, network, "v", sigma_data=0.5),
    case(r"defined for a step .*schedule.transition", Denoiser(network, "x_prev"), X, AT),
    case("use form='eps'", guidance.classifier(network, LOG_PROB, form="mean"), X, AT),
    *(case("known: eps", convert, X, X, AT, *names) for names in (("noise", "eps"), ("eps", "noise"))),
    *(case("not at a single level", convert, X, X, AT, *names) for names in (("x_prev", "x_0"), ("eps", "x_prev"))),
    case("must be equal", convert, X, X[:1], AT),
    *(case("True, False or a function of x_0, got", clip_x_0, X, clip) for clip in ("no", 1, None)),
    case("quantile", dynamic_threshold, 0.0),
    case("must be float in \\[-1, 1\\], not uint8; uint8 images need no conv", images.to_uint8, PIXELS),
    # losses
    case("known: none, snr", SIMPLE, X, weighting="p3"),
    case("known: eps", SIMPLE, X, prediction="noise"),
    case("'even'; known: uniform, antithetic, stratified", SIMPLE, X, timestep_sampler="even"),
    case("must return the shape of x_t", losses.simple, KEY, FULL, lambda x, time: x[..., :1], X),
    case("must return the shape of x_t", losses.simple, KEY, FULL, lambda x, time: doubled(x, time)[..., :4], X),
    case("is for a plain function; this denoiser predicts 'v'", losses.simple, KEY, FULL, V, X, prediction="eps"),
    case("trains a learned variance", losses.hybrid, KEY, FULL, UNCLIPPED, X),
    case("twice the channels", losses.vlb, KEY, FULL, network, X),
    case("has 19 steps, the schedule 20", SIMPLE, X, timestep_sampler=OF_19_STEPS),
    *(
        case("not determine x_0", losses.simple, KEY, JSD, network, X, prediction=name, weighting="truncated_snr")
        for name in ("eps", "score")
    ),
    *(
        case("give each a label", losses.classify, KEY, FULL, logits, X, y)
        for y in (np.array([1]), np.array([0, 1, 2]), np.array([[0], [1]]))
    ),
    *(
        case(NO_BATCH, call, x)
        for call in (
            SIMPLE,
            partial(losses.vlb, KEY, FULL, UNCLIPPED),
            lambda x: losses.classify(KEY, FULL, lambda x_t, time: jnp.zeros((len(x_t), 5)), x, jnp.zeros(3, int)),
            partial(BOUND, network),
        )
        for x in (jnp.zeros(3), jnp.zeros(()), 1.0)
    ),
    # likelihood
    case(r"strata, .* in \[1, 19\], got 20", BOUND, network, X, strata=20),
    case("twice the channels", BOUND, Denoiser(network, variance="learned"), X),
    case("gray_levels=256 and clip=True; .*gray_levels=None and clip=False", BOUND, network, X + 1.5),
    case("alpha_bar is 0", likelihood.bits_per_dim, KEY, JSD, network, X),
    case("gray_levels, .*, got 1", likelihood.decoder_log_prob, X, X, X, gray_levels=1),
    case("known: exact, tanh", likelihood.decoder_log_prob, X, X, X, cdf="erf"),
    case("scale must be float", likelihood.standardization_bits, np.array([1, 2])),
    # guidance
    case("y has 2 rows but x_t has 1", GUIDED(3, 1.0), X[:1], FULL.at(0, X)),
    case("use form='mean'", guidance.classifier, Denoiser(network, "x_prev"), LOG_PROB),
    case("unknown form 'sum'; known: eps, mean", guidance.classifier, network, LOG_PROB, form="sum"),
    case(r"low <= high, got \(7, 5\)", GUIDED, 3, 2.0, interval=(7, 5)),
    case("rescale", GUIDED, 3, 2.0, rescale=5),
    case("null_y must be int, as y is; got float", GUIDED, 10.7, 2.0),
    case(r"scale has shape", guidance.classifier_free(lambda x, time, y: x, LABELS, 3, jnp.ones((2, 2))), X, AT),
    # samplers
    *(
        case("order must be a whole number", make, order)
        for make in (sampling.dpm_solver_pp, sampling.deis, sampling.unipc)
        for order in (0, 4)
    ),
    case("a learned variance belongs to the network: Denoiser", sampling.ddpm, "learned"),
    case("must be fixed_small or fixed_large", process.p_mean_variance, FULL, network, X, T, "small"),
    case("fixed variance", DRAW, Denoiser(doubled, variance="learned_range"), X, sampling.ddpm("fixed_small")),
    case("eta", sampling.ddim, 1.5),
    case("bh1", sampling.unipc, variant="bh3"),
    *(
        case(f"{name} must be .*, got {re.escape(str(bad))}", sampling.heun, **{name: bad})
        for name, bad in (("churn", -1), ("churn", np.inf), ("churn_noise", -1), ("churn_range", (5, 1)))
    ),
    *(
        case("'x_prev' .*heun and pndm", DRAW, Denoiser(network, "x_prev"), X, s)
        for s in (sampling.heun(), sampling.pndm())
    ),
    case("x_T must have a batch axis", SAMPLE, 1.0, DDPM),
    *(  # x_0 + sigma eps with EDM's sigma of 80, and the last step of 20 steps, which has alpha_bar 0
        case(
            r"x_T has standard deviation (79|8\d)\.\d, but .* about 1 at index 19; draw x_T from N\(0, I\)",
            sampling.sample,
            KEY,
            schedule,
            V,
            80 * NOISE,
            sampling.ddim(),
        )
        for schedule in (JSD, EDM)
    ),
    case(r"such as sampling.ddim\(\), got 'ddim'", SAMPLE, X, "ddim"),
    case(r"start, an index .* in \[0, 19\], got 20", SAMPLE, X, DDPM, start=20),
    case(r"indices \(int\), got \[1.7\]", SAMPLE, X, DDPM, trajectory=[1.7]),
    case("sequence of indices", SAMPLE, X, DDPM, trajectory=3),
    *(case("keeps indices in 0 ... 19", SAMPLE, X, DDPM, trajectory=t) for t in ([20], np.array([2**32]))),
    case("keeps indices in 1 ... 19", SAMPLE, X, DDPM, trajectory=[0], final_step=False),
    case("must be a sampler such as", sampling.default_spacing, sampling.heun, FULL, network),
    # encode
    case("start, an index", ENCODE, X, start=20),
    case(r"order .* in \[1, 2\], got 3", ENCODE, X, order=3),
    case("x_prev", sampling.encode, FULL, Denoiser(network, "x_prev"), X),
    case("clip is for order 1", sampling.encode, FULL, Denoiser(network), X, order=2),
    case("a projection of x_0 has no inverse", sampling.encode, FULL, editing.project(network, GRAY_ONLY), X),
    case("x_0 must have a batch axis", ENCODE, 1.0),
    # editing
    case("must be a sampler such as", editing.replacement, "ddim", X, MASK),
    case("jump .* of at least 1, got 5.0", REPAINT, X, MASK, jump=5.0),
    case("resamplings .* of at least 1, got 0", REPAINT, X, MASK, resamplings=0),
    case("jump=20 must be below the 20 steps of the schedule", REPAINT, X, MASK, resamplings=2, jump=20),
    case("whose steps change its state; use ddpm", REPAINT, X, MASK, sampling.dpm_solver_pp(), jump=3),
    case("CountsSteps, whose steps change its state", REPAINT, X, MASK, CountsSteps(), jump=3),
    case("strength", editing.sdedit, KEY, FULL, network, X, sampling.ddim(), strength=0),
    case("8x6 cannot be divided into squares of 4", editing.average_pool(4).measure, jnp.zeros((1, 8, 6, 1))),
    case("only a deterministic sampler decodes", INTERPOLATE, X, [0.5], sampling.ddpm()),
    case("a denoiser takes a noise level, .* or a step, .*; got int", Denoiser(network), X, 5),
    case("the network is a Denoiser already", Denoiser, Denoiser(network)),
    case("a condition for each row", guidance.classifier_free, network, 3, 4, 2.0),
    case("a path has no steps", schedules.respace, schedules.edm(), 5),
    case("corrections and limits", losses.simple, KEY, FULL, editing.project(network, GRAY_ONLY), X),
    case("interpolate does not take ordr with t=3", INTERPOLATE, X, [0.5], sampling.ddim(), t=3, ordr=7),
    case("interpolate does not take order with t=3", INTERPOLATE, X, [0.5], sampling.ddim(), t=3, order=2),
    case(r"x has shape \(2, 4, 4, 3\) but y has \(1, 4, 4, 3\)", INTERPOLATE, X[:1], [0.5], sampling.ddim(), t=3),
    *(
        case("does not broadcast to x_0's shape", call, np.ones(shape, bool))
        for call in (*WITH_A_MASK, jax.jit(WITH_A_MASK[0]))
        for shape in ((5, 4, 3), (3, 4, 4, 3), (1, 2, 4, 4, 3))
    ),
    *(
        case("a mask holds 1 where pixels are known and 0 elsewhere, got", call, mask)
        for call in (*WITH_A_MASK, editing.masked)
        for mask in (np.array([0, 255, 0], np.uint8), np.array([0.0, 0.5, 1.0]))
    ),
    # networks
    *(
        case(f"network must be one float array; got {name}", call, lambda *_, output=output, **__: output)
        for call in WITH_A_NETWORK
        for name, output in {"tuple": (X, {}), "NoneType": None, "dict": {"eps": X}}.items()
    ),
]


@pytest.mark.parametrize(
    ("bad", "good", "limits", "words"),
    [
        ((-0.1, 1.1, np.nan), (0, 0.5, np.float32(1)), (0, 1), r"a number in \[0, 1\]"),
        ((0, np.inf), (1e-9, 1), (0,), "a number above 0"),
        ((2, 0, 1.0, True), (1, np.int64(1)), (1, 1), r"a whole number in \[1, 1\]"),
        ((-1, np.inf), (0, 2.5), (0,), "a number of at least 0"),
    ],
)
def test_numbers_within_limits(bad, good, limits, words):
    options = {"above": "above" in words, "whole": "whole" in words}
    for value in good:
        require_number("x", value, *limits, **options)
    for value in bad:
        with pytest.raises(ValueError, match=rf"x must be {words}, got "):
            require_number("x", value, *limits, **options)


@pytest.mark.parametrize(("call", "words"), REFUSED)
def test_wrong_arguments_are_refused(call, words):
    with pytest.raises(ValueError, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", sampling.SAMPLERS)
def test_the_options_of_a_network_are_no_options_of_a_sampler(name):
    for option, value in (("prediction", "v"), ("clip", False), ("variance", "learned")):
        if (name, option) != ("ddpm", "variance"):  # ddpm may replace a fixed variance
            words = rf"takes no {option}, .*: give the sampler diffusion_jax.Denoiser\(network, {option}={value!r}\)"
            with pytest.raises(TypeError, match=words):
                sampling.SAMPLERS[name](**{option: value})


def test_x_T_in_any_other_scale_is_accepted():
    """Wide data with little noise, a constant, a traced x_T, and the scale that the error asks for."""
    low_noise = schedules.from_betas([0.01, 0.02])  # alpha_bar 0.97
    for schedule, x_T in ((low_noise, 80 * NOISE), (EDM, 0 * NOISE + 80), (EDM, 80 * NOISE / np.hypot(1, 80))):
        assert np.isfinite(sampling.sample(KEY, schedule, V, x_T, sampling.ddim())).all()
    jax.eval_shape(lambda x_T: sampling.sample(KEY, EDM, V, x_T, sampling.ddim()), 80 * NOISE)
    on_device = jax.tree.map(jnp.asarray, EDM)
    for schedule in (EDM, on_device):  # constants of a traced function
        jax.eval_shape(lambda key, s=schedule: sampling.sample(key, s, V, NOISE, sampling.ddim()), KEY)
    sampling.sample(KEY, EDM, V, 80 * NOISE, sampling.ddim(), start=0)


@pytest.mark.parametrize("loss", [losses.vlb, losses.hybrid])
def test_the_bound_is_refused_for_eps_at_zero_terminal_snr(loss):
    """At the last step eps does not determine x_0; under jit, where t is traced, the result would be NaN."""
    learned = partial(Denoiser, doubled, variance="learned_range", clip=False)
    for prediction in ("eps", "score"):
        with pytest.raises(ValueError, match="does not determine x_0 there"):
            jax.jit(lambda key, p=prediction: loss(key, JSD, learned(p), X))(KEY)
    ends = lambda key, b, n: (jnp.array([0, n - 1]), jnp.ones(b))  # noqa: E731
    run = jax.jit(lambda key: loss(key, JSD, learned("v"), X, timestep_sampler=ends)[0])
    assert np.isfinite(run(KEY)).all()


@pytest.mark.parametrize("name", ("uniform", "antithetic", "stratified", "loss_second_moment"))
def test_a_timestep_sampler_by_name(name):
    if timesteps.needs_history(name):
        with pytest.raises(ValueError, match=rf"needs a history of the losses; use timesteps.{name}\(history\)"):
            SIMPLE(X, timestep_sampler=name)
    else:
        by_name, by_function = (SIMPLE(X, timestep_sampler=s)[1].t for s in (name, timesteps.TIMESTEP_SAMPLERS[name]))
        np.testing.assert_array_equal(by_name, by_function)


@pytest.mark.parametrize("shape", [(2, 1), (1,), (1, 2), (3,)])
def test_weights_that_are_not_one_for_each_example(shape):
    """A weight [B, 1] would broadcast a loss [B] to [B, B]."""
    for words, options in {
        "the weights of timestep_sampler": {"timestep_sampler": lambda key, batch, total: (T, jnp.full(shape, 2.0))},
        "the times of timestep_sampler": {"timestep_sampler": lambda key, batch, total: (jnp.zeros(shape, int), 1.0)},
        "the result of weighting": {"weighting": lambda snr: jnp.full(shape, 2.0)},
    }.items():
        with pytest.raises(ValueError, match=rf"{words}.* must have shape \[2\].*got \[{shape[0]}"):
            SIMPLE(X[:, 0, 0], **options)


def test_one_number_is_the_weight_of_every_example():
    for weight in (2.0, np.full(2, 2.0)):
        sampler = lambda key, batch, total, weight=weight: (T, weight)  # noqa: E731
        weighted, aux = SIMPLE(X, timestep_sampler=sampler, weighting=lambda snr: 3.0)
        np.testing.assert_allclose(weighted, 6 * aux.mse, rtol=1e-6)
        assert weighted.shape == aux.importance.shape == aux.t.shape == (2,)
