"""Terminal output: durations and bars."""

import pytest

from diffusion_jax import console, metrics


@pytest.mark.parametrize(
    ("seconds", "text"), [(62, "1:02"), (3 * 3600 + 245, "3:04:05"), (2726 * 3600, "114 days"), (47 * 3600, "47:00:00")]
)
def test_durations(seconds, text):
    assert console.format_duration(seconds) == text


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


def test_bars_count_images(capsys):
    """A bar for 300 images in two chunks does not show "2/2"."""
    assert list(console.progress_over("Reading the images")([256, 44], 300)) == [256, 44]
    assert capsys.readouterr().out.startswith("Reading the images 300/300 (100%)")
