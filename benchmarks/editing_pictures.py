"""Makes the pictures for docs/guides/editing.md: every --mode=edit task with the network of the first tutorial.

    python benchmarks/first_pictures.py DIR
    python benchmarks/editing_pictures.py DIR

The second command draws two new houses, which training did not see, edits them with the run DIR/runs/drawings of the first
command, and writes docs/images/edit_*.png.
"""

import pathlib
import random
import shutil
import subprocess
import sys

from PIL import Image, ImageDraw

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "examples"))

import drawings

SEED = 2  # drawings that training does not see
TASKS = {
    "inpaint": ["--config.sampling.sampler=ddpm"],
    "replace": [],
    "sdedit": ["--config.editing.strength=0.6"],
    "colorize": [],
    "super_resolution": ["--config.editing.factor=4"],
    "interpolate": ["--config.sampling.sampler=ddim"],
}


def make_files(directory):
    """Writes two new houses, and a mask whose lower half is known."""
    random.seed(SEED)
    for name in ("image", "other"):
        drawings.draw(drawings.house).save(directory / f"{name}.png")
    mask = Image.new("L", (drawings.SIZE, drawings.SIZE), 255)
    ImageDraw.Draw(mask).rectangle((0, 0, drawings.SIZE, drawings.SIZE // 2 - 1), fill=0)
    mask.save(directory / "mask.png")


def main():
    """Edits, and copies the pictures."""
    directory = pathlib.Path(sys.argv[1]).resolve()
    make_files(directory)
    run = directory / "runs" / "drawings"
    files = [f"--config.editing.{setting}={directory}/{setting}.png" for setting in ("image", "other", "mask")]
    command = [sys.executable, str(ROOT / "main.py"), f"--workdir={run}", "--mode=edit", *files]
    command += ["--config.sampling.label=house", "--config.sampling.steps=100"]
    shutil.rmtree(run / "samples" / "edits", ignore_errors=True)
    for task, options in TASKS.items():
        subprocess.run([*command, f"--config.editing.task={task}", *options], check=True, cwd=directory)
        (path,) = (run / "samples" / "edits").glob(f"{task}_*.png")
        shutil.copy(path, ROOT / "docs" / "images" / f"edit_{task}.png")


if __name__ == "__main__":
    main()
