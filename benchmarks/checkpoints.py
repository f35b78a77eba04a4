"""Measures how long a save stops the train loop, compared with copying the same bytes, and the time to write and hash.

    python benchmarks/checkpoints.py [--config=configs/cifar10.py] [--rounds=5] [--processes=1,2,4] [--replicated]

Each entry of --processes starts that many processes with one CPU device each. The processes split the state (fsdp), or, with
--replicated, each process holds the whole state. In every round, all processes start each measurement together, and the
slowest process counts. The state has random values: only the size matters, and no network is compiled.
"""

import argparse
import json
import pathlib
import runpy
import socket
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import jax
import numpy as np
from jax.experimental import multihost_utils

from diffusion_jax import training
from diffusion_jax.distributed import devices
from diffusion_jax.training.checkpoints import Checkpoints

MEASURED = {
    "copy": "copying the bytes in memory",
    "save": "save() stops the loop for",
    "finish": "writing them in the background",
    "check": "hashing all files, on restart",
}


def seconds(function) -> float:
    """Times a call that all processes start together, in seconds."""
    multihost_utils.sync_global_devices("benchmark")
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def measure(config_file: str, rounds: int, directory: pathlib.Path, fsdp: int) -> None:
    """Prints the seconds of this process as JSON: {name: one number for each round except the first}."""
    config = runpy.run_path(config_file)["get_config"]()
    config.mesh.fsdp = fsdp
    abstract = training.build_program(config).abstract_state

    def random(leaf):
        values = np.random.default_rng(0).standard_normal(leaf.shape).astype(leaf.dtype)
        return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda index: values[index])

    state = jax.tree.map(random, abstract)
    shards = [shard for leaf in jax.tree.leaves(state) for shard in leaf.addressable_shards]
    own = [shard.data for shard in shards if shard.replica_id == 0]
    memory = [np.array(chunk, copy=True) for chunk in own]
    found = {name: [] for name in MEASURED}
    with Checkpoints(directory, kept=1) as checkpoints:
        for step in range(1, rounds + 2):
            functions = {
                "copy": lambda: [np.copyto(*pair) for pair in zip(memory, own, strict=True)],
                "save": lambda: checkpoints.save(step, state),  # noqa: B023 (called at once)
                "finish": checkpoints.finish,
                "check": checkpoints.newest_intact_step,
            }
            for name, function in functions.items():
                found[name].append(seconds(function))
    megabytes = sum(chunk.nbytes for chunk in own) / 1e6
    print(json.dumps({name: values[1:] for name, values in found.items()} | {"megabytes": megabytes}), flush=True)
    multihost_utils.sync_global_devices("benchmark")


def run(options: argparse.Namespace, num_processes: int) -> dict[str, float]:
    """Returns medians over the rounds, using the slowest process in each round, and the megabytes of all processes."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    with tempfile.TemporaryDirectory() as directory:
        command = [sys.executable, __file__, f"--config={options.config}", f"--rounds={options.rounds}"]
        command += [f"--directory={directory}", f"--fsdp={1 if options.replicated else num_processes}"]
        started = [
            subprocess.Popen([*command, f"--join={address},{num_processes},{i}"], stdout=subprocess.PIPE, text=True)
            for i in range(num_processes)
        ]
        outputs = [json.loads(process.communicate()[0].splitlines()[-1]) for process in started]
    slowest = {name: np.median(np.max([output[name] for output in outputs], axis=0)) for name in MEASURED}
    return slowest | {"megabytes": sum(output["megabytes"] for output in outputs)}


def main() -> None:
    """Prints a table for each number of processes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", default="configs/cifar10.py")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--processes", default="1,2,4")
    parser.add_argument("--replicated", action="store_true")
    for internal in ("--join", "--directory", "--fsdp"):
        parser.add_argument(internal, help=argparse.SUPPRESS)
    options = parser.parse_args()
    devices.silence_libraries()
    if options.join:
        address, count, index = options.join.split(",")
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", 1)
        jax.distributed.initialize(address, int(count), int(index))
        measure(options.config, options.rounds, pathlib.Path(options.directory), int(options.fsdp))
        return
    for count in map(int, options.processes.split(",")):
        found = run(options, count)
        print(
            f"processes: {count}; state of {found['megabytes']:,.0f} MB; medians of {options.rounds} saves after a first save"
        )
        for name, meaning in MEASURED.items():
            print(f"{meaning:35} {found[name]:7.3f} s")


if __name__ == "__main__":
    main()
