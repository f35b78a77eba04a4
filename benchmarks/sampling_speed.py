"""Images a second of DDIM-50 and DPM-Solver++-20, beside diffusers' pipelines on PyTorch; DDPM's CIFAR-10 network.

    make parity && .venv/bin/python benchmarks/sampling_speed.py [--dtype=bfloat16] [--images=16] [--rounds=3]

Both networks have random weights and one shape. What is timed begins at the noise's key and ends with images on the host:
here the compiled program of `--mode=sample`, there `DDIMPipeline`, and `DDPMPipeline` with `DPMSolverMultistepScheduler`, the
network in PyTorch's faster memory layout (channels_last). They are timed in turn; medians, and the median of the ratios.

Before that, the cost of a sampling step over the bare call of the network, from samplers of five steps and five calls.
bfloat16 is `model.dtype=bfloat16` here and autocast there. `--samplers=` leaves the comparison out, `--step_rounds=0` the
cost of a step; `--small` is a narrow network and five steps, to see that all of it runs.
"""

import argparse
import pathlib
import statistics
import sys
import time

sys.path[:0] = [str(pathlib.Path(__file__).parent.parent), str(pathlib.Path(__file__).parent.parent / "tests")]

import jax
import numpy as np

from configs import cifar10
from diffusion_jax import training
from diffusion_jax.distributed import compiler
from diffusion_jax.images import to_uint8
from diffusion_jax.runs.sampling_setup import SamplingSetup
from diffusion_jax.training.state import initial_params

STEPS = {"ddim": 50, "dpm_solver_pp": 20}
SIZE, NARROW, FEW = 32, 32, 5


def in_turn(functions, rounds: int) -> np.ndarray:
    """Seconds [functions, rounds] of functions that are called one after the other, after one round that is not counted."""
    seconds = np.zeros((len(functions), rounds + 1))
    for i in range(rounds + 1):
        for which, function in enumerate(functions):
            start = time.perf_counter()
            function()
            seconds[which, i] = time.perf_counter() - start
    return seconds[:, 1:]


class Ours:
    """This project's programs, compiled as `--mode=sample` compiles them."""

    def __init__(self, dtype: str, images: int, small: bool):
        config = self._config = cifar10.get_config()
        config.model.update(dtype=dtype, **({"channels": NARROW} if small else {}))
        self._model, self._shape = training.model_from_config(config), (images, SIZE, SIZE, 3)
        self._schedule = training.schedule_from_config(config.diffusion)
        make = jax.jit(lambda: initial_params(jax.random.key(0), self._model, self._shape[1:]))
        self._params = make()

    def _compiled(self, function, *arguments):
        return jax.jit(function, compiler_options=compiler.options()).lower(*arguments).compile()

    def call(self):
        """The bare network, x_t and time as a sampler gives them."""
        arguments = self._params, np.zeros(self._shape, np.float32), np.full(self._shape[0], 500, np.float32)
        compiled = self._compiled(lambda p, x, t: self._model.apply({"params": p}, x, t), *arguments)
        arguments = jax.device_put(arguments)
        return lambda: jax.block_until_ready(compiled(*arguments))

    def sampler(self, name: str, steps: int):
        """() -> uint8 images."""
        self._config.sampling.update(sampler=name, steps=steps)
        setup = SamplingSetup(self._config, self._model, self._schedule, mesh=None)

        def draw(params, seed):
            return to_uint8(setup.draw(params, None, jax.random.key(seed), self._shape))

        compiled = self._compiled(draw, self._params, np.uint32(0))
        return lambda: np.asarray(compiled(self._params, np.uint32(0)))


def theirs(name: str, steps: int, dtype: str, images: int, small: bool):
    """() -> images, by a diffusers pipeline."""
    import diffusers
    import torch

    from helpers.torch_networks import PUBLISHED

    narrow = {"block_out_channels": (NARROW, *(2 * NARROW,) * 3)} if small else {}
    network = diffusers.UNet2DModel(**PUBLISHED | narrow).eval().to(memory_format=torch.channels_last)
    if name == "ddim":
        pipeline = diffusers.DDIMPipeline(network, diffusers.DDIMScheduler())
    else:
        pipeline = diffusers.DDPMPipeline(network, diffusers.DPMSolverMultistepScheduler())
    pipeline.set_progress_bar_config(disable=True)

    def draw():
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            return pipeline(batch_size=images, num_inference_steps=steps, output_type="np").images

    return draw


def main() -> None:
    """Prints the cost of a step, and the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--samplers", default=",".join(STEPS))
    parser.add_argument("--step_rounds", type=int, default=5, help="of the cost of a step; 0 leaves it out")
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args()
    ours = Ours(options.dtype, options.images, options.small)
    print(f"jax {jax.__version__} on {jax.default_backend()}; {options.images} images, {options.dtype}", flush=True)

    if options.step_rounds:
        call = ours.call()
        calls = lambda: [call() for _ in range(FEW)]  # noqa: E731
        bare, *samplers = in_turn([calls, *(ours.sampler(name, FEW) for name in STEPS)], options.step_rounds)
        print(f"a bare network call: {statistics.median(bare) / FEW:.4f} s", flush=True)
        for name, seconds in zip(STEPS, samplers, strict=True):
            print(f"a step of {name} over it: {np.median(seconds / bare) - 1:+.1%}", flush=True)

    for name in filter(None, options.samplers.split(",")):
        steps = FEW if options.small else STEPS[name]
        pair = ours.sampler(name, steps), theirs(name, steps, options.dtype, options.images, options.small)
        mine, other = in_turn(pair, options.rounds)
        speeds = [f"{options.images / np.median(seconds):.3f} images/s" for seconds in (mine, other)]
        print(
            f"{name} {steps}: ours {speeds[0]}, diffusers {speeds[1]}, ratio of times {np.median(mine / other):.3f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
