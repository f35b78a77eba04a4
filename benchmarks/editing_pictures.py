"""Makes the pictures for docs/guides/editing.md: every --mode=edit task with a small model of colored digits.

    python benchmarks/editing_pictures.py DIR

Creates an image folder of scikit-learn's digits with one color per class, trains on this folder (about five minutes on two
CPU cores), edits held-out digits, and writes docs/images/edit_*.png.
"""

import pathlib
import shutil
import subprocess
import sys

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

ROOT = pathlib.Path(__file__).parent.parent
HELD_OUT = 6  # every sixth digit is held out
COLORS = np.array(
    [[255, 90, 90], [255, 170, 60], [240, 240, 70], [120, 230, 80], [70, 230, 190]]
    + [[80, 190, 255], [110, 120, 255], [190, 110, 255], [255, 110, 220], [235, 235, 235]]
)
TASKS = {
    "inpaint": ["--config.sampling.steps=100"],
    "replace": ["--config.sampling.steps=100"],
    "sdedit": ["--config.sampling.steps=100", "--config.editing.strength=0.6"],
    "colorize": ["--config.sampling.steps=100"],
    "super_resolution": ["--config.sampling.steps=100", "--config.editing.factor=2"],
    "interpolate": ["--config.sampling.steps=100", "--config.sampling.sampler=ddim"],
}


def colored(image, digit):
    """Colors a digit [8, 8] in 0 ... 16 by its class, uint8 [8, 8, 3]."""
    return np.round(image[..., None] / 16 * COLORS[digit]).astype(np.uint8)


def make_files(directory):
    """Writes the training folder, two held-out digits (an 8 and a 3) and a mask of the upper half; returns the folder."""
    digits = load_digits()
    folder = directory / "digits"
    folder.mkdir(parents=True, exist_ok=True)
    held_out = np.arange(len(digits.images)) % HELD_OUT == HELD_OUT - 1
    for i in np.flatnonzero(~held_out):
        Image.fromarray(colored(digits.images[i], digits.target[i])).save(folder / f"{i:04d}.png")
    for name, digit in (("image", 8), ("other", 3)):
        i = np.flatnonzero(held_out & (digits.target == digit))[2]
        Image.fromarray(colored(digits.images[i], digit)).save(directory / f"{name}.png")
    mask = np.full((8, 8), 255, np.uint8)
    mask[:4] = 0
    Image.fromarray(mask).save(directory / "mask.png")
    return folder


def main():
    """Trains, edits and copies the pictures."""
    directory = pathlib.Path(sys.argv[1])
    folder, run = make_files(directory), directory / "run"
    command = [sys.executable, str(ROOT / "main.py"), f"--workdir={run}"]
    settings = [
        f"--config.data.{setting}" for setting in ("dataset=folder", f"data_dir={folder}", "channels=3", "levels=256")
    ]
    train = [
        f"--config={ROOT}/configs/digits.py",
        "--config.training.num_steps=4000",
        "--config.training.sample_every=0",
    ]
    subprocess.run([*command, *train, *settings], check=True)
    files = [f"--config.editing.{setting}={directory}/{setting}.png" for setting in ("image", "other", "mask")]
    for task, options in TASKS.items():
        edit = [*command, "--mode=edit", f"--config.editing.task={task}", *files, *options]
        subprocess.run(edit, check=True)
        (path,) = (run / "samples" / "edits").glob(f"{task}_*.png")
        shutil.copy(path, ROOT / "docs" / "images" / f"edit_{task}.png")


if __name__ == "__main__":
    main()
