"""Prints the memory of the published networks in bfloat16, itemized, for docs/results/scaling.md.

    python benchmarks/scaling.py

The estimates are from shapes and traced programs, as in `--mode=plan --config.mesh.device=h100`; nothing is compiled.
"""

import itertools
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from configs import cifar10, imagenet_adm, lsun_church_256
from diffusion_jax.config import resolve
from diffusion_jax.distributed import devices, topologies
from diffusion_jax.runs import plan

MEMORY = {"v5e": topologies.CHIPS["v5e"].memory, "h100": plan.DEVICES["h100"]}
NETWORKS = {
    "DDPM CIFAR-10": cifar10.get_config,
    "DDPM LSUN-256": lsun_church_256.get_config,
    "ADM-256": lambda: imagenet_adm.get_config("256"),
    "ADM-512": lambda: imagenet_adm.get_config("512"),
}


def main() -> None:
    """Prints the table, with the first settings that fit each device kind and count."""
    devices.silence_libraries()
    devices.start_virtual(1)
    parts = "parameters | moments | EMA | gradients | activations | backward"
    print(f"| network, batch | devices | fsdp, remat, microbatches | {parts} |")
    for name, get_config in NETWORKS.items():
        config = get_config()
        config.model.dtype = "bfloat16"
        config = resolve(config)
        traced = plan.trace(config, plan.remat_choices(config))
        for device, count in itertools.product(MEMORY, (1, 8, 64)):
            found = plan.all_estimates(config, traced, count)
            best = next((each for each in found if each.total <= plan.USABLE * MEMORY[device]), None)
            row = [f"{name}, {config.training.batch_size}", f"{count} x {device}"]
            if best is None:
                row.append("nothing fits")
            else:
                parameters = best.state / 4
                row.append(", ".join(map(str, best.settings)))
                sizes = (parameters, 2 * parameters, parameters, best.gradients, best.activations, best.working)
                row += [f"{size / 1e9:.2f}" for size in sizes]
            print("| " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()
