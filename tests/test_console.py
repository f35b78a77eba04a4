"""Terminal output: durations and bars."""

import pytest

from diffusion_jax import console


@pytest.mark.parametrize(
    ("seconds", "text"), [(62, "1:02"), (3 * 3600 + 245, "3:04:05"), (2726 * 3600, "114 days"), (47 * 3600, "47:00:00")]
)
def test_durations(seconds, text):
    assert console.format_duration(seconds) == text


def test_bars_count_images(capsys):
    """A bar for 300 images in two chunks does not show "2/2"."""
    assert list(console.progress_over("Reading the images")([256, 44], 300)) == [256, 44]
    assert capsys.readouterr().out.startswith("Reading the images 300/300 (100%)")
