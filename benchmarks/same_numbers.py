"""Checks that two versions of this project compute the same numbers in nine small runs: 20 train steps and 8 samples.

    python benchmarks/same_numbers.py OLD NEW [--python=PATH]

OLD and NEW are checkouts (`git worktree add --detach OLD COMMIT`). Each checkout trains and samples with its own main.py, on
the CPU and with the same interpreter; one run also colorizes an image. In the last checkpoint, the step, the parameters, the
EMA and the optimizer's state must be bit-identical, in whichever item they are stored; the logs (without times), the samples
and the edited images, too.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile

import jax
import numpy as np
import orbax.checkpoint as ocp
from PIL import Image

STEPS = 20
ALL = {
    "training.num_steps": STEPS,
    "training.log_every": 5,
    "training.checkpoint_every": STEPS,
    "training.sample_every": 0,
    "sampling.num_samples": 8,
    "sampling.batch_size": 8,
    "sampling.trajectory": 0,
    "sampling.preview_samples": 0,
}
NARROW = {
    "data.dataset": "folder",
    "training.batch_size": 8,
    "optimizer.warmup_steps": 0,
    "ema.warmup": True,  # otherwise newer versions sample with the raw weights after 20 steps
    "sampling.steps": 10,
    "sampling.spacing": "trailing",
}
RUNS = {
    "digits": {"sampling.steps": 25, "sampling.spacing": "trailing"},
    "digits_conditional": {"sampling.steps": 25, "sampling.spacing": "trailing", "sampling.guidance_scale": 2.0},
    "cifar10": {"model.channels": 32, "editing.task": "colorize", **NARROW},
    "cifar10_edm": {"model.channels": 32, "model.num_res_blocks": 1, **NARROW, "sampling.spacing": "karras"},
    "cifar10_flow": {"model.channels": 32, "model.num_res_blocks": 1, **NARROW},
    "imagenet64_adm": {
        "model.channels": 32,
        "model.num_res_blocks": 1,
        "model.num_classes": 3,
        "model.head_channels": 16,
        **NARROW,
    },
    "series": {"training.batch_size": 8, "sampling.steps": 10},
    "field": {"training.batch_size": 8, "sampling.steps": 10},
    "vectors": {"training.batch_size": 8, "sampling.steps": 10},
}
PARTS = ("step", "params", "ema_params", "opt_state")  # in a checkpoint; differences elsewhere would change the log
TIMES = ("images_per_second", "seconds_left", "step_seconds", "compute", "data_wait", "logging", "goodput")


def write_images(directory: pathlib.Path, size: int) -> None:
    """Writes 24 random images with `size` pixels in three classes."""
    rng = np.random.default_rng(0)
    for i in range(24):
        path = directory / f"class{i % 3}" / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC).save(path)


def run(python: str, checkout: pathlib.Path, name: str, workdir: pathlib.Path, data_dir: pathlib.Path) -> dict:
    """Trains and samples. Returns: {name: value} for log values, checkpoint arrays and samples."""
    settings = ALL | RUNS[name]
    if settings.get("data.dataset") == "folder":
        settings["data.data_dir"] = str(data_dir)
    modes = ["train", "sample"]
    if "editing.task" in settings:
        settings["editing.image"] = str(data_dir / "class0" / "00.png")
        modes += ["edit"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(checkout)}
    for mode in modes:
        if mode == "edit":
            del settings["sampling.num_samples"]  # the program refuses it, because edits have a setting of their own
        flags = [f"--config.{setting}={value}" for setting, value in settings.items()]
        command = [python, "main.py", f"--config=configs/{name}.py", f"--workdir={workdir}", f"--mode={mode}", *flags]
        subprocess.run(command, cwd=checkout, env=environment, check=True, stdout=subprocess.DEVNULL)
    arrays = {}
    for line in (workdir / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        arrays |= {f"log {record['step']} {key}": value for key, value in record.items() if key not in TIMES}
    arrays |= checkpoint_arrays(workdir / "checkpoints" / str(STEPS))
    files = sorted((workdir / "samples").rglob("*.npz"))
    assert len(files) == len(modes) - 1
    for samples in files:
        with np.load(samples) as stored:
            arrays |= {f"{samples.parent.name} {key}": stored[key] for key in ("arr_0", "arr_1") if key in stored}
    return arrays


def checkpoint_arrays(directory: pathlib.Path) -> dict[str, np.ndarray]:
    """Returns the arrays of PARTS in a checkpoint, in any item, as {path from the part's name on: array}."""
    arrays = {}
    for metadata in directory.rglob("_METADATA"):
        tree = ocp.PyTreeCheckpointer().restore(metadata.parent)
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
            names = [
                *metadata.parent.relative_to(directory).parts,
                *jax.tree_util.keystr(path, simple=True, separator="/").split("/"),
            ]
            start = next((index for index, name in enumerate(names) if name in PARTS), None)
            if start is not None:
                arrays["/".join(names[start:])] = np.asarray(leaf)
    missing = [part for part in PARTS if not any(name.split("/")[0] == part for name in arrays)]
    if missing:
        raise SystemExit(f"error: {directory} has no {', '.join(missing)}")
    return arrays


def differences(old: dict, new: dict) -> list[str]:
    """Returns the names of values that are missing on one side, or differ in value, dtype or shape."""
    differing = sorted(old.keys() ^ new.keys())
    for key in sorted(old.keys() & new.keys()):
        a, b = np.asarray(old[key]), np.asarray(new[key])
        if a.dtype != b.dtype or a.shape != b.shape or a.tobytes() != b.tobytes():
            differing.append(key)
    return differing


def main() -> int:
    """Prints a line for each run; the exit code is 1 if anything differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=pathlib.Path)
    parser.add_argument("new", type=pathlib.Path)
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--runs", default=",".join(RUNS), help="comma-separated; by default all")
    options = parser.parse_args()
    failed = False
    for name in options.runs.split(","):
        with tempfile.TemporaryDirectory() as temporary:
            root = pathlib.Path(temporary)
            write_images(root / "images", 64 if "64" in name else 32)
            results = [
                run(options.python, checkout.resolve(), name, root / version, root / "images")
                for version, checkout in (("old", options.old), ("new", options.new))
            ]
        differing = differences(*results)
        failed |= bool(differing)
        shown = f"{len(differing)} differ: {', '.join(differing[:5])}" if differing else "bit-identical"
        print(f"{name}: {len(results[0])} arrays and numbers, {shown}", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
