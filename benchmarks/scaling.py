"""ADM on many devices: bytes of a device, bytes it sends, and a roofline's time of a step. Makes docs/scaling.md's table.

    python benchmarks/scaling.py --size=256 [--compile=8]

The state and the collectives follow from the shapes by the rule of distributed/sharding.py, on any number of devices, without
compiling: two gathers and a reduce-scatter of what is split, an all-reduce of what is whole. `--compile=N` compiles the train
step for N virtual devices (minutes, and gigabytes) and holds the compiled program's bytes against them.
"""

import argparse
import math
import pathlib
import sys
from typing import NamedTuple

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import jax

from configs import imagenet_adm
from diffusion_jax import training
from diffusion_jax.distributed import sharding
from diffusion_jax.runs import devices, plan
from diffusion_jax.training.state import initial_params

BATCH = 256  # ADM's, of all devices together
GMACS = {"256": 1119.8, "512": 1982.3}  # of one call of the network for one image, convolutions and products counted


# A step's FLOPs for each multiplication of the forward pass: 2 forward, 4 backward, and what model.remat computes again, as
# counted in ADM-256's compiled step (7.92 TFLOP an image).
FLOPS = 7.08


class Chip(NamedTuple):
    """Published figures. links: bytes/s that a device sends in a ring, of as many devices; the next of more."""

    name: str
    flops: float  # dense bfloat16
    memory: float
    links: tuple[tuple[int, float], ...]

    def link(self, count: int) -> float:
        """Bytes/s of the slowest link in a ring of `count`."""
        return next(speed for size, speed in self.links if count <= size)


CHIPS = (
    Chip("v5e", 197e12, 16e9, ((256, 90e9),)),  # one axis of its torus, both ways at once
    Chip("H100", 989e12, 80e9, ((8, 450e9), (10**9, 50e9))),  # NVLink in a node of eight; InfiniBand, 400 Gbit/s a GPU
)
REACHED = 0.4  # of the peak: what the best trainers of such networks report


def leaves(config) -> list[tuple[int, ...]]:
    """Shapes of the parameters."""
    model, shape = training.model_from_config(config), training.input_shape(config)
    return [
        leaf.shape for leaf in jax.tree.leaves(jax.eval_shape(lambda: initial_params(jax.random.key(0), model, shape)))
    ]


def held(shapes, count: int) -> float:
    """Bytes of parameters, EMA and two moments, float32, on each of `count` devices."""
    return 16 * sum(math.prod(s) / (1 if sharding.split_axis(s, count) is None else count) for s in shapes)


def sent(shapes, count: int, width: int, reduced: int) -> float:
    """Bytes that a device sends in a step: gathers of `width` bytes a number, and `reduced` gathers' worth of reduction."""
    split = sum(math.prod(s) for s in shapes if sharding.split_axis(s, count) is not None)
    whole = sum(map(math.prod, shapes)) - split
    return (count - 1) / count * ((2 + reduced) * width * split + 2 * 4 * whole)


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
    shapes, kept = leaves(config), plan.activations_per_image(config)
    print(f"ADM-{options.size}: {sum(map(math.prod, shapes)):,} parameters, {kept / 1e9:.2f} GB kept of an image")
    chips = " | ".join(f"{chip.name}: sends, computes (at {REACHED:.0%}), step" for chip in CHIPS)
    print(f"| devices | images each | state | activations | sends | {chips} |")
    for count in (1, 8, 64, 256):
        images = BATCH // count
        bytes_sent = sent(shapes, count, 2, 1)
        flops = FLOPS * GMACS[options.size] * 1e9 * images
        row = [count, images, *(f"{size / 1e9:.2f}" for size in (held(shapes, count), kept * images, bytes_sent))]
        for chip in CHIPS:
            sends, computes = bytes_sent / chip.link(count), flops / (REACHED * chip.flops)
            row.append(f"{sends:.3f} s, {computes:.2f} s, {max(sends, computes):.2f} s")
        print("| " + " | ".join(map(str, row)) + " |")
    if options.compile:
        config.model.dtype = "float32"  # the CPU's compiler would cast bfloat16 sums to float32
        config.training.batch_size = config.mesh.fsdp = options.compile
        found = plan.measure(config)
        state = found.params + found.ema + found.optimizer
        print(f"Compiled for {options.compile}, float32, an image each:")
        print(f"  state {state:,} bytes, by the rule {held(shapes, options.compile):,.0f}")
        print(f"  sent {found.ring_bytes:,.0f} bytes, by the rule {sent(shapes, options.compile, 4, 2):,.0f}")
        print(f"  temporaries {found.temporaries:,} bytes; {found.flops_per_image / 1e9:,.1f} GFLOP an image")


if __name__ == "__main__":
    main()
