"""How long a save blocks the train loop, compared with a copy of the state and with Orbax; and the cost of digests.

    python benchmarks/checkpoints.py [--config=configs/cifar10.py] [--rounds=5]

The state is made of random numbers: only its size matters, and no network is compiled.
"""

import argparse
import pathlib
import runpy
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import jax
import numpy as np
import orbax.checkpoint as ocp

from diffusion_jax import training
from diffusion_jax.runs import devices
from diffusion_jax.training import digests
from diffusion_jax.training.checkpoints import Checkpoints


def seconds(function) -> float:
    """The seconds of a call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def orbax_alone(directory: pathlib.Path, state, steps: int) -> list[float]:
    """Seconds for which each save blocks if the loop calls Orbax directly, as runs of several processes do."""
    options = ocp.CheckpointManagerOptions(max_to_keep=1, create=True)
    blocked = []
    with ocp.CheckpointManager(directory, options=options) as manager:
        for step in range(1, steps + 1):
            save = ocp.args.StandardSave(dict(vars(state)))
            blocked.append(seconds(lambda: manager.save(step, args=save, force=True)))  # noqa: B023 (called at once)
            manager.wait_until_finished()
    return blocked


def main() -> None:
    """Prints the medians over the rounds."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", default="configs/cifar10.py")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    devices.silence_libraries()
    abstract = training.build_program(runpy.run_path(options.config)["get_config"]()).abstract_state
    rng = np.random.default_rng(0)

    def random_like(leaf):
        return jax.device_put(rng.standard_normal(leaf.shape).astype(leaf.dtype), leaf.sharding)

    state = jax.tree.map(random_like, abstract)
    megabytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state)) / 1e6
    rows = []
    with tempfile.TemporaryDirectory() as directory, Checkpoints(pathlib.Path(directory), kept=1) as checkpoints:
        for step in range(1, options.rounds + 2):
            copy = seconds(lambda: jax.tree.map(lambda leaf: np.array(leaf, copy=True), state))
            blocked = seconds(lambda: checkpoints.save(step, state))  # noqa: B023 (called at once)
            background = seconds(lambda: checkpoints.finish(step))  # noqa: B023
            path = pathlib.Path(directory) / str(step)
            hashed = seconds(lambda: digests.find_corruption(path, ("params", "ema_params", "rest")))  # noqa: B023
            rows.append((copy, blocked, background, hashed))
    with tempfile.TemporaryDirectory() as directory:
        alone = np.median(orbax_alone(pathlib.Path(directory), state, options.rounds + 1)[1:])
    copy, blocked, background, hashed = np.median(
        rows[1:], axis=0
    )  # the first save also creates threads and directories
    print(f"state of {megabytes:,.0f} MB, medians of {options.rounds} saves after a first one")
    print(f"copying it in memory              {copy:7.3f} s")
    print(f"save() blocks the loop for        {blocked:7.3f} s")
    print(f"Orbax alone blocks the loop for   {alone:7.3f} s")
    print(f"writing it in the background      {background:7.3f} s, including about the next time for digests")
    print(f"hashing all its files, on restart {hashed:7.3f} s")


if __name__ == "__main__":
    main()
