"""`--mode=edit`: the functions of `diffusion_jax.editing` applied to image files with a trained model."""

from __future__ import annotations

import hashlib
import pathlib
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from diffusion_jax import data, editing, sampling
from diffusion_jax.config import resolve
from diffusion_jax.distributed import compiler
from diffusion_jax.errors import UserError, as_user_error
from diffusion_jax.files import save_npz
from diffusion_jax.images import to_model_range, to_uint8
from diffusion_jax.runs import pictures
from diffusion_jax.runs.chunk_store import options_digest
from diffusion_jax.runs.console import log
from diffusion_jax.runs.edit_images import open_image, read_image, read_mask
from diffusion_jax.runs.sampling_setup import SamplingSetup
from diffusion_jax.runs.trained_model import TrainedModel
from diffusion_jax.runs.workdir import to_dict

__all__ = ["TASKS", "run"]


class _Edit(NamedTuple):
    """One task on one image.

    given: uint8 [G, H, W, C], images that the picture shows before the results, with their captions. apply: pure,
    (key, denoise_fn, make_sampler) -> float [N, H, W, C] in [-1, 1]; make_sampler(clip=None) is `SamplingSetup.sampler`.
    """

    given: np.ndarray
    captions: list[str]
    apply: Callable


class _Context:
    """The input of every task: options, the sampling setup, and the shape of the images."""

    def __init__(self, config: ConfigDict, setup: SamplingSetup):
        self.options, self.setup = config.editing, setup
        self.shape = data.example_shape(config.data)
        (height, width), self.channels = self.shape[:-1], self.shape[-1]
        self.size = height, width
        self.num_samples = self.options.num_samples

    def read(self, leaf: str, size: tuple[int, int] | None = None) -> np.ndarray:
        """`config.editing[leaf]` as uint8 [H, W, C]. Raises: UserError."""
        return read_image(self.options[leaf], leaf, size or self.size, self.channels)

    def repeat(self, image: np.ndarray) -> jax.Array:
        """uint8 [H, W, C] as `num_samples` equal images in [-1, 1]."""
        return jnp.repeat(to_model_range(jnp.asarray(image))[None], self.num_samples, axis=0)

    def sample(self, key, denoise_fn, sampler: sampling.Sampler) -> jax.Array:
        """Samples from noise."""
        key_noise, key_steps = jax.random.split(key)
        x_T = jax.random.normal(key_noise, (self.num_samples, *self.shape))
        x_0 = sampling.sample(key_steps, self.setup.schedule, denoise_fn, x_T, sampler)
        assert isinstance(x_0, jax.Array)  # a trajectory is not requested
        return x_0

    def read_masked(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The image, the mask, and both as `_Edit.given`. Raises: UserError."""
        image = self.read("image")
        sizes = [open_image(self.options[leaf], leaf).size for leaf in ("image", "mask")]
        if sizes[0] != sizes[1]:
            raise UserError(
                f"editing.mask={self.options.mask!r} has {sizes[1][0]}x{sizes[1][1]} pixels and the image has "
                f"{sizes[0][0]}x{sizes[0][1]}: they must have the same size, because both are cropped alike"
            )
        mask = read_mask(self.options.mask, self.size)
        kept, total = int(mask.sum()), mask.size
        log(
            f"The mask keeps its white pixels, {kept:,} of {total:,} ({100 * kept / total:.0f}%), and the model paints the "
            f"black ones, {total - kept:,} ({100 * (total - kept) / total:.0f}%)."
        )
        return image, mask, np.stack([image, np.where(mask, image, _UNKNOWN).astype(np.uint8)])


_UNKNOWN = 127  # gray for pixels that the model paints


def _inpaint(context: _Context) -> _Edit:
    image, mask, given = context.read_masked()

    def apply(key, denoise_fn, make_sampler):
        return editing.repaint(
            key,
            context.setup.schedule,
            denoise_fn,
            context.repeat(image),
            mask,
            make_sampler(),
            resamplings=context.options.resamplings,
            jump=context.options.jump,
        )

    return _Edit(given, ["image", "known"], apply)


def _replace(context: _Context) -> _Edit:
    image, mask, given = context.read_masked()
    mask = jnp.asarray(mask)

    def apply(key, denoise_fn, make_sampler):
        return context.sample(key, denoise_fn, editing.replacement(make_sampler(), context.repeat(image), mask))

    return _Edit(given, ["image", "known"], apply)


def _sdedit(context: _Context) -> _Edit:
    image = context.read("image")

    def apply(key, denoise_fn, make_sampler):
        schedule, strength = context.setup.schedule, context.options.strength
        return editing.sdedit(key, schedule, denoise_fn, context.repeat(image), make_sampler(), strength=strength)

    return _Edit(image[None], ["image"], apply)


def _restore(context: _Context, measurement: editing.LinearOperator, y: jax.Array, caption: str) -> _Edit:
    """Samples with the measurement y [N, ...]: every predicted x_0 is projected onto it. Raises: UserError."""
    if context.setup.parameterization["prediction"] == "x_prev" and context.setup.is_stochastic:
        raise UserError(
            f"editing.task={context.options.task!r} cannot act on an ancestral mean that the network predicts itself "
            "(diffusion.prediction='x_prev'): use sampling.sampler=ddim"
        )

    def apply(key, denoise_fn, make_sampler):
        return context.sample(key, denoise_fn, make_sampler(lambda clip: editing.project(measurement, y, clip)))

    return _Edit(np.asarray(to_uint8(measurement.invert(y)))[:1], [caption], apply)


def _colorize(context: _Context) -> _Edit:
    if context.channels == 1:
        raise UserError("editing.task='colorize' needs a model of color images (data.channels=3)")
    measurement = editing.gray(context.channels)
    return _restore(context, measurement, measurement.measure(context.repeat(context.read("image"))), "gray")


def _super_resolution(context: _Context) -> _Edit:
    factor, (height, width) = context.options.factor, context.size
    if height % factor or width % factor:
        raise UserError(f"editing.factor={factor} must divide the model's {height}x{width} pixels")
    small = context.read("image", (height // factor, width // factor))
    return _restore(context, editing.average_pool(factor), context.repeat(small), "small")


def _interpolate(context: _Context) -> _Edit:
    first, second = context.read("image"), context.read("other")
    setup, t, num_steps = context.setup, context.options.level, context.setup.schedule.num_timesteps
    if t is not None and t >= num_steps:
        raise UserError(f"editing.level={t} must be an index of the steps, 0 ... {num_steps - 1}, or None")
    if t is None and setup.is_stochastic:
        raise UserError(
            "editing.task='interpolate' mixes the images' encodings, which only a deterministic sampler decodes: use "
            "sampling.sampler=ddim (eta 0) or heun, or give editing.level"
        )
    if setup.classes is not None and len(setup.classes) > 1:
        raise UserError("editing.task='interpolate' needs a single class: give sampling.class")
    weights = np.linspace(0, 1, context.num_samples)

    def apply(key, denoise_fn, make_sampler):
        x_0, other = (to_model_range(jnp.asarray(image))[None] for image in (first, second))
        encoding = sampling.EncodeOptions()
        if t is None:
            names = setup.parameterization
            encoding = sampling.EncodeOptions(prediction=names["prediction"], variance=names["variance"])
        x = editing.interpolate(key, setup.schedule, denoise_fn, x_0, other, weights, make_sampler(), t=t, **encoding)
        return x[:, 0]

    return _Edit(np.stack([first, second]), ["image", "other"], apply)


TASKS = {
    "inpaint": _inpaint,
    "replace": _replace,
    "sdedit": _sdedit,
    "colorize": _colorize,
    "super_resolution": _super_resolution,
    "interpolate": _interpolate,
}


def _make_edit(config: ConfigDict, setup: SamplingSetup) -> _Edit:
    """The edit of a config, its images read. Raises: UserError."""
    task, num_samples = config.editing.task, config.editing.num_samples
    if task == "interpolate" and num_samples < 2:
        raise UserError(f"editing.num_samples={num_samples} is too few for interpolate: it must be at least 2")
    return TASKS[task](_Context(config, setup))


def _captions(edit: _Edit, config: ConfigDict) -> list[str]:
    """One for each image of the picture: the given ones, then the results."""
    num_samples = config.editing.num_samples
    if config.editing.task == "interpolate":
        return [*edit.captions, *(f"{weight:.2g}" for weight in np.linspace(0, 1, num_samples))]
    return [*edit.captions, *(f"result {i}" for i in range(1, num_samples + 1))]


def run(config: ConfigDict, workdir: pathlib.Path) -> None:
    """Edits `editing.image`: writes a picture of the given images and the results, and an .npz of the results.

    Raises: UserError, PretrainedError.
    """
    config = resolve(config)
    trained = TrainedModel.open(config, workdir, config.sampling.use_ema)
    with as_user_error("config"):
        setup = SamplingSetup(config, trained.model, trained.schedule, trained.mesh, trained.class_names)
        edit = _make_edit(config, setup)
    # One process does this, on one device.
    params, classifier_params = jax.device_get((trained.params, setup.classifier_params))
    num_rows = 1 if config.editing.task == "interpolate" else config.editing.num_samples
    labels = setup.labels(np.arange(num_rows))

    def apply(params, classifier_params, key, y):
        denoise_fn = setup.network(params, classifier_params, y)
        return to_uint8(edit.apply(key, denoise_fn, partial(setup.sampler, classifier_params, y)))

    if jax.process_index() != 0:
        return
    for note in setup.notes:
        log(f"Note: {note}.")
    log(f"Compiling {config.editing.task} ...")
    with as_user_error("config"):
        apply = jax.jit(apply, compiler_options=compiler.options())
        images = np.asarray(apply(params, classifier_params, jax.random.key(config.sampling.seed), labels))
    given_digest = hashlib.sha256(edit.given.tobytes()).hexdigest()
    name = f"edit_{config.editing.task}_{trained.weights_name}_{setup.name}_seed{config.sampling.seed}"
    name += f"_{options_digest(to_dict(config.editing), given_digest)[:6]}"
    path = workdir / "samples" / f"{name}.npz"
    path.parent.mkdir(exist_ok=True)
    save_npz(path, {"arr_0": images})
    shown = np.concatenate([edit.given, images])
    picture = path.with_suffix(".png")
    pictures.save_png(picture, pictures.grid(shown, min(len(shown), 10), _captions(edit, config)))
    log(f"The given images and {len(images)} results: {picture}; the results alone: {path}")
