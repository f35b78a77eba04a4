"""Trains the digits with two networks for the same time, and compares their samples.

    python benchmarks/compare_networks.py [--seeds 0 1 2] [--workdir=DIR]

The U-Net trains with configs/digits.py; the transformer of examples/ trains with the same data, batch size, objective and EMA
for as many steps as fit into the same time. The ratio of the times is measured first, with alternating steps. Each run draws
1,000 samples with 40 steps of DPM-Solver++ 2M. Finished runs are not repeated. The output is a table in Markdown: means over
the seeds, with the standard error of the mean over seeds.
"""

import argparse
import json
import pathlib
import sys
import time
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import jax
import numpy as np

from benchmarks import compare_objectives
from diffusion_jax import pretrained, training
from diffusion_jax.config import ConfigDict, default, resolve
from diffusion_jax.runs import train

KIND = str(pathlib.Path(__file__).parent.parent / "examples" / "transformer.py") + ":transformer"
NETWORKS = {"U-Net": None, "transformer": {"width": 128, "depth": 4, "patch": 2}}
SAMPLER = ("dpm_solver_pp", "log_snr", 40)


def make_config(network: str, seed: int, num_steps: int) -> ConfigDict:
    """Returns the config of a run."""
    config = compare_objectives.make_config("digits", "eps", seed)
    config.training.update(num_steps=num_steps, checkpoint_every=num_steps)
    if options := NETWORKS[network]:
        config.model = default().model
        config.model.update(kind=KIND, options=options)
    return resolve(config)


def step_times(rounds: int = 8, steps: int = 8) -> dict[str, float]:
    """Returns the median time of a train step in seconds, by network, from alternating groups of steps."""
    images = np.random.default_rng(0).integers(0, 256, (64, 8, 8, 1), dtype=np.uint8)
    programs: dict[str, list[Any]] = {name: list(training.create(make_config(name, 0, 1000))) for name in NETWORKS}
    times: dict[str, list[float]] = {name: [] for name in NETWORKS}
    for _ in range(rounds):
        for name, program in programs.items():
            begin = time.perf_counter()
            for _ in range(steps):
                program[0], _ = program[1](program[0], {"image": images})
            jax.block_until_ready(program[0])
            times[name].append((time.perf_counter() - begin) / steps)
    return {name: float(np.median(values[1:])) for name, values in times.items()}  # the first includes the compilation


def main() -> None:
    """Measures all runs, then prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path("runs/networks"))
    options = parser.parse_args()
    options.workdir.mkdir(parents=True, exist_ok=True)
    path = options.workdir / "results.json"
    results = json.loads(path.read_text()) if path.exists() else {"step": step_times()}
    path.write_text(json.dumps(results))
    times = results["step"]
    print({name: f"{seconds * 1e3:.0f} ms per step" for name, seconds in times.items()}, flush=True)
    steps = {name: round(1500 * times["U-Net"] / seconds) for name, seconds in times.items()}
    for seed in options.seeds:
        for name in NETWORKS:
            key = f"{name}, seed {seed}"
            if key not in results:
                workdir = options.workdir / key.replace(", ", "_").replace(" ", "_")
                train.run(make_config(name, seed, steps[name]), workdir)
                net = pretrained.load(workdir, network=True)
                results[key] = compare_objectives.quality(net, compare_objectives.draw(net, "digits", *SAMPLER))
                path.write_text(json.dumps(results))
                print(key, results[key], flush=True)
    titles = list(results[f"U-Net, seed {options.seeds[0]}"])
    print(f"| network | steps | {' | '.join(titles)} |\n|---|---|{'---|' * len(titles)}")
    for name in NETWORKS:
        runs = [results[f"{name}, seed {seed}"] for seed in options.seeds]
        cells = [compare_objectives.format_mean([run[title] for run in runs]) for title in titles]
        print(f"| {name} | {steps[name]:,} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
