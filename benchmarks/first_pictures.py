"""Runs the commands of docs/start/first_pictures.md, prints their times, and draws docs/images/first_pictures.png.

    python benchmarks/first_pictures.py DIR [--plot=docs/images/first_pictures.png]

In DIR, the script runs the page's Python block and the page's two commands for the run `runs/shapes`, training and sampling,
and prints the wall and CPU seconds of each command; the compilation cache is also in DIR. Then the script continues the run
to 1,000 steps. The picture has the samples that the run drew during training, and training images.
"""

import argparse
import os
import pathlib
import re
import resource
import shlex
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
from PIL import Image

from diffusion_jax import data, pictures

PAGE = ROOT / "docs" / "start" / "first_pictures.md"
STEPS = (250, 500, 1000)  # training steps of the samples in the picture
NUM_IMAGES = 16  # how many samples the training command draws


def blocks(kind: str) -> list[str]:
    """Returns the page's code blocks in a language, from top to bottom."""
    return re.findall(rf"^```{kind}\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)


def run(command: list[str], directory: pathlib.Path) -> None:
    """Runs a command and prints its times."""
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = os.environ | {"XDG_CACHE_HOME": str(directory / "cache")}
    subprocess.run(command, cwd=directory, env=environment, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(f"{shlex.join(command)}\n{time.perf_counter() - start:.0f} s, {cpu:.0f} CPU seconds", flush=True)


def run_page(directory: pathlib.Path) -> None:
    """Runs the page's steps: draws the shapes, trains and samples."""
    (directory / "draw.py").write_text(blocks("python")[0])
    run([sys.executable, "draw.py"], directory)
    commands = []
    for block in blocks("sh"):
        words = shlex.split(block.replace("\\\n", " "))
        if "--workdir=runs/shapes" in words:
            arguments = [word.replace("--config=", f"--config={ROOT}/") for word in words[2:]]
            commands.append([sys.executable, str(ROOT / "main.py"), *arguments])
    train, sample = commands
    run(train, directory)
    run(sample, directory)
    run([*train, f"--config.training.num_steps={STEPS[-1]}"], directory)


def training_images(directory: pathlib.Path) -> np.ndarray:
    """Reads the first training images with the program's reader, uint8 [NUM_IMAGES, 32, 32, 3]."""
    source = data.Folder(str(directory / "shapes"), (32, 32), 3)
    return source.read(np.arange(NUM_IMAGES))["image"]


def plot(directory: pathlib.Path):
    """Plots the samples after each number of steps in STEPS, and training images."""
    from matplotlib.figure import Figure

    panels = [Image.open(directory / f"runs/shapes/samples/train_step{step:08d}.png") for step in STEPS]
    training = pictures.draw_samples(training_images(directory), f"{NUM_IMAGES} of the training images")
    panels.append(pictures.to_array(training))
    figure = Figure(figsize=(9, 9.4), dpi=100, layout="constrained")
    for axes, picture in zip(figure.subplots(2, 2).ravel(), panels, strict=True):
        axes.imshow(picture, interpolation="nearest")
        axes.set_axis_off()
    return figure


def main() -> None:
    """Runs the page and draws the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=pathlib.Path, metavar="DIR")
    parser.add_argument("--plot", default="", help="the picture to write")
    options = parser.parse_args()
    directory = options.directory.resolve()
    directory.mkdir(parents=True, exist_ok=True)
    run_page(directory)
    if options.plot:
        plot(directory).savefig(options.plot)


if __name__ == "__main__":
    main()
