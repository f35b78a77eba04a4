"""ADM on many devices: memory and communication of a device, and a roofline's time of a step, for docs/results/scaling.md.

    python benchmarks/scaling.py --size=256 [--compile=8]

The state and the collectives follow from the shapes by the rule of distributed/sharding.py, for any number of devices and
without compiling: two gathers and a reduce-scatter of the split parameters, an all-reduce of the others. `--compile=N`
compiles the train step for N virtual devices (minutes, and gigabytes) and compares the bytes of the compiled program.
"""

import argparse
import math
import pathlib
import sys
from typing import NamedTuple

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import jax

from configs import imagenet_adm
from diffusion_jax import data, training
from diffusion_jax.distributed import sharding
from diffusion_jax.runs import devices, plan
from diffusion_jax.training.state import initial_params

BATCH = 256  # ADM's global batch
GMACS = {"256": 1119.8, "512": 1982.3}  # of the convolutions and products of a network call for one image

# FLOPs of a train step for each multiplication of the forward pass: 2 forward, 4 backward, and the recomputation of
# model.remat, as counted in ADM-256's compiled step (7.92 TFLOP per image).
FLOPS_PER_MAC = 7.08


class Chip(NamedTuple):
    """Published figures. flops: dense bfloat16. memory: bytes. links: (largest ring, bytes/s that a device sends in it)."""

    name: str
    flops: float
    memory: float
    links: tuple[tuple[int, float], ...]

    def link(self, count: int) -> float:
        """Bytes/s of the slowest link in a ring of `count` devices."""
        return next(speed for size, speed in self.links if count <= size)


CHIPS = (
    Chip("v5e", 197e12, 16e9, ((256, 90e9),)),  # one axis of its torus, both ways at once
    Chip("H100", 989e12, 80e9, ((8, 450e9), (10**9, 50e9))),  # NVLink in a node of eight; InfiniBand, 400 Gbit/s a GPU
)
UTILIZATION = 0.4  # of the peak FLOPs, as reported for good trainers of such networks


def parameter_shapes(config) -> list[tuple[int, ...]]:
    """The shapes of the parameters."""
    model, shape = training.model_from_config(config), data.example_shape(config["data"])
    return [
        leaf.shape for leaf in jax.tree.leaves(jax.eval_shape(lambda: initial_params(jax.random.key(0), model, shape)))
    ]


def state_bytes(shapes, count: int) -> float:
    """Bytes of the parameters, the EMA and Adam's two moments, in float32, on each of `count` devices."""
    return 16 * sum(math.prod(s) / (1 if sharding.split_axis(s, count) is None else count) for s in shapes)


def sent_bytes(shapes, count: int, width: int, reduced: int) -> float:
    """Bytes that a device sends in a step: two gathers of `width` bytes per number and `reduced` reductions of that size."""
    num_split = sum(math.prod(s) for s in shapes if sharding.split_axis(s, count) is not None)
    num_replicated = sum(map(math.prod, shapes)) - num_split
    return (count - 1) / count * ((2 + reduced) * width * num_split + 2 * 4 * num_replicated)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=sorted(GMACS), default="256")
    parser.add_argument("--compile", type=int, default=0, help="devices to compile for")
    options = parser.parse_args()
    devices.silence_libraries()
    devices.start_virtual(max(1, options.compile))
    config = imagenet_adm.get_config(options.size)
    config.model.update(dtype="bfloat16", remat=True)
    shapes, activations = parameter_shapes(config), plan.activations_per_example(config)
    print(
        f"ADM-{options.size}: {sum(map(math.prod, shapes)):,} parameters, {activations / 1e9:.2f} GB of activations per image"
    )
    chips = " | ".join(f"{chip.name}: sends, computes (at {UTILIZATION:.0%}), step" for chip in CHIPS)
    print(f"| devices | images per device | GB of state | GB of activations | GB sent | {chips} |")
    for count in (1, 8, 64, 256):
        images = BATCH // count
        bytes_sent = sent_bytes(shapes, count, 2, 1)
        flops = FLOPS_PER_MAC * GMACS[options.size] * 1e9 * images
        sizes = (state_bytes(shapes, count), activations * images, bytes_sent)
        row = [count, images, *(f"{size / 1e9:.2f}" for size in sizes)]
        for chip in CHIPS:
            sends, computes = bytes_sent / chip.link(count), flops / (UTILIZATION * chip.flops)
            row.append(f"{sends:.3f} s, {computes:.2f} s, {max(sends, computes):.2f} s")
        print("| " + " | ".join(map(str, row)) + " |")
    if options.compile:
        config.model.dtype = "float32"  # the CPU's compiler would cast bfloat16 sums to float32
        config.training.batch_size = config.mesh.fsdp = options.compile
        measured = plan.estimate(config)
        state = measured.params + measured.ema + measured.optimizer
        print(f"Compiled for {options.compile}, float32, one image per device:")
        print(f"  state {state:,} bytes, by the rule {state_bytes(shapes, options.compile):,.0f}")
        print(f"  sent {measured.ring_bytes:,.0f} bytes, by the rule {sent_bytes(shapes, options.compile, 4, 2):,.0f}")
        print(f"  temporaries {measured.temporaries:,} bytes; {measured.flops_per_example / 1e9:,.1f} GFLOP per image")


if __name__ == "__main__":
    main()
