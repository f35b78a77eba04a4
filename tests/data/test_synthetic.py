"""The synthetic sources: their draws against their exact laws, and the laws against independent formulas."""

import dataclasses
import importlib
import pickle

import numpy as np
import pytest
from scipy import stats

from diffusion_jax import data
from diffusion_jax.config import resolve
from diffusion_jax.data import synthetic
from diffusion_jax.errors import DataError

SHAPES = {
    "series": ((16,), 2),
    "field": ((4, 6), 5),
    "volume": ((4, 2, 6), 1),
    "moons": ((), 2),
    "mixture": ((), 10),
    "conditional": ((), 2),
    "real_series": ((32,), 1),
}


def load(name, split="train", **changes):
    size, channels = SHAPES[name]
    return getattr(synthetic, name)({"image_size": size, "channels": channels, "split": split} | changes)


def spectral_z_scores(x, law_spectrum):
    """z-scores of the real and the imaginary parts of all cross spectra, without the parts that are always 0."""
    spatial = x.shape[1:-1]
    transform = np.fft.fftn(x - x.mean(axis=tuple(range(x.ndim - 1))), axes=range(1, x.ndim - 1))
    products = transform[..., :, None] * transform[..., None, :].conj() / np.prod(spatial)
    difference = products.mean(axis=0) - law_spectrum
    error = (products.real.std(axis=0) + 1j * products.imag.std(axis=0)) / np.sqrt(len(x))
    is_real = error.imag < 1e-9 * error.real
    assert np.abs(difference.imag[is_real]).max() < 1e-9 * np.abs(law_spectrum).max()
    return np.concatenate([(difference.real / error.real).ravel(), difference.imag[~is_real] / error.imag[~is_real]])


def agrees(z):
    """Whether z-scores are those of an exact law: standard normal numbers, apart from their correlations."""
    return np.abs(z).max() < 5 and 0.8 < np.sqrt(np.mean(z**2)) < 1.25


@pytest.mark.parametrize("name", SHAPES)
def test_sources_repeat_and_their_splits_share_no_example(name):
    train, again, test = load(name), load(name), load(name, split="test")
    if name != "real_series":
        assert (len(train), len(test)) == (20_000, 4_000)
    size, channels = SHAPES[name]
    indices = np.array([5, 0, 5, len(train) - 1])
    batch = train.read(indices)
    assert batch["x"].shape == (4, *size, channels) and batch["x"].dtype == np.float32
    assert set(batch) == ({"x", "condition"} if name == "conditional" else {"x"})
    for key, values in pickle.loads(pickle.dumps(train)).read(indices).items():
        assert (values == batch[key]).all()
    assert (again.arrays["x"] == train.arrays["x"]).all()
    rows = np.concatenate([train.arrays["x"], test.arrays["x"]]).reshape(len(train) + len(test), -1)
    is_recorded = name == "real_series"  # whose windows may agree by their rounding
    assert is_recorded or len(np.unique(rows, axis=0)) == len(rows)


# ---- Series


def simulate_series(law, rng, count, length):
    """The series as autoregressive recursions, whose covariances need no matrix: a complex one, and one for each channel."""
    start, steps = 8, length + 8

    def recursion(coefficient, noise):
        values = np.empty_like(noise)
        values[:, 0] = noise[:, 0]
        for s in range(1, steps):
            values[:, s] = coefficient * values[:, s - 1] + np.sqrt(1 - abs(coefficient) ** 2) * noise[:, s]
        return values

    rotation = np.exp(-1 / law.damping + 2j * np.pi * law.frequency)
    parts = rng.standard_normal((2, count, steps))
    oscillation = recursion(rotation, parts[0] + 1j * parts[1]).real
    shared, own = rng.standard_normal((count, steps)), rng.standard_normal((2, count, steps))
    rough = [
        recursion(np.exp(-1 / law.roughness), np.sqrt(law.correlation) * shared + np.sqrt(1 - law.correlation) * noise)
        for noise in own
    ]
    channels = [
        mean + scale * (a * np.roll(oscillation, int(delay), axis=1) + np.sqrt(1 - a**2) * v)
        for mean, scale, a, delay, v in zip(law.means, law.scales, law.oscillating, law.delays, rough, strict=True)
    ]
    return np.stack(channels, axis=-1)[:, start:]


@pytest.mark.parametrize("draw", ["source", "recursion"])
def test_the_spectrum_of_series_is_the_exact_one_and_no_other(draw):
    law = synthetic.SERIES
    x = load("series").arrays["x"] if draw == "source" else simulate_series(law, np.random.default_rng(3), 20_000, 16)
    assert agrees(spectral_z_scores(x, law.spectrum(16)))
    for change in (
        {"frequency": 0.13},
        {"damping": 12.0},
        {"roughness": 5.0},
        {"correlation": 0.4},
        {"delays": (2.0, 0.0)},
        {"oscillating": (0.85, 0.6)},
    ):
        assert not agrees(spectral_z_scores(x, dataclasses.replace(law, **change).spectrum(16))), change


def test_the_covariance_of_series_is_that_of_the_draws():
    law, x = synthetic.SERIES, load("series").arrays["x"].reshape(20_000, -1).astype(np.float64)
    exact = law.covariance(16).reshape(32, 32)
    centered = x - np.tile(law.means, 16)
    products = centered[:, :, None] * centered[:, None, :]
    z = (products.mean(axis=0) - exact) / (products.std(axis=0) / np.sqrt(len(x)))
    assert np.abs(z).max() < 5
    np.testing.assert_allclose(exact, exact.T, rtol=1e-12)
    np.testing.assert_allclose(np.diag(exact), np.tile(np.square(law.scales), 16), rtol=1e-12)


def test_the_entropy_of_series_is_the_mean_of_minus_log_density():
    law = synthetic.SERIES
    x = load("series", split="test").arrays["x"].reshape(4_000, -1).astype(np.float64)
    values = -stats.multivariate_normal(np.tile(law.means, 16), law.covariance(16).reshape(32, 32)).logpdf(x) / 32
    assert abs(values.mean() - law.entropy(16)) < 4 * values.std() / np.sqrt(4_000)
    assert np.isclose(
        law.entropy(1), stats.multivariate_normal(np.zeros(2), law.cross_covariance([0])[0]).entropy() / 2
    )


# ---- Fields and volumes


@pytest.mark.parametrize("name", ["field", "volume"])
def test_the_spectrum_of_periodic_arrays_is_the_exact_one_and_no_other(name):
    source = load(name)
    law, x, shape = getattr(synthetic, name.upper()), source.arrays["x"], SHAPES[name][0]
    assert agrees(spectral_z_scores(x, law.spectrum(shape)))
    changes = [{"exponents": tuple(1.1 * e for e in law.exponents)}, {"noise": 0.06}]
    changes.append({"lengths": tuple(row[::-1] for row in law.lengths)})
    if name == "field":
        changes.append({"shifts": tuple((-a, -b) for a, b in law.shifts)})
        changes.append({"mixing": ((0.9, -0.3, 0.0, 0.2, 0.0), *law.mixing[1:])})
    for change in changes:
        assert not agrees(spectral_z_scores(x, dataclasses.replace(law, **change).spectrum(shape))), change
    means = x.astype(np.float64).mean(axis=tuple(range(1, x.ndim - 1)))
    assert np.abs((means.mean(axis=0) - law.means) / (means.std(axis=0) / np.sqrt(len(x)))).max() < 4.5


def test_a_shift_of_a_channel_moves_it_by_whole_positions():
    law = synthetic.FieldLaw(
        means=(0.0, 0.0),
        scales=(1.0, 1.0),
        mixing=((1.0,), (1.0,)),
        lengths=((1.5, 1.0),),
        exponents=(1.0,),
        shifts=((0, 0), (1, 2)),
        noise=0.0,
    )
    x = law.sample(np.random.default_rng(0), 3, (6, 8))
    np.testing.assert_allclose(x[..., 1], np.roll(x[..., 0], (1, 2), axis=(1, 2)), atol=1e-12)


@pytest.mark.parametrize("law, shape", [(synthetic.FIELD, (4, 5)), (synthetic.VOLUME, (3, 4, 2))])
def test_entropy_and_covariance_of_periodic_arrays_are_those_of_the_whole_matrix(law, shape):
    table = law.cross_covariance(shape)
    positions = list(np.ndindex(*shape))
    matrix = np.block([[table[tuple(np.subtract(a, b) % shape)] for b in positions] for a in positions])
    np.testing.assert_allclose(matrix, matrix.T, atol=1e-9 * np.abs(matrix).max())
    size = len(matrix)
    exact = 0.5 * np.log(2 * np.pi * np.e) + 0.5 * np.linalg.slogdet(matrix)[1] / size
    assert np.isclose(law.entropy(shape), exact, rtol=1e-10)
    x = law.sample(np.random.default_rng(1), 20_000, shape)
    x = x.reshape(20_000, -1) - np.tile(law.means, size // len(law.means))
    products = x[:, : len(law.means), None] * x[:, None, :]  # of the first position with all
    z = (products.mean(axis=0) - matrix[: len(law.means)]) / (products.std(axis=0) / np.sqrt(len(x)))
    assert np.abs(z).max() < 5


# ---- Vectors


def test_the_density_of_moons_is_that_of_the_draws():
    law, rng = synthetic.MOONS, np.random.default_rng(0)
    points = np.array([[1.0, 0.0], [0.5, 0.25], [0.0, 0.5], [-1.1, -0.2], [2.0, 0.3]])
    angles = rng.uniform(0, np.pi, 400_000)
    upper = np.stack([np.cos(angles), np.sin(angles)], axis=-1)
    lower = np.stack([1 - np.cos(angles), 0.5 - np.sin(angles)], axis=-1)
    for point, exact in zip(points, np.exp(law.log_density(points)), strict=True):
        kernels = sum(np.exp(-np.square(point - c).sum(axis=-1) / 0.02) for c in (upper, lower)) / (4 * np.pi * 0.01)
        assert abs(kernels.mean() - exact) < 5 * kernels.std() / np.sqrt(len(kernels))
    x = load("moons").arrays["x"].astype(np.float64)
    for candidate in (law, dataclasses.replace(law, noise=0.11)):
        values = -candidate.log_density(x) / 2  # their mean is the entropy if the candidate is the law of the draws
        assert (abs(values.mean() - candidate.entropy()) < 4 * values.std() / np.sqrt(len(x))) == (candidate is law)


def test_the_density_of_the_mixture_is_scipys_and_its_entropy_lies_between_its_bounds():
    law, x = synthetic.MIXTURE, load("mixture", split="test").arrays["x"].astype(np.float64)
    normals = [stats.multivariate_normal(m, c) for m, c in zip(law.means, law.covariances, strict=True)]
    density = sum(w * normal.pdf(x) for w, normal in zip(law.weights, normals, strict=True))
    np.testing.assert_allclose(law.log_density(x), np.log(density), rtol=1e-9)
    estimate = law.entropy(np.random.default_rng(0), 100_000)
    # Modes that do not overlap have the upper bound, modes that coincide the lower one.
    lower = np.dot(law.weights, [normal.entropy() for normal in normals]) / 10
    upper = lower - np.dot(law.weights, np.log(law.weights)) / 10
    assert lower + 4 * estimate.standard_error < estimate.value < upper + 4 * estimate.standard_error
    test = -law.log_density(x) / 10
    assert abs(test.mean() - estimate.value) < 4 * np.hypot(test.std() / np.sqrt(len(x)), estimate.standard_error)


def test_the_modes_of_the_mixture_have_their_weights():
    law, x = synthetic.MIXTURE, load("mixture").arrays["x"].astype(np.float64)
    assert np.isclose(sum(law.weights), 1)
    shares = np.bincount(law.mode_of(x), minlength=5) / len(x)
    posterior = np.exp(law.log_joint(x) - law.log_density(x)[:, None])
    np.testing.assert_allclose(posterior.mean(axis=0), shares, atol=1e-3)  # modes hardly overlap
    error = np.sqrt(shares * (1 - shares) / len(x))
    assert (np.abs(posterior.mean(axis=0) - law.weights) < 4 * error).all()
    assert (np.abs(shares - 0.2) > 4 * error).all()


def test_vectors_follow_their_condition():
    law, arrays = synthetic.CONDITIONAL, load("conditional").arrays
    c, x = arrays["condition"].astype(np.float64), arrays["x"].astype(np.float64)
    assert c.shape == (20_000, 1) and c.min() >= 0 and c.max() <= 4
    place = np.floor(c[:, 0] * 5).astype(int)
    for k in range(20):
        inside = place == k
        residual = (x - law.mean(c))[inside] / law.standard_deviation(c)[inside]
        assert np.abs(residual.mean(axis=0)).max() < 4.5 / np.sqrt(inside.sum())
        assert np.abs(residual.var(axis=0) - 1).max() < 4.5 * np.sqrt(2 / inside.sum())
        assert abs(np.corrcoef(residual.T)[0, 1] - 0.6) < 4.5 * 0.64 / np.sqrt(inside.sum())
    np.testing.assert_allclose(law.mean(np.array([[np.pi / 4]])), [[0.0, np.pi / 4]], atol=1e-12)


def test_the_density_of_vectors_with_a_condition_is_scipys():
    law, rng = synthetic.CONDITIONAL, np.random.default_rng(2)
    c = law.sample_conditions(rng, 20_000)
    x = law.sample(rng, c)
    for i in range(5):
        variance = law.standard_deviation(c[i : i + 1])[0, 0] ** 2
        normal = stats.multivariate_normal(law.mean(c[i : i + 1])[0], variance * np.array([[1, 0.6], [0.6, 1]]))
        assert np.isclose(law.log_density(x[i : i + 1], c[i : i + 1])[0], normal.logpdf(x[i]))
    values = -law.log_density(x, c) / 2
    assert abs(values.mean() - law.entropy()) < 4 * values.std() / np.sqrt(len(c))


# ---- The recording, and refusals


def test_windows_of_the_recording_are_split_in_time():
    train, test = (load("real_series", split=split).arrays["x"][..., 0] for split in ("train", "test"))
    assert len(train) == 7500 - 124 and len(test) == 1900 - 124  # a window of 32 values spans 125 of the recording
    # A value of the recording is in the windows that start 4 values apart.
    assert (train[4:, :-1] == train[:-4, 1:]).all() and (test[4:, :-1] == test[:-4, 1:]).all()
    assert -75 < train.min() < -40 and -5 < train.max() < 20  # millivolts at rest and in a spike
    rows = {row.tobytes() for row in train}
    assert not any(row.tobytes() in rows for row in test)


@pytest.mark.parametrize(
    "name, changes, message",
    [
        ("series", {"channels": 1}, "data.channels=1: the data set 'series' has 2; use 2"),
        ("series", {"image_size": 32}, "data.image_size=32: the data set 'series' has 1 spatial axes"),
        ("mixture", {"image_size": (4,)}, r"data.image_size=\(4,\): .* use a tuple of 0, like \(\)"),
        ("field", {"split": "validation"}, "data.split='validation': the data set 'field' has 'train' and 'test'"),
        ("real_series", {"image_size": (500,)}, r"longer than the recording; use \(475,\) or less"),
    ],
)
def test_configs_that_do_not_fit_are_refused(name, changes, message):
    with pytest.raises(DataError, match=message):
        load(name, **({"split": "test"} | changes))


@pytest.mark.parametrize(
    "name, variant",
    [
        ("series", "synthetic"),
        ("series", "real"),
        ("field", None),
        ("volume", None),
        *(("vectors", v) for v in ("moons", "mixture", "conditional")),
    ],
)
def test_the_experiments_describe_their_sources(name, variant):
    config = resolve(importlib.import_module(f"configs.{name}").get_config(*([variant] if variant else [])))
    source = data.load(config.data)
    normalizations = data.find_normalizations(config.data, source)
    batch = data.Normalized(source, normalizations).read(np.arange(500))
    assert batch["x"].shape == (500, *data.example_shape(config.data))
    condition = batch.get("condition", np.zeros((500, 0)))
    assert condition.shape == (500, config.model.condition_features)
    whole = data.Normalized(source, normalizations).read(np.arange(len(source)))["x"].astype(np.float64)
    axes = tuple(range(whole.ndim - 1))
    np.testing.assert_allclose(whole.mean(axis=axes), 0, atol=1e-4)
    np.testing.assert_allclose(whole.std(axis=axes), 1, atol=1e-4)
    assert config.optimizer.decay_steps == config.training.num_steps


@pytest.mark.parametrize("name, known", [("series", "synthetic, real"), ("vectors", "moons, mixture, conditional")])
def test_an_unknown_argument_of_an_experiment_is_refused(name, known):
    with pytest.raises(ValueError, match=f"{name}.py:other: known are {known}"):
        importlib.import_module(f"configs.{name}").get_config("other")
