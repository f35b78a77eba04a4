"""Normalization constants for float data: the values, the inverse, and refused data."""

import json
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import data
from diffusion_jax.config import default
from diffusion_jax.errors import DiffusionJaxError
from diffusion_jax.metrics import of_arrays


def source_of(**arrays):
    return data.InMemory(arrays)


def settings(**changes):
    return dict(default().data) | {"levels": None, "random_flip": False, "image_size": (4,), "channels": 2} | changes


def series(count=1000, dtype=np.float64, offset=(300.0, -5e6), scale=(7.0, 0.3)):
    rng = np.random.default_rng(0)
    return (rng.standard_normal((count, 4, 2)) * scale + offset).astype(dtype)


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.int64])
def test_channels_are_standardized_by_their_mean_and_deviation(dtype):
    x = series(dtype=dtype, scale=(7.0, 40.0))
    found = data.find_normalizations(settings(), source_of(x=x))["x"]
    exact = x.astype(np.float64).reshape(-1, 2)
    np.testing.assert_allclose(found.offset, exact.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(found.scale, exact.std(axis=0), rtol=1e-9)
    standardized = found.apply(x)
    assert standardized.dtype == np.float32
    # One rounding to float32, and the difference of two float64 means, which have 16 digits of 5e6 / 40.
    expected = (x.astype(np.float64) - exact.mean(axis=0)) / exact.std(axis=0)
    np.testing.assert_allclose(standardized, expected, atol=1e-9, rtol=2.0**-23)
    np.testing.assert_allclose(found.invert(standardized), x, rtol=1e-6)


def test_limits_become_the_range_of_the_model():
    config = settings(normalization="limits", limits=(-10.0, 30.0))
    x = np.array([-10.0, 10.0, 30.0, 20.0] * 2, np.float32).reshape(1, 4, 2)
    found = data.find_normalizations(config, source_of(x=x))
    np.testing.assert_allclose(found["x"].apply(x).ravel(), [-1, 0, 1, 0.5] * 2)
    source = data.Normalized(source_of(x=np.concatenate([x, x + 1])), found, bounded=["x"])
    np.testing.assert_allclose(source.read([0])["x"].ravel(), [-1, 0, 1, 0.5] * 2)
    with pytest.raises(data.DataError, match="example 1 has the value 31, outside data.limits"):
        source.read([0, 1])
    source = pickle.loads(pickle.dumps(data.Normalized(source_of(x=with_nan(series(50), 41)), {})))
    with pytest.raises(data.DataError, match="example 41 has values that are not finite"):
        source.read([3, 41, 2])


def test_conditions_are_standardized_too():
    c = np.random.default_rng(1).uniform(10, 20, (100, 3))
    images = np.zeros((100, 4, 2), np.uint8)
    for arrays, names in (({"image": images}, {"condition"}), ({"x": series(100)}, {"x", "condition"})):
        source = source_of(**arrays, condition=c)
        config = settings(levels=256 if "image" in arrays else None)
        found = data.find_normalizations(config, source)
        assert found.keys() == names
        read = data.Normalized(source, found).read(np.arange(100))
        np.testing.assert_allclose(read["condition"].mean(axis=0), 0, atol=1e-6)
        np.testing.assert_allclose(read["condition"].std(axis=0), 1, rtol=1e-6)
        stored = data.Normalization.from_json(json.loads(json.dumps(found["condition"].to_json())))
        np.testing.assert_array_equal([stored.low, stored.high], [c.min(axis=0), c.max(axis=0)])
        if "image" in arrays:
            assert read["image"] is not None and read["image"].dtype == np.uint8
    assert data.find_normalizations(settings(normalization="none"), source_of(x=series(100), condition=c)) == {}


@pytest.mark.parametrize("normalization", ["auto", "none"])
def test_examples_without_a_condition_do_not_count_and_nan_is_refused_with_its_row(normalization):
    rng = np.random.default_rng(1)
    condition, missing = rng.uniform(10, 20, (600, 2)), np.arange(600) % 3 == 1
    condition[missing] = rng.choice([np.nan, np.inf, 1e9], (missing.sum(), 1))
    x, config = series(600), settings(normalization=normalization)
    source = source_of(x=x, condition=condition, condition_missing=missing)
    found = data.find_normalizations(config, source)
    given = condition[~missing]
    standardized = (given - given.mean(axis=0)) / given.std(axis=0) if normalization == "auto" else given
    read = data.Normalized(source, found).read(np.arange(600))
    np.testing.assert_allclose(read["condition"][~missing], standardized, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(read["condition"][missing], 0)
    np.testing.assert_array_equal(read["condition_missing"], missing)
    if normalization == "auto":
        assert found["condition"].high == tuple(given.max(axis=0))
    condition[300, 1] = np.nan  # not marked
    for read in (
        lambda: data.find_normalizations(settings(), source),
        lambda: data.Normalized(source, found).read([1, 300]),
    ):
        with pytest.raises(
            data.DataError, match="example 300 has values .* not finite in its condition.*condition_missing"
        ):
            read()
    missing[:] = True
    with pytest.raises(data.DataError, match="condition_missing is True for every example"):
        data.find_normalizations(settings(), source)


def with_nan(x, row):
    x = x.copy()
    x[row, 2, 1] = np.nan
    return x


@pytest.mark.parametrize(
    ("changes", "arrays", "words"),
    [
        ({}, {"x": with_nan(series(600), 411)}, "example 411 has values that are not finite; remove or repair it"),
        (
            {},
            {"x": series(), "condition": np.r_[np.zeros(9), np.inf, np.zeros(990)][:, None]},
            "example 9 .* condition",
        ),
        (
            {},
            {"x": series(scale=(1.0, 0.0))},
            "channel 1 of the data is constant up to rounding .-5e.06 everywhere.*data.normalization",
        ),
        ({"normalization": "limits"}, {"x": series()}, "needs data.limits, the range"),
        (
            {"normalization": "none", "levels": 256},
            {"image": np.zeros((3, 4, 2), np.uint8)},
            "always become .-1, 1.*=auto",
        ),
    ],
)
def test_data_that_cannot_be_normalized_are_refused_in_one_line(changes, arrays, words):
    with pytest.raises(DiffusionJaxError, match=words) as error:
        data.find_normalizations(settings(**changes), source_of(**arrays))
    assert "\n" not in str(error.value)


def test_large_offsets_keep_the_digits_of_the_data():
    """float32 has steps of 0.5 at 5e6, more than the deviation: x float32 has a precision of 6e-8 deviations, and so must the
    data have. Smaller offsets stay float32."""
    x = series()
    found = data.find_normalizations(settings(), source_of(x=x))["x"]
    for restored in (found.invert(found.apply(x)), found.invert(jnp.asarray(found.apply(x)))):
        assert isinstance(restored, np.ndarray) and restored.dtype == np.float64
        np.testing.assert_allclose((restored - x) / x.std(axis=(0, 1)), 0, atol=1e-6)
    small = data.Normalization((300.0, -5e6), (7.0, 6e3))
    assert small.invert(np.ones((1, 2), np.float32)).dtype == np.float32
    assert isinstance(small.invert(jnp.ones((1, 2))), jax.Array)
    assert jax.jit(found.invert)(jnp.ones((1, 2))).dtype == jnp.float32


def test_the_offset_of_narrow_data_is_not_rounded():
    """The float32 number nearest to the offset is 0.09 deviations away."""
    x = 3e6 + np.float32([[[-2.0], [0.0], [1.5]]])
    standardized = data.Normalization((3e6 + 0.09,), (1.0,)).apply(x)
    np.testing.assert_allclose(standardized.ravel(), [-2.09, -0.09, 1.41], rtol=1e-6)


@pytest.mark.parametrize(("dtype", "ulp"), [(np.float32, 2.0**-27), (np.float64, 2.0**-56), (np.float16, 2.0**-14)])
def test_a_constant_channel_with_its_rounding_is_constant(dtype, ulp):
    """0.1 plus or minus one unit in the last place is constant; four units are data."""
    rng, x = np.random.default_rng(0), series(100, dtype, offset=(0.0, 0.0), scale=(1.0, 1.0))
    x[..., 1] = dtype(0.1) + rng.integers(-1, 2, x.shape[:-1]).astype(dtype) * dtype(ulp)
    assert len(np.unique(x[..., 1])) == 3
    with pytest.raises(data.DataError, match="channel 1 of the data is constant up to rounding"):
        data.find_normalizations(settings(), source_of(x=x))
    with pytest.raises(ValueError, match="channel 1 is constant"):
        of_arrays.autocorrelation(x)
    if dtype == np.float32:
        x[..., 1] = dtype(0.1) + rng.integers(-4, 5, x.shape[:-1]).astype(dtype) * dtype(ulp)
        data.find_normalizations(settings(), source_of(x=x))
        of_arrays.autocorrelation(x)


def test_channels_of_a_condition_field_have_their_own_range():
    normalization = data.Normalization((15.0, 0.0), (3.0, 0.5), (10.0, -1.0), (20.0, 1.0))
    fields = np.tile(np.array([12.0, 0.5]), (4, 6, 8, 1))
    fields[2, 3, 4, 0] = -3.0
    np.testing.assert_allclose(normalization.apply(fields), (fields - [15, 0]) / [3, 0.5], rtol=1e-6)
    note = "1 of 4 conditions are far outside the training data; samples may be noise: condition 2 has -3 at entry 0"
    assert note in normalization.describe_outside(fields)
