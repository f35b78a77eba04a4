"""Runs the commands of docs/start/first_arrays.md, prints their times, and measures the samples.

    python benchmarks/first_arrays.py DIR [--seed=0]

In DIR, the script runs the page's commands for `runs/patterns`, trained with --config.seed=SEED, and prints the wall and CPU
seconds of each command; the compilation cache is also in DIR. The last line is a JSON object about the 200 samples of the
page's evaluation:

  NAME_z: the mean of a statistic minus the mean over 200 new simulations, in standard errors for independent sets.
  NAME_paired_z: the same for the differences between each sample and the simulation of the same kill rate.
  kill_bias: the mean of these differences for the kill rate.
  kill_in_bar: share of samples whose kill rate is within 0.001 of the requested rate. kill_error: the 95% quantile.
  feed_mean, feed_std: the feed rate of the samples; the simulation has 0.037. feed_std_new: of the new simulations.
  memorized: share of samples nearer to a training pattern than 99% of the training patterns are to each other;
  memorized_new: the same share of the new simulations.
"""

import argparse
import json
import pathlib
import sys

ROOT = pathlib.Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

import numpy as np
import reaction_diffusion

from benchmarks.first_pictures import run_page
from diffusion_jax.metrics.of_features import memorization_report

ERROR_BAR = 0.001


def quality(train: np.ndarray, test: np.ndarray, kill: np.ndarray, samples: np.ndarray) -> dict[str, float]:
    """Returns the numbers of this file's docstring. kill: the requested rates [N] of the new simulations and samples."""
    found, new = reaction_diffusion.statistics(samples), reaction_diffusion.statistics(test)
    differences = {name: found[name] - new[name] for name in found}
    paired = {f"{name}_paired_z": x.mean() / (x.std(ddof=1) / len(x) ** 0.5) for name, x in differences.items()}
    errors = np.abs(found["kill"] - kill)
    reference, *others = (x.reshape(len(x), -1) for x in (train, samples, test))
    memorized, memorized_new = (memorization_report(reference, x)[0]["close_share"] for x in others)
    values = (
        reaction_diffusion.compare(test, samples)
        | paired
        | {
            "kill_bias": differences["kill"].mean(),
            "kill_in_bar": (errors < ERROR_BAR).mean(),
            "kill_error": np.quantile(errors, 0.95),
            "feed_mean": found["feed"].mean(),
            "feed_std": found["feed"].std(),
            "feed_std_new": new["feed"].std(),
            "memorized": memorized,
            "memorized_new": memorized_new,
        }
    )
    return {name: round(float(value), 5) for name, value in values.items()}


def main() -> None:
    """Runs the page and measures the samples."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=pathlib.Path, metavar="DIR")
    parser.add_argument("--seed", type=int, default=0, help="the seed of the training run")
    options = parser.parse_args()
    directory = options.directory.resolve()
    directory.mkdir(parents=True, exist_ok=True)
    np.save(directory / "kill.npy", np.linspace(*reaction_diffusion.KILL, 16)[:, None])
    run_page("first_arrays.md", "patterns", directory, options.seed)
    found = max((directory / "runs/patterns/samples").glob("*.npz"), key=lambda path: len(np.load(path)["arr_0"]))
    with np.load(directory / "patterns/train.npz") as train, np.load(directory / "patterns/test.npz") as test:
        with np.load(found) as arrays:
            print(json.dumps(quality(train["x"], test["x"], test["condition"][:, 0], arrays["arr_0"])))


if __name__ == "__main__":
    main()
