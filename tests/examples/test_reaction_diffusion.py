"""examples/reaction_diffusion.py, the data of the second tutorial, and its config."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import config as configs
from diffusion_jax.functions import import_function
from helpers.paths import ROOT

draw, rates, simulate, statistics, compare = (
    import_function(f"{ROOT}/examples/reaction_diffusion.py:{name}")
    for name in ("draw", "rates", "simulate", "statistics", "compare")
)


def test_one_euler_step_in_float64_numpy():
    rng = np.random.default_rng(0)
    fields, kill = rng.uniform(size=(3, 5, 4, 2)), np.array([0.058, 0.061, 0.065])
    padded = np.pad(fields, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="wrap")
    around = padded[:, :-2, 1:-1] + padded[:, 2:, 1:-1] + padded[:, 1:-1, :-2] + padded[:, 1:-1, 2:]
    u, v = fields[..., 0], fields[..., 1]
    u_rate = 0.08 * (around[..., 0] - 4 * u) - u * v * v + 0.037 * (1 - u)
    v_rate = 0.04 * (around[..., 1] - 4 * v) + u * v * v - (0.037 + kill[:, None, None]) * v
    exact = np.stack([u_rate, v_rate], axis=-1)
    np.testing.assert_allclose(rates(jnp.float32(fields), jnp.float32(kill)), exact, atol=1e-6)
    np.testing.assert_allclose(simulate(jnp.float32(fields), jnp.float32(kill), 1), fields + exact, atol=1e-6)


def test_spots_minus_holes_and_the_wavelength():
    """Two spots over the borders of the torus; a ring, a spot with a hole; stripes around the torus, which are rings, too."""
    v = np.zeros((3, 24, 24))
    v[0, [0, -1]], v[0, :, 3:-3], v[0, 10:12, 10:14] = 1, 0, 1
    v[1, 5:12, 5:12], v[1, 7:9, 7:10] = 1, 0
    v[2, np.arange(24) // 4 % 2 == 0] = 1
    found = statistics(np.stack([1 - v, v], axis=-1))
    np.testing.assert_array_equal(found["spots_minus_holes"], [2, 0, 0])
    waves = np.cos(2 * np.pi * np.arange(24) / 8)[:, None] * np.ones(24)
    np.testing.assert_allclose(statistics(np.stack([waves, waves], -1)[None])["wavelength"], 8)


def kill_rates(fields):
    """The rates at which v's gains u v^2 equal its losses, with the feed rate at which u's gains equal its losses."""
    u, v = fields[..., 0], fields[..., 1]
    reaction = (u * v**2).mean((1, 2))
    return reaction / v.mean((1, 2)) - reaction / (1 - u.mean((1, 2)))


def test_the_difference_of_means_is_in_standard_errors():
    rng = np.random.default_rng(1)
    one, other = rng.uniform(size=(9, 6, 6, 2)), rng.uniform(0.1, 1, size=(9, 6, 6, 2))
    v, w = (x[..., 1].mean(axis=(1, 2)) for x in (one, other))
    exact = (w.mean() - v.mean()) / np.sqrt(v.var() / 9 + w.var() / 9)
    np.testing.assert_allclose(compare(one, other)["mean_v_z"], exact)
    with pytest.raises(ValueError, match=r"8 samples and 9 simulations; .* set evaluation.num_samples=9"):
        compare(one, other[:8])


def test_the_verdict_needs_the_kill_rates_and_the_means():
    one = np.random.default_rng(2).uniform(0.1, 0.5, size=(40, 6, 6, 2))
    for changed, within in ((0, 1), (2, 1), (3, 0)):  # at most 5% of the kill rates may be wrong
        other = one.copy()
        other[:changed, ..., 0] += 0.1
        differences = np.abs(kill_rates(other) - kill_rates(one))
        assert np.all((differences < 1e-4) | (differences > 0.0011)) and (differences > 0.001).sum() == changed
        found = compare(one, other)
        assert found["kill_within_0.001"] == pytest.approx(1 - changed / 40) and found["within_error_bars"] == within
    # A permutation of rows keeps the sums over positions, and changes the wavelength.
    shift = np.random.default_rng(3).uniform(size=(40, 1, 1))
    smooth = 0.25 + 0.1 * np.cos(2 * np.pi * (np.arange(6)[:, None] + shift) / 6)
    smooth = np.stack(2 * [smooth * np.ones(6)], axis=-1) + 1e-3 * one
    rough = smooth[:, [0, 3, 1, 4, 2, 5]]
    found = compare(smooth, rough)
    assert found["kill_within_0.001"] == 1 and abs(found["wavelength_z"]) > 3 and found["within_error_bars"] == 0


@pytest.mark.thorough
def test_patterns_obey_the_laws_and_suit_the_config():
    config = configs.experiment("patterns")
    fields, kill = draw(jax.random.key(0), 12)
    assert fields.shape[1:] == (*config.data.image_size, config.data.channels)
    found = statistics(fields)
    np.testing.assert_allclose(found["feed"], 0.037, atol=1e-4)
    np.testing.assert_allclose(found["kill"], kill, atol=1e-5)
    assert np.corrcoef(found["spots_minus_holes"], kill)[0, 1] > 0.8
