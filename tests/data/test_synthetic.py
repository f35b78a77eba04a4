"""The synthetic sources: draws against exact distributions, and distributions against independent formulas."""

import dataclasses

import numpy as np
import pytest
from scipy import stats

from diffusion_jax import data
from diffusion_jax.data import synthetic

SHAPES = {
    "series": ((16,), 2),
    "field": ((4, 6), 5),
    "volume": ((4, 2, 6), 1),
    "moons": ((), 2),
    "conditional": ((), 2),
}


def load(name, split="train", **changes):
    size, channels = SHAPES[name]
    return getattr(synthetic, name)({"image_size": size, "channels": channels, "split": split} | changes)


def spectral_z_scores(x, law_spectrum):
    """z-scores for all cross spectra, real and imaginary parts, without the parts that are always 0."""
    spatial = x.shape[1:-1]
    transform = np.fft.fftn(x - x.mean(axis=tuple(range(x.ndim - 1))), axes=range(1, x.ndim - 1))
    products = transform[..., :, None] * transform[..., None, :].conj() / np.prod(spatial)
    difference = products.mean(axis=0) - law_spectrum
    error = (products.real.std(axis=0) + 1j * products.imag.std(axis=0)) / np.sqrt(len(x))
    is_real = error.imag < 1e-9 * error.real
    assert np.abs(difference.imag[is_real]).max() < 1e-9 * np.abs(law_spectrum).max()
    return np.concatenate([(difference.real / error.real).ravel(), difference.imag[~is_real] / error.imag[~is_real]])


def agrees(z):
    """Whether z-scores are standard normal, as for an exact distribution, apart from correlations."""
    return np.abs(z).max() < 5 and 0.8 < np.sqrt(np.mean(z**2)) < 1.25


@pytest.mark.parametrize("name", SHAPES)
def test_sources_repeat_and_their_splits_share_no_example(name):
    train, again, test = load(name), load(name), load(name, split="test")
    assert (len(train), len(test)) == (20_000, 4_000)
    size, channels = SHAPES[name]
    batch = train.read(np.array([5, 0]))
    assert batch["x"].shape == (2, *size, channels) and batch["x"].dtype == np.float32
    assert set(batch) == ({"x", "condition"} if name == "conditional" else {"x"})
    assert (again.arrays["x"] == train.arrays["x"]).all()
    rows = np.concatenate([train.arrays["x"], test.arrays["x"]]).reshape(len(train) + len(test), -1)
    assert len(np.unique(rows, axis=0)) == len(rows)


def simulate_series(distribution, rng, count, length):
    """The series as autoregressive recursions, whose covariances need no matrix: a complex one, and one for each channel."""
    start, steps = 8, length + 8

    def recursion(coefficient, noise):
        values = np.empty_like(noise)
        values[:, 0] = noise[:, 0]
        for s in range(1, steps):
            values[:, s] = coefficient * values[:, s - 1] + np.sqrt(1 - abs(coefficient) ** 2) * noise[:, s]
        return values

    rotation = np.exp(-1 / distribution.damping + 2j * np.pi * distribution.frequency)
    parts = rng.standard_normal((2, count, steps))
    oscillation = recursion(rotation, parts[0] + 1j * parts[1]).real
    shared, own = rng.standard_normal((count, steps)), rng.standard_normal((2, count, steps))
    rough = [
        recursion(
            np.exp(-1 / distribution.roughness),
            np.sqrt(distribution.correlation) * shared + np.sqrt(1 - distribution.correlation) * noise,
        )
        for noise in own
    ]
    channels = [
        mean + scale * (a * np.roll(oscillation, int(delay), axis=1) + np.sqrt(1 - a**2) * v)
        for mean, scale, a, delay, v in zip(
            distribution.means, distribution.scales, distribution.oscillating, distribution.delays, rough, strict=True
        )
    ]
    return np.stack(channels, axis=-1)[:, start:]


@pytest.mark.parametrize("draw", ["source", "recursion"])
def test_the_spectrum_of_series_is_the_exact_one_and_no_other(draw):
    distribution = synthetic.SERIES
    simulated = simulate_series(distribution, np.random.default_rng(3), 20_000, 16) if draw == "recursion" else None
    x = load("series").arrays["x"] if simulated is None else simulated
    assert agrees(spectral_z_scores(x, distribution.spectrum(16)))
    for change in (
        {"frequency": 0.13},
        {"damping": 12.0},
        {"roughness": 5.0},
        {"correlation": 0.4},
        {"delays": (2.0, 0.0)},
        {"oscillating": (0.85, 0.6)},
    ):
        assert not agrees(spectral_z_scores(x, dataclasses.replace(distribution, **change).spectrum(16))), change


def test_the_entropy_of_series_is_the_mean_of_minus_log_density():
    distribution = synthetic.SERIES
    x = load("series", split="test").arrays["x"].reshape(4_000, -1).astype(np.float64)
    normal = stats.multivariate_normal(np.tile(distribution.means, 16), distribution.covariance(16).reshape(32, 32))
    values = -normal.logpdf(x) / 32
    assert abs(values.mean() - distribution.entropy(16)) < 4 * values.std() / np.sqrt(4_000)


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["field", "volume"])
def test_the_spectrum_of_periodic_arrays_is_the_exact_one_and_no_other(name):
    source = load(name)
    distribution, x, shape = getattr(synthetic, name.upper()), source.arrays["x"], SHAPES[name][0]
    assert agrees(spectral_z_scores(x, distribution.spectrum(shape)))
    changes = [{"exponents": tuple(1.1 * e for e in distribution.exponents)}, {"noise": 0.06}]
    changes.append({"lengths": tuple(row[::-1] for row in distribution.lengths)})
    if name == "field":
        changes.append({"shifts": tuple((-a, -b) for a, b in distribution.shifts)})
        changes.append({"mixing": ((0.9, -0.3, 0.0, 0.2, 0.0), *distribution.mixing[1:])})
    for change in changes:
        assert not agrees(spectral_z_scores(x, dataclasses.replace(distribution, **change).spectrum(shape))), change
    means = x.astype(np.float64).mean(axis=tuple(range(1, x.ndim - 1)))
    assert np.abs((means.mean(axis=0) - distribution.means) / (means.std(axis=0) / np.sqrt(len(x)))).max() < 4.5


@pytest.mark.parametrize("distribution, shape", [(synthetic.FIELD, (4, 5)), (synthetic.VOLUME, (3, 4, 2))])
def test_entropy_and_covariance_of_periodic_arrays_are_those_of_the_whole_matrix(distribution, shape):
    table = distribution.cross_covariance(shape)
    positions = list(np.ndindex(*shape))
    matrix = np.block([[table[tuple(np.subtract(a, b) % shape)] for b in positions] for a in positions])
    np.testing.assert_allclose(matrix, matrix.T, atol=1e-9 * np.abs(matrix).max())
    size = len(matrix)
    exact = 0.5 * np.log(2 * np.pi * np.e) + 0.5 * np.linalg.slogdet(matrix)[1] / size
    assert np.isclose(distribution.entropy(shape), exact, rtol=1e-10)
    x = distribution.sample(np.random.default_rng(1), 20_000, shape)
    x = x.reshape(20_000, -1) - np.tile(distribution.means, size // len(distribution.means))
    products = x[:, : len(distribution.means), None] * x[:, None, :]  # covariances of the first position
    z = (products.mean(axis=0) - matrix[: len(distribution.means)]) / (products.std(axis=0) / np.sqrt(len(x)))
    assert np.abs(z).max() < 5


@pytest.mark.thorough
def test_the_density_of_moons_is_that_of_the_draws():
    distribution, rng = synthetic.MOONS, np.random.default_rng(0)
    points = np.array([[1.0, 0.0], [0.5, 0.25], [0.0, 0.5], [-1.1, -0.2], [2.0, 0.3]])
    angles = rng.uniform(0, np.pi, 400_000)
    upper = np.stack([np.cos(angles), np.sin(angles)], axis=-1)
    lower = np.stack([1 - np.cos(angles), 0.5 - np.sin(angles)], axis=-1)
    for point, exact in zip(points, np.exp(distribution.log_density(points)), strict=True):
        kernels = sum(np.exp(-np.square(point - c).sum(axis=-1) / 0.02) for c in (upper, lower)) / (4 * np.pi * 0.01)
        assert abs(kernels.mean() - exact) < 5 * kernels.std() / np.sqrt(len(kernels))
    x = load("moons").arrays["x"].astype(np.float64)
    for candidate in (distribution, dataclasses.replace(distribution, noise=0.11)):
        values = -candidate.log_density(x) / 2  # the mean is the entropy if x is drawn from the candidate
        is_entropy = abs(values.mean() - candidate.entropy()) < 4 * values.std() / np.sqrt(len(x))
        assert is_entropy == (candidate is distribution)


def test_vectors_follow_their_condition():
    distribution, arrays = synthetic.CONDITIONAL, load("conditional").arrays
    c, x = arrays["condition"].astype(np.float64), arrays["x"].astype(np.float64)
    assert c.shape == (20_000, 1) and c.min() >= 0 and c.max() <= 4
    place = np.floor(c[:, 0] * 5).astype(int)
    for k in range(20):
        inside = place == k
        residual = (x - distribution.mean(c))[inside] / distribution.standard_deviation(c)[inside]
        assert np.abs(residual.mean(axis=0)).max() < 4.5 / np.sqrt(inside.sum())
        assert np.abs(residual.var(axis=0) - 1).max() < 4.5 * np.sqrt(2 / inside.sum())
        assert abs(np.corrcoef(residual.T)[0, 1] - 0.6) < 4.5 * 0.64 / np.sqrt(inside.sum())
    residual = (x - distribution.mean(c)) / distribution.standard_deviation(c)
    log_density = stats.multivariate_normal([0, 0], [[1, 0.6], [0.6, 1]]).logpdf(residual)
    values = -(log_density - np.log(distribution.standard_deviation(c)).sum(axis=1)) / 2
    assert abs(values.mean() - distribution.entropy()) < 4 * values.std() / np.sqrt(len(c))


def test_configs_that_do_not_fit_are_refused():
    for changes, words in (
        ({"image_size": (4,)}, r"data.image_size=\(4,\): the data set 'field' has 2 spatial axes; use .*=\(16, 16\)"),
        ({"split": "validation"}, "data.split='validation': the data set 'field' has 'train' and 'test'"),
    ):
        with pytest.raises(data.DataError, match=words):
            load("field", **changes)
