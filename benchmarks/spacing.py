"""Measures the widths of samples for each sampler, spacing and number of network calls, with exact networks and an MLP.

    python benchmarks/spacing.py exact [--schedules cosine ...] [--samplers ddpm ...] [--calls 20 ...] [--spacings NAME ...]
    python benchmarks/spacing.py mlp [--seeds 0 1 2]

exact: the network is exact for Gaussian data with standard deviation s and mean 1, so all errors are errors of the sampler.
Each row has the standard deviation of the samples divided by s, for every s in `DEVIATIONS`, and the error of the mean for
s = 1. A sampler without noise is an affine map of x_T, so two points give its exact result; a sampler with noise draws
`POINTS` samples, and a ratio has the standard error 0.003. An asterisk marks steps that the program refuses.

mlp: the README's network and training, on the README's data and on thin data: two directions with deviations 1 and 1/20,
rotated by 45 degrees and then standardized. Each row has the standard deviations of 10,000 samples along the wide and the
thin direction, divided by those of the training data: the mean over the seeds, and the value farthest from 1.
"""

import argparse
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import jax
import jax.numpy as jnp
import numpy as np
import optax

from diffusion_jax import Denoiser, losses, models, sampling, schedules
from diffusion_jax.config import resolve
from diffusion_jax.training.from_config import schedule_from_config

DEVIATIONS = np.array([1.0, 0.3, 0.1, 0.03, 0.01, 0.003])
POINTS = 50_000
SAMPLERS = {
    "ddpm": sampling.ddpm(),
    "ddim": sampling.ddim(),
    "dpm_solver_pp": sampling.dpm_solver_pp(),
    "dpm_solver_pp sde": sampling.dpm_solver_pp(sde=True),
    "unipc": sampling.unipc(),
    "heun": sampling.heun(),
}
LEVELS = {name: {"schedule": name} for name in ("cosine", "linear")} | {
    name: {"path": name, "prediction": "flow"} for name in ("edm", "vp_cosine", "rectified_flow")
}
MLP_CASES = [
    *(("dpm_solver_pp", calls, spacing) for calls in (20, 50) for spacing in ("trailing", "karras", "log_snr")),
    *((name, 50, "log_snr") for name in ("unipc", "ddim", "ddpm")),
    *((name, 50, "trailing") for name in ("ddim", "ddpm")),
]


def exact_denoiser(schedule):
    """Returns the exact denoiser for N(1, s^2), with one s of `DEVIATIONS` in each column."""

    def network(x, time):
        level = schedule.path.at(time, x)
        slope = (x - level.alpha) / (level.alpha**2 * DEVIATIONS**2 + level.sigma**2)
        return level.alpha * level.sigma * slope - level.sigma * (1 + level.alpha * DEVIATIONS**2 * slope)

    return Denoiser(network, prediction="v", clip=False)


def measure_exact(sampler, schedule):
    """Returns the deviations of the samples divided by s, and the errors of the means."""
    columns = len(DEVIATIONS)
    points = np.repeat([[0.0], [1.0]], columns, axis=1)
    x_T = jax.random.normal(jax.random.key(1), (POINTS, columns)) if sampler.is_stochastic else jnp.asarray(points)
    denoiser, key = exact_denoiser(schedule), jax.random.key(0)
    x = np.asarray(jax.jit(lambda x_T: sampling.sample(key, schedule, denoiser, x_T, sampler))(x_T))
    if sampler.is_stochastic:
        return x.std(axis=0) / DEVIATIONS, x.mean(axis=0) - 1
    return np.abs(x[1] - x[0]) / DEVIATIONS, x[0] - 1


def measure_mlp(name, seed):
    """Trains the README's network, and returns the ratios of deviations, {case: (wide, thin)}."""
    mixing = np.array([[0.1, 0.08], [0, 0.06]]) if name == "readme" else np.array([[1, 1], [-0.05, 0.05]])
    data = jax.random.normal(jax.random.key(seed), (256, 2)) @ mixing
    x_0 = (data - data.mean(0)) / data.std(0)
    schedule = schedules.from_betas(schedules.betas("cosine", 1000))
    network, optimizer = models.MLP(channels=32), optax.adam(optax.cosine_decay_schedule(3e-3, 1000))
    params = network.init(jax.random.key(seed + 1000), x_0, jnp.zeros(256))

    def denoiser(params):
        return Denoiser(lambda x_t, time: network.apply(params, x_t, time), prediction="v", clip=False)

    def train_step(carry, key):
        params, state = carry
        gradients = jax.grad(lambda params: losses.simple(key, schedule, denoiser(params), x_0)[0].mean())(params)
        updates, state = optimizer.update(gradients, state)
        return (optax.apply_updates(params, updates), state), None

    keys = jax.random.split(jax.random.key(seed + 2000), 1000)
    (params, _), _ = jax.jit(lambda carry: jax.lax.scan(train_step, carry, keys))((params, optimizer.init(params)))
    variances, directions = np.linalg.eigh(np.cov(x_0.T))
    x_T, found = jax.random.normal(jax.random.key(3), (10_000, 2)), {}
    for case in MLP_CASES:
        sampler, short = SAMPLERS[case[0]], schedules.respace(schedule, *case[1:])
        draw = jax.jit(
            lambda x_T, sampler=sampler, short=short: sampling.sample(
                jax.random.key(4), short, denoiser(params), x_T, sampler
            )
        )
        found[case] = ((np.asarray(draw(x_T)) @ directions).std(axis=0) / np.sqrt(variances))[::-1]
    return found


def print_exact(options):
    """Prints the tables of the exact network."""
    for name in options.schedules:
        schedule = schedule_from_config(resolve({"diffusion": LEVELS[name]})["diffusion"])
        print(f"\n{name}\n\n| sampler, calls, spacing | {' | '.join(f's = {s:g}' for s in DEVIATIONS)} | mean |")
        print("|---" * (len(DEVIATIONS) + 2) + "|")
        for sampler_name in options.samplers:
            sampler = SAMPLERS[sampler_name]
            for calls in options.calls:
                for spacing in options.spacings:
                    steps = (calls + 1) // 2 if sampler_name == "heun" else calls
                    try:
                        short = schedules.respace(schedule, steps, spacing)
                    except ValueError:  # the spacing visits a step twice
                        continue
                    ratios, errors = measure_exact(sampler, short)
                    mark = " *" if sampling.find_problem(sampler, short) else ""
                    cells = [f"{sampler_name}, {calls}, `{spacing}`{mark}", *(f"{ratio:.3f}" for ratio in ratios)]
                    print("| " + " | ".join([*cells, f"{errors[0]:.3f}"]) + " |", flush=True)


def print_mlp(options):
    """Prints the tables of the README's network."""
    for name in ("readme", "thin"):
        found = [measure_mlp(name, seed) for seed in options.seeds]
        print(f"\n{name}\n\n| sampler, calls, spacing | wide | thin | farthest from 1 |\n|---|---|---|---|")
        for case in MLP_CASES:
            ratios = np.array([each[case] for each in found])
            farthest = ratios.ravel()[np.abs(ratios - 1).argmax()]
            wide, thin = ratios.mean(axis=0)
            print(f"| {case[0]}, {case[1]}, `{case[2]}` | {wide:.3f} | {thin:.3f} | {farthest:.3f} |", flush=True)


def main():
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("exact", "mlp"))
    parser.add_argument("--schedules", nargs="+", default=list(LEVELS), choices=LEVELS)
    parser.add_argument("--samplers", nargs="+", default=list(SAMPLERS), choices=SAMPLERS)
    parser.add_argument("--calls", nargs="+", type=int, default=[10, 20, 50, 100])
    named = [name for name in schedules.SPACINGS if not name.startswith("openai")]
    parser.add_argument("--spacings", nargs="+", default=named, choices=named)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    options = parser.parse_args()
    if options.part == "exact":
        jax.config.update("jax_enable_x64", True)
        print_exact(options)
    else:
        print_mlp(options)


if __name__ == "__main__":
    main()
