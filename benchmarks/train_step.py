"""Compares a call and a train step of DDPM's CIFAR-10 network with diffusers' `UNet2DModel` on PyTorch.

    make parity && .venv/bin/python benchmarks/train_step.py [--dtype=bfloat16] [--batch_size=8] [--rounds=10]

Both train steps are L_simple's forward and backward pass, gradient clipping, Adam and the EMA, on one batch in memory.
Each library runs in its own process with its usual setup: this project as in main.py, PyTorch with its faster memory layout
(channels_last). The libraries are timed alternately, call by call, so that a drift in the machine's speed favors neither
library; the script prints medians, and the median of the ratios. bfloat16 is `model.dtype=bfloat16` in this project and
autocast in PyTorch.
"""

import argparse
import pathlib
import platform
import sys

sys.path[:0] = [str(pathlib.Path(__file__).parent.parent), str(pathlib.Path(__file__).parent.parent / "tests")]

import numpy as np

from benchmarks.timing import Process, time_alternately


def make_ours(batch_size: int, dtype: str):
    """Returns (functions, (parameters, a line about the software)) for this project."""
    import jax

    from configs import cifar10
    from diffusion_jax import training
    from diffusion_jax.distributed import devices

    devices.start()
    config = cifar10.get_config()
    config.model.dtype = dtype
    config.training.batch_size = batch_size
    built = training.build_program(config)
    state = built.init()
    batch = {"image": np.zeros((batch_size, 32, 32, 3), np.uint8), "label": np.zeros(batch_size, np.int32)}
    x, time = np.zeros((batch_size, 32, 32, 3), np.float32), np.full(batch_size, 500.0, np.float32)
    apply = jax.jit(lambda p, x, t: built.model.apply({"params": p}, x, t), compiler_options=devices.compiler_options())

    def step():
        nonlocal state
        state, metrics = built.train_step(state, batch)
        jax.block_until_ready((state, metrics))

    functions = {"network call": lambda: jax.block_until_ready(apply(state.params, x, time)), "train step": step}
    software = (
        f"jax {jax.__version__} on {jax.default_backend()}, compiler options {devices.compiler_options() or 'none'}"
    )
    return functions, (sum(p.size for p in jax.tree.leaves(state.params)), software)


def make_diffusers(batch_size: int, dtype: str):
    """Returns (functions, (parameters, a line about the software)) for diffusers on PyTorch."""
    import torch
    from diffusers import UNet2DModel

    from benchmarks.diffusers_network import make_train_step
    from helpers.torch_networks import PUBLISHED

    autocast = torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16")
    model = UNet2DModel(**PUBLISHED, dropout=0.1).to(memory_format=torch.channels_last)
    x = torch.zeros(batch_size, 3, 32, 32).to(memory_format=torch.channels_last)
    train_step = make_train_step(model, model, x, autocast)

    def call():
        with torch.no_grad(), autocast:
            model.eval()(x, torch.full((batch_size,), 500))

    def step():
        model.train()
        train_step()

    software = f"torch {torch.__version__}, {torch.get_num_threads()} threads"
    return {"network call": call, "train step": step}, (sum(p.numel() for p in model.parameters()), software)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    options = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}; Python {platform.python_version()}")
    print(f"batch {options.batch_size}, {options.dtype}", flush=True)
    makers = {"ours": make_ours, "diffusers": make_diffusers}
    processes = {name: Process(make, options.batch_size, options.dtype) for name, make in makers.items()}
    for name, process in processes.items():
        parameters, software = process.facts
        print(f"{name}: {parameters:,} parameters, {software}", flush=True)
    for name in ("network call", "train step"):
        functions = [process.function(name) for process in processes.values()]
        our_seconds, diffusers_seconds = time_alternately(functions, options.rounds, warmup=2)
        print(
            f"{name + ':':13} ours {np.median(our_seconds):.3f} s, diffusers {np.median(diffusers_seconds):.3f} s, "
            f"ratio {np.median(our_seconds / diffusers_seconds):.2f}",
            flush=True,
        )
    for process in processes.values():
        process.end()


if __name__ == "__main__":
    main()
