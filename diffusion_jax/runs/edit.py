"""`--mode=edit`: the functions of `diffusion_jax.editing` applied to image or array files with a trained model."""

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

from diffusion_jax import data, editing, pictures, sampling
from diffusion_jax.config import is_continuous, resolve
from diffusion_jax.distributed import compiler
from diffusion_jax.errors import UserError, as_user_error
from diffusion_jax.files import save_npz
from diffusion_jax.images import to_model_range, to_uint8
from diffusion_jax.runs.batch_sampler import check_finite
from diffusion_jax.runs.chunk_store import options_digest
from diffusion_jax.runs.console import log
from diffusion_jax.runs.edit_arrays import check_known, read_array, read_array_mask
from diffusion_jax.runs.edit_images import open_image, read_image, read_mask
from diffusion_jax.runs.sampling_conditions import read_conditions, standardize_conditions
from diffusion_jax.runs.sampling_setup import SamplingSetup
from diffusion_jax.runs.trained_model import TrainedModel
from diffusion_jax.runs.workdir import to_dict

__all__ = ["TASKS", "run"]


class _Edit(NamedTuple):
    """One task on one example.

    given: [G, *spatial, C], uint8 or in the units of continuous data: examples that the picture shows before the results,
    with their captions. apply: pure, (key, denoise_fn, make_sampler) -> float [N, *spatial, C] in the model's range;
    make_sampler(clip=None) is `SamplingSetup.sampler`. known: where the results are `given[0]`; None for nowhere.
    """

    given: np.ndarray
    captions: list[str]
    apply: Callable
    known: np.ndarray | None = None


class _Context:
    """The input of every task: options, the sampling setup, and the shape and the values of the data.

    normalization: of continuous data. is_of_images: whether the files are images, and not arrays.
    """

    def __init__(self, config: ConfigDict, setup: SamplingSetup, normalization: data.Normalization | None):
        self.options, self.setup = config.editing, setup
        self.shape = data.example_shape(config.data)
        self.size, self.channels = self.shape[:-1], self.shape[-1]
        self.num_samples = self.options.num_samples
        self._levels, self._normalization = config.data.levels, normalization
        self._limits = config.data.limits if config.data.normalization == "limits" else ()
        self.is_of_images = data.is_of_images(config.data)

    def read(self, leaf: str, size: tuple[int, ...] | None = None) -> np.ndarray:
        """`config.editing[leaf]` as uint8 [*spatial, C], or in the units of continuous data. Raises: UserError."""
        if self.is_of_images:
            height, width = size or self.size
            return read_image(self.options[leaf], leaf, (height, width), self.channels)
        array = read_array(self.options[leaf], leaf, (*(size or self.size), self.channels), self._levels)
        check_known(array, leaf, self._limits)
        return array

    def to_model(self, example: np.ndarray) -> jax.Array:
        """An example as a batch float32 [1, *spatial, C] in the model's range."""
        if self._levels is not None:
            return to_model_range(jnp.asarray(example))[None]
        return jnp.asarray(data.to_model_units(example[None], self._normalization))

    def repeat(self, example: np.ndarray) -> jax.Array:
        """An example as `num_samples` equal ones in the model's range."""
        return jnp.repeat(self.to_model(example), self.num_samples, axis=0)

    def to_data(self, x) -> np.ndarray:
        """Examples [B, *spatial, C] in the model's range as uint8, or float32 in the units of continuous data."""
        if self._levels is not None:
            return np.asarray(to_uint8(x))
        return data.to_data_units(np.asarray(x), self._normalization)

    def sample(self, key, denoise_fn, sampler: sampling.Sampler) -> jax.Array:
        """Samples from noise."""
        key_noise, key_steps = jax.random.split(key)
        x_T = jax.random.normal(key_noise, (self.num_samples, *self.shape))
        x_0 = sampling.sample(key_steps, self.setup.schedule, denoise_fn, x_T, sampler)
        assert isinstance(x_0, jax.Array)  # a trajectory is not requested
        return x_0

    def read_masked(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The example, the mask, and both as `_Edit.given`. Raises: UserError."""
        if not self.is_of_images:
            return self._read_masked_array()
        image = self.read("image")
        sizes = [open_image(self.options[leaf], leaf).size for leaf in ("image", "mask")]
        if sizes[0] != sizes[1]:
            raise UserError(
                f"editing.mask={self.options.mask!r} has {sizes[1][0]}x{sizes[1][1]} pixels and the image has "
                f"{sizes[0][0]}x{sizes[0][1]}: they must have the same size, because both are cropped alike"
            )
        height, width = self.size
        mask = read_mask(self.options.mask, (height, width))
        kept, total = int(mask.sum()), mask.size
        log(
            f"The mask keeps its white pixels, {kept:,} of {total:,} ({100 * kept / total:.0f}%), and the model paints the "
            f"black ones, {total - kept:,} ({100 * (total - kept) / total:.0f}%)."
        )
        return image, mask, np.stack([image, np.where(mask, image, _UNKNOWN).astype(np.uint8)])

    def _read_masked_array(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """As `read_masked`; values that are not known may be anything, NaN for instance."""
        mask = read_array_mask(self.options.mask, self.shape)
        example = read_array(self.options.image, "image", self.shape, self._levels)
        everywhere = np.broadcast_to(mask, self.shape)
        check_known(example[everywhere], "image", self._limits)
        kept, total = int(everywhere.sum()), everywhere.size
        log(
            f"The mask keeps {kept:,} of {total:,} values ({100 * kept / total:.0f}%), and the model generates the other "
            f"{total - kept:,}."
        )
        unknown = np.nan if self._levels is None else _UNKNOWN
        shown = np.where(mask, example, unknown).astype(example.dtype)
        return np.where(mask, example, 0).astype(example.dtype), mask, np.stack([example, shown])


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

    return _Edit(given, ["image", "known"], apply, mask)


def _replace(context: _Context) -> _Edit:
    image, mask, given = context.read_masked()
    known = jnp.asarray(mask)

    def apply(key, denoise_fn, make_sampler):
        return context.sample(key, denoise_fn, editing.replacement(make_sampler(), context.repeat(image), known))

    return _Edit(given, ["image", "known"], apply, mask)


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

    return _Edit(context.to_data(measurement.invert(y))[:1], [caption], apply)


def _colorize(context: _Context) -> _Edit:
    if not context.is_of_images:
        raise UserError(
            "editing.task='colorize' is for images; use inpaint, replace, sdedit or interpolate for other data"
        )
    if context.channels == 1:
        raise UserError("editing.task='colorize' needs a model of color images (data.channels=3)")
    measurement = editing.gray(context.channels)
    return _restore(context, measurement, measurement.measure(context.repeat(context.read("image"))), "gray")


def _super_resolution(context: _Context) -> _Edit:
    factor, size = context.options.factor, context.size
    if len(size) != 2:
        raise UserError(
            f"editing.task='super_resolution' is for images and fields with two spatial axes, not for examples of shape "
            f"{list(context.shape)}; use inpaint, replace, sdedit or interpolate"
        )
    height, width = size
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
    if setup.conditions is not None and len(setup.conditions) > 1:
        raise UserError(
            f"editing.task='interpolate' needs a single condition, and sampling.conditions has {len(setup.conditions)}: "
            "give a file with one row"
        )
    weights = np.linspace(0, 1, context.num_samples)

    def apply(key, denoise_fn, make_sampler):
        x_0, other = context.to_model(first), context.to_model(second)
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


def _make_edit(context: _Context) -> _Edit:
    """The edit of a config, its files read. Raises: UserError."""
    task, num_samples = context.options.task, context.num_samples
    if task == "interpolate" and num_samples < 2:
        raise UserError(f"editing.num_samples={num_samples} is too few for interpolate: it must be at least 2")
    return TASKS[task](context)


def _captions(edit: _Edit, config: ConfigDict) -> list[str]:
    """One for each example of the picture: the given ones, then the results."""
    num_samples = config.editing.num_samples
    if config.editing.task == "interpolate":
        return [*edit.captions, *(f"weight {weight:.2g}" for weight in np.linspace(0, 1, num_samples))]
    return [*edit.captions, *(f"result {i}" for i in range(1, num_samples + 1))]


def run(config: ConfigDict, workdir: pathlib.Path) -> None:
    """Edits `editing.image`: writes a picture of the given examples and the results, and an .npz of the results.

    The .npz has arr_0, uint8 [N, *spatial, C], or float32 in the units of continuous data.

    Raises: UserError, PretrainedError.
    """
    config = resolve(config)
    trained = TrainedModel.open(config, workdir, config.sampling.use_ema)
    with as_user_error("config"):
        conditions = standardize_conditions(read_conditions(config), trained.normalizations)
        setup = SamplingSetup(
            config, trained.model, trained.schedule, trained.mesh, trained.class_names, conditions=conditions
        )
        context = _Context(config, setup, trained.normalizations.get("x"))
        edit = _make_edit(context)
    # One process does this, on one device.
    params, classifier_params = jax.device_get((trained.params, setup.classifier_params))
    num_rows = 1 if config.editing.task == "interpolate" else config.editing.num_samples
    rows = np.arange(num_rows)
    labels, condition = setup.labels(rows), setup.condition(rows)

    def apply(params, classifier_params, key, y, condition):
        denoise_fn = setup.network(params, classifier_params, y, condition=condition)
        x = edit.apply(key, denoise_fn, partial(setup.sampler, classifier_params, y))
        return x if is_continuous(config) else to_uint8(x)

    if jax.process_index() != 0:
        return
    for note in setup.notes:
        log(f"Note: {note}.")
    log(f"Compiling {config.editing.task} ...")
    with as_user_error("config"):
        apply = jax.jit(apply, compiler_options=compiler.options())
        key = jax.random.key(config.sampling.seed)
        results = np.asarray(apply(params, classifier_params, key, labels, condition))
    if is_continuous(config):
        results = context.to_data(results)
        if edit.known is not None:  # exactly the numbers of the file, without the rounding of the normalization
            results = np.where(edit.known, edit.given[0], results).astype(results.dtype)
        check_finite(results)
    given_digest = hashlib.sha256(edit.given.tobytes()).hexdigest()
    name = f"edit_{config.editing.task}_{trained.weights_name}_{setup.name}_seed{config.sampling.seed}"
    name += f"_{options_digest(to_dict(config.editing), given_digest)[:6]}"
    path = workdir / "samples" / f"{name}.npz"
    path.parent.mkdir(exist_ok=True)
    save_npz(path, {"arr_0": results})
    picture = path.with_suffix(".png")
    title = f"Edit: {config.editing.task.replace('_', ' ')}, {trained.weights_name}, {setup.name}"
    pictures.save(picture, pictures.draw_edit(edit.given, results, _captions(edit, config), title))
    noun = "images" if context.is_of_images else "examples"
    log(f"The given {noun} and {len(results)} results: {picture}; the results alone: {path}")
