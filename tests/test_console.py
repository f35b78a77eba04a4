"""Terminal output: the table of parameters, durations and bars."""

import numpy as np
import pytest

from diffusion_jax import console

PARAMS = {
    "conv_in": {"kernel": np.zeros((3, 3, 1, 8)), "bias": np.zeros(8)},
    "down_0_block_0": {"conv1": {"kernel": np.zeros((5, 4))}},
    "down_0_attn_0": {"norm": {"norm": {"scale": np.zeros(8), "bias": np.zeros(8)}}},
}


def test_the_table_of_parameters_has_a_row_for_each_level(capsys):
    console.log_parameters(PARAMS)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    header, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert header == ["Level", "Arrays", "Parameters", "Share"]
    assert rows == [["conv_in", "2", "80", "69.0%"], ["down_0", "3", "36", "31.0%"]]


@pytest.mark.parametrize(
    ("seconds", "text"), [(62, "1:02"), (3 * 3600 + 245, "3:04:05"), (2726 * 3600, "114 days"), (47 * 3600, "47:00:00")]
)
def test_durations(seconds, text):
    assert console.format_duration(seconds) == text


def test_bars_count_images(capsys):
    """Of 300 images in two chunks: not "2/2"."""
    assert list(console.progress_over("Reading the images")([256, 44], 300)) == [256, 44]
    assert capsys.readouterr().out.startswith("Reading the images 300/300 (100%)")
