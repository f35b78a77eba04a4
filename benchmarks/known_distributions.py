"""Trains configs whose data have a known distribution, and compares samples with this distribution.

    python benchmarks/known_distributions.py [series field volume moons conditional] [--workdir=runs/known] [--seed=0]

Each output line is one comparison: the largest deviation from the exact distribution, the error bar, and the largest
deviation from a wrong distribution, which must be outside its error bar. An error bar is the stated bias for a network
trained for minutes (the constants below) plus four Monte Carlo standard errors. The test data's likelihood bound must be at
least the distribution's entropy, and at most the entropy plus the bound's slack and a stated excess. Finished runs are not
trained again.
"""

import argparse
import dataclasses
import importlib
import pathlib
import resource
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import jax
import numpy as np

from diffusion_jax import data, likelihood, pretrained
from diffusion_jax.config import resolve
from diffusion_jax.data import synthetic
from diffusion_jax.data.synthetic import FieldDistribution, SeriesDistribution
from diffusion_jax.metrics.of_arrays import mean_and_covariance, power_spectrum
from diffusion_jax.runs import sample, train

# Bias of a trained network that an error bar allows, in addition to the Monte Carlo error.
POWER_BIAS = 0.15  # power in a shell of frequencies, relative to the exact power
CORRELATION_BIAS = 0.05  # correlation between two channels at one position
MEAN_BIAS = 0.2  # conditional mean, in conditional standard deviations
EXCESS_NATS = 0.1  # bound per dimension, in excess of its slack with the exact score

NUM_TEST = 512
CONFIGS = {
    "series": ("series",),
    "field": ("field",),
    "volume": ("volume",),
    "moons": ("vectors", "moons"),
    "conditional": ("vectors", "conditional"),
}
WRONG_DISTRIBUTIONS = {
    "series": {"half the damping": {"damping": 8.0}, "another correlation": {"correlation": 0.0}},
    "field": {"other exponents": {"exponents": (1.0, 1.0, 1.0, 1.0, 1.0)}, "no mixing": {"mixing": np.eye(5).tolist()}},
    "volume": {"other exponents": {"exponents": (1.0,)}},
}


def report(name: str, what: str, deviation: np.ndarray, bar: np.ndarray | float, is_wrong: bool = False) -> bool:
    """Prints and returns whether all deviations are within error bars; with `is_wrong`, whether one is outside."""
    ratio = np.abs(deviation) / bar
    worst = int(np.argmax(ratio))
    largest, its_bar = np.ravel(np.abs(deviation))[worst], np.ravel(np.broadcast_to(bar, np.shape(deviation)))[worst]
    good = bool((ratio.max() > 1) if is_wrong else (ratio.max() <= 1))
    print(f"{'ok  ' if good else 'FAIL'} {name}: {what}: {largest:.4f}, error bar {its_bar:.4f}", flush=True)
    return good


# ---- Stationary Gaussian distributions


def shell_average(values: np.ndarray, spatial: tuple[int, ...]) -> np.ndarray:
    """Averages the diagonals of spectra [*K, C, C] over the shells of `power_spectrum`: [shells, C]."""
    frequencies = np.stack(np.meshgrid(*map(np.fft.fftfreq, spatial), indexing="ij"), axis=-1)
    shells = np.round(np.linalg.norm(frequencies, axis=-1).ravel() * max(spatial)).astype(int)
    power = np.diagonal(values.real, axis1=-2, axis2=-1).reshape(len(shells), -1)
    return np.stack([power[shells == shell].mean(axis=0) for shell in np.unique(shells)])


def distribution_at(
    distribution: SeriesDistribution | FieldDistribution, spatial: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray, float]:
    """Returns (spectrum, correlation of the channels at one position, entropy) for arrays with this spatial shape."""
    if isinstance(distribution, SeriesDistribution):
        spectrum, covariance, entropy = (
            distribution.spectrum(spatial[0]),
            distribution.cross_covariance([0])[0],
            distribution.entropy(spatial[0]),
        )
    else:
        covariance = distribution.cross_covariance(spatial)[(0,) * len(spatial)]
        spectrum, entropy = distribution.spectrum(spatial), distribution.entropy(spatial)
    deviations = np.sqrt(np.diag(covariance))
    return spectrum, covariance / np.outer(deviations, deviations), entropy


def compare_gaussian(name: str, x: np.ndarray, distribution: SeriesDistribution | FieldDistribution) -> list[bool]:
    """Compares the power in every shell of frequencies, and channel correlations, with the true and wrong distributions."""
    spatial = x.shape[1:-1]
    measured = power_spectrum(x, periodic=True)
    moments = mean_and_covariance(x).covariance
    distributions = {"the distribution": distribution}
    distributions |= {
        wrong: dataclasses.replace(distribution, **change) for wrong, change in WRONG_DISTRIBUTIONS[name].items()
    }
    results = []
    spectral, correlated = [], []
    for candidate in distributions.values():
        spectrum, correlation, _ = distribution_at(candidate, spatial)
        exact = shell_average(spectrum, spatial)
        spectral.append((measured.value / exact - 1, POWER_BIAS + 4 * measured.standard_error / exact))
        scales = np.sqrt(np.diag(moments.value))
        scales = np.outer(scales, scales)
        correlated.append(
            (moments.value / scales - correlation, CORRELATION_BIAS + 4 * moments.standard_error / scales)
        )
    results.append(report(name, "power of a shell, relative", *spectral[0]))
    print(f"     {name}: root mean square of these: {np.sqrt(np.mean(spectral[0][0] ** 2)):.4f}")
    if x.shape[-1] > 1:
        results.append(report(name, "correlation of two channels", *correlated[0]))
    for i, wrong in enumerate(list(distributions)[1:], start=1):
        either = [(d, np.broadcast_to(b, d.shape)) for d, b in (spectral[i], correlated[i])]
        deviations, bars = (np.concatenate([part.ravel() for part in parts]) for parts in zip(*either, strict=True))
        results.append(report(name, f"power or correlation, against {wrong}", deviations, bars, is_wrong=True))
    return results


# ---- Vectors


def compare_vectors(name: str, x: np.ndarray, condition: np.ndarray | None) -> list[bool]:
    """Compares conditional means, or the mean log density of samples."""
    if name == "conditional":
        assert condition is not None
        distribution = synthetic.CONDITIONAL
        place = np.floor(condition[:, 0] * 4).astype(int).clip(0, 15)
        deviation = distribution.standard_deviation(condition)
        errors = 1 / np.sqrt(np.bincount(place, minlength=16))

        def mean_in_bins(values: np.ndarray) -> np.ndarray:
            return np.stack([values[place == k].mean(axis=0) for k in range(16)])

        residual = (x - distribution.mean(condition)) / deviation
        linear = np.stack([np.polyval(np.polyfit(condition[:, 0], column, 1), condition[:, 0]) for column in x.T], -1)
        bar = MEAN_BIAS + 4 * errors[:, None]
        print(f"     {name}: standard deviation over the exact one {residual.std(axis=0).round(3)}")
        return [
            report(name, "conditional mean, in standard deviations", mean_in_bins(residual), bar),
            report(
                name, "conditional mean, against a line", mean_in_bins((x - linear) / deviation), bar, is_wrong=True
            ),
        ]
    values = -synthetic.MOONS.log_density(x) / 2
    error = 4 * values.std() / np.sqrt(len(x))
    excess = np.array([values.mean() - synthetic.MOONS.entropy()])
    wrong = dataclasses.replace(synthetic.MOONS, noise=0.2)
    return [
        report(name, "-log density of samples minus the entropy", excess, EXCESS_NATS + error),
        report(
            name,
            "the same of noise 0.2",
            np.array([(-wrong.log_density(x) / 2).mean() - wrong.entropy()]),
            EXCESS_NATS + error,
            is_wrong=True,
        ),
    ]


# ---- Likelihood


def exact_slack(schedule, variances: np.ndarray) -> float:
    """Returns bound minus entropy for a Gaussian with the exact score and fixed_large, in nats per dimension.

    variances: variances [K] of the standardized data along the principal axes. Nearly all slack comes from the smallest
    noise, where the slack is the same for every distribution with a density.
    """
    transitions, alpha_bar = schedule.transitions, schedule.alpha_bar[:, None]
    reverse, posterior = transitions.fixed_large_variance[:, None], np.exp(transitions.posterior_log_variance)[:, None]
    error = variances * (1 - alpha_bar) / (alpha_bar * variances + 1 - alpha_bar)  # E (x_0 - E[x_0 | x_t])^2
    coefficient = transitions.posterior_mean_coef_x_0[:, None]
    kl = 0.5 * (np.log(reverse / posterior) + (posterior + coefficient**2 * error) / reverse - 1)
    decoder = 0.5 * (np.log(2 * np.pi * reverse[0]) + error[0] / reverse[0])
    prior = 0.5 * (alpha_bar[-1] * variances - alpha_bar[-1] - np.log1p(-alpha_bar[-1]))
    entropy = 0.5 * np.log(2 * np.pi * np.e * variances)
    return float((prior + decoder + kl[1:].sum(axis=0) - entropy).mean())


def principal_variances(name: str, distribution, scale: np.ndarray, spatial: tuple[int, ...]) -> np.ndarray:
    """Returns the variances of standardized data along the principal axes; 1 for vectors, which are not Gaussian."""
    if name == "series":
        size = spatial[0] * len(scale)
        scales = np.tile(scale, spatial[0])
        return np.linalg.eigvalsh(distribution.covariance(spatial[0]).reshape(size, size) / np.outer(scales, scales))
    if name in ("field", "volume"):
        return np.linalg.eigvalsh(distribution.spectrum(spatial) / np.outer(scale, scale)).ravel()
    return np.array([1.0])


def compare_likelihood(name: str, config, net: pretrained.Model, distribution) -> list[bool]:
    """Compares the variational bound of test data with the entropy, in nats per dimension and data units."""
    normalizations = net.normalizations
    scale = np.asarray(normalizations["x"].scale, np.float64)
    source = data.Normalized(data.load({**config.data, "split": "test"}), normalizations)
    batch = source.read(np.arange(NUM_TEST))
    denoiser = dataclasses.replace(net.denoiser(condition=batch.get("condition"), clip=False), variance="fixed_large")

    @jax.jit
    def compute(key, x):
        options = {"gray_levels": None, "strata": 100, "tables": False}
        return likelihood.bits_per_dim(key, net.schedule, denoiser, x, **options).total

    bits = compute(jax.random.key(0), batch["x"])
    nats = np.asarray(bits, np.float64) * np.log(2) + np.log(scale).mean()
    spatial = tuple(config.data.image_size)
    entropy = distribution_at(distribution, spatial)[2] if spatial else distribution.entropy()
    slack = exact_slack(net.schedule, principal_variances(name, distribution, scale, spatial))
    error = nats.std(ddof=1) / np.sqrt(NUM_TEST)
    good = entropy - 4 * error <= nats.mean() <= entropy + slack + EXCESS_NATS + 4 * error
    print(
        f"{'ok  ' if good else 'FAIL'} {name}: bound {nats.mean():.4f} ± {error:.4f} nats per dimension, "
        f"entropy {entropy:.4f}, slack with the exact score {slack:.4f}, "
        f"excess {nats.mean() - entropy - slack:.4f} of {EXCESS_NATS}",
        flush=True,
    )
    return [bool(good)]


# ---- Runs


def cpu_seconds() -> float:
    """Returns the CPU time of this process."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def run(name: str, root: pathlib.Path, seed: int) -> bool:
    """Trains, samples and compares one config. seed: for training and for samples."""
    module, *variant = CONFIGS[name]
    config = resolve(importlib.import_module(f"configs.{module}").get_config(*variant))
    config.seed = config.sampling.seed = seed
    workdir = root / (f"{name}_seed{seed}" if seed else name)
    for job, what in ((train.run, "training"), (sample_run, "sampling")):
        wall, cpu = time.time(), cpu_seconds()
        job(config, workdir)
        print(f"     {name}: {what}: {time.time() - wall:.0f} s, {cpu_seconds() - cpu:.0f} s of CPU", flush=True)
    (path,) = (workdir / "samples").glob(f"*_n{config.sampling.num_samples}.npz")
    with np.load(path) as arrays:
        x, condition = arrays["arr_0"].astype(np.float64), arrays.get("condition")
    distribution = getattr(synthetic, name.upper())
    net = pretrained.load(workdir)
    results = compare_gaussian(name, x, distribution) if x.ndim > 2 else compare_vectors(name, x, condition)
    return all(results + compare_likelihood(name, config, net, distribution))


def sample_run(config, workdir: pathlib.Path) -> None:
    """Draws the samples; conditional models get conditions that the distribution draws."""
    if config.model.condition_features:
        conditions = synthetic.CONDITIONAL.sample_conditions(np.random.default_rng(1), config.sampling.num_samples)
        np.save(workdir / "conditions.npy", conditions)
        config.sampling.conditions = str(workdir / "conditions.npy")
    sample.run(config, workdir)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(CONFIGS)}; by default all")
    parser.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path("runs/known"))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if unknown := set(options.names) - set(CONFIGS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; known are {', '.join(CONFIGS)}")
    good = [run(name, options.workdir, options.seed) for name in options.names or CONFIGS]
    sys.exit(0 if all(good) else 1)
