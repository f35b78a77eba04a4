"""Programs of a small network, compiled for four chips by the TPU's compiler on this machine."""

import importlib.metadata
import json
import pathlib
import re
from typing import Any

import jax
import pytest

from benchmarks import tpu_program, work
from diffusion_jax import cli, training
from diffusion_jax.config import resolve
from diffusion_jax.distributed import hlo, topologies

pytestmark = pytest.mark.tpu

STEPS = 10
OVERRIDES = {
    "model.dtype": "bfloat16",
    "model.channels": 64,
    "model.channel_multipliers": (1, 2),
    "model.num_res_blocks": 1,
    "training.batch_size": 32,
    "sampling.batch_size": 32,
    "sampling.steps": STEPS,
}
# Of programs, by the versions that compiled them.
CYCLES = pathlib.Path(__file__).parents[1] / "fixtures/tpu_cycles.json"
# Sums over groups of channels, and the gradient of the softmax, are products of float32 matrices.
FLOAT32 = re.compile(r"jit\(_normalize\)|transpose.*/vmap\(BTNH,BSNH->BNTS\)")


def config_with(**overrides):
    settings = {f"--config.{name}={value}" for name, value in (OVERRIDES | overrides).items()}
    return resolve(cli.parse(["--config=cifar10", "--mode=plan", *sorted(settings)]).config)


@pytest.fixture(scope="module")
def devices():
    return topologies.tpu_devices("v5e:2x2")


def check(name: str, config, devices) -> tuple[hlo.Program, Any]:
    """Compiles a program, checks what holds for every program, and its cycles if these versions have a recorded number."""
    kind = name if name in tpu_program.PROGRAMS else "sample"
    compiled = tpu_program.compile_program(kind, config, devices)
    program = hlo.Program(compiled.as_text())
    assert program.cycles > 0 and not work.host_calls(program)
    products = {
        work.op_name_of(i) for i, _ in program.executed() for _, dtypes in work.products(program, i) if "f32" in dtypes
    }
    assert kind == "features" or not {each for each in products if not FLOAT32.search(each)}
    versions = ", ".join(f"{each} {importlib.metadata.version(each)}" for each in ("jax", "libtpu"))
    recorded = json.loads(CYCLES.read_text()).get(versions, {}).get(name)
    print(f"{versions}: {name} {program.cycles} cycles, {recorded or 'not compared: none'} recorded")
    if recorded:
        assert abs(program.cycles / recorded - 1) < 0.05
    return program, compiled


def test_a_train_step_donates_its_state_and_sends_gradients_once(devices):
    config = config_with()
    program, compiled = check("train", config, devices)
    state = training.build_program(config, devices).abstract_state
    size = sum(leaf.dtype.itemsize * leaf.size for leaf in jax.tree.leaves(state))
    assert compiled.memory_analysis().alias_size_in_bytes >= size
    sent = work.collectives(program)
    assert {each.kind for each in sent} == {"all-reduce"}
    # One for each dtype of the gradients; what else is sent are the random numbers of 32 timesteps.
    assert sum(each.sent > 100 * config.training.batch_size * 4 for each in sent) <= 2
    params = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    assert sum(each.sent for each in sent) < tpu_program.ideal_bytes(params, 2, data=4, fsdp=1)

    # With a split state, the gathered parameters are stored, in bfloat16. A jax.checkpoint around the layers, or gathers of
    # the arrays that are not split, would cost 18% or 39% more cycles.
    split = tpu_program.compile_program("train", config_with(**{"mesh.fsdp": 4}), devices)
    temporary = [each.memory_analysis().temp_size_in_bytes for each in (split, compiled)]
    split = hlo.Program(split.as_text())
    print(f"fsdp=4: {split.cycles} cycles, temporaries of {temporary[0]} bytes, data=4: {temporary[1]}")
    assert split.cycles < 1.1 * program.cycles and temporary[0] < temporary[1] + 2 * params


def test_samplers_are_one_loop_whose_step_costs_little_more_than_a_network_call(devices):
    call, _ = check("network", config_with(), devices)
    assert not work.collectives(call)
    for sampler in ("ddpm", "ddim", "dpm_solver_pp"):
        program, _ = check(sampler, config_with(**{"sampling.sampler": sampler}), devices)
        assert [each.opcode for each, _ in program.executed()].count("while") == 1
        assert STEPS * 0.5 * call.cycles < program.cycles < STEPS * 1.1 * call.cycles
        assert sum(each.sent for each in work.collectives(program)) < 10_000  # random numbers of a few keys


def test_features_send_nothing(devices, monkeypatch):
    monkeypatch.setattr(tpu_program, "IMAGE_SIZE", 96)  # 299 takes ten minutes to compile
    program, _ = check("features", config_with(**{"sampling.batch_size": 8}), devices)
    assert not work.collectives(program)
