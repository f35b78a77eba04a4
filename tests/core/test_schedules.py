"""Schedules against the published definitions, in independent float64 NumPy."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import Denoiser, editing, sampling, schedules
from diffusion_jax.denoiser import convert
from diffusion_jax.schedules import NoiseLevel, Transition

NAMES = list(schedules.SCHEDULES)


# Improved DDPM eq. 17: alpha_bar of the cosine, at t = 0 ... 1000.
COSINE = np.cos((np.arange(1001) / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2
BETAS = {
    "linear": np.linspace(1e-4, 0.02, 1000),
    "quadratic": np.linspace(0.01, np.sqrt(0.02), 1000) ** 2,
    "sigmoid": 1e-4 + 0.0199 / (1 + np.exp(-np.linspace(-6, 6, 1000))),
    "constant": np.full(1000, 0.02),
    "jsd": 1 / np.arange(1000.0, 0, -1),
    "warmup10": np.append(np.linspace(1e-4, 0.02, 100), np.full(900, 0.02)),
    "warmup50": np.append(np.linspace(1e-4, 0.02, 500), np.full(500, 0.02)),
    "cosine": np.minimum(1 - COSINE[1:] / COSINE[:-1], 0.999),
}


@pytest.mark.parametrize("name", NAMES)
def test_the_betas_are_as_published(name):
    betas = schedules.betas(name, 1000)
    assert betas.dtype == np.float64
    np.testing.assert_allclose(betas, BETAS[name], rtol=1e-10)


def test_more_timesteps_than_memory_holds_are_refused():
    with pytest.raises(ValueError, match="num_timesteps must be a whole number in .* got 1000001"):
        schedules.betas("linear", 10**6 + 1)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("num_timesteps", [1, 2, 3, 10, 1000])
def test_any_length_gives_a_schedule(name, num_timesteps):
    schedule = schedules.from_betas(schedules.betas(name, num_timesteps))
    assert schedule.num_timesteps == num_timesteps
    for leaf in jax.tree.leaves(schedule):
        assert leaf.dtype == np.float64 and leaf.shape == (num_timesteps,) and np.isfinite(leaf).all()
    assert (np.diff(schedule.alpha_bar) < 0).all()
    assert schedule.zero_terminal_snr == (name == "jsd")


def test_published_entries_of_the_tables():
    schedule = schedules.from_betas(schedules.betas("linear", 1000))
    assert schedule.alpha_bar[-1] == pytest.approx(4.035830e-05, rel=1e-6)  # DDPM's L_T depends on this value
    steps = schedule.transitions
    assert steps.posterior_log_variance[0] == pytest.approx(-9.816725, abs=1e-6)
    np.testing.assert_array_equal(schedule.timesteps, np.arange(1000))
    assert (steps.posterior_variance[0], steps.posterior_mean_coef_x_0[0]) == (0.0, pytest.approx(1.0))


THOUSAND, JSD = (schedules.from_betas(schedules.betas(name, count)) for name, count in [("linear", 1000), ("jsd", 100)])


def test_the_indices_of_sections():
    sections = schedules.respace(THOUSAND, "10,15,20").timesteps
    bounds = [0, 334, 667, 1000]  # the first section takes the odd step
    assert [sum((a <= sections) & (sections < b)) for a, b in itertools.pairwise(bounds)] == [10, 15, 20]
    assert set(sections) >= {0, 333, 334, 666, 667, 999}
    assert schedules.respace(schedules.from_betas([0.5]), 1, "leading").timesteps == [0]  # the only step


@pytest.mark.parametrize(
    ("steps", "spacing", "expected"),
    [
        ("ddim25", None, range(0, 1000, 40)),
        ("ddim50", None, range(0, 1000, 20)),
        ("25", None, [round(i * 999 / 24) for i in range(25)]),
        (25, "openai", [round(i * 999 / 24) for i in range(25)]),
        ("1", None, [0]),
        ("1000", None, range(1000)),
        (10, None, range(99, 1000, 100)),  # "trailing"
        (10, "trailing", range(99, 1000, 100)),
        (3, "trailing", [332, 666, 999]),
        *((1, spacing, [999]) for spacing in (None, "trailing", "karras", "log_snr", "gaussian")),
        (10, "leading", range(0, 1000, 100)),
        (11, "linspace", [0, 100, 200, 300, 400, 500, 599, 699, 799, 899, 999]),
        (10, "quadratic", [int((np.sqrt(800) * i / 9) ** 2) for i in range(10)]),
        ([999, 5, 0], None, [0, 5, 999]),
        (np.array([7]), None, [7]),
    ],
)
def test_the_indices_of_a_spacing(steps, spacing, expected):
    np.testing.assert_allclose(schedules.respace(THOUSAND, steps, spacing).timesteps, expected, atol=1e-9)


def test_schedules_whose_signal_underflows():
    """alpha is 0 in float32 from about 17,500 linear steps on; alpha_bar is 0 in float64 from about 70,000."""
    long = schedules.from_betas(schedules.betas("linear", 20_000))
    assert long.zero_terminal_snr and not schedules.from_betas(schedules.betas("linear", 17_000)).zero_terminal_snr
    lowest = int(np.argmax(long.transitions.level.alpha < np.finfo(np.float32).tiny))
    assert 1e-80 < long.alpha_bar[lowest] < 1e-74
    x_T = jnp.full((4, 2), 0.3)

    def draw(schedule, start, prediction):
        denoiser = Denoiser(lambda x, time: -0.3 * x, prediction)
        return sampling.sample(jax.random.key(0), schedule, denoiser, x_T, sampling.ddim(), start=start)

    for call in (
        lambda: draw(long, 19_998, "eps"),
        lambda: draw(schedules.respace(long, 20), None, "score"),
        lambda: editing.sdedit(jax.random.key(0), long, lambda x, time: x, x_T, sampling.ddim(), strength=0.95),
    ):
        with pytest.raises(
            ValueError, match=r"does not determine x_0 there; .*schedules.respace\(schedule, range\(\d+\)"
        ):
            call()
    with pytest.raises(ValueError, match="alpha is 0: there eps does not determine x_0"):
        convert(x_T, x_T, long.at(jnp.array([3, 19_000, 0, 7]), x_T))
    for steps in (
        draw(long, 19_998, "v"),
        draw(long, lowest - 1, "eps"),
        draw(schedules.respace(long, range(lowest)), None, "eps"),
    ):
        assert np.isfinite(steps).all()


def test_the_text_of_a_schedule_is_one_line():
    assert repr(THOUSAND) == "Schedule(num_timesteps=1000, timesteps 0 ... 999, alpha_bar 0.9999 ... 4.03583e-05)"
    stacked = jax.tree.map(lambda table: jnp.stack([table, table]), THOUSAND)
    assert repr(stacked) == "Schedule(betas of shape (2, 1000))"


def sigmas(schedule):
    return np.sqrt((1 - schedule.alpha_bar) / schedule.alpha_bar)


def test_spacings_of_the_noise_level():
    first, last = sigmas(THOUSAND)[[0, -1]]
    for count in (2, 10, 200):
        spaced = {name: schedules.respace(THOUSAND, count, name) for name in ("karras", "log_snr", "gaussian")}
        for schedule in spaced.values():
            assert schedule.num_timesteps == count
            np.testing.assert_allclose(sigmas(schedule)[[0, -1]], [first, last], rtol=1e-9)
            np.testing.assert_allclose(schedule.timesteps[[0, -1]], [0, 999], atol=1e-9)
            np.testing.assert_allclose(np.cumprod(1 - schedule.betas), schedule.alpha_bar, rtol=1e-12)
            # The network's time is the time at which the training grid has this level.
            np.testing.assert_allclose(schedule.path.log_snr(schedule.timesteps), np.log(schedule.snr), atol=2e-5)
        rho = np.linspace(last ** (1 / 7), first ** (1 / 7), count)[::-1] ** 7  # Karras et al. 2022 eq. 5
        np.testing.assert_allclose(sigmas(spaced["karras"]), rho, rtol=1e-9)
        assert np.ptp(np.diff(np.log(spaced["log_snr"].snr))) < 1e-8
        assert np.ptp(np.diff(np.arctan(sigmas(spaced["gaussian"]) / 0.5))) < 1e-8


def test_respacing_to_explicit_network_times():
    schedule = schedules.respace(THOUSAND, [700.0, 0.5, 31.25])
    np.testing.assert_allclose(schedule.timesteps, [0.5, 31.25, 700])
    log = np.log(THOUSAND.alpha_bar)
    expected = [(log[0] + log[1]) / 2, 0.75 * log[31] + 0.25 * log[32], log[700]]
    np.testing.assert_allclose(np.log(schedule.alpha_bar), expected, rtol=1e-12)
    whole = schedules.respace(THOUSAND, [3.0, 40.0])
    np.testing.assert_allclose(whole.alpha_bar, schedules.respace(THOUSAND, [3, 40]).alpha_bar, rtol=1e-14)
    again = schedules.respace(schedules.respace(THOUSAND, 50, "karras"), 7, "log_snr")  # respaced twice
    np.testing.assert_allclose(again.alpha_bar, schedules.respace(THOUSAND, 7, "log_snr").alpha_bar, rtol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_respacing_keeps_alpha_bar(name):
    schedule = schedules.from_betas(schedules.betas(name, 1000))
    short = schedules.respace(schedule, "ddim50")
    np.testing.assert_array_equal(short.alpha_bar, schedule.alpha_bar[::20])
    np.testing.assert_allclose(np.cumprod(1 - short.betas), short.alpha_bar, rtol=1e-12)
    again = schedules.respace(short, [0, 10, 49])
    np.testing.assert_array_equal(again.timesteps, [0, 200, 980])
    assert not short.zero_terminal_snr
    assert schedules.respace(schedule, 10, spacing="trailing").zero_terminal_snr == (name == "jsd")


def test_log_snr_extends_the_table_and_is_invertible(x64):
    np.testing.assert_allclose(THOUSAND.path.log_snr(THOUSAND.timesteps), np.log(THOUSAND.snr), rtol=1e-12)
    short = schedules.respace(THOUSAND, "ddim25")
    time = jnp.array([0.0, 17.25, 500.5, 998.9])
    np.testing.assert_allclose(short.path.log_snr(time), THOUSAND.path.log_snr(time), rtol=1e-12)
    np.testing.assert_allclose(THOUSAND.path.time_at_log_snr(THOUSAND.path.log_snr(time)), time, atol=1e-8)
    long = schedules.from_betas(schedules.betas("linear", 10_000))  # alpha_bar ends near 1e-44
    np.testing.assert_allclose(long.path.log_snr(long.timesteps), np.log(long.snr), rtol=1e-9)
    middle = np.exp(np.log(THOUSAND.alpha_bar[[500, 501]]).mean())
    np.testing.assert_allclose(THOUSAND.path.log_snr(500.5), np.log(middle / (1 - middle)), rtol=1e-12)


def test_the_levels_of_a_step(x64):
    t, x = jnp.array([0, 1, 500]), jnp.zeros((3, 1))
    level, target, *_ = THOUSAND.transition(t, x)
    np.testing.assert_allclose(level.log_snr[:, 0], np.log(THOUSAND.snr[t]), rtol=1e-10)
    np.testing.assert_allclose(target.lam[1:, 0], np.log(THOUSAND.snr[t[1:] - 1]) / 2, rtol=1e-10)
    assert target.lam[0, 0] > 45 and target.sigma[0, 0] == 0  # no noise, as a finite number
    for found, expected in zip(THOUSAND.at(t, x), level, strict=True):
        np.testing.assert_array_equal(found, expected)


def assert_step(found, alpha2, sigma2, target_alpha2, target_sigma2, lost, decoder_variance=np.nan):
    """Compares a float32 step with float64 NumPy: the squares of its levels, and 1 - r for the ratio r of the SNRs."""
    is_last = target_sigma2 == 0
    beta, variance = sigma2 * lost, target_sigma2 * lost
    expected = {
        "beta": beta,
        "posterior_variance": variance,
        "posterior_mean_coef_x_0": np.sqrt(target_alpha2) * lost,
        "posterior_mean_coef_x_t": np.sqrt(alpha2 / target_alpha2) * target_sigma2 / sigma2,
        "fixed_large_variance": np.where(is_last, decoder_variance, beta),
    }
    for name, value in expected.items():
        assert getattr(found, name).dtype == jnp.float32
        np.testing.assert_allclose(getattr(found, name), value, rtol=0, atol=3e-7, err_msg=name)
        if name != "posterior_mean_coef_x_t":  # which is not small where levels are close
            np.testing.assert_allclose(getattr(found, name), value, rtol=6e-7, err_msg=name)
    log_variance = np.log(np.where(is_last, decoder_variance, variance))
    np.testing.assert_allclose(found.posterior_log_variance, log_variance, rtol=3e-7, atol=6e-7)


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_every_step_of_a_schedule_in_float32(name):
    """q(x_{t-1} | x_t, x_0) of DDPM eq. 7."""
    beta = BETAS[name]
    alpha_bar = np.cumprod(1 - beta)
    before = np.append(1.0, alpha_bar[:-1])
    decoder_variance = beta[1] * (1 - before[1]) / (1 - alpha_bar[1])
    found = schedules.from_betas(schedules.betas(name, 1000)).transition(jnp.arange(1000), jnp.zeros(1000))
    lost = beta / (1 - alpha_bar)
    assert_step(found, alpha_bar, 1 - alpha_bar, before, 1 - before, lost, decoder_variance)
    for level, squared in ((found.level, alpha_bar), (found.target, before)):
        np.testing.assert_allclose(level.alpha, np.sqrt(squared), rtol=1e-7)
        np.testing.assert_allclose(level.sigma, np.sqrt(1 - squared), rtol=1e-7)


def log_snr_pairs(kind):
    """float32 log SNRs of a noisy and a cleaner level."""
    rng = np.random.default_rng(0)
    if kind in ("close", "far"):
        low, high = {"close": (1e-5, 1e-2), "far": (1.0, 30.0)}[kind]
        noisy = np.float32(rng.uniform(-20, 20, 20_000))
        clean = np.float32(noisy + np.exp(rng.uniform(np.log(low), np.log(high), 20_000)))
        return noisy[noisy < clean], clean[noisy < clean]
    log_snr = np.float32(np.log(schedules.from_betas(schedules.betas(kind, 1000)).snr))
    pairs = [(log_snr[stride:], log_snr[:-stride]) for stride in (1, 2, 7, 100, 999)]
    return tuple(np.concatenate(side) for side in zip(*pairs, strict=True))


@pytest.mark.parametrize("kind", ["close", "far", "linear", "cosine"])
def test_the_step_between_any_two_levels(kind):
    noisy, clean = log_snr_pairs(kind)
    level, target = (NoiseLevel.at_log_snr(jnp.asarray(g), jnp.zeros(len(g))) for g in (noisy, clean))
    found = jax.jit(Transition.between)(level, target)
    g, h = np.float64(noisy), np.float64(clean)
    squares = [1 / (1 + np.exp(z)) for z in (-g, g, -h, h)]
    assert_step(found, *squares, -np.expm1(g - h))


def test_the_step_between_a_level_and_x_0():
    """The first step of a path's schedule; from pure noise, the posterior is q(x_{t-1} | x_0)."""
    schedule = schedules.from_path(schedules.rectified_flow(), [1.0, 500.0, 1000.0])
    for t in range(3):
        expected = schedule.transition(t, 0.0)
        found = Transition.between(expected.level, expected.target, schedule.path)
        assert found.path is schedule.path
        for name, a, b in zip(Transition._fields[2:-1], found[2:-1], expected[2:-1], strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-20, err_msg=name)


def test_a_network_time_at_the_end_has_the_end_s_alpha_bar():
    given = schedules.respace(JSD, [10.0, 50.5, 99.0])
    assert given.zero_terminal_snr and given.alpha_bar[-1] == 0 and given.betas[-1] == 1
    assert not schedules.respace(JSD, [10.0, 98.0]).zero_terminal_snr
