"""ADM on many devices: memory and communication of a device, and a roofline's time of a step, for docs/results/scaling.md.

    python benchmarks/scaling.py --size=256 [--compile=8]
    python benchmarks/scaling.py --memory

The state and the collectives follow from the shapes by the rule of distributed/sharding.py, for any number of devices and
without compiling: two gathers and a reduce-scatter of the split parameters, an all-reduce of the others. `--compile=N`
compiles the train step for N virtual devices (minutes, and gigabytes) and compares the bytes of the compiled program.
`--memory` prints the bytes of each part for the published networks, with the fastest settings that fit.
"""

import argparse
import itertools
import math
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from configs import cifar10, imagenet_adm, lsun_church_256
from diffusion_jax.config import resolve
from diffusion_jax.runs import devices, plan, plan_settings
from diffusion_jax.runs.plan_settings import DEVICES, UTILIZATION, sent_bytes, state_bytes

BATCH = 256  # ADM's global batch
GMACS = {"256": 1119.8, "512": 1982.3}  # of the convolutions and products of a network call for one image

# FLOPs of a train step for each multiplication of the forward pass: 2 forward, 4 backward, and the recomputation of
# model.remat, as counted in ADM-256's compiled step (7.92 TFLOP per image).
FLOPS_PER_MAC = 7.08


CHIPS = ("v5e", "h100")
NETWORKS = {
    "DDPM CIFAR-10": cifar10.get_config,
    "DDPM LSUN-256": lsun_church_256.get_config,
    "ADM-256": lambda: imagenet_adm.get_config("256"),
    "ADM-512": lambda: imagenet_adm.get_config("512"),
}


def memory() -> None:
    """Prints the parts of a device's memory for the published networks in bfloat16, with the fastest settings that fit."""
    parts = "parameters | moments | EMA | gradients | activations | backward"
    print(f"| network, batch | devices | fsdp, remat, microbatches | {parts} |")
    for name, config in NETWORKS.items():
        config = resolve(config())
        config.model.dtype = "bfloat16"
        traced = plan_settings.trace(config)
        for device, count in itertools.product(CHIPS, (1, 8, 64)):
            found = plan_settings.estimates(config, traced, count, DEVICES[device])
            best = next((each for each in found if each.total <= plan_settings.USABLE * DEVICES[device].memory), None)
            row = [f"{name}, {config.training.batch_size}", f"{count} x {device}"]
            if best is None:
                row.append("nothing fits")
            else:
                parameters = best.state / 4
                row.append(", ".join(map(str, best.settings)))
                sizes = (parameters, 2 * parameters, parameters, best.gradients, best.activations, best.working)
                row += [f"{size / 1e9:.2f}" for size in sizes]
            print("| " + " | ".join(row) + " |", flush=True)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=sorted(GMACS), default="256")
    parser.add_argument("--compile", type=int, default=0, help="devices to compile for")
    parser.add_argument("--memory", action="store_true", help="the table of memory by part, and nothing else")
    options = parser.parse_args()
    devices.silence_libraries()
    devices.start_virtual(max(1, options.compile))
    if options.memory:
        memory()
        return
    config = imagenet_adm.get_config(options.size)
    config.model.update(dtype="bfloat16", remat=True)
    shapes, activations = plan_settings.parameter_shapes(config), plan_settings.activations_per_example(config)
    print(
        f"ADM-{options.size}: {sum(map(math.prod, shapes)):,} parameters, {activations / 1e9:.2f} GB of activations per image"
    )
    chips = " | ".join(f"{chip}: sends, computes (at {UTILIZATION:.0%}), step" for chip in CHIPS)
    print(f"| devices | images per device | GB of state | GB of activations | GB sent | {chips} |")
    for count in (1, 8, 64, 256):
        images = BATCH // count
        bytes_sent = sent_bytes(shapes, count, 2, 1)
        flops = FLOPS_PER_MAC * GMACS[options.size] * 1e9 * images
        sizes = (state_bytes(shapes, count), activations * images, bytes_sent)
        row = [count, images, *(f"{size / 1e9:.2f}" for size in sizes)]
        for chip in map(DEVICES.__getitem__, CHIPS):
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
