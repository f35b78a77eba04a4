"""The reader of programs compiled for TPUs, on a short text; nothing is compiled."""

import json
import pathlib

import pytest

from benchmarks import tpu_program, work
from diffusion_jax.distributed import hlo, topologies
from diffusion_jax.errors import UserError

STEP = "jit(train_step)/jvp(UNet)/UNet.encode/UNet.residual_block/down_0_block_0"
# Shortened by hand from the form of a compiled train step.
TEXT = (pathlib.Path(__file__).parents[1] / "fixtures/tpu_program.txt").read_text()


def test_cycles_count_each_iteration_of_a_loop():
    program = hlo.Program(TEXT)
    assert program.cycles == 1000 + 200 + 70 + 5 * 10 + 3
    kinds, blocks = {}, {}
    for instruction, count in program.executed():
        kind, block = work.kind_of_work(program, instruction), work.block_of_network(work.op_name_of(instruction))
        kinds[kind] = kinds.get(kind, 0) + count * instruction.cycles
        blocks[block] = blocks.get(block, 0) + count * instruction.cycles
    assert {kind: cycles for kind, cycles in kinds.items() if cycles} == {
        "convolutions and products": 1000,
        "norms": 200,
        "copies": 70,
        "random numbers and dropout": 50,
        "outside the network": 3,
    }
    assert blocks == {"down_0_block_0": 1200, "": 123}
    assert work.block_of_network("jit(f)/transpose(jvp(UNet))/UNet._decode/up_1_upsample/dot") == "up_1_upsample"


def test_a_scan_has_as_many_iterations_as_the_limit_of_its_counter():
    known = ', backend_config={"known_trip_count":{"n":"5"}}'
    condition = """%cond (p: (s32[], f32[8])) -> pred[] {
  %limit = s32[]{:T(128)} constant(7)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %limit), direction=LT
}

"""
    body = TEXT.index("%body")
    text = (TEXT[:body] + condition + TEXT[body:]).replace(known, "")
    assert hlo.Program(text).cycles == 1000 + 200 + 70 + 7 * 10 + 3
    assert hlo.Program(text.replace("direction=LT", "direction=NE")).cycles == 1000 + 200 + 70 + 10 + 3


def test_a_layout_pads_the_two_fastest_axes_to_its_tile():
    (image,) = work.read_arrays("bf16[8,32,32,3]{3,2,1,0:T(8,128)(2,1)}")
    assert (image.size, image.padded, image.in_memory) == (8 * 32 * 32 * 3 * 2, 8 * 32 * 32 * 128 * 2, True)
    (image,) = work.read_arrays("f32[8,32,31,3]{2,3,1,0:T(8,128)S(1)}")  # the third axis is the fastest
    assert (image.padded, image.in_memory) == (8 * 32 * 128 * 8 * 4, False)
    scalar, vector = work.read_arrays("(s32[]{:T(128)}, f32[130]{0:T(128)})")
    assert (scalar.shape, scalar.size, vector.padded) == ((), 4, 4 * 256)


def test_bytes_of_collectives_are_those_of_a_ring():
    reduced, gathered = work.collectives(hlo.Program(TEXT))
    assert reduced == work.Collective("all-reduce", 1, 4, 2 * 3 / 4 * 72 * 4)
    assert gathered == work.Collective("all-gather", 1, 2, 1 / 2 * 20 * 2)
    mesh = "mesh['a'=2,'b'=4,'c'=3] {'a','c'}, use_global_device_ids=true"
    ordered = "mesh['a'=2,'b'=4,'c'=3], device_ids=([8,3]T(1,0)) {'b','c'}"
    for groups, devices in ((mesh, 6), (ordered, 12)):
        (named, _) = work.collectives(hlo.Program(TEXT.replace("[1,4]<=[4]", groups)))
        assert named.devices == devices
    with pytest.raises(ValueError, match="unknown groups"):
        work.collectives(hlo.Program(TEXT.replace("[1,4]<=[4]", "all")))
    assert work.num_fused_collectives(hlo.Program(TEXT)) == 0
    gather = "%all-gather.2 = f32[3,3,8,8]{3,2,1,0} all-gather(%param_1.1), dimensions={0}\n  ROOT %conv"
    assert work.num_fused_collectives(hlo.Program(TEXT.replace("ROOT %conv", gather, 1))) == 1
    # data parallelism: one all-reduce of float32 gradients; fsdp: two or three times the bfloat16 parameters.
    assert tpu_program.ideal_bytes(72, 2, data=4, fsdp=1) == reduced.sent
    assert tpu_program.ideal_bytes(72, 2, data=1, fsdp=4) == 2 * 3 / 4 * 72 * 2
    assert tpu_program.ideal_bytes(72, 2, data=1, fsdp=4, remat=True) == 3 * 3 / 4 * 72 * 2


def test_products_have_the_dtypes_of_their_operands_and_host_calls_are_found():
    program = hlo.Program(TEXT)
    products = [dtypes for instruction, _ in program.executed() for _, dtypes in work.products(program, instruction)]
    assert products == [["bf16", "f32"]] and work.host_calls(program) == []
    host = '  %cb = f32[] custom-call(%x), custom_call_target="xla_ffi_python_cpu_callback"\n  ROOT %add.1'
    assert len(work.host_calls(hlo.Program(TEXT.replace("  ROOT %add.1", host)))) == 1
    with pytest.raises(ValueError, match="ENTRY"):
        hlo.Program("HloModule empty")


def test_the_command_reads_a_text_and_writes_json(tmp_path, capsys):
    text, record = pathlib.Path(__file__).parents[1] / "fixtures/tpu_program.txt", tmp_path / "program.json"
    tpu_program.main(["digits", "v5e:2x2", f"--read={text}", f"--json={record}"])
    out = capsys.readouterr().out
    tables = [line for line in out.splitlines() if line.endswith(".") and "Cycles by" in line]
    assert len(tables) == 2 and all("estimate, not a measurement" in line for line in tables)
    assert "| down_0_block_0 | 1 | 90.7% |" in out
    found = json.loads(record.read_text())
    assert found["cycles"] == 1323 and found["float32_products"] == [f"{STEP}/conv1/conv_general_dilated"]
    assert found["seconds"] == pytest.approx(1323 / 1.5e9, rel=2e-3)


def test_a_wrong_topology_is_refused_in_one_line(monkeypatch):
    for name in ("v5e", "v9:2x2", "v5e:four", "v5e:2x2x2", "v4:4x4"):
        with pytest.raises(UserError, match=r"is not a TPU topology; use a chip \(v4, v5e, v5p, v6e\)"):
            topologies.tpu_devices(name)
    monkeypatch.setattr(topologies.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs libtpu; pip install -r requirements/tpu.txt"):
        topologies.tpu_devices("v5e:2x2")
