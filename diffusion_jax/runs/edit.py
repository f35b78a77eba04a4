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
from PIL import Image

from diffusion_jax import data, editing, pictures, sampling
from diffusion_jax.config import is_continuous, resolve
from diffusion_jax.distributed import compiler
from diffusion_jax.errors import UserError, as_user_error
from diffusion_jax.files import save_npz
from diffusion_jax.images import to_model_range, to_uint8
from diffusion_jax.runs.batch_sampler import check_finite
from diffusion_jax.runs.chunk_store import options_digest
from diffusion_jax.runs.console import log
from diffusion_jax.runs.sampling_conditions import read_conditions, standardize_conditions
from diffusion_jax.runs.sampling_setup import SamplingSetup
from diffusion_jax.runs.trained_model import TrainedModel
from diffusion_jax.runs.workdir import to_dict
from diffusion_jax.storage.downloads import local_path

__all__ = ["TASKS", "run"]

_UNKNOWN = 127  # gray for pixels that the model paints
_THRESHOLD = 127  # of a mask's 255; pixels above it are known


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

    normalization: of continuous data. is_of_images: whether the files are images, and not .npy arrays.
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
        size = size or self.size
        if self.is_of_images:
            height, width = size
            return data.fit(self._open_image(leaf), (height, width), self.channels)
        array = self._read_array(leaf, (*size, self.channels))
        self._check_known(array, leaf)
        return array

    def _open_image(self, leaf: str) -> Image.Image:
        """The decoded image of `config.editing[leaf]`. Raises: UserError."""
        path = self.options[leaf]
        if not path:
            raise UserError(f"editing.{leaf}=FILE is needed: the path of an image file")
        try:
            with Image.open(local_path(path)) as image:
                image.load()
                return image
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            raise UserError(f"editing.{leaf}={path!r} cannot be read as an image: {error}") from None

    def _load_array(self, leaf: str) -> np.ndarray:
        """The array of `config.editing[leaf]`. Raises: UserError."""
        path = self.options[leaf]
        if not path:
            raise UserError(f"editing.{leaf}=FILE.npy is needed: the path of an array file")
        try:
            array = np.load(local_path(path), allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"editing.{leaf}={path!r} cannot be read as an .npy file: {error}") from None
        if not isinstance(array, np.ndarray):
            raise UserError(f"editing.{leaf}={path!r} holds several arrays; save the one to use with np.save")
        return array

    def _read_array(self, leaf: str, shape: tuple[int, ...]) -> np.ndarray:
        """One example of this shape: uint8, or numbers in the units of continuous data. Raises: UserError."""
        array, is_continuous = self._load_array(leaf), self._levels is None
        is_allowed = array.dtype.kind in "iuf" if is_continuous else array.dtype == np.uint8
        if array.shape != shape or not is_allowed:
            raise UserError(
                f"editing.{leaf}={self.options[leaf]!r} holds {array.dtype} {list(array.shape)}; it must be one example of "
                f"shape {list(shape)} of {'real numbers, in the units of the data' if is_continuous else 'uint8'}"
            )
        return array.astype(np.float64) if is_continuous and array.dtype.kind != "f" else array

    def _check_known(self, values: np.ndarray, leaf: str) -> None:
        """Raises: UserError for values that are not finite, or outside the limits of the data."""
        if not np.isfinite(values).all():
            raise UserError(
                f"editing.{leaf} has values that are not finite; repair them (editing.task=inpaint generates values that "
                "editing.mask leaves out)"
            )
        if self._limits and (values.min() < self._limits[0] or values.max() > self._limits[1]):
            raise UserError(
                f"editing.{leaf} has values from {values.min():g} to {values.max():g}, outside "
                f"data.limits={tuple(self._limits)}; clip them"
            )

    def read_masked(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The example, the mask, and both as `_Edit.given`; values that are not known may be NaN. Raises: UserError."""
        if self.is_of_images:
            image, mask = self.read("image"), self._read_image_mask()
        else:
            image, mask = self._read_array("image", self.shape), self._read_array_mask()
            self._check_known(image[np.broadcast_to(mask, self.shape)], "image")
        if mask.all() or not mask.any():
            color, problem = ("white", "nothing is left to generate") if mask.all() else ("black", "nothing is kept")
            if not self.is_of_images:
                color = str(bool(mask.all()))
            raise UserError(
                f"editing.mask={self.options.mask!r} is {color} everywhere: {problem}. Make what is to be kept white (above "
                "127 of 255) or True, and what is to be generated black or False"
            )
        everywhere = np.broadcast_to(mask, self.shape)
        log(
            f"The mask keeps {everywhere.sum():,} of {everywhere.size:,} values ({100 * everywhere.mean():.0f}%), where it "
            "is white or True, and the model generates the others."
        )
        unknown = np.nan if self._levels is None else _UNKNOWN
        shown = np.where(mask, image, unknown).astype(image.dtype)
        return np.where(mask, image, 0).astype(image.dtype), mask, np.stack([image, shown])

    def _read_image_mask(self) -> np.ndarray:
        """bool [H, W, 1], True where pixels are known: white, above 127 of 255, or 1 in a mask of 0 and 1."""
        image, mask = (self._open_image(leaf) for leaf in ("image", "mask"))
        if image.size != mask.size:
            raise UserError(
                f"editing.mask={self.options.mask!r} has {mask.width}x{mask.height} pixels and the image has "
                f"{image.width}x{image.height}: they must have the same size, because both are cropped alike"
            )
        values = np.asarray(mask.convert("L"))
        values = values * 255 if values.max() == 1 else values
        height, width = self.size
        return data.fit(Image.fromarray(values), (height, width), 1) > _THRESHOLD

    def _read_array_mask(self) -> np.ndarray:
        """bool [*spatial, 1] or [*spatial, C], True where values are known."""
        mask = self._load_array("mask")
        allowed = [self.shape, (*self.size, 1), self.size] if self.size else [self.shape]
        if mask.dtype != bool or mask.shape not in allowed:
            raise UserError(
                f"editing.mask={self.options.mask!r} holds {mask.dtype} {list(mask.shape)}; it must be bool of shape "
                f"{' or '.join(str(list(shape)) for shape in allowed)}, True where values are known"
            )
        return mask if mask.ndim == len(self.shape) else mask[..., None]

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
    if context.num_samples < 2:
        raise UserError(f"editing.num_samples={context.num_samples} is too few for interpolate: it must be at least 2")
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
        edit = TASKS[config.editing.task](context)
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
