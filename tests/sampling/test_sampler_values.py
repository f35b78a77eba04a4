"""Samplers as values: equality, hash and repr, dtypes with and without x64, and the start index."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import Denoiser, editing, sampling, schedules
from diffusion_jax.denoiser import dynamic_threshold
from helpers.gaussian_mixtures import FULL, mixture
from helpers.samplers import MAKERS, METHODS, is_deterministic

KEY = jax.random.key(0)


@pytest.mark.parametrize("name", MAKERS)
def test_equal_options_make_equal_samplers(name):
    make = MAKERS[name]
    a, b = make(), make()
    assert a == b and hash(a) == hash(b) and a is not b
    namespace = {"inf": float("inf"), type(a).__name__: type(a)} | vars(sampling)
    assert eval(repr(a), namespace) == a  # the repr shows every option
    with pytest.raises(dataclasses.FrozenInstanceError):
        a.order = 1


@pytest.mark.thorough
@pytest.mark.parametrize("name", MAKERS)
def test_a_sampler_knows_whether_it_draws_noise(name):
    schedule, x_T = schedules.respace(FULL, [40, 300, 620, 900]), jnp.array([[0.3, -1.0]])
    sampler, network = MAKERS[name](), Denoiser(lambda x, time: 0.3 * x, clip=False)
    with jax.disable_jit():
        a, b = (sampling.sample(jax.random.key(seed), schedule, network, x_T, sampler) for seed in (0, 1))
    assert sampler.is_stochastic == bool((a != b).any())


def test_equal_samplers_and_options_that_are_refused():
    assert sampling.euler() == sampling.ddim(0.0) and sampling.euler_ancestral() == sampling.ddim(eta=1)
    assert sampling.plms() == sampling.pndm(runge_kutta=False)
    assert sampling.dpm_solver_pp() != sampling.dpm_solver_pp(3) != sampling.deis(3)
    assert sampling.ddpm() != sampling.ddpm("fixed_large") == sampling.ddpm(variance="fixed_large")
    with pytest.raises(TypeError, match="positional"):
        sampling.ddpm("fixed_small", "eps")


class returns(sampling.Sampler):
    """Its step returns `change` of the right `Step`."""

    def __init__(self, change):
        object.__setattr__(self, "change", change)

    def step(self, key, denoiser, x_t, transition, state):
        return self.change(sampling.Step(x_t, denoiser(x_t, transition).x_0))


@pytest.mark.parametrize(
    ("sampler", "words"),
    [
        (sampling.Sampler(), "Sampler defines no step"),
        (returns(lambda new: new.x_prev), r"returns.step must return sampling.Step\(x_prev, x_0, state\), not a "),
        (returns(tuple), "not a tuple"),
        (returns(lambda new: new._replace(x_prev=new.x_prev[:, 0])), r"x_prev float32\[2\], not floats like x_t"),
        (returns(lambda new: new._replace(x_prev=new.x_prev[:1])), r"x_prev float32\[1,3\]"),
        (returns(lambda new: new._replace(x_0=new.x_0.sum())), r"x_0 float32\[\]"),
        (returns(lambda new: new._replace(x_prev=new.x_prev.astype(int))), r"x_prev int32\[2,3\]"),
    ],
)  # fmt: skip
def test_a_step_to_another_shape_is_refused_when_it_is_traced(sampler, words):
    with pytest.raises(ValueError, match=words) as caught:
        jax.eval_shape(lambda x: sampling.sample(KEY, FULL, mixture(), x, sampler), jnp.ones((2, 3)))
    assert "\n" not in str(caught.value)


def test_a_step_in_a_lower_precision_is_cast():
    halved = returns(lambda new: new._replace(x_prev=new.x_prev.astype(jnp.bfloat16)))
    assert sampling.sample(KEY, schedules.respace(FULL, 2), mixture(), jnp.ones((2, 3)), halved).dtype == jnp.float32


def test_a_static_sampler_does_not_compile_again():
    """`jax.jit` of `sample` itself, with the sampler static: the second call traces nothing."""
    traces = []
    network = mixture()

    def counted(x, time):
        traces.append(1)
        return network(x, time)

    def denoiser(quantile):
        return Denoiser(counted, clip=dynamic_threshold(quantile))

    draw = jax.jit(sampling.sample, static_argnames=("sampler", "start"))
    schedule, x_T = schedules.respace(FULL, 3, "log_snr"), jax.random.normal(KEY, (2, 1))
    first = draw(KEY, schedule, denoiser(0.995), x_T, sampler=sampling.ddim())
    count = len(traces)
    again = draw(KEY, schedule, denoiser(0.995), x_T, sampler=sampling.ddim(0.0))
    assert count and len(traces) == count
    np.testing.assert_array_equal(first, again)
    for quantile, eta in ((0.9, 0.0), (0.995, 0.5)):
        count = len(traces)
        draw(KEY, schedule, denoiser(quantile), x_T, sampler=sampling.ddim(eta))
        assert len(traces) > count


@pytest.mark.thorough
@pytest.mark.parametrize("name", [name for name in MAKERS if " 1" not in name])
def test_float32_samples_are_the_same_under_x64(name):
    """Float64 samples agree with both to float32's rounding. Without jit, so that single operations are compiled once."""
    schedule = schedules.respace(FULL, 5, "log_snr")
    x_T = np.random.default_rng(0).standard_normal((3, 2)).astype(np.float32)
    network = Denoiser(lambda x, time: jnp.tanh(0.8 * x) * (0.5 + time[:, None] / 2000), clip=False)
    outs = []
    for x64, dtype in ((False, np.float32), (True, np.float32), (True, np.float64)):
        with jax.enable_x64(x64), jax.disable_jit():
            draw = sampling.sample(jax.random.key(0), schedule, network, x_T.astype(dtype), MAKERS[name]())
            outs.append(np.asarray(draw))
    assert [out.dtype for out in outs] == [np.float32, np.float32, np.float64]
    scale = abs(outs[0]).max()
    np.testing.assert_allclose(outs[1], outs[0], atol=1e-5 * scale)
    if is_deterministic(name):  # noise in another dtype is another draw
        np.testing.assert_allclose(outs[2], outs[0], atol=1e-4 * scale)


ZERO = schedules.from_betas([0.02, 0.1, 0.3, 0.5, 0.7, 1.0])
SHORT = schedules.from_betas([0.02, 0.1, 0.3, 0.5, 0.7])


def one_gaussian(x, time):
    """A smooth eps that needs no tables, finite at every time and NaN where alpha_bar is 0."""
    return jnp.where(time[:, None] < 4.5, 0.5 * jnp.tanh(x) + 0.05 * time[:, None], jnp.nan)


def test_pure_noise_is_refused_where_it_is_visited():
    x = jnp.ones((1, 2))
    for start in (None, 5):
        for prediction in ("eps", "score"):
            denoiser = Denoiser(one_gaussian, prediction=prediction)
            with pytest.raises(ValueError, match="alpha_bar is 0 at index 5"):
                sampling.sample(KEY, ZERO, denoiser, x, sampling.ddim(), start=start)
    edited = editing.sdedit(KEY, ZERO, one_gaussian, x, sampling.ddim(), strength=0.8)
    assert np.isfinite(edited).all()
    with pytest.raises(ValueError, match="alpha_bar is 0"):
        editing.sdedit(KEY, ZERO, one_gaussian, x, sampling.ddim(), strength=1.0)
    slope = jax.grad(lambda x: sampling.sample(KEY, ZERO, one_gaussian, x, sampling.deis(3), start=4).sum())(x)
    assert np.isfinite(slope).all()


@pytest.mark.thorough
@pytest.mark.parametrize("name", [*(name for name in METHODS if "churn" not in name), 1, 2])
def test_a_start_below_pure_noise_accepts_every_prediction(name):
    """From a start up to T - 2 in a chain that ends at alpha_bar = 0, an eps network's samples equal those of the chain
    without the last step; the same for noise."""
    x = np.random.default_rng(0).standard_normal((3, 2)).astype(np.float32)
    with jax.disable_jit():
        if name in (1, 2):
            run = lambda schedule, **o: sampling.encode(schedule, one_gaussian, x, order=name, **o)  # noqa: E731
        else:
            denoiser, sampler = Denoiser(one_gaussian, clip=False), MAKERS[name]()
            run = lambda schedule, **o: sampling.sample(KEY, schedule, denoiser, x, sampler, **o)  # noqa: E731
        whole, part = run(SHORT), run(ZERO, start=4)
    assert np.isfinite(whole).all()
    np.testing.assert_allclose(part, whole, rtol=2e-5, atol=1e-5)
