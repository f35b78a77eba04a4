"""Measures every deterministic solver's error against the number of network calls, on a mixture of Gaussians.

    python benchmarks/samplers.py [--spacing=karras] [--schedule=linear] [--deviation=0.05] [--plot=docs/images/samplers.svg]

The mixture has five modes in the plane with standard deviation 0.05. The exact eps is known, so the reference is the
probability-flow map from x_T to x_0, computed by scipy's adaptive solver in float64; the error is the root mean square
distance to the reference over 256 points.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
from scipy.integrate import solve_ivp

from diffusion_jax import Denoiser, sampling, schedules

ANGLES = 2 * np.pi * np.arange(5) / 5
MODES, SD = 0.8 * np.stack([np.cos(ANGLES), np.sin(ANGLES)], axis=1), 0.05
SCHEDULE = schedules.from_betas(schedules.betas("linear", 1000))
POINTS = 256

# name: (sampler, number of network calls -> number of steps).
SOLVERS = {
    "DDIM (Euler)": (sampling.ddim(), lambda calls: calls),
    "Heun": (sampling.heun(), lambda calls: (calls + 1) // 2),
    "DPM-Solver++ 2M": (sampling.dpm_solver_pp(2), lambda calls: calls),
    "DPM-Solver++ 3M": (sampling.dpm_solver_pp(3), lambda calls: calls),
    "DPM-Solver++ 2S": (sampling.dpm_solver_pp(2, singlestep=True), lambda calls: calls),
    "DPM-Solver++ 3S": (sampling.dpm_solver_pp(3, singlestep=True), lambda calls: calls),
    "UniPC 2": (sampling.unipc(2), lambda calls: calls),
    "UniPC 3": (sampling.unipc(3), lambda calls: calls),
    "DEIS 2": (sampling.deis(2), lambda calls: calls),
    "DEIS 3": (sampling.deis(3), lambda calls: calls),
    "PNDM": (sampling.pndm(), lambda calls: calls - 9),
    "PLMS": (sampling.pndm(runge_kutta=False), lambda calls: calls - 1),
}


def eps(x, alpha, sigma, np=np):
    """Computes E[eps | x] for the mixture, at x = alpha x_0 + sigma eps. x: [N, 2]. alpha, sigma: broadcast with [N, 1]."""
    spread = alpha**2 * SD**2 + sigma**2
    offset = x[:, None] - alpha[..., None] * MODES  # [N, modes, 2]
    logits = -0.5 * (offset**2).sum(-1) / spread
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    weights = weights / weights.sum(axis=1, keepdims=True)
    return sigma / spread * (weights[..., None] * offset).sum(1)


def network(x_t, time):
    """Computes the exact eps at network times of the schedule."""
    level = SCHEDULE.path.at(time, x_t)
    return eps(x_t, level.alpha, level.sigma, jnp)


def exact_map(x_T):
    """Solves the probability flow d(x/alpha)/d(sigma/alpha) = eps from x_T to sigma = 0: x_0, float64 [N, 2]."""
    level = SCHEDULE.transitions.level
    alpha, sigma = level.alpha[-1], level.sigma[-1]

    def slope(log_s, flat):
        s = np.exp(log_s)
        a = np.full((1, 1), 1 / np.sqrt(1 + s**2))
        return s * eps(a * flat.reshape(-1, 2), a, s * a).ravel()

    ends = np.log(sigma / alpha), np.log(1e-5)
    return solve_ivp(slope, ends, np.ravel(x_T) / alpha, "DOP853", rtol=1e-9, atol=1e-10).y[:, -1].reshape(-1, 2)


def error(name, calls, x_T, truth, spacing="karras"):
    """Returns a solver's root mean square distance from `truth`; NaN if `calls` does not allow two steps."""
    sampler, steps = SOLVERS[name]
    if steps(calls) < 2:
        return np.nan
    schedule = schedules.respace(SCHEDULE, steps(calls), spacing)
    denoiser = Denoiser(network, clip=False)
    x_0 = jax.jit(lambda x: sampling.sample(jax.random.key(0), schedule, denoiser, x, sampler))(x_T)
    return float(np.sqrt(np.mean(np.sum((np.asarray(x_0) - truth) ** 2, axis=1))))


# The panels of the figure. Each panel also shows the first solver, as a reference.
PANELS = {
    "DPM-Solver++, multistep": ("DPM-Solver++ 2M", "DPM-Solver++ 3M"),
    "DPM-Solver++, singlestep": ("DPM-Solver++ 2S", "DPM-Solver++ 3S"),
    "UniPC": ("UniPC 2", "UniPC 3"),
    "DEIS": ("DEIS 2", "DEIS 3"),
    "PNDM": ("PNDM", "PLMS"),
    "Heun": ("Heun",),
}
REFERENCE = "DDIM (Euler)"


def plot(errors, all_calls, spacing):
    """Plots errors, {solver: [error at each number of calls]}, with one panel for each family of solvers."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 9), layout="constrained")
    figure.suptitle(
        f"Error of each solver with the spacing {spacing!r}\n(data: five modes at radius 0.8 with standard deviation {SD})"
    )
    panels = figure.subplots(3, 2, sharex=True, sharey=True)
    for axes, (title, names) in zip(panels.ravel(), PANELS.items(), strict=True):
        axes.plot(all_calls, errors[REFERENCE], color="gray", linestyle="--", label=REFERENCE)
        for name, color, marker in zip(names, ("tab:blue", "tab:red"), "os", strict=False):
            axes.plot(all_calls, errors[name], color=color, marker=marker, markersize=5, label=name)
        axes.set(xscale="log", yscale="log", title=title)
        axes.set_xticks(all_calls[::2], map(str, all_calls[::2]))
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend()
    for axes in panels[-1]:
        axes.set_xlabel("network calls")
    for axes in panels[:, 0]:
        axes.set_ylabel("RMS distance to the exact map")
    return figure


def main():
    """Prints the table and draws the plot."""
    global SCHEDULE, SD
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--spacing", default="karras")
    parser.add_argument("--schedule", default="linear")
    parser.add_argument("--deviation", type=float, default=SD, help="the standard deviation of each mode")
    parser.add_argument("--plot", default="")
    options = parser.parse_args()
    SCHEDULE, SD = schedules.from_betas(schedules.betas(options.schedule, 1000)), options.deviation
    jax.config.update("jax_enable_x64", True)
    x_T = jax.random.normal(jax.random.key(1), (POINTS, 2))
    truth = exact_map(x_T)
    all_calls = [5, 7, 10, 14, 20, 28, 40, 56, 80, 100]
    print(f"| spacing {options.spacing!r}, calls | " + " | ".join(map(str, all_calls)) + " |")
    print("|---" * (len(all_calls) + 1) + "|")
    errors = {}
    for name in SOLVERS:
        errors[name] = [error(name, calls, x_T, truth, options.spacing) for calls in all_calls]
        print(f"| {name} | " + " | ".join("" if np.isnan(e) else f"{e:.3g}" for e in errors[name]) + " |", flush=True)
    if options.plot:
        plot(errors, all_calls, options.spacing).savefig(options.plot)


if __name__ == "__main__":
    main()
