"""`--mode=edit`: the functions of `diffusion_jax.editing` applied to image or array files with a trained model."""

from __future__ import annotations

import dataclasses
import os
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from diffusion_jax import data, editing, pictures, pretrained
from diffusion_jax.config import resolve
from diffusion_jax.console import log
from diffusion_jax.distributed import sharding
from diffusion_jax.errors import UserError, as_user_error
from diffusion_jax.files import save_npz
from diffusion_jax.images import to_model_range
from diffusion_jax.provenance import Provenance, array_digest, settings_digest
from diffusion_jax.run_dir import RunDir, open_run_dir
from diffusion_jax.runs.sampling import SamplingSettings, check_finite, draw, resolve_sampling, to_examples
from diffusion_jax.runs.trained_model import load_weights, open_model
from diffusion_jax.runs.workdir import to_dict
from diffusion_jax.storage.downloads import local_path

__all__ = ["TASKS", "run"]

_UNKNOWN = 127  # gray for pixels that the model paints
_THRESHOLD = 127  # of a mask's 255; pixels above it are known


class _Edit(NamedTuple):
    """One task on one example.

    given: [G, *spatial, C], uint8 or in the units of continuous data: examples that the picture shows before the results,
    with their captions. arguments: of `pretrained.Model.sample`, the sampler or the algorithm of the task. known: where the
    results are `given[0]`; None for nowhere.
    """

    given: np.ndarray
    captions: list[str]
    arguments: dict[str, Any]
    known: np.ndarray | None = None


class _Context:
    """The input of every task: options, the model, the sampling settings, and the shape and the values of the data.

    is_of_images: whether the files are images, and not .npy arrays.
    """

    def __init__(self, config: ConfigDict, net: pretrained.Model, settings: SamplingSettings):
        self.options, self.net, self.settings, self.sampler = config.editing, net, settings, settings.sampler
        self.shape = net.example_shape
        self.size, self.channels = self.shape[:-1], self.shape[-1]
        self.num_samples = self.options.num_samples
        self.is_continuous = net.levels is None
        self.is_of_images = data.is_of_images(config.data)

    def _open(self, leaf: str) -> Any:
        """The decoded image, or the array, of `config.editing[leaf]`. Raises: UserError."""
        path, suffix, kind = self.options[leaf], "", "image"
        if not self.is_of_images:
            suffix, kind = ".npy", "array"
        if not path:
            raise UserError(f"editing.{leaf}=FILE{suffix} is needed: the path of an {kind} file")
        try:
            if self.is_of_images:
                with Image.open(local_path(path)) as image:
                    image.load()
                    return image
            array = np.load(local_path(path), allow_pickle=False)
        except (OSError, ValueError, EOFError, SyntaxError, Image.DecompressionBombError) as error:
            raise UserError(f"editing.{leaf}={path!r} cannot be read as an {suffix or kind} file: {error}") from None
        if not isinstance(array, np.ndarray):
            raise UserError(f"editing.{leaf}={path!r} holds several arrays; save the one to use with np.save")
        return array

    def read(self, leaf: str, size: tuple[int, ...] | None = None, known: np.ndarray | None = None) -> np.ndarray:
        """`config.editing[leaf]` as uint8 [*spatial, C], or in the units of continuous data.

        known: where values must be finite and within the limits of the data; None for everywhere. Raises: UserError.
        """
        size, example = size or self.size, self._open(leaf)
        if self.is_of_images:
            height, width = size
            return data.fit(example, (height, width), self.channels)
        is_allowed = example.dtype.kind in "iuf" if self.is_continuous else example.dtype == np.uint8
        shape = (*size, self.channels)
        if example.shape != shape or not is_allowed:
            raise UserError(
                f"editing.{leaf}={self.options[leaf]!r} holds {example.dtype} {list(example.shape)}; it must be one example "
                f"of shape {list(shape)} of {'real numbers, in the units of the data' if self.is_continuous else 'uint8'}"
            )
        values = example if known is None else example[np.broadcast_to(known, shape)]
        if not np.isfinite(values).all():
            raise UserError(
                f"editing.{leaf} has values that are not finite; repair them (editing.task=inpaint generates values that "
                "editing.mask leaves out)"
            )
        if values.size and self.net.limits and (values.min() < self.net.limits[0] or values.max() > self.net.limits[1]):
            raise UserError(
                f"editing.{leaf} has values from {values.min():g} to {values.max():g}, outside "
                f"data.limits={tuple(self.net.limits)}; clip them"
            )
        return example.astype(np.float64) if self.is_continuous and example.dtype.kind != "f" else example

    def read_masked(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The example, the mask, and both as `_Edit.given`; values that are not known may be NaN. Raises: UserError."""
        mask = self._read_mask()
        image = self.read("image", known=mask)
        everywhere = np.broadcast_to(mask, self.shape)
        if mask.all() or not mask.any():
            color, problem = ("white", "nothing is left to generate") if mask.all() else ("black", "nothing is kept")
            raise UserError(
                f"editing.mask={self.options.mask!r} is {color if self.is_of_images else mask.all()} everywhere: {problem}. "
                "Make what is to be kept white (above 127 of 255) or True, and what is to be generated black or False"
            )
        log(
            f"The mask keeps {everywhere.sum():,} of {everywhere.size:,} values ({100 * everywhere.mean():.0f}%), where it "
            "is white or True, and the model generates the others."
        )
        shown = np.where(mask, image, np.nan if self.is_continuous else _UNKNOWN).astype(image.dtype)
        return np.where(mask, image, 0).astype(image.dtype), mask, np.stack([image, shown])

    def _read_mask(self) -> np.ndarray:
        """bool [*spatial, 1] or [*spatial, C], True where values are known: white, above 127 of 255, or 1 of 0 and 1."""
        image, mask = (self._open(leaf) for leaf in ("image", "mask"))
        if self.is_of_images:
            height, width = self.size
            if image.size != mask.size:
                raise UserError(
                    f"editing.mask={self.options.mask!r} has {mask.width}x{mask.height} pixels and the image has "
                    f"{image.width}x{image.height}: they must have the same size, because both are cropped alike"
                )
            values = np.asarray(mask.convert("L"))
            values = values * 255 if values.max() == 1 else values
            return data.fit(Image.fromarray(values), (height, width), 1) > _THRESHOLD
        allowed = [self.shape, (*self.size, 1), self.size] if self.size else [self.shape]
        if mask.dtype != bool or mask.shape not in allowed:
            raise UserError(
                f"editing.mask={self.options.mask!r} holds {mask.dtype} {list(mask.shape)}; it must be bool of shape "
                f"{' or '.join(str(list(shape)) for shape in allowed)}, True where values are known"
            )
        return mask if mask.ndim == len(self.shape) else mask[..., None]

    def to_model(self, example: np.ndarray, copies: int = 1) -> jax.Array:
        """Equal copies of an example, float32 [copies, *spatial, C] in the model's range."""
        if self.is_continuous:
            x = jnp.asarray(data.to_model_units(example[None], self.net.normalizations.get("x")))
        else:
            x = to_model_range(jnp.asarray(example))[None]
        return jnp.repeat(x, copies, axis=0)

    def to_data(self, x) -> np.ndarray:
        """Examples [B, *spatial, C] in the model's range as uint8, or float32 in the units of continuous data."""
        return to_examples(self.net, data.to_data_units(np.asarray(x), self.net.normalizations.get("x")))


def _inpaint(context: _Context) -> _Edit:
    """The tasks "inpaint", by RePaint, and "replace"."""
    image, mask, given = context.read_masked()
    x_0 = context.to_model(image, context.num_samples)
    options = {name: context.options[name] for name in ("resamplings", "jump")}

    def repaint(key, schedule, denoise_fn, sampler):
        return editing.repaint(key, schedule, denoise_fn, x_0, mask, sampler, **options)

    arguments: dict[str, Any] = {"algorithm": repaint}
    if context.options.task == "replace":
        arguments = {"sampler": editing.replacement(context.sampler, x_0, jnp.asarray(mask))}
    return _Edit(given, ["image", "known"], arguments, mask)


def _sdedit(context: _Context) -> _Edit:
    image = context.read("image")
    x_0, strength = context.to_model(image, context.num_samples), context.options.strength

    def sdedit(key, schedule, denoise_fn, sampler):
        return editing.sdedit(key, schedule, denoise_fn, x_0, sampler, strength=strength)

    return _Edit(image[None], ["image"], {"algorithm": sdedit})


def _restore(context: _Context, measurement: editing.LinearOperator, y: jax.Array, caption: str) -> _Edit:
    """Samples with the measurement y [N, ...]: every predicted x_0 is projected onto it. Raises: UserError."""
    sampler = context.sampler
    if sampler.prediction == "x_prev" and sampler.is_stochastic:
        raise UserError(
            f"editing.task={context.options.task!r} cannot act on an ancestral mean that the network predicts itself "
            "(diffusion.prediction='x_prev'): use sampling.sampler=ddim"
        )
    projecting = dataclasses.replace(sampler, clip=editing.project(measurement, y, sampler.clip))
    return _Edit(context.to_data(measurement.invert(y))[:1], [caption], {"sampler": projecting})


def _colorize(context: _Context) -> _Edit:
    if not context.is_of_images:
        raise UserError(
            "editing.task='colorize' is for images; use inpaint, replace, sdedit or interpolate for other data"
        )
    if context.channels == 1:
        raise UserError("editing.task='colorize' needs a model of color images (data.channels=3)")
    measurement = editing.gray(context.channels)
    color = context.to_model(context.read("image"), context.num_samples)
    return _restore(context, measurement, measurement.measure(color), "gray")


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
    small = context.to_model(context.read("image", (height // factor, width // factor)), context.num_samples)
    return _restore(context, editing.average_pool(factor), small, "small")


def _interpolate(context: _Context) -> _Edit:
    if context.num_samples < 2:
        raise UserError(f"editing.num_samples={context.num_samples} is too few for interpolate: it must be at least 2")
    first, second = context.read("image"), context.read("other")
    settings, t = context.settings, context.options.level
    num_steps = settings.schedule.num_timesteps
    if t is not None and t >= num_steps:
        raise UserError(f"editing.level={t} must be an index of the steps, 0 ... {num_steps - 1}, or None")
    if t is None and context.sampler.is_stochastic:
        raise UserError(
            "editing.task='interpolate' mixes the images' encodings, which only a deterministic sampler decodes: use "
            "sampling.sampler=ddim (eta 0) or heun, or give editing.level"
        )
    if settings.classes is not None and len(settings.classes) > 1:
        raise UserError("editing.task='interpolate' needs a single class: give sampling.class")
    if settings.conditions is not None and len(settings.conditions) > 1:
        raise UserError(
            f"editing.task='interpolate' needs a single condition, and sampling.conditions has {len(settings.conditions)}: "
            "give a file with one row"
        )
    weights, x_0, other = np.linspace(0, 1, context.num_samples), context.to_model(first), context.to_model(second)

    def interpolate(key, schedule, denoise_fn, sampler):
        return editing.interpolate(key, schedule, denoise_fn, x_0, other, weights, sampler, t=t)[:, 0]

    return _Edit(np.stack([first, second]), ["image", "other"], {"algorithm": interpolate})


TASKS = {
    "inpaint": _inpaint,
    "replace": _inpaint,
    "sdedit": _sdedit,
    "colorize": _colorize,
    "super_resolution": _super_resolution,
    "interpolate": _interpolate,
}


def run(config: ConfigDict, workdir: RunDir | str | os.PathLike) -> None:
    """Edits `editing.image`: writes a picture of the given examples and the results, and an .npz of the results.

    The .npz has arr_0, uint8 [N, *spatial, C], or float32 in the units of continuous data.

    Raises: UserError, PretrainedError.
    """
    config, workdir = resolve(config), open_run_dir(workdir)
    task, net = config.editing.task, open_model(config, workdir, sharding.one_device_mesh())
    with as_user_error("config"):
        settings = resolve_sampling(config, net)
        context = _Context(config, net, settings)
        edit = TASKS[task](context)
    net = load_weights(net, config, workdir, config.sampling.use_ema)
    if jax.process_index() != 0:
        return
    for note in settings.notes:
        log(f"Note: {note}.")
    log(f"Compiling {task} ...")
    num_rows = 1 if task == "interpolate" else config.editing.num_samples
    key = jax.random.key(config.sampling.seed)
    with as_user_error("config"):
        results = to_examples(net, draw(net, settings, key, np.arange(num_rows), **edit.arguments))
    if context.is_continuous:
        if edit.known is not None:  # exactly the numbers of the file, without the rounding of the normalization
            results = np.where(edit.known, edit.given[0], results).astype(results.dtype)
        check_finite(results)
    made_by = settings.provenance(net)
    made_by |= {"editing": to_dict(config.editing), "given_digest": array_digest(edit.given)}
    common = f"{net.provenance.name}_{settings.name}"
    name = f"{task}_{common}_seed{config.sampling.seed}_{settings_digest(made_by)[:6]}"
    path = workdir / "samples" / "edits" / f"{name}.npz"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_npz(path, {"arr_0": results} | Provenance(name, made_by, net.provenance.details).arrays())
    captions = [*edit.captions, *(f"result {i}" for i in range(1, len(results) + 1))]
    if task == "interpolate":
        captions[2:] = [f"weight {weight:.2g}" for weight in np.linspace(0, 1, len(results))]
    title = f"Edit: {task.replace('_', ' ')}, {common}"
    pictures.save(path.with_suffix(".png"), pictures.draw_edit(edit.given, results, captions, title))
    workdir.upload(path, path.with_suffix(".png"))
    noun = "images" if context.is_of_images else "examples"
    log(f"The given {noun} and {len(results)} results: {path.with_suffix('.png')}; the results alone: {path}")
