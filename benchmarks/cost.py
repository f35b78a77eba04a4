"""Measures how cost grows with the batch size, the resolution and the number of sampling steps.

    python benchmarks/cost.py [--plot=docs/images/cost.svg] [--small]

The network is DDPM's CIFAR-10 network in float32. Measured on this machine: one network call at several batch sizes and
resolutions, and DDIM with several numbers of steps. Counted, not measured: a call's FLOPs, from the traced program (XLA's
cost analysis), and the activations that the backward pass needs (as in `--mode=plan`). `--small` uses a narrow network, to
check that everything runs.
"""

import argparse
import math
import pathlib
import statistics
import sys
import time
from typing import NamedTuple

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import jax
import jax.numpy as jnp
import numpy as np

from configs import cifar10
from diffusion_jax import sampling, schedules, training
from diffusion_jax.distributed import devices
from diffusion_jax.runs import plan
from diffusion_jax.training.state import initial_params

BATCHES, SIZES, STEPS = (1, 2, 4, 8, 16, 32), (16, 24, 32, 48, 64), (5, 10, 20, 50)
COUNTED_SIZES = (*SIZES, 128, 256)


def seconds(function, *arguments, rounds: int = 5) -> float:
    """Returns the median seconds of a compiled call, after two calls that are not counted."""
    compiled = jax.jit(function, compiler_options=devices.compiler_options()).lower(*arguments).compile()
    taken = []
    for _ in range(rounds + 2):
        start = time.perf_counter()
        jax.block_until_ready(compiled(*arguments))
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[2:])


def table(title: str, head: list[str], rows: list[list]) -> None:
    """Prints a Markdown table; NaN is an empty cell."""
    print(f"\n{title}\n\n| {' | '.join(head)} |\n{'|---' * len(head)}|")
    for row in rows:
        cells = ("" if math.isnan(value) else f"{value:,.3g}" for value in row)
        print(f"| {' | '.join(cells)} |", flush=True)


def slope(x, y) -> float:
    """Returns the exponent of a power law through the points."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


class Network:
    """DDPM's CIFAR-10 network, or a narrow network, with the cost of a call."""

    def __init__(self, small: bool):
        self._config = cifar10.get_config()
        self._config.model.channels = 32 if small else 128
        self.model = training.model_from_config(self._config)
        self.params = jax.jit(lambda: initial_params(jax.random.key(0), self.model, (32, 32, 3)))()

    def call(self, params, x):
        """Returns the output for images x at one time."""
        return self.model.apply({"params": params}, x, jnp.full(len(x), 500.0))

    def call_seconds(self, count: int, size: int = 32) -> float:
        """Returns the median seconds of a call for `count` images with size x size pixels."""
        return seconds(self.call, self.params, images(count, size))

    def flops(self, size: int) -> float:
        """Returns the FLOPs of a call for one image, from the traced program."""
        shape = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
        return jax.jit(self.call).lower(self.params, shape).cost_analysis()["flops"]

    def activation_bytes(self, size: int) -> float:
        """Returns the bytes of activations that the backward pass needs for one image."""
        self._config.data.image_size = size
        return plan.activations_per_example(self._config)

    def ddim_seconds(self, steps: int) -> float:
        """Returns the median seconds of DDIM with batch size 4."""
        schedule = schedules.respace(schedules.from_betas(schedules.betas("linear", 1000)), steps, "trailing")

        def sample(params, x_T):
            def network(x_t, time):
                return self.model.apply({"params": params}, x_t, time)

            return sampling.sample(jax.random.key(0), schedule, network, x_T, sampling.ddim())

        return seconds(sample, self.params, images(4), rounds=3)


class Costs(NamedTuple):
    """The numbers in the tables.

    by_batch: seconds of a call. by_size: seconds per image. counted: (GFLOP, MB of activations) per image, by size. by_steps:
    seconds of DDIM.
    """

    by_batch: list[float]
    by_size: list[float]
    counted: list[tuple[float, float]]
    by_steps: list[float]


def images(count: int, size: int = 32) -> jax.Array:
    """Returns images filled with zeros."""
    return jnp.zeros((count, size, size, 3))


def measure(network: Network) -> Costs:
    """Measures and counts all costs, and prints each table as soon as it is complete."""
    by_batch = [network.call_seconds(count) for count in BATCHES]
    rows = [[count, taken, taken / count] for count, taken in zip(BATCHES, by_batch, strict=True)]
    table("A call at 32x32", ["batch", "seconds", "seconds per image"], rows)

    by_size = [network.call_seconds(4, size) / 4 for size in SIZES]
    counted = [(network.flops(size) / 1e9, network.activation_bytes(size) / 1e6) for size in COUNTED_SIZES]
    measured = [*by_size, *[math.nan] * (len(COUNTED_SIZES) - len(SIZES))]
    rows = [[size, taken, *count] for size, taken, count in zip(COUNTED_SIZES, measured, counted, strict=True)]
    table("A call, batch 4", ["pixels", "seconds per image", "GFLOP per image", "MB of activations per image"], rows)
    power = slope(SIZES[1:], by_size[1:]) / 2
    print(f"\nfrom {SIZES[1]} pixels on, seconds grow with the number of pixels to the power {power:.2f}")

    by_steps = [network.ddim_seconds(steps) for steps in STEPS]
    step, constant = np.polyfit(STEPS, by_steps, 1)
    table("DDIM, batch 4", ["steps", "seconds"], [[n, taken] for n, taken in zip(STEPS, by_steps, strict=True)])
    print(f"\n{step:.4f} s per step plus {constant:.4f} s; a network call {by_batch[BATCHES.index(4)]:.4f} s")

    return Costs(by_batch, by_size, counted, by_steps)


def plot(costs: Costs):
    """Plots the costs, with one panel for each table."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 9), layout="constrained")
    figure.suptitle("What DDPM's network for CIFAR-10 costs on two CPU cores")
    names = [["batch", "steps"], ["seconds", "flops"], ["activations", "activations"]]
    panels = figure.subplot_mosaic(names)
    batch, steps, seconds, flops, activations = panels.values()
    gflop, megabytes = zip(*costs.counted, strict=True)
    batch.plot(BATCHES, costs.by_batch, "o-", label="measured")
    batch.set(title="A network call, 32x32 pixels", xlabel="batch size", ylabel="seconds")
    steps.plot(STEPS, costs.by_steps, "o-", label="measured")
    steps.set(title="DDIM, batch size 4, 32x32 pixels", xlabel="sampling steps", ylabel="seconds")
    scale = costs.by_size[SIZES.index(32)] / gflop[COUNTED_SIZES.index(32)]
    seconds.plot(COUNTED_SIZES, np.multiply(gflop, scale), "--", color="gray", label="in proportion to the FLOPs")
    seconds.plot(SIZES, costs.by_size, "o-", label="measured, batch size 4")
    seconds.set(title="A network call", xlabel="width and height in pixels", ylabel="seconds per image")
    flops.plot(COUNTED_SIZES, gflop, "o-", label="traced program")
    flops.set(title="FLOPs of a network call", xlabel="width and height in pixels", ylabel="GFLOP per image")
    activations.plot(COUNTED_SIZES, np.divide(megabytes, 1e3), "o-", label="traced program")
    activations.set(title="Activations of a train step", xlabel="width and height in pixels", ylabel="GB per image")
    ticks = (BATCHES, STEPS, COUNTED_SIZES, COUNTED_SIZES, COUNTED_SIZES)
    for axes, values in zip(panels.values(), ticks, strict=True):
        axes.set(xscale="log", yscale="log")
        axes.set_xticks(values, map(str, values))
        axes.set_xticks([], minor=True)
        axes.grid(alpha=0.3)
        axes.legend(loc="upper left")
    return figure


def main() -> None:
    """Prints the tables and draws the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plot", default="", help="the picture to write")
    parser.add_argument("--small", action="store_true", help="a narrow network")
    options = parser.parse_args()
    costs = measure(Network(options.small))
    if options.plot:
        plot(costs).savefig(options.plot)


if __name__ == "__main__":
    main()
