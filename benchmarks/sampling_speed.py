"""Images per second of DDIM-50 and DPM-Solver++-20, compared with diffusers' pipelines; DDPM's CIFAR-10 network.

    make parity && .venv/bin/python benchmarks/sampling_speed.py [--dtype=bfloat16] [--images=16] [--rounds=3]

Both networks have the same shape and random weights. The time is from the key of the noise to images on the host. This
project runs the compiled program of `--mode=sample`; diffusers runs `DDIMPipeline`, and `DDPMPipeline` with
`DPMSolverMultistepScheduler`, with the network in PyTorch's faster memory layout (channels_last). The two are timed
alternately; the script prints medians, and the median of the ratios.

Before that, it prints the cost of a sampling step beyond the network call, from samplers of five steps and five calls.
bfloat16 is `model.dtype=bfloat16` in this project and autocast in PyTorch. `--samplers=` skips the comparison, and
`--step_rounds=0` the cost of a step; `--small` uses a narrow network and five steps, to check that everything runs.
"""

import argparse
import pathlib
import sys

sys.path[:0] = [str(pathlib.Path(__file__).parent.parent), str(pathlib.Path(__file__).parent.parent / "tests")]

import jax
import numpy as np

from benchmarks.timing import time_alternately
from configs import cifar10
from diffusion_jax import training
from diffusion_jax.distributed import compiler
from diffusion_jax.images import to_uint8
from diffusion_jax.runs.sampling_setup import SamplingSetup
from diffusion_jax.training.state import initial_params

STEPS = {"ddim": 50, "dpm_solver_pp": 20}
IMAGE_SIZE, SMALL_CHANNELS, FEW_STEPS = 32, 32, 5


class Ours:
    """This project's programs, compiled as `--mode=sample` compiles them."""

    def __init__(self, dtype: str, images: int, small: bool):
        config = self._config = cifar10.get_config()
        config.model.update(dtype=dtype, **({"channels": SMALL_CHANNELS} if small else {}))
        self._model, self._shape = training.model_from_config(config), (images, IMAGE_SIZE, IMAGE_SIZE, 3)
        self._schedule = training.schedule_from_config(config.diffusion)
        self._params = jax.jit(lambda: initial_params(jax.random.key(0), self._model, self._shape[1:]))()

    def _compile(self, function, *arguments):
        return jax.jit(function, compiler_options=compiler.options()).lower(*arguments).compile()

    def call(self):
        """() -> the output of the network for the x_t and time of a sampler."""
        arguments = self._params, np.zeros(self._shape, np.float32), np.full(self._shape[0], 500, np.float32)
        compiled = self._compile(lambda p, x, t: self._model.apply({"params": p}, x, t), *arguments)
        arguments = jax.device_put(arguments)
        return lambda: jax.block_until_ready(compiled(*arguments))

    def sampler(self, name: str, steps: int):
        """() -> images, uint8 [N, H, W, C]."""
        self._config.sampling.update(sampler=name, steps=steps)
        setup = SamplingSetup(self._config, self._model, self._schedule, mesh=None)

        def draw(params, seed):
            return to_uint8(setup.draw(params, None, jax.random.key(seed), self._shape))

        compiled = self._compile(draw, self._params, np.uint32(0))
        return lambda: np.asarray(compiled(self._params, np.uint32(0)))


def diffusers_sampler(name: str, steps: int, dtype: str, images: int, small: bool):
    """() -> images, by a diffusers pipeline."""
    import diffusers
    import torch

    from helpers.torch_networks import PUBLISHED

    narrow = {"block_out_channels": (SMALL_CHANNELS, *(2 * SMALL_CHANNELS,) * 3)} if small else {}
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
    """Prints the cost of a step and the images per second of each sampler."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--samplers", default=",".join(STEPS))
    parser.add_argument("--step_rounds", type=int, default=5, help="rounds for the cost of a step; 0 skips it")
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args()
    ours = Ours(options.dtype, options.images, options.small)
    print(f"jax {jax.__version__} on {jax.default_backend()}; {options.images} images, {options.dtype}", flush=True)

    if options.step_rounds:
        call = ours.call()
        functions = [lambda: [call() for _ in range(FEW_STEPS)], *(ours.sampler(name, FEW_STEPS) for name in STEPS)]
        network, *samplers = time_alternately(functions, options.step_rounds, warmup=1)
        print(f"a network call: {np.median(network) / FEW_STEPS:.4f} s", flush=True)
        for name, seconds in zip(STEPS, samplers, strict=True):
            print(f"a step of {name}, compared with a call: {np.median(seconds / network) - 1:+.1%}", flush=True)

    for name in filter(None, options.samplers.split(",")):
        steps = FEW_STEPS if options.small else STEPS[name]
        diffusers = diffusers_sampler(name, steps, options.dtype, options.images, options.small)
        pair = time_alternately((ours.sampler(name, steps), diffusers), options.rounds, warmup=1)
        speeds = [f"{options.images / np.median(seconds):.3f} images/s" for seconds in pair]
        ratio = np.median(pair[0] / pair[1])
        print(f"{name} {steps}: ours {speeds[0]}, diffusers {speeds[1]}, ratio of times {ratio:.3f}", flush=True)


if __name__ == "__main__":
    main()
