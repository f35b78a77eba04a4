"""DDPM's CIFAR-10 network: one call and one train step, beside diffusers' `UNet2DModel` on PyTorch.

    make parity && .venv/bin/python benchmarks/train_step.py [--dtype=bfloat16] [--batch_size=8] [--rounds=10]

Both train steps are L_simple's forward and backward pass, gradient clipping, Adam and the EMA, on one batch in memory. The
two are timed in turn, call by call, so that a machine whose speed drifts does not favor one; medians, and the median of
the ratios. PyTorch runs in its faster memory layout (channels_last). bfloat16 is `model.dtype=bfloat16` here and autocast
there.
"""

import argparse
import pathlib
import platform
import statistics
import sys
import time

sys.path[:0] = [str(pathlib.Path(__file__).parent.parent), str(pathlib.Path(__file__).parent.parent / "tests")]

import jax
import numpy as np
import torch
from diffusers import UNet2DModel

from configs import cifar10
from diffusion_jax import training
from diffusion_jax.distributed import compiler
from helpers.torch_networks import PUBLISHED


def ours(batch_size: int, dtype: str):
    """(call, step, parameters) of this project."""
    config = cifar10.get_config()
    config.model.dtype = dtype
    config.training.batch_size = batch_size
    built = training.setup(config)
    state = built.init()
    batch = {"image": np.zeros((batch_size, 32, 32, 3), np.uint8), "label": np.zeros(batch_size, np.int32)}
    x, time_ = np.zeros((batch_size, 32, 32, 3), np.float32), np.full(batch_size, 500.0, np.float32)
    apply = jax.jit(lambda p, x, t: built.model.apply({"params": p}, x, t), compiler_options=compiler.options())

    def step():
        nonlocal state
        state, metrics = built.train_step(state, batch)
        jax.block_until_ready((state, metrics))

    return lambda: jax.block_until_ready(apply(state.params, x, time_)), step, state


def theirs(batch_size: int, dtype: str):
    """(call, step, parameters) of diffusers on PyTorch."""
    cast = torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16")
    model = UNet2DModel(**PUBLISHED, dropout=0.1).to(memory_format=torch.channels_last)
    ema = [p.detach().clone() for p in model.parameters()]
    adam = torch.optim.Adam(model.parameters(), lr=2e-4)
    alpha_bar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0)
    x = torch.zeros(batch_size, 3, 32, 32).to(memory_format=torch.channels_last)

    def call():
        with torch.no_grad(), cast:
            model.eval()(x, torch.full((batch_size,), 500))

    def step():
        model.train()
        t, eps = torch.randint(0, 1000, (batch_size,)), torch.randn_like(x)
        a = alpha_bar[t].reshape(-1, 1, 1, 1)
        with cast:
            output = model(a.sqrt() * x + (1 - a).sqrt() * eps, t).sample
        loss = ((output.float() - eps) ** 2).mean()
        adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        with torch.no_grad():
            torch._foreach_lerp_(ema, list(model.parameters()), 1e-4)

    return call, step, model


def in_turn(a, b, rounds: int) -> tuple[float, float, float]:
    """Median seconds of a and of b, and the median of a / b, timed in turn after two rounds of warming up."""
    seconds = ([], [])
    for i in range(rounds + 2):
        for which, function in enumerate((a, b)):
            start = time.perf_counter()
            function()
            if i >= 2:
                seconds[which].append(time.perf_counter() - start)
    return (*map(statistics.median, seconds), statistics.median(x / y for x, y in zip(*seconds, strict=True)))


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    options = parser.parse_args()
    call, step, state = ours(options.batch_size, options.dtype)
    torch_call, torch_step, model = theirs(options.batch_size, options.dtype)
    parameters = sum(p.size for p in jax.tree.leaves(state.params)), sum(p.numel() for p in model.parameters())
    print(
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads; Python {platform.python_version()}"
    )
    print(
        f"jax {jax.__version__} on {jax.default_backend()}, torch {torch.__version__}; "
        f"batch {options.batch_size}, {options.dtype}"
    )
    print(f"compiler options: {compiler.options() or 'none'}")
    print(f"parameters:   ours {parameters[0]:,}, diffusers {parameters[1]:,}")
    for name, a, b in (("network call", call, torch_call), ("train step", step, torch_step)):
        mine, other, ratio = in_turn(a, b, options.rounds)
        print(f"{name + ':':13} ours {mine:.3f} s, diffusers {other:.3f} s, ratio {ratio:.2f}")


if __name__ == "__main__":
    main()
