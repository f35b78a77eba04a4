"""Compiles a config's program for TPUs or an H100, which need not be present, and prints what the compiler knows.

    python benchmarks/tpu_program.py cifar10 v5e:2x2 [--program=train] [--json=FILE] [--text=FILE] [--config.GROUP.NAME=VALUE]
    python benchmarks/tpu_program.py cifar10 v5e:2x2 --read=FILE    # a text that --text wrote, without compiling
    python benchmarks/tpu_program.py cifar10 h100    # prints bytes only

TPUs need libtpu (`make setup EXTRA=tpu`, or pip install -r requirements/tpu.txt). An H100 needs two packages, in the version
of jax, and neither CUDA nor a GPU: pip install --no-deps jax-cuda12-plugin jax-cuda12-pjrt.

Programs: `train`, a train step; `sample`, a batch of samples with the sampler and steps of `config.sampling`; `network`, one
network call for such a batch; `features`, FID's Inception for such a batch. All numbers are of one device, and cycles are the
compiler's estimate.

CIFAR-10's train step takes about 5 minutes of CPU time and 4 GB.
"""

from __future__ import annotations

import argparse
import collections
import datetime
import importlib.metadata
import importlib.util
import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.topologies import get_topology_desc
from jax.sharding import Mesh
from ml_collections import ConfigDict

from benchmarks import work
from diffusion_jax import cli, data, models, pretrained, sampling, training
from diffusion_jax.config import resolve
from diffusion_jax.denoiser import Denoiser
from diffusion_jax.distributed import devices, hlo, sharding, topologies
from diffusion_jax.errors import UserError
from diffusion_jax.evaluation.inception import IMAGE_SIZE, Inception
from diffusion_jax.models import layers
from diffusion_jax.training.batches import abstract_batch

NOTE = "The compiler's estimate, not a measurement."
# How XLA describes an H100 to its compiler; clock, bandwidth and memory are NVIDIA's.
H100 = """
platform_name: "CUDA" device_description_str: "NVIDIA H100 80GB HBM3"
dnn_version_info { major: 9 minor: 7 } runtime_version { major: 12 minor: 8 }
gpu_device_info {
  cuda_compute_capability { major: 9 } core_count: 132 fpus_per_core: 128 threads_per_warp: 32
  threads_per_block_limit: 1024 threads_per_core_limit: 2048 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 registers_per_core_limit: 65536 registers_per_block_limit: 65536
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
  l2_cache_size: 52428800 device_memory_size: 84929347584 memory_bandwidth: 3352320000000 clock_rate_ghz: 1.98
}
"""
MIN_PADDED = 2**20  # bytes; smaller arrays are not listed

PROGRAMS: dict[str, Callable[[ConfigDict, Sequence[Any]], Any]] = {}


def lower_train(config: ConfigDict, mesh_devices: Sequence[Any]):
    """Lowers a train step."""
    program = training.build_program(config, mesh_devices)
    return program.train_step.lower(program.abstract_state, abstract_batch(config))


def lower_sample(config: ConfigDict, mesh_devices: Sequence[Any]):
    """Lowers sampling a batch, one scan."""
    from diffusion_jax.runs.sampling_setup import sampler_from_config, steps_from_config

    network, mesh, params, x, inputs = _call(config, mesh_devices)
    net = pretrained.from_config(config, jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), params))
    sampler, schedule = net.configure(
        net.denoiser(), sampler_from_config(config.sampling), *steps_from_config(config.sampling)
    )

    def sample(params, x_T, inputs, seed):
        denoiser = Denoiser(
            lambda x_t, time: network(params, x_t, time, inputs), config.diffusion.prediction, config.diffusion.variance
        )
        return sampling.sample(jax.random.key(seed), schedule, denoiser, x_T, sampler)

    return _jit(sample, mesh, (params,), (x, inputs), (jax.ShapeDtypeStruct((), jnp.uint32),))


def lower_network(config: ConfigDict, mesh_devices: Sequence[Any]):
    """Lowers a network call."""
    network, mesh, params, x, inputs = _call(config, mesh_devices)
    return _jit(lambda p, x, inputs: network(p, x, jnp.full(len(x), 500.0), inputs), mesh, (params,), (x, inputs))


def lower_features(config: ConfigDict, mesh_devices: Sequence[Any]):
    """Lowers Inception's features of a batch of resized images."""
    mesh = sharding.make_mesh(config.mesh, mesh_devices)
    x = jax.ShapeDtypeStruct((config.sampling.batch_size, IMAGE_SIZE, IMAGE_SIZE, 3), jnp.float32)
    params = jax.eval_shape(lambda: Inception().init(jax.random.key(0), jnp.zeros(x.shape)))
    return _jit(Inception().apply, mesh, (params,), (x,))


PROGRAMS |= {"train": lower_train, "sample": lower_sample, "network": lower_network, "features": lower_features}


def compile_program(name: str, config: ConfigDict, mesh_devices: Sequence[Any]):
    """Compiles one of `PROGRAMS` for devices that need not be present."""
    with layers.compiling_for(mesh_devices[0].platform):
        return PROGRAMS[name](config, mesh_devices).compile()


def _call(config: ConfigDict, mesh_devices: Sequence[Any]):
    """Returns (network(params, x_t, time, inputs), mesh, shapes of parameters, of a batch of x_t and of other inputs)."""
    program = training.build_program(config, mesh_devices)
    example = jax.eval_shape(lambda: models.initial_inputs(program.model, data.example_shape(config.data)))
    rows = {
        name: jax.ShapeDtypeStruct((config.sampling.batch_size, *leaf.shape[1:]), leaf.dtype)
        for name, leaf in example.items()
    }
    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), program.abstract_state.params)

    def network(params, x_t, time, inputs):
        return program.model.apply({"params": params}, x_t, time, **inputs)

    x = rows.pop("x_t")
    rows.pop("time")
    return network, program.mesh, params, x, rows


def _jit(function: Callable, mesh: Mesh, whole: tuple, rows: tuple, rest: tuple = ()):
    """Lowers function(*whole, *rows, *rest); `whole` and `rest` are replicated, and `rows` is split over the devices."""
    everywhere, split = sharding.replicated(mesh), sharding.batch_sharding(mesh)
    shardings = (everywhere,) * len(whole) + (split,) * len(rows) + (everywhere,) * len(rest)
    return jax.jit(function, in_shardings=shardings).lower(*whole, *rows, *rest)


def h100_devices() -> list:
    """Returns an H100 for which JAX's CUDA plugin compiles, without a GPU. Raises: UserError without the plugin."""
    if importlib.util.find_spec("jax_plugins.xla_cuda12") is None:
        version = importlib.metadata.version("jax")
        raise UserError(
            f"compiling for an H100 needs: pip install --no-deps jax-cuda12-plugin=={version} jax-cuda12-pjrt=={version}"
        )
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"  # of CUDA's libraries
    # Autotuning would run kernels.
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_autotune_level=0"
    return list(get_topology_desc(platform="cuda", target_config=H100, topology="1x1x1").devices)


# ---- What the compiler knows


def report(text: str, chip: topologies.Chip) -> dict[str, Any]:
    """Returns the numbers of a program's text: cycles by kind of work and by block, collectives, and padded arrays."""
    program = hlo.Program(text)
    kinds, blocks = collections.Counter(), collections.Counter()
    largest, padded = [], {}
    for instruction, count in program.executed():
        kind, cycles = work.kind_of_work(program, instruction), count * instruction.cycles
        op_name = work.op_name_of(instruction)
        kinds[kind] += cycles
        blocks[work.block_of_network(op_name) or "outside the network"] += cycles
        largest.append((cycles, kind, instruction.name, op_name))
        for array in work.arrays_of(instruction):
            if array.in_memory and array.padded >= max(MIN_PADDED, 1.5 * array.size):
                padded[instruction.name] = (array.dtype, array.shape, array.size, array.padded, op_name)
    seconds = program.cycles / chip.clock
    return {
        "cycles": program.cycles,
        "seconds": seconds,
        "kinds": dict(kinds.most_common()),
        "blocks": dict(blocks.most_common()),
        "largest": sorted(largest, reverse=True)[:20],
        "padded": sorted(padded.values(), key=lambda each: -each[3])[:10],
        "collectives": [each._asdict() for each in work.collectives(program)],
        "fused_collectives": work.num_fused_collectives(program),
        "float32_products": [
            work.op_name_of(i) for i, _ in program.executed() for _, d in work.products(program, i) if "f32" in d
        ],
        "host_calls": len(work.host_calls(program)),
    }


def ideal_bytes(params: int, width: int, data: int, fsdp: int, remat: bool = False) -> float:
    """Returns the bytes that a device must send in a train step, with rings.

    One gather (two with model.remat) and one reduce-scatter of the parameters around `fsdp`, in the layers' dtype (`width`
    bytes), and one all-reduce of each float32 gradient around `data`.
    """
    return (2 + remat) * (fsdp - 1) / fsdp * params * width + 2 * (data - 1) / data * (params / fsdp) * 4


def table(title: str, head: Sequence[str], rows: Iterator[Sequence[Any]]) -> None:
    """Prints a Markdown table below its title and the note."""
    print(f"\n{title}. {NOTE}\n\n| {' | '.join(head)} |\n{'|---' * len(head)}|")
    for row in rows:
        print(f"| {' | '.join(map(str, row))} |")


def print_memory(sizes: Mapping[str, float]) -> None:
    """Prints the table of bytes."""
    table("Bytes of one device", ["what", "GB"], ((name, f"{size / 1e9:.3f}") for name, size in sizes.items()))


def print_report(found: Mapping[str, Any], chip: topologies.Chip) -> None:
    """Prints the tables."""
    cycles = found["cycles"] or math.nan

    def rows(counts: Mapping[str, int]) -> Iterator[Sequence[Any]]:
        return ((name, f"{count / 1e3:,.0f}", f"{count / cycles:.1%}") for name, count in counts.items() if count)

    if "memory" in found:
        print_memory({"memory of the chip": chip.memory} | found["memory"])
        flops, moved, seconds = found["flops"], found["bytes_accessed"], found["seconds"]
        table(
            "Work of one device against the chip's peaks",
            ["what", "value", "seconds at the peak", "share of the estimated time"],
            iter(
                [
                    ("cycles", f"{cycles:,.0f}", f"{seconds:.5f}", "100%"),
                    ("FLOP", f"{flops:.4g}", f"{flops / chip.flops:.5f}", f"{flops / chip.flops / seconds:.1%}"),
                    (
                        "bytes accessed",
                        f"{moved:.4g}",
                        f"{moved / chip.bandwidth:.5f}",
                        f"{moved / chip.bandwidth / seconds:.1%}",
                    ),
                ]
            ),
        )
    table("Cycles by kind of work", ["kind", "thousand cycles", "share"], rows(found["kinds"]))
    table("Cycles by block", ["block", "thousand cycles", "share"], rows(found["blocks"]))
    largest = ((f"{c / 1e3:,.0f}", kind, name, op) for c, kind, name, op in found["largest"])
    table("Largest instructions", ["thousand cycles", "kind", "instruction", "operation"], largest)
    sent = collections.Counter()
    for each in found["collectives"]:
        sent[f"{each['kind']} over {each['devices']}"] += each["sent"]
    counts = collections.Counter(f"{each['kind']} over {each['devices']}" for each in found["collectives"])
    table("Collectives", ["kind", "number", "MB sent"], ((k, counts[k], f"{b / 1e6:,.2f}") for k, b in sent.items()))
    if found["fused_collectives"]:
        print(f"\nFusions that contain collectives, whose bytes are not counted: {found['fused_collectives']}.")
    elif found.get("ideal_bytes"):
        print(f"\nBytes sent: {sum(sent.values()) / found['ideal_bytes']:.3f} of the ideal.")
    arrays = (
        (f"{dtype}{list(shape)}", f"{size / 1e6:.2f}", f"{full / 1e6:.2f}", op)
        for dtype, shape, size, full, op in found["padded"]
    )
    table("Arrays in memory with at least 50% of padding", ["array", "MB", "MB with padding", "operation"], arrays)
    print(f"\nFloat32 products: {len(found['float32_products'])}. Calls of the host: {found['host_calls']}.")


def main(arguments: list[str] | None = None) -> None:
    """Compiles and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="a file in configs/ without .py")
    parser.add_argument("topology", help="such as v5e:2x2, v4:2x2x1, v5p:4x4x4 or v6e:8x8; or h100")
    parser.add_argument("--program", choices=PROGRAMS, default="train")
    parser.add_argument("--json", default="", help="the file to write")
    parser.add_argument("--text", default="", help="the file for the text of the program")
    parser.add_argument("--read", default="", help="a text to read instead of compiling")
    options, overrides = parser.parse_known_args(arguments)
    try:
        on_gpu = options.topology == "h100"
        chip = None if on_gpu else topologies.find_chip(options.topology)
        config = resolve(cli.parse([f"--config={options.config}", "--mode=plan", *overrides]).config)
        found: dict[str, Any] = {"date": str(datetime.date.today()), "topology": options.topology}
        found |= {"program": options.program, "config": options.config, "overrides": overrides, "note": NOTE}
        if options.read and on_gpu:
            raise UserError("--read reads the text of a TPU's program; use a topology such as v5e:2x2")
        if options.read:
            text = pathlib.Path(options.read).read_text()
        else:
            devices.silence_libraries()
            devices.start_virtual(1)
            mesh_devices = h100_devices() if on_gpu else topologies.tpu_devices(options.topology)
            names = ("jax", "jax-cuda12-plugin" if on_gpu else "libtpu", "flax")
            versions = {name: importlib.metadata.version(name) for name in names}
            target = f"{len(mesh_devices)} devices of {options.topology}"
            print(f"{options.config}, {options.program}, {target}, {versions}", flush=True)
            start, cpu = time.perf_counter(), time.process_time()
            compiled = compile_program(options.program, config, mesh_devices)
            seconds = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu}
            text, memory, cost = compiled.as_text(), compiled.memory_analysis(), compiled.cost_analysis() or {}
            parts = {"arguments": "argument", "donated arguments": "alias", "output": "output", "temporaries": "temp"}
            found |= {
                "versions": versions,
                "compile": seconds,
                "memory": {name: getattr(memory, f"{part}_size_in_bytes") for name, part in parts.items()},
                "flops": cost.get("flops"),
                "bytes_accessed": cost.get("bytes accessed"),
            }
            print("Compiled in {seconds:.0f} s, {cpu_seconds:.0f} s of CPU time.".format(**seconds))
            if options.program == "train":
                shapes = jax.eval_shape(training.build_program(config, mesh_devices).init)
                mesh = sharding.make_mesh(config.mesh, mesh_devices)
                count, width = (
                    sum(p.size for p in jax.tree.leaves(shapes.params)),
                    jnp.dtype(config.model.dtype).itemsize,
                )
                found["ideal_bytes"] = ideal_bytes(count, width, **mesh.shape, remat=bool(config.model.remat))
    except UserError as error:
        sys.exit(str(error))
    if options.text:
        pathlib.Path(options.text).write_text(text)
    if chip is None:  # a GPU's program has no estimate of cycles
        print_memory(found["memory"])
    else:
        found |= report(text, chip)
        print_report(found, chip)
    if options.json:
        pathlib.Path(options.json).write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
