"""Runs the commands of docs/start/first_pictures.md, prints their times, and measures the samples.

    python benchmarks/first_pictures.py DIR [--seed=0] [--pictures]

In DIR, the script runs the page's commands for `runs/drawings`, trained with --config.seed=SEED, and prints the wall and CPU
seconds of each command; the compilation cache is also in DIR. A rerun in DIR uses the finished run. With --pictures, it also
draws hero.webp, its last frame hero.png, and social.png in docs/images, and copies the picture of the samples there.

A small convolutional network, trained on the drawings, judges the samples of the page's evaluation. The threshold is the
confidence that 95% of new drawings exceed. The last line is a JSON object:

  accuracy: share of 1,200 new drawings whose class the classifier recognizes. threshold: the confidence.
  recognized: share of samples whose predicted class is the requested class, with a confidence of at least the threshold.
  right_class: the same share for any confidence. rarest: the smallest share of a predicted class.
  memorized: share of samples nearer to a drawing than 99% of the drawings are to each other (`close_share` of
  --mode=evaluate); memorized_new: the same share of the new drawings.
"""

import argparse
import json
import os
import pathlib
import random
import re
import resource
import shlex
import shutil
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

import drawings
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from PIL import Image, ImageDraw, ImageFont

from diffusion_jax import data
from diffusion_jax.images import to_uint8
from diffusion_jax.metrics.of_features import memorization_report
from diffusion_jax.runs.sample import SampleFile
from diffusion_jax.runs.sampling_setup import keys_of_samples
from diffusion_jax.runs.workdir import load_config

IMAGES = ROOT / "docs" / "images"
NAMES = [kind.__name__ for kind in drawings.CLASSES]
NEW_PER_CLASS, NEW_SEED = 200, 1  # drawings that training does not see
FIT_STEPS, FIT_BATCH = 600, 128
COLUMNS, ROWS, TILE, GAP = 12, 3, 64, 6  # of the animation, in samples and pixels


# ---- The page's commands


def page_commands(page: str, name: str) -> list[list[str]]:
    """Returns the commands of docs/start/PAGE that make the data and use runs/NAME, from top to bottom."""
    text = (ROOT / "docs" / "start" / page).read_text()
    blocks = re.findall(r"^```sh\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [
        shlex.split(line) for line in lines if line.startswith("python examples/") or f"--workdir=runs/{name}" in line
    ]


def run(command: list[str], directory: pathlib.Path) -> None:
    """Runs a command and prints its times."""
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = os.environ | {"XDG_CACHE_HOME": str(directory / "cache"), "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, *command[1:]], cwd=directory, env=environment, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(f"{shlex.join(command)}\n{time.perf_counter() - start:.0f} s, {cpu:.0f} CPU seconds", flush=True)


def run_page(page: str, name: str, directory: pathlib.Path, seed: int) -> None:
    """Runs the page's commands in a directory with links to this project's files. seed: of the training run."""
    for link in ("main.py", "configs", "examples"):
        if not (directory / link).exists():
            (directory / link).symlink_to(ROOT / link)
    for command in page_commands(page, name):
        run([*command, f"--config.seed={seed}"] if f"--config=configs/{name}.py" in command else command, directory)


# ---- The classifier and the numbers


class Classifier(nn.Module):
    """A small convolutional network: uint8 images [B, 16, 16, 3] to logits [B, classes]."""

    @nn.compact
    def __call__(self, images):
        """images: uint8 [B, H, W, 3]."""
        x = images.astype(jnp.float32) / 127.5 - 1
        for channels in (16, 32, 64):
            x = nn.relu(nn.Conv(channels, (3, 3), strides=2)(x))
        x = nn.relu(nn.Dense(64)(x.reshape(len(x), -1)))
        return nn.Dense(len(NAMES))(x)


def fit_classifier(images: np.ndarray, labels: np.ndarray):
    """Trains the classifier. Returns a function from images to probabilities [B, classes]."""
    network, optimizer = Classifier(), optax.adamw(optax.cosine_decay_schedule(2e-3, FIT_STEPS), weight_decay=1e-3)
    params = network.init(jax.random.key(0), images[:1])
    state, rng = optimizer.init(params), np.random.default_rng(0)

    @jax.jit
    def step(params, state, images, labels):
        def loss_fn(params):
            targets = optax.smooth_labels(jax.nn.one_hot(labels, len(NAMES)), 0.1)
            return optax.softmax_cross_entropy(network.apply(params, images), targets).mean()

        updates, state = optimizer.update(jax.grad(loss_fn)(params), state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(FIT_STEPS):
        chosen = rng.integers(len(images), size=FIT_BATCH)
        params, state = step(params, state, images[chosen], labels[chosen])
    return lambda images: np.asarray(jax.nn.softmax(network.apply(params, images)))


def new_drawings(count: int) -> np.ndarray:
    """Draws `count` new pictures of each class, uint8 [classes * count, H, W, 3]."""
    random.seed(NEW_SEED)
    return np.stack([np.asarray(drawings.draw(kind)) for kind in drawings.CLASSES for _ in range(count)])


def quality(images: np.ndarray, labels: np.ndarray, samples: np.ndarray, requested: np.ndarray) -> dict[str, float]:
    """Returns the numbers of this file's docstring.

    images, labels: the drawings and their classes. samples, requested: the samples and their requested classes.
    """
    new, classes = new_drawings(NEW_PER_CLASS), np.repeat(np.arange(len(NAMES)), NEW_PER_CLASS)
    classify = fit_classifier(images, labels)
    of_new, of_samples = classify(new), classify(samples)
    threshold = np.quantile(of_new.max(axis=1), 0.05)
    predicted = of_samples.argmax(axis=1)
    right, sure = predicted == requested, of_samples.max(axis=1) >= threshold
    reference, *others = (drawings.pixels(x).astype(np.float32) for x in (images, samples, new))
    memorized, memorized_new = (memorization_report(reference, x)[0]["close_share"] for x in others)
    values = {
        "accuracy": (of_new.argmax(axis=1) == classes).mean(),
        "threshold": threshold,
        "recognized": (right & sure).mean(),
        "right_class": right.mean(),
        "rarest": np.bincount(predicted, minlength=len(NAMES)).min() / len(samples),
        "memorized": memorized,
        "memorized_new": memorized_new,
    }
    recognized = {name: (right & sure)[requested == i].mean() for i, name in enumerate(NAMES)}
    return {name: round(float(value), 4) for name, value in (values | recognized).items()}


# ---- Pictures


def denoised(directory: pathlib.Path) -> list[np.ndarray]:
    """Returns samples being denoised, uint8 [36, H, W, 3] each, from noise to the finished samples."""
    os.chdir(directory)  # the run's settings have relative paths
    workdir = directory / "runs" / "drawings"
    setup = SampleFile(load_config(workdir), workdir).setup
    indices = np.arange(COLUMNS * ROWS)
    steps = np.arange(0, setup.schedule.num_timesteps, 2)  # every second step, for a smaller file
    samples, frames = setup.generate(keys_of_samples(1, indices), indices, trajectory=steps)
    return [*np.asarray(to_uint8(frames.x_t)), np.asarray(to_uint8(samples))]


def draw_tiles(images: np.ndarray, columns: int, tile: int, gap: int) -> Image.Image:
    """Draws samples [N, H, W, 3] as a grid. tile: width of a sample in the picture, a multiple of W."""
    count = len(images) // columns
    picture = Image.new("RGB", (columns * (tile + gap) + gap, count * (tile + gap) + gap), "white")
    for i, image in enumerate(images):
        row, column = divmod(i, columns)
        large = Image.fromarray(image).resize((tile, tile), Image.Resampling.NEAREST)
        picture.paste(large, (gap + column * (tile + gap), gap + row * (tile + gap)))
    return picture


def social_picture(images: np.ndarray) -> Image.Image:
    """Draws the project's name above 30 samples, in the size of a link's picture on other sites."""
    picture = Image.new("RGB", (1200, 630), "white")
    draw = ImageDraw.Draw(picture)
    draw.text((60, 50), "diffusion_jax", "black", ImageFont.load_default(80))
    draw.text((60, 155), "Denoising diffusion models in JAX", "black", ImageFont.load_default(40))
    picture.paste(draw_tiles(images[:30], 10, 96, 12), (54, 240))
    return picture


def draw_pictures(directory: pathlib.Path) -> None:
    """Writes the animation with its last frame, the social picture, and the program's own picture of 96 samples."""
    (picture,) = (directory / "runs/drawings/samples").glob("*_n96.png")
    shutil.copy(picture, IMAGES / "first_pictures.png")
    grids = denoised(directory)
    frames = [draw_tiles(images, COLUMNS, TILE, GAP) for images in grids]
    durations = [600, *[200] * (len(frames) - 2), 4000]  # milliseconds
    options = {"save_all": True, "append_images": frames[1:], "duration": durations, "loop": 1}
    frames[0].save(IMAGES / "hero.webp", lossless=True, method=4, **options)
    frames[-1].save(IMAGES / "hero.png", optimize=True)
    social_picture(grids[-1]).save(IMAGES / "social.png", optimize=True)


def main() -> None:
    """Runs the page, measures the samples and draws the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=pathlib.Path, metavar="DIR")
    parser.add_argument("--seed", type=int, default=0, help="the seed of the training run")
    parser.add_argument("--pictures", action="store_true", help="also draw the pictures")
    options = parser.parse_args()
    directory = options.directory.resolve()
    directory.mkdir(parents=True, exist_ok=True)
    run_page("first_pictures.md", "drawings", directory, options.seed)
    size = drawings.SIZE
    source = data.Folder(str(directory / "drawings"), (size, size), 3)
    images, labels = (source.read(np.arange(len(source)))[name] for name in ("image", "label"))
    found = max((directory / "runs/drawings/samples").glob("*.npz"), key=lambda path: len(np.load(path)["arr_0"]))
    with np.load(found) as arrays:
        sets = images, labels, arrays["arr_0"], arrays["arr_1"]
    print(json.dumps(quality(*sets)))
    if options.pictures:
        draw_pictures(directory)


if __name__ == "__main__":
    main()
