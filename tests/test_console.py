"""The table of parameters that a launch prints."""

import numpy as np

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
