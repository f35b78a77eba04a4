"""Schedules against their published definitions, in float64 NumPy written here anew."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import editing, process, sampling, schedules

NAMES = list(schedules.SCHEDULES)


@pytest.mark.parametrize(
    ("name", "first", "last"),
    [
        ("linear", 1e-4, 0.02),
        ("quadratic", 1e-4, 0.02),
        ("sigmoid", 1e-4 + 0.0199 / (1 + np.exp(6)), 1e-4 + 0.0199 / (1 + np.exp(-6))),
        ("constant", 0.02, 0.02),
        ("jsd", 1e-3, 1.0),
        ("warmup10", 1e-4, 0.02),
        ("warmup50", 1e-4, 0.02),
        (
            "cosine",
            1 - np.cos((0.001 + 0.008) / 1.008 * np.pi / 2) ** 2 / np.cos(0.008 / 1.008 * np.pi / 2) ** 2,
            0.999,
        ),
    ],
)
def test_the_first_and_last_beta_are_as_published(name, first, last):
    betas = schedules.betas(name, 1000)
    assert betas.dtype == np.float64 and betas.shape == (1000,)
    np.testing.assert_allclose(betas[[0, -1]], [first, last], rtol=1e-12)


def test_the_middle_of_each_schedule():
    linear, quadratic = schedules.betas("linear", 1000), schedules.betas("quadratic", 1000)
    np.testing.assert_allclose(np.diff(linear), 0.0199 / 999, rtol=1e-9)
    np.testing.assert_allclose(np.diff(np.sqrt(quadratic)), (np.sqrt(0.02) - 0.01) / 999, rtol=1e-9)
    np.testing.assert_allclose(1 / schedules.betas("jsd", 7), [7, 6, 5, 4, 3, 2, 1])
    assert (schedules.betas("warmup10", 1000)[99:] == 0.02).all() and schedules.betas("warmup10", 1000)[98] < 0.02
    assert (schedules.betas("warmup50", 1000)[499:] == 0.02).all() and schedules.betas("warmup50", 1000)[498] < 0.02
    # Improved DDPM eq. 17: alpha_bar itself is the squared cosine until beta is capped.
    alpha_bar = np.cumprod(1 - schedules.betas("cosine", 4000))
    f = np.cos((np.arange(1, 3990) / 4000 + 0.008) / 1.008 * np.pi / 2) ** 2
    np.testing.assert_allclose(alpha_bar[:3989], f / np.cos(0.008 / 1.008 * np.pi / 2) ** 2, rtol=1e-9)
    # JSD: x_t keeps a fraction of the signal that falls linearly, alpha_bar_t = 1 - t / T.
    np.testing.assert_allclose(np.cumprod(1 - schedules.betas("jsd", 50)), 1 - np.arange(1, 51) / 50, atol=1e-12)


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
    assert schedule.alpha_bar[-1] == pytest.approx(4.035830e-05, rel=1e-6)  # DDPM's L_T rests on it
    assert schedule.posterior_log_variance[0] == pytest.approx(-9.816725, abs=1e-6)
    np.testing.assert_array_equal(schedule.timesteps, np.arange(1000))
    assert (schedule.posterior_variance[0], schedule.posterior_mean_coef_x_0[0]) == (0.0, pytest.approx(1.0))


def test_bad_betas_are_refused():
    for bad, words in [
        ([0.1, 0.0], r"betas\[1\] is 0"),
        ([0.1, 1.5], r"betas\[1\]"),
        ([1.0, 0.1], r"betas\[0\] is 1"),
        ([], "one"),
    ]:
        with pytest.raises(ValueError, match=words):
            schedules.from_betas(bad)
    for tiny in (np.nan, 1e-17):
        with pytest.raises(ValueError, match=rf"betas\[0\] is {tiny}"):
            schedules.from_betas([tiny, 0.1])
    with pytest.raises(ValueError, match="increasing"):
        schedules.from_betas([0.1, 0.2], timesteps=[0, np.nan])
    with pytest.raises(ValueError, match="known: linear"):
        schedules.betas("lineal", 10)
    with pytest.raises(ValueError, match="at least 1"):
        schedules.betas("linear", 0)
    with pytest.raises(ValueError, match=r"\(0, 1\]"):
        schedules.betas("linear", 10, beta_end=2.0)
    with pytest.raises(ValueError, match="increasing"):
        schedules.from_betas([0.1, 0.2], timesteps=[3, 3])


@pytest.fixture(scope="module")
def thousand():
    return schedules.from_betas(schedules.betas("linear", 1000))


def indices(schedule, *args, **kwargs):
    return schedules.respace(schedule, *args, **kwargs).timesteps.astype(int).tolist()


def test_openai_strings(thousand):
    assert indices(thousand, "ddim25") == list(range(0, 1000, 40))
    assert indices(thousand, "ddim50") == list(range(0, 1000, 20))
    twenty_five = indices(thousand, "25")
    assert twenty_five == indices(thousand, 25, "openai") == [round(i * 999 / 24) for i in range(25)]
    sections = indices(thousand, "10,15,20")
    bounds = [0, 334, 667, 1000]  # the first section takes the odd step
    assert [sum(a <= i < b for i in sections) for a, b in itertools.pairwise(bounds)] == [10, 15, 20]
    assert [i for i in sections if i in (0, 333, 334, 666, 667, 999)] == [0, 333, 334, 666, 667, 999]
    assert indices(thousand, "1") == [0]
    assert indices(thousand, "1000") == list(range(1000))


def test_integers_and_indices(thousand):
    assert indices(thousand, 10) == list(range(99, 1000, 100))  # "trailing"
    assert indices(thousand, 1) == [999]
    assert indices(thousand, 10, spacing="leading") == list(range(0, 1000, 100))
    assert indices(thousand, 10, spacing="trailing") == list(range(99, 1000, 100))
    assert indices(thousand, 3, spacing="trailing") == [332, 666, 999]
    assert indices(thousand, 11, spacing="linspace") == [0, 100, 200, 300, 400, 500, 599, 699, 799, 899, 999]
    assert indices(thousand, 10, spacing="quadratic") == [int((np.sqrt(800) * i / 9) ** 2) for i in range(10)]
    assert indices(thousand, [999, 5, 0]) == [0, 5, 999]
    assert indices(thousand, np.array([7])) == [7]


def test_one_step_of_a_spacing_that_starts_at_index_0_is_refused(thousand):
    for spacing in ("leading", "linspace", "quadratic"):
        with pytest.raises(ValueError, match=f"one step of spacing '{spacing}' would be index 0"):
            schedules.respace(thousand, 1, spacing)
    for spacing in ("trailing", "karras", "log_snr", "gaussian"):
        np.testing.assert_allclose(schedules.respace(thousand, 1, spacing).timesteps, [999])
    single = schedules.from_betas([0.5])
    assert indices(single, 1, spacing="leading") == [0]


def test_schedules_whose_signal_underflows():
    """alpha is 0 in float32 from about 17,500 linear steps on; alpha_bar is 0 in float64 from about 70,000."""
    long = schedules.from_betas(schedules.betas("linear", 20_000))
    assert long.zero_terminal_snr and not schedules.from_betas(schedules.betas("linear", 17_000)).zero_terminal_snr
    lowest = int(np.argmax(long.sqrt_alpha_bar < np.finfo(np.float32).tiny))
    assert 1e-80 < long.alpha_bar[lowest] < 1e-74
    x_T = jax.random.normal(jax.random.key(0), (4, 2))
    draw = lambda schedule, start, p: sampling.sample(  # noqa: E731
        jax.random.key(0), schedule, lambda x, time: -0.3 * x, x_T, sampling.ddim(prediction=p), start=start
    )
    words = rf"does not determine x_0 there; predict v, x_0 or flow, .*schedules.respace\(schedule, range\({lowest}\)\)"
    for call in (
        lambda: draw(long, 19_998, "eps"),
        lambda: draw(schedules.respace(long, 20), None, "score"),
        lambda: process.to_x_0(long, x_T, x_T, jnp.array([3, 19_000, 0, 7])),
        lambda: editing.sdedit(jax.random.key(0), long, lambda x, time: x, x_T, sampling.ddim(), strength=0.95),
    ):
        with pytest.raises(ValueError, match=words.replace(str(lowest), r"\d+")):
            call()
    for x in (
        draw(long, 19_998, "v"),
        draw(long, lowest - 1, "eps"),
        draw(schedules.respace(long, range(lowest)), None, "eps"),
    ):
        assert np.isfinite(x).all()
    with pytest.raises(ValueError, match=r"underflows at index \d+ of 100000; use smaller betas or fewer steps"):
        schedules.from_betas(schedules.betas("linear", 100_000))


def test_the_text_of_a_schedule_is_one_line(thousand):
    assert repr(thousand) == "Schedule(num_timesteps=1000, timesteps 0 ... 999, alpha_bar 0.9999 ... 4.03583e-05)"
    stacked = jax.tree.map(lambda table: jnp.stack([table, table]), thousand)
    assert repr(stacked) == "Schedule(betas of shape (2, 1000))"


def sigmas(schedule):
    return np.sqrt((1 - schedule.alpha_bar) / schedule.alpha_bar)


def test_spacings_of_the_noise_level(thousand):
    first, last = sigmas(thousand)[[0, -1]]
    for count in (2, 10, 200):
        spaced = {name: schedules.respace(thousand, count, name) for name in ("karras", "log_snr", "gaussian")}
        for schedule in spaced.values():
            assert schedule.num_timesteps == count
            np.testing.assert_allclose(sigmas(schedule)[[0, -1]], [first, last], rtol=1e-9)
            np.testing.assert_allclose(schedule.timesteps[[0, -1]], [0, 999], atol=1e-9)
            np.testing.assert_allclose(np.cumprod(1 - schedule.betas), schedule.alpha_bar, rtol=1e-12)
            # The network's time is where the training grid has this level.
            np.testing.assert_allclose(schedule.log_snr(schedule.timesteps), np.log(schedule.snr), atol=2e-5)
        rho = np.linspace(last ** (1 / 7), first ** (1 / 7), count)[::-1] ** 7  # Karras et al. 2022 eq. 5
        np.testing.assert_allclose(sigmas(spaced["karras"]), rho, rtol=1e-9)
        assert np.ptp(np.diff(np.log(spaced["log_snr"].snr))) < 1e-8
        assert np.ptp(np.diff(np.arctan(sigmas(spaced["gaussian"]) / 0.5))) < 1e-8
    assert schedules.respace(thousand, 1, "karras").timesteps == pytest.approx([999])


def test_the_gaussian_spacing_is_the_best_for_ddim_on_gaussian_data(thousand):
    """DDIM multiplies by (s^2 + sigma sigma')/(s^2 + sigma^2), the flow by their square roots; their ratio is a product of
    cosines of steps in the angle arctan(sigma / s), largest where the steps are equal."""
    levels = sigmas(schedules.respace(thousand, 8, "gaussian"))

    def error(levels):
        high, low = levels[1:], levels[:-1]
        ddim = np.prod((0.25 + high * low) / (0.25 + high**2))
        return 1 - ddim / np.sqrt((0.25 + levels[0] ** 2) / (0.25 + levels[-1] ** 2))

    angles = np.arctan(levels / 0.5)
    assert error(levels) == pytest.approx(1 - np.cos(np.diff(angles)).prod())
    rng = np.random.default_rng(0)
    for _ in range(200):
        moved = np.sort(levels * np.append(np.append(1, np.exp(0.05 * rng.standard_normal(6))), 1))
        assert error(moved) >= error(levels)
    for name in ("karras", "log_snr"):
        assert error(sigmas(schedules.respace(thousand, 8, name))) > error(levels)


def test_respacing_to_explicit_network_times(thousand):
    schedule = schedules.respace(thousand, [700.0, 0.5, 31.25])
    np.testing.assert_allclose(schedule.timesteps, [0.5, 31.25, 700])
    log = np.log(thousand.alpha_bar)
    expected = [(log[0] + log[1]) / 2, 0.75 * log[31] + 0.25 * log[32], log[700]]
    np.testing.assert_allclose(np.log(schedule.alpha_bar), expected, rtol=1e-12)
    whole = schedules.respace(thousand, [3.0, 40.0])
    np.testing.assert_allclose(whole.alpha_bar, schedules.respace(thousand, [3, 40]).alpha_bar, rtol=1e-14)
    again = schedules.respace(schedules.respace(thousand, 50, "karras"), 7, "log_snr")  # respaced twice
    np.testing.assert_allclose(again.alpha_bar, schedules.respace(thousand, 7, "log_snr").alpha_bar, rtol=1e-12)


def test_spacings_of_the_noise_level_need_a_finite_one():
    jsd = schedules.from_betas(schedules.betas("jsd", 100))
    for name in ("karras", "log_snr", "gaussian"):
        with pytest.raises(ValueError, match="alpha_bar ends at 0; use 'trailing'"):
            schedules.respace(jsd, 10, name)
        with pytest.raises(ValueError, match=r"whole number in 1 \.\.\. 100"):
            schedules.respace(jsd, 101, name)


@pytest.mark.usefixtures("unchecked_annotations")
@pytest.mark.parametrize(
    ("steps", "words"),
    [
        ("ddim300", "use ddim334 or ddim250"),
        ("ddim0", "no integer stride"),
        ("10,,5", "write"),
        ("2000", "must lie in 1"),
        ("10,0,5", "section 1 has 333 steps; its count must lie in 1 ... 333, got 0"),
        (0, "whole number in 1"),
        (1001, "whole number in 1"),
        (2.5, "whole number"),
        ("", "write"),
        ([1, 1], "visits step 1 twice"),
        ([-1, 4], "0 ... 999"),
        ([1000], "0 ... 999"),
        ([], "explicit steps"),
        ([0.5, 999.5], "network times must lie in 0 ... 999"),
        ([0.5, 0.5], "visits step 0.5 twice"),
    ],
)
def test_impossible_respacings_are_refused(thousand, steps, words):
    with pytest.raises(ValueError, match=words):
        schedules.respace(thousand, steps)


def test_repeated_steps_and_unknown_spacings_are_refused(thousand):
    with pytest.raises(ValueError, match="fewer steps or another spacing"):
        schedules.respace(thousand, 900, spacing="quadratic")
    with pytest.raises(ValueError, match="leading, trailing"):
        schedules.respace(thousand, 10, spacing="even")


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


def test_log_snr_extends_the_table_and_is_invertible(thousand, x64):
    np.testing.assert_allclose(thousand.log_snr(thousand.timesteps), np.log(thousand.snr), rtol=1e-12)
    short = schedules.respace(thousand, "ddim25")
    time = jnp.array([0.0, 17.25, 500.5, 998.9])
    np.testing.assert_allclose(short.log_snr(time), thousand.log_snr(time), rtol=1e-12)
    np.testing.assert_allclose(thousand.time_at_log_snr(thousand.log_snr(time)), time, atol=1e-8)
    long = schedules.from_betas(schedules.betas("linear", 10_000))  # alpha_bar ends near 1e-44
    np.testing.assert_allclose(long.log_snr(long.timesteps), np.log(long.snr), rtol=1e-9)
    middle = np.exp(np.log(thousand.alpha_bar[[500, 501]]).mean())
    np.testing.assert_allclose(thousand.log_snr(500.5), np.log(middle / (1 - middle)), rtol=1e-12)


def test_a_schedule_that_jit_returned_is_not_respaced(thousand):
    """Its tables are float32, whose digits would not do."""
    with pytest.raises(ValueError, match="respace the schedule outside of jax.jit"):
        schedules.respace(jax.jit(lambda schedule: schedule)(thousand), 10)


def test_a_network_time_at_the_end_has_the_end_s_alpha_bar():
    jsd = schedules.from_betas(schedules.betas("jsd", 100))
    given = schedules.respace(jsd, [10.0, 50.5, 99.0])
    assert given.zero_terminal_snr and given.alpha_bar[-1] == 0 and given.betas[-1] == 1
    assert not schedules.respace(jsd, [10.0, 98.0]).zero_terminal_snr
