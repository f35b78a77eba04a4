"""How cost grows: with the batch, the resolution, the number of sampling steps, and the number of devices.

    python benchmarks/cost.py [--plot=docs/images/cost.png] [--small]

DDPM's CIFAR-10 network in float32. Measured on this machine: one call of it at several batches and resolutions, and DDIM of
several lengths. Counted where nothing is measured: FLOPs of a call from the traced program (XLA's cost analysis), activations
kept for the backward pass (as `--mode=plan`), and for devices the bytes of benchmarks/scaling.py, of ADM's 256-pixel network.
`--small` is a narrow network, to see that it runs.
"""

import argparse
import math
import pathlib
import statistics
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import jax
import jax.numpy as jnp
import numpy as np
import scaling

from configs import cifar10, imagenet_adm
from diffusion_jax import models, sampling, schedules, training
from diffusion_jax.distributed import compiler
from diffusion_jax.runs import plan
from diffusion_jax.training.state import initial_params

BATCHES, SIZES, STEPS, DEVICES = (1, 2, 4, 8, 16, 32), (16, 24, 32, 48, 64), (5, 10, 20, 50), (1, 2, 4, 8, 16, 32, 64)
COUNTED_SIZES = (*SIZES, 128, 256)


def seconds(function, *arguments, rounds: int = 5) -> float:
    """Median time of a compiled call, after two that are not counted."""
    compiled = jax.jit(function, compiler_options=compiler.options()).lower(*arguments).compile()
    taken = []
    for _ in range(rounds + 2):
        start = time.perf_counter()
        jax.block_until_ready(compiled(*arguments))
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[2:])


def table(title: str, head: list[str], rows: list[list]) -> None:
    """A table of Markdown."""
    print(f"\n{title}\n\n| {' | '.join(head)} |\n{'|---' * len(head)}|")
    for row in rows:
        cells = ("" if math.isnan(value) else f"{value:,.3g}" for value in row)
        print(f"| {' | '.join(cells)} |", flush=True)


def slope(x, y) -> float:
    """The exponent of a power law through the points."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def main() -> None:
    """Prints the tables and draws the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plot", default="")
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args()
    config = cifar10.get_config()
    config.model.channels = 32 if options.small else 128
    model = training.model_from_config(config)
    params = jax.jit(lambda: initial_params(jax.random.key(0), model, (32, 32, 3)))()

    def call(params, x):
        return model.apply({"params": params}, x, jnp.full(len(x), 500.0))

    def images(count: int, size: int = 32):
        return jnp.zeros((count, size, size, 3))

    def flops(size: int) -> float:
        shape = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
        return jax.jit(call).lower(params, shape).cost_analysis()["flops"]

    def kept(size: int) -> float:
        config.data.image_size = size
        return plan.activations_per_image(config)

    by_batch = [seconds(call, params, images(count)) for count in BATCHES]
    rows = [[count, taken, taken / count] for count, taken in zip(BATCHES, by_batch, strict=True)]
    table("A call at 32x32", ["batch", "seconds", "seconds an image"], rows)

    by_size = [seconds(call, params, images(4, size)) / 4 for size in SIZES]
    counted = [(size, flops(size) / 1e9, kept(size) / 1e6) for size in COUNTED_SIZES]
    measured = [*by_size, *[math.nan] * len(COUNTED_SIZES)]
    rows = [[size, took, *count] for (size, *count), took in zip(counted, measured, strict=False)]
    table("A call, batch 4", ["pixels", "seconds an image", "GFLOP an image", "MB kept for the backward pass"], rows)
    print(
        f"\nfrom {SIZES[1]} pixels on, seconds grow as their number to the power {slope(SIZES[1:], by_size[1:]) / 2:.2f}"
    )

    whole = schedules.from_betas(schedules.betas("linear", 1000))

    def drawing(steps: int):
        schedule = schedules.respace(whole, steps, "trailing")

        def draw(params, x_T):
            network = models.precompute_time_embeddings(model, params, schedule.timesteps)
            return sampling.sample(jax.random.key(0), schedule, network, x_T, sampling.ddim())

        return draw

    by_steps = [seconds(drawing(steps), params, images(4), rounds=3) for steps in STEPS]
    each, fixed = np.polyfit(STEPS, by_steps, 1)
    table("DDIM, batch 4", ["steps", "seconds"], [[n, took] for n, took in zip(STEPS, by_steps, strict=True)])
    print(f"\n{each:.4f} s a step and {fixed:.4f} s beside them; the call alone {by_batch[BATCHES.index(4)]:.4f} s")

    shapes = scaling.leaves(imagenet_adm.get_config("256"))
    held = [scaling.held(shapes, count) / 1e9 for count in DEVICES]
    sent = [scaling.sent(shapes, count, 2, 1) / 1e9 for count in DEVICES]
    rows = [list(row) for row in zip(DEVICES, held, sent, strict=True)]
    table("ADM-256 with mesh.fsdp", ["devices", "GB of state on each", "GB that each sends in a step"], rows)

    if options.plot:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 6), dpi=80, layout="constrained")
        panels = figure.subplots(2, 2).ravel()
        panels[0].plot(BATCHES, by_batch, "o-", label="a call, 32x32, two CPU cores")
        panels[0].set(xlabel="batch", ylabel="seconds")
        panels[1].plot(SIZES, by_size, "o-", label="seconds an image, measured")
        sides, gflop, mb = zip(*counted, strict=True)
        scale = by_size[SIZES.index(32)] / gflop[COUNTED_SIZES.index(32)]
        panels[1].plot(sides, np.multiply(gflop, scale), "--", label="the FLOPs' growth")
        panels[1].plot(sides, np.divide(mb, 1e3), "s:", label="GB kept for the backward pass")
        panels[1].set(xlabel="pixels of a side")
        panels[2].plot(STEPS, by_steps, "o-", label="DDIM, batch 4")
        panels[2].set(xlabel="sampling steps", ylabel="seconds")
        panels[3].plot(DEVICES, held, "o-", label="ADM-256: GB of state on each")
        panels[3].plot(DEVICES[1:], sent[1:], "s--", label="GB that each sends in a step")
        panels[3].set(xlabel="devices (mesh.fsdp)")
        for axes, ticks in zip(panels, (BATCHES, COUNTED_SIZES, STEPS, DEVICES), strict=True):
            axes.set(xscale="log", yscale="log")
            axes.set_xticks(ticks, map(str, ticks))
            axes.minorticks_off()
            axes.grid(alpha=0.3)
            axes.legend(fontsize=8)
        figure.savefig(options.plot)


if __name__ == "__main__":
    main()
