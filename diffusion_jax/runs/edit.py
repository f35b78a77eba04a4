"""`--mode=edit`: images of the user's own, edited by a trained model: `editing` at the end of a command line."""

from __future__ import annotations

import hashlib
import pathlib
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from diffusion_jax import data, editing, sampling
from diffusion_jax.distributed import compiler, sharding
from diffusion_jax.errors import UserError, as_user_error
from diffusion_jax.runs import pictures, trained_model
from diffusion_jax.runs import workdir as work
from diffusion_jax.runs.artifacts import digest
from diffusion_jax.runs.console import say
from diffusion_jax.runs.sampling_setup import SamplingSetup
from diffusion_jax.training import model_from_config, schedule_from_config

TASKS = ("inpaint", "replace", "sdedit", "colorize", "super_resolution", "interpolate")


def _open(path: str, leaf: str) -> Image.Image:
    """The decoded image of a file. Raises: UserError."""
    if not path:
        raise UserError(f"editing.{leaf}=FILE is needed: the path of an image file")
    try:
        with Image.open(pathlib.Path(path).expanduser()) as image:
            image.load()
            return image
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"editing.{leaf}={path!r} cannot be read as an image: {error}") from None


def _image(path: str, leaf: str, size: tuple[int, int], channels: int) -> np.ndarray:
    """A file as uint8 [H, W, C] of the model's size. Raises: UserError."""
    return data.fit(_open(path, leaf), size, channels)


def _mask(path: str, size: tuple[int, int]) -> np.ndarray:
    """A file as bool [H, W, 1] of the model's size, True where pixels are known. Raises: UserError.

    White is known: values above 127 of 255. A file that holds only 0 and 1, as boolean arrays are often saved, is scaled.
    """
    image = _open(path, "mask")
    transparent = "A" in image.getbands() or "transparency" in image.info
    if image.mode != "1" and not image.mode.startswith("I"):  # 16 bits of gray, which PIL would clip
        image = image.convert("L")
    values = np.asarray(image).astype(int)
    largest = 1 if values.max() == 1 else 65535 if image.mode.startswith("I") else 255
    if largest == 1:
        image = Image.fromarray(values.astype(np.uint8) * 255)
    known = data.fit(image, size, 1) > 127
    if known.all() or not known.any():
        color, task = ("white", "nothing is left to paint") if known.all() else ("black", "no pixel is kept")
        found = f"values {values.min()} to {values.max()} of {largest}" + (
            "; transparency is ignored" if transparent else ""
        )
        raise UserError(
            f"editing.mask={path!r} is {color} everywhere ({found}): {task}. Make the pixels to keep white (above 127 of "
            "255; or 1 in a mask of 0 and 1) and those to paint black (0)"
        )
    return known


def _signed(images: np.ndarray, count: int) -> jax.Array:
    """uint8 [H, W, C] as `count` float images in [-1, 1]."""
    return jnp.repeat(jnp.asarray(images, jnp.float32)[None] / 127.5 - 1.0, count, axis=0)


class _Edit:
    """One task on one image. given: uint8 [G, H, W, C], what the picture shows before the results.

    run(key, denoise_fn, sampler) -> float [N, H, W, C], pure; sampler(clip=None) makes the sampler, `clip` around its own.
    """

    def __init__(self, config: ConfigDict, recipe: SamplingSetup):
        self.options, self.recipe = config.editing, recipe
        self.shape = data.image_shape(config.data)
        *self.size, self.channels = self.shape
        self.count = self.options.num_samples
        if self.options.task not in TASKS:
            raise UserError(f"editing.task={self.options.task!r} is unknown; known: {', '.join(TASKS)}")
        least = 2 if self.options.task == "interpolate" else 1
        if self.count < least:
            raise UserError(f"editing.num_samples={self.count} is too few: it must be at least {least}")
        self.given, self.run = getattr(self, f"_{self.options.task}")()

    def _read(self, leaf: str, size=None) -> np.ndarray:
        return _image(self.options[leaf], leaf, tuple(size or self.size), self.channels)

    def _sample(self, clip: Callable) -> Callable:
        """Plain sampling, with every x_0 on the way changed by `clip`. Raises: UserError."""
        if self.recipe.says["prediction"] == "x_prev" and self.recipe.stochastic:
            raise UserError(
                f"editing.task={self.options.task!r} cannot act on an ancestral mean that the network predicts itself "
                "(diffusion.prediction='x_prev'): use sampling.sampler=ddim"
            )

        def run(key, denoise_fn, sampler):
            key_noise, key_steps = jax.random.split(key)
            x_T = jax.random.normal(key_noise, (self.count, *self.shape))
            return sampling.sample(key_steps, self.recipe.schedule, denoise_fn, x_T, sampler(clip))

        return run

    def _masked(self):
        image = self._read("image")
        shapes = [_open(self.options[leaf], leaf).size for leaf in ("image", "mask")]
        if shapes[0] != shapes[1]:
            raise UserError(
                f"editing.mask={self.options.mask!r} is {shapes[1][0]}x{shapes[1][1]} pixels and the image "
                f"{shapes[0][0]}x{shapes[0][1]}: they must be as large, to be cropped alike"
            )
        mask = _mask(self.options.mask, tuple(self.size))
        kept, count = int(mask.sum()), mask.size
        say(
            f"The mask keeps its white pixels, {kept:,} of {count:,} ({100 * kept / count:.0f}%), and the model paints the "
            f"black ones, {count - kept:,} ({100 * (count - kept) / count:.0f}%)."
        )
        return image, mask, np.stack([image, np.where(mask, image, 127).astype(np.uint8)])

    def _inpaint(self):
        image, mask, given = self._masked()

        def run(key, denoise_fn, sampler):
            return editing.repaint(
                key,
                self.recipe.schedule,
                denoise_fn,
                _signed(image, self.count),
                mask,
                sampler(),
                resamplings=self.options.resamplings,
                jump=self.options.jump,
            )

        return given, run

    def _replace(self):
        image, mask, given = self._masked()

        def run(key, denoise_fn, sampler):
            key_noise, key_steps = jax.random.split(key)
            x_T = jax.random.normal(key_noise, (self.count, *self.shape))
            known = editing.replacement(sampler(), _signed(image, self.count), mask)
            return sampling.sample(key_steps, self.recipe.schedule, denoise_fn, x_T, known)

        return given, run

    def _sdedit(self):
        image = self._read("image")

        def run(key, denoise_fn, sampler):
            x_0 = _signed(image, self.count)
            strength = self.options.strength
            return editing.sdedit(key, self.recipe.schedule, denoise_fn, x_0, sampler(), strength=strength)

        return image[None], run

    def _colorize(self):
        if self.channels == 1:
            raise UserError("editing.task='colorize' needs a model of color images (data.channels=3)")
        linear, image = editing.gray(self.channels), self._read("image")
        y = linear.measure(_signed(image, self.count))
        return np.asarray(pictures.to_uint8(linear.invert(y)))[:1], self._sample(
            lambda clip: editing.project(linear, y, clip)
        )

    def _super_resolution(self):
        factor = self.options.factor
        if factor < 1 or self.size[0] % factor or self.size[1] % factor:
            raise UserError(f"editing.factor={factor} must divide the model's {self.size[0]}x{self.size[1]} pixels")
        linear = editing.average_pool(factor)
        small = self._read("image", (self.size[0] // factor, self.size[1] // factor))
        y = _signed(small, self.count)
        return np.asarray(pictures.to_uint8(linear.invert(y)))[:1], self._sample(
            lambda clip: editing.project(linear, y, clip)
        )

    def _interpolate(self):
        ends = [self._read(leaf) for leaf in ("image", "other")]
        level, steps = self.options.level, self.recipe.schedule.num_timesteps
        if level is not None and not 0 <= level < steps:
            raise UserError(f"editing.level={level} must be an index of the steps, 0 ... {steps - 1}, or None")
        if level is None and self.recipe.stochastic:
            raise UserError(
                "editing.task='interpolate' mixes the images' encodings, which only a deterministic sampler decodes: use "
                "sampling.sampler=ddim (eta 0) or heun, or give editing.level"
            )
        if self.recipe.classes is not None and len(self.recipe.classes) > 1:
            raise UserError("editing.task='interpolate' is of one class: give sampling.class")

        def run(key, denoise_fn, sampler):
            encoding = {} if level is not None else self.recipe.says
            x = editing.interpolate(
                key,
                self.recipe.schedule,
                denoise_fn,
                *(_signed(end, 1) for end in ends),
                np.linspace(0, 1, self.count),
                sampler(),
                t=level,
                **encoding,
            )
            return x[:, 0]

        return np.stack(ends), run

    @property
    def captions(self) -> list[str]:
        """One for each image that the picture shows: what was given, then the results."""
        known = {"interpolate": ["image", "other"], "colorize": ["gray"], "super_resolution": ["small"]}
        given = known.get(self.options.task, ["image", "known"][: len(self.given)])
        if self.options.task == "interpolate":
            return [*given, *(f"{weight:.2g}" for weight in np.linspace(0, 1, self.count))]
        return [*given, *(f"result {i}" for i in range(1, self.count + 1))]

    @property
    def rows(self) -> int:
        """Images that the network sees at a time."""
        return 1 if self.options.task == "interpolate" else self.count


def edit(config: ConfigDict, directory: pathlib.Path) -> None:
    """Edits `editing.image`: writes a picture of what was given and what came of it, and an .npz of the results."""
    work.check_identity(config, directory)
    work.check_seed("sampling.seed", config.sampling.seed)
    with as_user_error("config"):
        mesh = sharding.make_mesh(config.mesh)
        model, schedule = model_from_config(config), schedule_from_config(config.diffusion)
        recipe = SamplingSetup(config, model, schedule, mesh, work.class_names(config, directory))
        task = _Edit(config, recipe)
    step, params = trained_model.load(config, directory, model, mesh, config.sampling.use_ema)
    params, guide = jax.device_get((params, recipe.guide))  # one process does this, on one device
    labels = recipe.labels(np.arange(task.rows))

    def run(params, guide, key, y):
        sampler = partial(recipe.sampler, guide, y)
        return pictures.to_uint8(task.run(key, recipe.network(params, guide, y), sampler))

    if jax.process_index() != 0:
        return
    for note in recipe.notes:
        say(f"Note: {note}.")
    say(f"Compiling {config.editing.task} ...")
    with as_user_error("config"):
        run = jax.jit(run, compiler_options=compiler.options())
        images = np.asarray(run(params, guide, jax.random.key(config.sampling.seed), labels))
    given = hashlib.sha256(task.given.tobytes()).hexdigest()
    told = f"edit_{config.editing.task}_{trained_model.origin(config, step)}_{recipe.name}_seed{config.sampling.seed}"
    name = f"{told}_{digest(work.to_dict(config.editing), given)[:6]}"
    path = directory / "samples" / name
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_name(f"{name}.partial.npz")
    np.savez(temporary, images)
    temporary.replace(path.with_name(f"{name}.npz"))
    shown = np.concatenate([task.given, images])
    pictures.save_png(path.with_name(f"{name}.png"), pictures.grid(shown, min(len(shown), 10), task.captions))
    say(f"What was given, and {len(images)} results: {path}.png; the results alone: {path}.npz")
