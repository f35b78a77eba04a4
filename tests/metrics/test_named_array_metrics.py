"""Array metrics by name: which metrics suit the data, and the values, also for sets that are read when needed."""

import json
import math

import numpy as np
import pytest

from diffusion_jax import data, metrics
from diffusion_jax.evaluation import features
from diffusion_jax.metrics import of_arrays, of_features
from diffusion_jax.metrics.of_arrays import LazyExamples
from diffusion_jax.pictures import draw_curves

ARRAY_METRICS = [name for name in metrics.METRICS if not metrics.needs_features([name], False)]


class Found:
    """The metrics' joint results: values and notes."""

    def __init__(self, reference, samples, names, normalization=None):
        options = metrics.Options(normalization=normalization)
        results = [metrics.METRICS[name].compute(reference, samples, options) for name in names]
        self.values = {key: value for result in results for key, value in result.values.items()}
        self.notes = [result.note for result in results if result.note]


def series(seed, n=200, slope=0.8, length=16):
    """Stationary series [n, length, 2]: an AR(1) process, and independent noise."""
    rng = np.random.default_rng(seed)
    x = np.empty((n, length, 2))
    x[:, 0] = rng.standard_normal((n, 2))
    for i in range(1, length):
        x[:, i, 0] = slope * x[:, i - 1, 0] + math.sqrt(1 - slope**2) * rng.standard_normal(n)
        x[:, i, 1] = rng.standard_normal(n)
    return x.astype(np.float32)


def own(name):
    return metrics.find_metric(f"helpers.own_networks:{name}").compute


def test_a_metric_of_the_user():
    x, y = series(1), series(2)
    assert own("mean_shift")(x, y, metrics.Options()).values == {"mean_shift": float(y.mean() - x.mean())}
    lazy = LazyExamples(lambda indices: y[indices], y.shape, y.dtype)
    assert own("several_numbers")(x, lazy, metrics.Options()).values == {
        "one": 0.5,
        "other": pytest.approx(y.sum(dtype=np.float64)),
    }
    for name, words in (
        ("not_finite", "not_finite returned not_finite=nan; a metric is a finite number"),
        ("text", "text returned text='good'; a metric is a finite number"),
        ("fid", "fid returned fid, the name of another metric; choose another name"),
    ):
        with pytest.raises(ValueError, match=words):
            own(name)(x, y, metrics.Options())
    with pytest.raises(ValueError, match="evaluation.metrics=helpers.own_networks:absent cannot be imported"):
        own("absent")
    with pytest.raises(ValueError, match="absent cannot be imported"):  # before anything is drawn
        metrics.choose_metrics(["helpers.own_networks:absent"], 1, False, False)
    names = ("helpers.own_networks:mean_shift", "energy_distance")
    assert metrics.choose_metrics(names, 1, False, False) == names


def test_a_wrong_spectrum_is_found_where_it_is():
    """The process has the same mean and covariance at one position."""
    names = ("power_spectrum", "autocorrelation", "mean_and_covariance")
    equal, found = (Found(series(1), series(3, slope=slope), names).values for slope in (0.8, 0.5))
    for name in ("power_spectrum", "autocorrelation"):
        assert abs(found[f"{name}_z"]) > 2 * found[f"{name}_z_limit"] and found[f"{name}_channel"] == 0, name
        assert abs(equal[f"{name}_z"]) < equal[f"{name}_z_limit"] + 0.5
    assert found["autocorrelation_lag"] <= 3 and found["autocorrelation_deviation"] < -0.2
    assert abs(found["covariance_z"]) < found["mean_and_covariance_z_limit"] + 1


def test_a_shift_and_a_scale_are_found():
    x, y = series(1), series(2) * np.float32(1.2) + np.array([0, 0.5], np.float32)
    y[0] = 1e6  # must not hide the other metrics
    assert Found(x, y, ("marginal_histograms",)).values["histogram_distance_channel"] == 1
    y[0] = y[1]
    values = Found(x, y, ("mean_and_covariance",)).values
    assert values["mean_channel"] == 1 and values["mean_deviation"] == pytest.approx(0.5, abs=0.1)
    assert values["covariance_channels"] == [1, 1] and values["covariance_deviation"] == pytest.approx(0.44, abs=0.15)
    moments = [of_arrays.mean_and_covariance(part).mean for part in (x, y)]
    error = np.hypot(moments[0].standard_error[1], moments[1].standard_error[1])
    assert values["mean_deviation_standard_error"] == pytest.approx(error)
    assert values["mean_z"] == pytest.approx(values["mean_deviation"] / error)


def test_the_relative_error_of_the_spectrum_is_that_of_a_ratio():
    x, y = series(1), 1.5 * series(2)
    values = Found(x, y, ("power_spectrum",)).values
    one, other = (of_arrays.power_spectrum(part) for part in (x, y))
    shell = int(np.argmin(np.abs(one.x - values["power_spectrum_frequency"])))
    at = shell, values["power_spectrum_channel"]
    ratio = other.value[at] / one.value[at]
    assert values["power_spectrum_deviation"] == pytest.approx(ratio - 1)
    relative = [part.standard_error[at] / part.value[at] for part in (one, other)]
    assert values["power_spectrum_deviation_standard_error"] == pytest.approx(ratio * np.hypot(*relative))


def test_z_of_sets_with_other_sizes_has_one_variance():
    """By hand, for numbers; the sign changes with the order of the sets."""
    rng = np.random.default_rng(0)
    one, other = rng.normal(size=(2000, 1)), rng.normal(size=(50, 1)) * 1.5
    found, swapped = (
        metrics.METRICS["mean_and_covariance"].compute(*pair, metrics.Options()).values
        for pair in ((one, other), (other, one))
    )
    variance = (2000 * one.var(ddof=1) + 50 * other.var(ddof=1)) / 2050
    expected = (other.mean() - one.mean()) / np.sqrt(variance * (1 / 2000 + 1 / 50))
    assert found["mean_z"] == pytest.approx(expected) and swapped["mean_z"] == pytest.approx(-expected)


def test_a_subset_has_all_labels_of_a_cycle():
    for classes, total, count in ((10, 50_000, 10_000), (1000, 100_000, 50_000), (3, 7, 5)):
        chosen = of_arrays.subset_indices(total, count)
        assert len(set(chosen)) == count and (np.diff(chosen) > 0).all() and 0 <= chosen[0] <= chosen[-1] < total
        if count > classes * 5:
            shares = np.bincount(chosen % classes, minlength=classes) / count * classes
            assert abs(shares - 1).max() < 6 * np.sqrt(classes / count)
    np.testing.assert_array_equal(of_arrays.subset_indices(4, 9), np.arange(4))


@pytest.mark.parametrize("count", [1, 50])
def test_the_limit_is_exceeded_in_one_of_twenty_comparisons(count):
    rng, limit = np.random.default_rng(0), metrics.largest_z(count)
    exceeded = np.mean(np.abs(rng.standard_normal((4000, count))).max(axis=1) > limit)
    assert exceeded == pytest.approx(0.05, abs=4 * math.sqrt(0.05 * 0.95 / 4000))


def test_large_sets_are_read_when_needed_and_measured_in_part(monkeypatch):
    """The numbers equal those for arrays in memory with the same examples."""
    x, y = (300 + 10 * series(seed) for seed in (1, 2))
    constants = data.Normalization((300.0, 300.0), (10.0, 10.0))

    monkeypatch.setattr(metrics, "_ENERGY_EXAMPLES", 50)
    monkeypatch.setattr(metrics, "_NEIGHBOR_BYTES", 100 * 4 * 32)
    monkeypatch.setattr(metrics, "_MAX_COVARIANCE_CHANNELS", 1)
    sources = [data.InMemory({"x": part}) for part in (x, y)]
    in_memory = [features.read_all(source, constants) for source in sources]
    monkeypatch.setattr(features, "_MAX_BYTES_IN_MEMORY", 1000)
    lazy = [features.read_all(source, constants) for source in sources]
    assert all(isinstance(part, LazyExamples) and part.dtype == part[:2].dtype == np.float32 for part in lazy)
    far = data.Normalization((3e5, 3e5), (10.0, 10.0))  # whose data units need float64
    exact = features.read_all(data.InMemory({"x": 3e5 + x.astype(np.float64)}), far, in_data_units=True)
    assert isinstance(exact, LazyExamples) and exact.dtype == exact[:2].dtype == np.float64
    np.testing.assert_allclose(in_memory[0], series(1), atol=1e-4)
    found = [Found(*sets, ARRAY_METRICS, constants).values for sets in (in_memory, lazy)]
    assert found[0] == found[1]
    values = found[0]
    assert values["energy_distance_num_examples"] == [50, 50] and values["mean_and_covariance_num_channels"] == 1
    assert values["memorization"]["num_reference"] == values["memorization"]["num_samples"] == 100
    np.testing.assert_array_equal(of_arrays.select(x, 50), x[of_arrays.subset_indices(200, 50)])


def test_a_constant_channel_has_no_autocorrelation_and_finite_numbers():
    x, y = series(1, 60), series(2, 60)
    x[..., 1], y[..., 1] = 0, 1
    found = Found(x, y, ARRAY_METRICS)
    values = found.values
    assert "autocorrelation_z" not in values and "channel 1 is constant" in found.notes[0]
    assert values["mean_z"] is None and values["mean_deviation"] == 1
    json.dumps(values, allow_nan=False)


INPUTS = {
    "moments": lambda x: of_features.moments(x.reshape(len(x), -1)),
    "pool": lambda x: x.reshape(len(x), -1),
    "examples": lambda x: x,
}
INPUTS |= {"spatial": INPUTS["moments"], "logits": INPUTS["pool"], "vectors": INPUTS["examples"]}


@pytest.mark.parametrize("name", metrics.METRICS)
def test_every_metric_gives_numbers_and_statistics_for_a_record(name):
    metric, sets = metrics.METRICS[name], (series(1, 60), series(2, 50, slope=0.2))
    assert all(len(x) >= metric.minimum for x in sets)
    found, again = (metric.compute(*map(INPUTS[metric.needs], sets), metrics.Options()) for _ in range(2))
    assert again.values == found.values
    json.dumps(found.values, allow_nan=False)
    numbers = found.values.get("memorization", found.values)
    assert any(isinstance(value, float) for value in numbers.values())
    assert all(np.isfinite(array).all() for array in found.arrays.values())
    if found.curves is not None:
        assert len(draw_curves(found.curves, "both").axes) == 2
        assert found.curves.reference.value.shape == found.curves.samples.standard_error.shape
