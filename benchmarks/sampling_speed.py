"""Compares DDIM-50 and DPM-Solver++-20 with diffusers' pipelines, in images per second, for DDPM's CIFAR-10 network.

    make parity && .venv/bin/python benchmarks/sampling_speed.py [--dtype=bfloat16] [--images=16] [--rounds=3]

Both networks have the same shape and random weights. Timing starts with the noise key and ends with images on the host. This
project runs the compiled program of `--mode=sample`; diffusers runs `DDIMPipeline`, and `DDPMPipeline` with
`DPMSolverMultistepScheduler`, with the network in PyTorch's faster memory layout (channels_last). Each library runs in its
own process, and the libraries are timed alternately; the script prints medians, and the median of the ratios.

First, the script prints the cost of a sampling step without the network call, from samplers with five steps and five calls.
bfloat16 is `model.dtype=bfloat16` in this project and autocast in PyTorch. `--samplers=` skips the comparison, and
`--step_rounds=0` the cost of a step; `--small` uses a narrow network and five steps, to check that everything runs.
"""

import argparse
import functools
import pathlib
import sys

sys.path[:0] = [str(pathlib.Path(__file__).parent.parent), str(pathlib.Path(__file__).parent.parent / "tests")]

import numpy as np

from benchmarks.timing import Process, time_alternately

STEPS = {"ddim": 50, "dpm_solver_pp": 20}
IMAGE_SIZE, SMALL_CHANNELS, FEW_STEPS = 32, 32, 5


def make_ours(dtype: str, images: int, small: bool):
    """Returns (functions, a line about the software) for this project; functions compile at their first call."""
    import jax

    from configs import cifar10
    from diffusion_jax import pretrained, training
    from diffusion_jax.distributed import devices, sharding
    from diffusion_jax.runs.sampling_setup import resolve_sampling
    from diffusion_jax.training.state import initial_params

    devices.start()
    config = cifar10.get_config()
    config.model.update(dtype=dtype, **({"channels": SMALL_CHANNELS} if small else {}))
    model, shape = training.model_from_config(config), (images, IMAGE_SIZE, IMAGE_SIZE, 3)
    params = jax.jit(lambda: initial_params(jax.random.key(0), model, shape[1:]))()
    x, time = jax.device_put((np.zeros(shape, np.float32), np.full(images, 500, np.float32)))
    apply = jax.jit(lambda p, x, t: model.apply({"params": p}, x, t), compiler_options=devices.compiler_options())

    @functools.cache
    def setup(name: str, steps: int):
        config.sampling.update(sampler=name, steps=steps)
        net = pretrained.from_config(config, params, mesh=sharding.make_mesh(config.mesh))
        return resolve_sampling(config, net, read_files=False)

    def draw(name: str, steps: int):
        return lambda: setup(name, steps).generate_batch(0, 0, images)

    functions = {f"{name} {steps}": draw(name, steps) for name in STEPS for steps in (STEPS[name], FEW_STEPS)}
    functions["calls"] = lambda: [jax.block_until_ready(apply(params, x, time)) for _ in range(FEW_STEPS)]
    return functions, f"jax {jax.__version__} on {jax.default_backend()}"


def make_diffusers(dtype: str, images: int, small: bool):
    """Returns (functions, a line about the software) for diffusers' pipelines."""
    import diffusers
    import torch

    from helpers.torch_networks import PUBLISHED

    narrow = {"block_out_channels": (SMALL_CHANNELS, *(2 * SMALL_CHANNELS,) * 3)} if small else {}
    network = diffusers.UNet2DModel(**PUBLISHED | narrow).eval().to(memory_format=torch.channels_last)
    pipelines = {
        "ddim": diffusers.DDIMPipeline(network, diffusers.DDIMScheduler()),
        "dpm_solver_pp": diffusers.DDPMPipeline(network, diffusers.DPMSolverMultistepScheduler()),
    }

    def draw(name: str, steps: int):
        def run_pipeline():
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
                return pipelines[name](batch_size=images, num_inference_steps=steps, output_type="np").images

        pipelines[name].set_progress_bar_config(disable=True)
        return run_pipeline

    functions = {f"{name} {steps}": draw(name, steps) for name in STEPS for steps in (STEPS[name], FEW_STEPS)}
    return functions, f"torch {torch.__version__}, diffusers {diffusers.__version__}"


def main() -> None:
    """Prints the cost of a step, and the images per second for each sampler."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--samplers", default=",".join(STEPS))
    parser.add_argument("--step_rounds", type=int, default=5, help="rounds for the cost of a step; 0 skips it")
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args()
    network = options.dtype, options.images, options.small
    our_process = Process(make_ours, *network)
    print(f"{options.images} images, {options.dtype}; {our_process.facts}", flush=True)

    if options.step_rounds:
        names = ["calls", *(f"{name} {FEW_STEPS}" for name in STEPS)]
        calls, *samplers = time_alternately([*map(our_process.function, names)], options.step_rounds, warmup=1)
        print(f"a network call: {np.median(calls) / FEW_STEPS:.4f} s", flush=True)
        for name, seconds in zip(STEPS, samplers, strict=True):
            print(f"a step of {name}, compared with a call: {np.median(seconds / calls) - 1:+.1%}", flush=True)

    samplers = [*filter(None, options.samplers.split(","))]
    if not samplers:
        our_process.end()
        return
    their_process = Process(make_diffusers, *network)
    print(their_process.facts, flush=True)
    for name in samplers:
        task = f"{name} {FEW_STEPS if options.small else STEPS[name]}"
        pair = time_alternately((our_process.function(task), their_process.function(task)), options.rounds, warmup=1)
        speeds = [f"{options.images / np.median(seconds):.3f} images/s" for seconds in pair]
        ratio = np.median(pair[0] / pair[1])
        print(f"{task}: ours {speeds[0]}, diffusers {speeds[1]}, ratio of times {ratio:.3f}", flush=True)
    our_process.end()
    their_process.end()


if __name__ == "__main__":
    main()
