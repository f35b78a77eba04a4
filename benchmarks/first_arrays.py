"""Runs the commands of docs/start/first_arrays.md, prints their times, and measures the samples.

    python benchmarks/first_arrays.py DIR [--seed=0] [--picture]

In DIR, the script runs the page's commands for `runs/patterns`, trained with --config.seed=SEED, and prints the wall and CPU
seconds of each command; the compilation cache is also in DIR. A rerun in DIR uses the finished run. With --picture, it also
copies the picture of the page's samples to docs/images/first_arrays.png. The last line is a JSON object about the 200 samples
of the page's evaluation:

  NAME_z, kill_within_0.001, within_error_bars: as `compare` of examples/reaction_diffusion.py returns them.
  NAME_paired_z: NAME_z for the differences between each sample and the simulation of the same kill rate.
  kill_bias: the mean of these differences for the kill rate. kill_error: the 95% quantile of their absolute values.
  feed_mean, feed_std: the feed rate of the samples; the simulation has 0.037. feed_std_new: of the new simulations.
  memorized: share of samples nearer to a training pattern than 99% of the training patterns are to each other
  (`close_share` of --mode=evaluate).
"""

import argparse
import json
import os
import pathlib
import re
import shutil
import sys

sys.path[:0] = [str(pathlib.Path(__file__).parents[1] / folder) for folder in ("", "examples")]

import numpy as np
import reaction_diffusion

from benchmarks.first_pictures import IMAGES, ROOT, run_page

PAGE = "first_arrays.md"


def quality(test: np.ndarray, samples: np.ndarray, memorized: float) -> dict[str, float]:
    """Returns the numbers of this file's docstring. test: new simulations with the samples' kill rates."""
    found, new = reaction_diffusion.statistics(samples), reaction_diffusion.statistics(test)
    differences = {name: found[name] - new[name] for name in found}
    paired = {f"{name}_paired_z": x.mean() / (x.std(ddof=1) / len(x) ** 0.5) for name, x in differences.items()}
    values = (
        reaction_diffusion.compare(test, samples)
        | paired
        | {
            "kill_bias": differences["kill"].mean(),
            "kill_error": np.quantile(np.abs(differences["kill"]), 0.95),
            "feed_mean": found["feed"].mean(),
            "feed_std": found["feed"].std(),
            "feed_std_new": new["feed"].std(),
            "memorized": memorized,
        }
    )
    return {name: round(float(value), 5) for name, value in values.items()}


def run_python_blocks(directory: pathlib.Path) -> None:
    """Runs the page's Python blocks in a directory."""
    os.chdir(directory)
    for code in re.findall(
        r"^```python\n(.*?)^```", (ROOT / "docs" / "start" / PAGE).read_text(), re.DOTALL | re.MULTILINE
    ):
        exec(code, {})


def main() -> None:
    """Runs the page and measures the samples."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=pathlib.Path, metavar="DIR")
    parser.add_argument("--seed", type=int, default=0, help="the seed of the training run")
    parser.add_argument("--picture", action="store_true", help="also copy the picture of the samples")
    options = parser.parse_args()
    directory = options.directory.resolve()
    directory.mkdir(parents=True, exist_ok=True)
    run_python_blocks(directory)
    run_page(PAGE, "patterns", directory, options.seed)
    workdir = directory / "runs" / "patterns"
    few, *_, many = sorted((workdir / "samples").glob("*.npz"), key=lambda path: len(np.load(path)["arr_0"]))
    memorized = json.loads((workdir / "metrics.json").read_text())[-1]["memorization"]["close_share"]
    with np.load(directory / "patterns/test.npz") as test, np.load(many) as samples:
        print(json.dumps(quality(test["x"], samples["arr_0"], memorized)))
    if options.picture:
        shutil.copy(few.with_suffix(".png"), IMAGES / "first_arrays.png")


if __name__ == "__main__":
    main()
