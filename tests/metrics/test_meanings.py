"""Texts for people name each number and its better direction."""

import numpy as np
import pytest

from diffusion_jax import data, metrics
from diffusion_jax.evaluation import compare
from helpers.array_configs import array_config
from helpers.configs import tiny_config


def test_every_number_of_an_array_metric_has_a_meaning():
    x = np.random.default_rng(0).normal(size=(2, 40, 8, 2)).astype(np.float32)
    for name in ("marginal_histograms", "mean_and_covariance", "power_spectrum", "autocorrelation"):
        values = metrics.reported_values(metrics.METRICS[name].compute(x[0], x[1], metrics.Options()).values)
        assert values and all(metrics.find_meaning(key) for key in values), name


def test_the_log_shows_directions_errors_and_limits(capsys):
    record = {"num_samples": 100, "frechet_distance": 12.0}
    record |= {"kernel_distance": 0.10671, "kernel_distance_standard_error": 0.0123, "kernel_distance_std": 0.5}
    record |= {"mean_z": -4.0, "mean_and_covariance_z_limit": 3.5, "own": 2.0, "memorization": {"close_share": 0.02}}
    compare.log_values(record)
    assert [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()] == [
        "Frechet distance 12 lower is better",
        "kernel distance 0.107 ± 0.012 lower is better",
        "z of the mean -4 closer to 0 is better; equal distributions: |z| below 3.5",
        "own 2",
        "share of near copies 0.02 lower is better; equal distributions: 0.01",
    ]


def test_few_samples_have_a_note():
    features = np.random.default_rng(0).normal(size=(50, 4))
    one, few, many = (metrics.of_features.moments(features[:n]) for n in (50, 39, 40))
    compute = metrics.METRICS["fid"].compute
    assert compute(one, few, metrics.Options()).note.startswith("39 samples for 4 dimensions: ")
    assert compute(one, many, metrics.Options()).note == ""


def test_messages_call_only_images_images():
    assert data.noun(tiny_config().data) == "images"
    assert data.noun(array_config("series", "").data) == "examples"
    assert data.noun(tiny_config(**{"data.image_size": (8, 8, 8)}).data) == "examples"


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (3.2345, 0.81, "3.2 ± 0.8"),
        (0.10671, 0.0123, "0.107 ± 0.012"),
        (1234.5, 56.0, "1234 ± 56"),
        (-0.00123, 0.0004, "-0.0012 ± 0.0004"),
        (1e-9, 2.1e-10, "1e-09 ± 2.1e-10"),
        (2.5e13, 3e11, "2.5e+13 ± 3e+11"),
        (0.123456, None, "0.1235"),
        (2.0, 0.0, "2 ± 0"),
        (2.0, float("nan"), "2 ± nan"),
    ],
)
def test_numbers_with_errors(value, error, text):
    assert metrics.format_value(value, error) == text
