"""Trains one network with each objective on equal budgets, and compares likelihoods, samples and solvers.

    python benchmarks/compare_objectives.py [digits moons] [--objectives eps v ...] [--seeds 0 1 2] [--workdir=DIR]

Every run has the network, optimizer, batch size and number of steps of configs/digits.py or configs/vectors.py; only the
objective differs (`OBJECTIVES`). All runs are measured on the same chain of noise levels, and with every solver and spacing
in `SOLVERS`. Finished runs and measurements are not repeated. The output is tables in Markdown: means over the seeds, with
the standard error of the mean over seeds.
"""

import argparse
import functools
import itertools
import json
import pathlib
import sys
import time
import warnings

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax import schedules


def edm_times_1000() -> schedules.Path:
    """EDM's levels at 1,000 times EDM's network time: shows whether a network resolves log(s) / 4."""
    first, last = schedules.edm().interval
    return schedules.path(
        lambda time: -8 * time / 1000, lambda log_snr: -125 * log_snr, interval=(1000 * first, 1000 * last)
    )


schedules.PATHS["edm_times_1000"] = edm_times_1000  # before the settings read the names of the paths

from benchmarks import digits_quality
from configs import digits, vectors
from diffusion_jax import Denoiser, data, likelihood, pretrained, sampling
from diffusion_jax.config import ConfigDict, resolve
from diffusion_jax.data import synthetic
from diffusion_jax.data.sources import batch_examples
from diffusion_jax.evaluation import features
from diffusion_jax.evaluation.ode_likelihood import log_density
from diffusion_jax.metrics import of_arrays, of_features
from diffusion_jax.runs import train

EDM = {"path": "edm", "draw": "log_normal", "preconditioning": "edm", "prediction": "x_0", "weighting": "edm"}
FLOW = {"path": "rectified_flow", "prediction": "flow"}
OBJECTIVES = {
    "eps": {"schedule": "cosine", "prediction": "eps"},
    "v": {"schedule": "cosine", "prediction": "v"},
    "edm": EDM,
    "edm_times_1000": EDM | {"path": "edm_times_1000"},
    "flow": FLOW | {"draw": "uniform"},
    "flow_logit_normal": FLOW | {"draw": "logit_normal"},
}
CONFIGS = {"digits": digits.get_config, "moons": vectors.get_config}
NUM_SAMPLES = {"digits": 1000, "moons": 4000}
# (solver, spacing). Heun calls the network twice in each step except the last, the others once.
SOLVERS = (
    ("ddim", "trailing"),
    ("ddim", "log_snr"),
    ("heun", "log_snr"),
    ("heun", "karras"),
    ("dpm_solver_pp", "trailing"),
    ("dpm_solver_pp", "log_snr"),
)
CALLS = {"digits": (20,), "moons": (10, 20)}
REFERENCE = "dpm_solver_pp, log_snr, 40"
# The levels of the bound: uniform in log SNR, within the levels that every objective trains on.
CHAIN_PATH = schedules.path(lambda time: -time, lambda log_snr: -log_snr, interval=(-9.0, 8.0))
CHAIN = schedules.from_path(CHAIN_PATH, np.linspace(*CHAIN_PATH.interval, 500))
NUM_TEST = 299  # all held-out digits
SMALL = ("energy distance",)  # shown times 1e4


def make_config(name: str, objective: str, seed: int) -> ConfigDict:
    """Returns the config of a run."""
    config = CONFIGS[name]()
    config.diffusion.update(OBJECTIVES[objective])
    config.seed = seed
    config.training.update(sample_every=0, checkpoint_every=config.training.num_steps)
    config.evaluation.every = 0
    return resolve(config)


# ---- Measurements


def likelihoods(net: pretrained.Model, source: data.Source) -> dict[str, float]:
    """Returns the bound of test digits on `CHAIN`, or for moons minus the log density by the probability-flow ODE."""
    batch = data.Normalized(source, net.normalizations).read(np.arange(NUM_TEST))
    x_0 = batch_examples(batch)
    x_0 = jnp.asarray(x_0 if net.levels is None else x_0 / 127.5 - 1, jnp.float32)

    denoiser = net.denoiser()
    if net.levels is None:
        options = {"trace": "exact", "time": float(net.schedule.path.time_at_log_snr(9.0))}
        density = jax.jit(lambda key, x_0: log_density(key, net.schedule, denoiser, x_0, **options).log_density)(
            jax.random.key(0), x_0
        )
        nats = -float(np.asarray(density, np.float64).mean()) / x_0.shape[-1]
        return {"nats per dimension": nats + float(np.log(net.normalizations["x"].scale).mean())}

    def network(x_t, time):
        return denoiser.output(x_t, net.schedule.path.at_log_snr(-time, x_t))

    on_chain = Denoiser(network, net.prediction, "fixed_small", clip=True)

    @jax.jit
    def compute(key, x_0):
        options = {"gray_levels": net.levels, "strata": 50, "tables": False}
        return likelihood.bits_per_dim(key, CHAIN, on_chain, x_0, **options).total

    return {"bits per dimension": float(compute(jax.random.key(0), x_0).mean())}


@functools.cache
def digit_features() -> tuple[features.FeatureExtractor, of_features.Moments]:
    """Returns the extractor, and the moments of the training digits."""
    extractor, source = features.digits(), data.Digits("train", (8, 8), 1)
    images = batch_examples(source.read(np.arange(len(source))))
    return extractor, of_features.moments(np.asarray(extractor.function(extractor.params, jnp.asarray(images))["pool"]))


@functools.cache
def reference_moons() -> np.ndarray:
    """Returns 4,000 points of the exact distribution."""
    return synthetic.MOONS.sample(np.random.default_rng(12345), 4000)


def quality(net: pretrained.Model, samples: np.ndarray) -> dict[str, float]:
    """Returns measures of samples: Frechet distance and sure digits, or energy distance and outliers."""
    if net.levels is None:
        density = synthetic.MOONS.log_density
        outside = (density(samples) < np.quantile(density(reference_moons()), 0.01)).mean()
        distance = of_arrays.energy_distance(reference_moons(), samples)
        return {"energy distance": float(distance.value), "samples beyond 99% of the data": float(outside)}
    images = np.asarray(np.clip(np.round((samples + 1) * 127.5), 0, 255), np.uint8)
    extractor, moments = digit_features()
    found = of_features.moments(np.asarray(extractor.function(extractor.params, jnp.asarray(images))["pool"]))
    measured = digits_quality.quality(images)
    return {"Frechet distance": of_features.frechet_distance(moments, found)} | {
        name: measured[key] for name, key in (("sure digits", "confident"), ("distance ratio", "distance"))
    }


def draw(net: pretrained.Model, name: str, solver: str, spacing: str, calls: int) -> np.ndarray:
    """Draws the samples of a run; calls: how often the network is called for each sample."""
    steps = calls // 2 if solver == "heun" else calls
    sampler = sampling.SAMPLERS[solver]()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # poor combinations are measured, too
        return np.asarray(
            net.sample(jax.random.key(7), NUM_SAMPLES[name], sampler=sampler, steps=steps, spacing=spacing)
        )


def measure(name: str, objective: str, seed: int, root: pathlib.Path) -> dict[str, dict[str, float]]:
    """Trains a run and measures it: {"likelihood" or "solver, spacing, calls": {measure: value}}."""
    path = root / f"{name}_{objective}_{seed}.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    workdir = root / f"{name}_{objective}_{seed}"
    train.run(make_config(name, objective, seed), workdir)
    net = pretrained.load(workdir)
    jobs: dict[str, tuple[str, str, int] | None] = {"likelihood": None, REFERENCE: ("dpm_solver_pp", "log_snr", 40)}
    for (solver, spacing), calls in itertools.product(SOLVERS, CALLS[name]):
        jobs[f"{solver}, {spacing}, {calls}"] = solver, spacing, calls
    for key, options in jobs.items():
        if key in found:
            continue
        begin = time.time()
        if options is None:
            found[key] = likelihoods(net, data.load({**make_config(name, objective, seed).data, "split": "test"}))
        else:
            try:
                found[key] = quality(net, draw(net, name, *options))
            except ValueError as error:  # so few steps that the sampler is known to fail
                print(f"{path.stem}: {key}: {error}")
                found[key] = {}
        path.write_text(json.dumps(found, indent=1))
        print(f"{path.stem}: {key}: {found[key]}, {time.time() - begin:.1f} s", flush=True)
    return found


# ---- Tables


def format_mean(values: list[float]) -> str:
    """Formats the mean over seeds and its standard error."""
    if not values:
        return "fails"
    mean = np.mean(values)
    if len(values) == 1 or mean > 1e4:
        return f"{mean:.3g}"
    error = np.std(values, ddof=1) / np.sqrt(len(values))
    digits_shown = max(0, int(np.ceil(-np.log10(max(error, 1e-6)))))
    return f"{mean:.{digits_shown}f} ± {error:.{digits_shown}f}"


def scaled(measured: dict[str, float], title: str) -> float:
    """Returns a measure, times 1e4 if its values are small."""
    return measured[title] * (1e4 if title in SMALL else 1)


def print_tables(name: str, results: dict[str, list[dict[str, dict[str, float]]]]) -> None:
    """Prints a table of objectives for `REFERENCE`, and a table of solvers for each objective."""
    measures = ("likelihood", REFERENCE)
    titles = {title: key for key in measures for runs in results.values() for title in runs[0][key]}
    heads = [f"{title} x 1e4" if title in SMALL else title for title in titles]
    print(f"\n### {name}\n\n| objective | {' | '.join(heads)} |\n|---|{'---|' * len(titles)}")
    for objective, runs in results.items():
        cells = [format_mean([scaled(run[key], title) for run in runs]) for title, key in titles.items()]
        print(f"| {objective} | {' | '.join(cells)} |")
    if name == "moons":
        x = batch_examples(data.load({**CONFIGS[name]().data, "split": "test"}).read(np.arange(NUM_TEST)))
        exact = -synthetic.MOONS.log_density(x).mean() / x.shape[-1]
        print(f"\nThe exact density gives {exact:.4f} nats per dimension.")
    main = "Frechet distance" if name == "digits" else "energy distance"
    unit = " x 1e4" if main in SMALL else ""
    print(f"\n{main}{unit} by solver, spacing and network calls:\n\n| solver, spacing, calls | {' | '.join(results)} |")
    print(f"|---|{'---|' * len(results)}")
    for calls in CALLS[name]:
        for solver, spacing in SOLVERS:
            key = f"{solver}, {spacing}, {calls}"
            cells = [format_mean([scaled(run[key], main) for run in runs if run[key]]) for runs in results.values()]
            print(f"| {key} | {' | '.join(cells)} |")


def main() -> None:
    """Measures all chosen runs, then prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(CONFIGS), help=f"of {', '.join(CONFIGS)}; by default all")
    parser.add_argument("--objectives", nargs="*", choices=OBJECTIVES, default=list(OBJECTIVES))
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path("runs/objectives"))
    options = parser.parse_args()
    if unknown := set(options.names) - set(CONFIGS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; known are {', '.join(CONFIGS)}")
    options.workdir.mkdir(parents=True, exist_ok=True)
    for name in options.names:
        results: dict[str, list] = {objective: [] for objective in options.objectives}
        for seed in options.seeds:
            for objective in options.objectives:
                results[objective].append(measure(name, objective, seed, options.workdir))
        print_tables(name, results)


if __name__ == "__main__":
    main()
