"""The lines that a launch prints about the network and the device."""

import types

import jax
import numpy as np
import pytest

from diffusion_jax import training
from diffusion_jax.runs import console, train
from helpers.array_configs import array_config, write_arrays
from helpers.configs import tiny_config

PARAMS = {
    "conv_in": {"kernel": np.zeros((3, 3, 1, 8)), "bias": np.zeros(8)},
    "down_0_block_0": {"conv1": {"kernel": np.zeros((5, 4))}},
    "down_0_attn_0": {"norm": {"norm": {"scale": np.zeros(8), "bias": np.zeros(8)}}},
}


def rows_of(text):
    """{level: (arrays, parameters, share)} of a printed table."""
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    assert cells[0] == ["Level", "Arrays", "Parameters", "Share"]
    return {name: (int(arrays), int(size.replace(",", "")), share) for name, arrays, size, share in cells[1:]}


def test_the_table_of_parameters_has_a_row_for_each_level(capsys):
    console.log_parameters(PARAMS)
    expected = {"conv_in": (2, 80, "69.0%"), "down_0": (3, 36, "31.0%")}
    assert rows_of(capsys.readouterr().out) == expected
    shapes = training.build_program(tiny_config()).abstract_state.params
    console.log_parameters(shapes)
    rows, leaves = rows_of(capsys.readouterr().out), jax.tree.leaves(shapes)
    assert sum(row[0] for row in rows.values()) == len(leaves)
    assert sum(row[1] for row in rows.values()) == sum(leaf.size for leaf in leaves)
    assert {"conv_in", "down_0", "down_1", "mid_block", "up_0", "up_1", "norm_out", "time_0"} <= set(rows)


@pytest.mark.parametrize(("backend", "deterministic"), [("gpu", False), ("gpu", True), ("cpu", False)])
def test_a_launch_prints_the_table_and_a_note_on_gpus(tmp_path, monkeypatch, capsys, backend, deterministic):
    pretended = types.SimpleNamespace(**vars(jax) | {"default_backend": lambda: backend})
    monkeypatch.setattr(train, "jax", pretended)
    config = array_config("vectors", write_arrays("vectors", tmp_path / "data.npz"), **{"training.num_steps": 1})
    config.training.update(deterministic=deterministic, sample_every=0, log_every=1, checkpoint_every=1)
    train.run(config, tmp_path / "run")
    out = capsys.readouterr().out
    assert rows_of(out) and ("add --config.training.deterministic=True" in out) == (
        backend == "gpu" and not deterministic
    )
