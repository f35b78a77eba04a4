"""Measures posterior samples of trained runs for eight measurements, as docs/results/benchmarks.md shows.

    python benchmarks/posterior_runs.py runs/digits --noise=1.6 --steps=50

Held-out examples are measured with simulated noise, and 19 samples are drawn for each. Printed for each measurement and
covariance of x_0: chi-squared for each measured number; the spread of the samples, times sqrt((M + 1) / M), divided by the
error of their mean; the share of true values in 90% intervals; the error of the mean; CPU seconds after compilation.
--spectrum=FILE.npy, the variances of the Fourier coefficients of Gaussian fields, adds the numbers of the exact posterior.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import pathlib
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax import data, pretrained
from diffusion_jax.data.sources import batch_examples, read_conditions
from diffusion_jax.images import to_model_range
from diffusion_jax.metrics.calibration import is_covered, ranks
from diffusion_jax.run_dir import open_run_dir
from diffusion_jax.runs.likelihood import load_held_out
from diffusion_jax.runs.posterior import Problem, covariance_of_data
from diffusion_jax.runs.sampling_setup import keys_of_samples, resolve_sampling
from diffusion_jax.runs.workdir import load_config, open_model

SAMPLES = 19
MEASUREMENTS = {
    "points": {"task": "sparse", "share": 0.1},
    "blur": {"task": "deblur", "blur": 1.5},
    "decimation": {"task": "linear", "operator": f"{__file__}:every_second"},
    "block means": {"task": "super_resolution", "factor": 4},
    "Fourier": {"task": "fourier", "share": 0.25},
    "rays": {"task": "tomography", "share": 0.25},
    "cumulative sums": {"task": "linear", "operator": f"{__file__}:cumulative_sums"},
    "mask": {"task": "inpaint"},
}


def every_second(x):
    """Every second entry along each spatial axis."""
    return x[(slice(None), *[slice(None, None, 2)] * (x.ndim - 2))]


def cumulative_sums(x):
    """Sums from the start of the first spatial axis, divided by 4."""
    return jnp.cumsum(x, axis=1) / 4


def exact_posterior(problem: Problem, spectrum: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns (means [N, ...], deviations [...]) in data units for periodic Gaussian fields with mean 0."""
    shape = problem.net.example_shape
    size = int(np.prod(shape))
    unit = np.eye(size).reshape(size, *shape)
    spectrum = spectrum.reshape(*shape[:-1], 1)
    axes = tuple(range(1, len(shape)))
    scale, offset = problem.net.normalizations["x"].scale[0], problem.net.normalizations["x"].offset[0]
    prior = np.fft.ifftn(spectrum * np.fft.fftn(unit, axes=axes), axes=axes).real.reshape(size, size) / scale**2
    a = np.asarray(problem.operator.linear(jnp.asarray(unit, jnp.float32)), np.float64).reshape(size, -1).T
    noise = np.broadcast_to(problem.noise, problem.y_shape).ravel()
    kept = np.square(a).sum(axis=1) > 0
    a, noise = a[kept], noise[kept]
    gain = prior @ a.T @ np.linalg.inv(a @ prior @ a.T + np.diag(noise**2))
    mean = -offset / scale  # of x_0 in network units
    means = mean + (y.reshape(len(y), -1)[:, kept] - (a * mean).sum(axis=1)) @ gain.T
    deviations = np.sqrt(np.diag(prior - gain @ a @ prior))
    return scale * means.reshape(-1, *shape) + offset, scale * deviations.reshape(shape)


def summarize(mean: np.ndarray, spread: np.ndarray, truth: np.ndarray, found: np.ndarray) -> str:
    """spread: standard deviations of truth - mean that the method states. found: ranks."""
    error = np.sqrt(np.mean((mean - truth) ** 2))
    inside = is_covered(found, SAMPLES).reshape(len(truth), -1).mean(axis=1)
    stated = np.sqrt(np.mean(np.broadcast_to(spread, truth.shape) ** 2))
    return f"{stated / error:7.3f}  {inside.mean():.3f} +- {inside.std() / len(inside) ** 0.5:.3f}  {error:9.4f}"


def main() -> None:
    """Prints a row for each measurement and covariance."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=pathlib.Path)
    parser.add_argument("--noise", type=float, required=True, help="in data units")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--examples", type=int, default=100)
    parser.add_argument("--batch", type=int, default=50, help="examples that are measured at once")
    parser.add_argument("--methods", default="data,jacobian:3", help="covariances, with a number of iterations")
    parser.add_argument("--only", default="", help="names of measurements")
    parser.add_argument("--spectrum", type=pathlib.Path)
    options = parser.parse_args()
    workdir, rng = open_run_dir(options.run), np.random.default_rng(0)
    config = load_config(workdir)
    assert config is not None
    net = open_model(config, workdir)
    source, _ = load_held_out(config, None, is_trained_here=True)
    batch = source.read(np.arange(options.examples))
    examples = batch_examples(batch)
    x_0 = to_model_range(examples) if net.levels else data.to_model_units(examples, net.normalizations.get("x"))
    config.sampling.update(sampler="dpm_solver_pp", steps=options.steps)
    conditions = read_conditions(batch) if net.condition_shape is not None else None
    setup = resolve_sampling(config, net, conditions)
    labels = np.asarray(batch["label"], np.int32) if net.num_classes else None
    setup = dataclasses.replace(setup, net=pretrained.load_weights(net, config, workdir, True), labels=labels)
    truth, of_data = examples.astype(np.float64), covariance_of_data(config, net)
    device = jax.devices()[0].device_kind
    print(f"{options.run.name}: {options.examples} examples of {SAMPLES} samples, {options.steps} steps, {device}")
    print(f"{'measurement':16} {'covariance':13}    chi^2  spread   in 90% intervals       RMSE   CPU s")
    with tempfile.TemporaryDirectory() as folder:
        mask = rng.random(net.example_shape[:-1])[..., None] < 0.5
        for name, settings in MEASUREMENTS.items():
            config.editing.update({"noise": options.noise, "mask": f"{folder}/mask.npy", "operator": "", **settings})
            fits = name != "rays" or len(net.example_shape) == 3
            if not fits or (options.only and name not in options.only.split(",")):
                continue
            problem = Problem.from_config(config, net, mask)
            y = problem.simulate(np.asarray(x_0), np.arange(len(x_0)))
            if options.spectrum is not None:
                mean, deviation = exact_posterior(problem, np.load(options.spectrum), y)
                draws = mean + deviation * rng.standard_normal((SAMPLES, *mean.shape))
                print(f"{name:16} {'exact':13} {'':8} {summarize(mean, deviation, truth, ranks(truth, draws))}")
            for method in options.methods.split(","):
                covariance, _, iterations = method.partition(":")
                config.editing.update(covariance=covariance, iterations=int(iterations) if iterations else None)
                problem = Problem.from_config(config, net, mask).with_covariance(of_data)
                samples, chi, seconds = [], [], 0.0
                for start in range(0, len(truth), options.batch):
                    before = time.process_time()
                    rows = start + np.arange(options.batch)
                    keys = keys_of_samples(0, (np.arange(SAMPLES)[:, None] * len(truth) + rows).ravel())
                    some = dataclasses.replace(
                        setup,
                        labels=None if labels is None else labels[rows],
                        conditions={key: values[rows] for key, values in setup.conditions.items()},
                    )
                    x = problem.draw(some, y[rows], SAMPLES, keys)
                    if start:  # the first batch compiles
                        seconds += (time.process_time() - before) * len(truth) / (len(truth) - options.batch)
                    chi.append(problem.chi_squared(x, y[rows]).mean())
                    samples.append(x)
                x = np.concatenate(samples, axis=1).astype(np.float64)
                if net.levels is not None:  # in the levels of the data, so that equal numbers are ordered at random
                    steps = net.levels - 1
                    x = (((x + 1) / 2 * steps).round().clip(0, steps) * 255 / steps).round()
                spread = np.sqrt((SAMPLES + 1) / SAMPLES * x.var(axis=0, ddof=1).mean())
                row = summarize(x.mean(axis=0), spread, truth, ranks(truth, x))
                print(f"{name:16} {method:13} {np.mean(chi):8.3f} {row} {seconds:7.1f}", flush=True)
                if options.spectrum is not None:
                    off = (x.mean(axis=0) - mean) / deviation
                    ratio = np.sqrt(np.mean(x.var(axis=0, ddof=1) / deviation**2))
                    error = np.sqrt(max(np.mean(off**2) - ratio**2 / SAMPLES, 0))
                    print(f"{'':30} deviation / exact {ratio:.3f}, error of the mean in deviations {error:.3f}")


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    main()
