"""Meshes: how a state is split, the bytes that a step sends, equal numbers on any mesh, and relaunches on another mesh."""

import dataclasses
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from diffusion_jax.distributed import devices, sharding
from helpers.configs import tiny_config
from helpers.paths import ROOT


@pytest.fixture(scope="module")
def measured():
    """The measurements of helpers/eight_devices.py."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    command = [sys.executable, "-m", "helpers.eight_devices"]
    out = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert out.returncode == 0, out.stderr[-3000:]
    return json.loads(out.stdout)


def test_split_axis_is_the_longest_divisible_axis():
    assert sharding.split_axis((3, 3, 128, 256), 8) == 3
    assert sharding.split_axis((3, 3, 256, 128), 8) == 2
    assert sharding.split_axis((3, 3, 256, 256), 8) == 3  # the last of equally long axes
    assert sharding.split_axis((1001, 512), 8) == 1
    assert sharding.split_axis((257, 511), 8) is None
    assert sharding.split_axis((256,), 8) is None and sharding.split_axis((3, 3, 128, 256), 1) is None


@pytest.mark.whole
def test_program_gathers_parameters_and_sums_gradients(measured):
    """Every split array is gathered separately, and the gradients are summed once; activations would add to the bytes.
    Arrays are gathered again in the backward pass only with model.remat. Bytes are counted from the arrays: parameters,
    two moments and the EMA."""
    program = measured["program"]
    split = program["params"] - program["whole"]
    state = 4 * (split / 8 + program["whole"])
    np.testing.assert_allclose(program["held"], state, rtol=1e-5)  # Adam's step counter, too
    assert program["held"] <= program["arguments"] <= 1.01 * state  # and the batch and the running sums
    assert state <= 1.15 * 4 * program["params"] / 8  # a small network has a larger share of biases and norms
    assert program["init_temporary"] < program["params"]  # not even one of the four copies was whole on a device
    assert sum(program["gathers"]) == split < sum(program["remat"]["gathers"]) <= 2 * split
    for sent in (program, program["remat"]):
        assert sent["kinds"] == ["all-gather", "all-reduce"]
        assert max(sent["gathers"]) <= program["largest"]
        assert sent["reduced"] <= 1.05 * program["params"]


@pytest.mark.whole
def test_remat_recomputes_every_block_with_sharded_parameters(measured):
    """model.remat repeats the first convolution in each recomputed block and nothing else; three of eight blocks have full
    resolution. Without it there is no jax.checkpoint, whose stored values TPUs cannot fuse."""
    (without, *_), (full_resolution, *_), (all_blocks, *_) = measured["program"]["traced"]
    assert (full_resolution - without, all_blocks - without) == (3, 8)
    assert [has_checkpoint for _, has_checkpoint in measured["program"]["traced"]] == [False, True, True]


@pytest.mark.whole
def test_losses_are_equal_on_every_mesh(measured):
    """The same draws and rows, so the same losses up to the order of float32 sums.

    A loss is a mean of some 500 numbers: another order changes the loss by a few 6e-8. In Adam's first steps, rounding
    errors in the smallest gradients change updates by up to the learning rate, 2e-3 here: hence 1e-5 after four.
    """
    expected = measured["trajectories"]["losses"]["1x1"]
    assert len(set(expected)) == 4 and measured["trajectories"]["same_init"]
    assert all(rows == list(range(8)) for rows in measured["trajectories"]["rows"])  # the order in which data are read
    for mesh, losses in measured["trajectories"]["losses"].items():
        np.testing.assert_allclose(losses[0], expected[0], rtol=1e-6, err_msg=mesh)
        np.testing.assert_allclose(losses, expected, rtol=1e-5, err_msg=mesh)


@pytest.mark.whole
def test_a_user_s_network_has_equal_losses_on_split_parameters(measured):
    for kind, (one, eight) in measured["own_networks"].items():
        np.testing.assert_allclose(eight, one, rtol=1e-5, err_msg=kind)
        assert len(set(one)) == 4


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"mesh.fsdp": 3}, "mesh.fsdp=3 must divide the number of devices, 8; use one of 1, 2, 4, 8"),
        ({"mesh.fsdp": 0}, "use one of 1, 2, 4, 8"),
        ({"mesh.data": 4}, "mesh.data=4 times mesh.fsdp=1 must be the number of devices, 8; use mesh.data=8, or -1"),
        ({"mesh.data": 8, "mesh.fsdp": 2}, "use mesh.data=4"),
    ],
)
def test_make_mesh_refuses_sizes_other_than_the_number_of_devices(overrides, words, monkeypatch):
    monkeypatch.setattr("jax.device_count", lambda: 8)
    with pytest.raises(ValueError, match=words):
        sharding.make_mesh(tiny_config(**overrides).mesh)


@pytest.mark.parametrize(
    ("num_devices", "batch_size", "parts", "words"),
    [
        (8, 12, 1, "multiple of the 8 devices; nearest: 8 or 16"),
        (8, 16, 4, "multiple of 32, the 8 devices times training.accumulation_steps=4; nearest: 32$"),
        (1, 6, 4, "multiple of 4, the 1 device times training.accumulation_steps=4"),
    ],
)
def test_a_batch_that_does_not_divide_names_the_nearest(num_devices, batch_size, parts, words):
    mesh = dataclasses.make_dataclass("Mesh", ["size"])(num_devices)
    with pytest.raises(ValueError, match=words):
        sharding.check_divides(batch_size, mesh, "training.batch_size", parts)


def test_the_compiler_option_is_a_user_s_to_set(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_experimental_ynn_fusion_type=-individual_convolution")
    devices.compiler_options.cache_clear()
    assert devices.compiler_options() == {}
    monkeypatch.setattr("jax.default_backend", lambda: "gpu")
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_autotune_level=2")
    devices.compiler_options.cache_clear()
    assert devices.compiler_options(deterministic=True) == {"xla_gpu_exclude_nondeterministic_ops": True}
    assert devices.compiler_options() == {}
    devices.compiler_options.cache_clear()
