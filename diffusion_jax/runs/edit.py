"""`--mode=edit`: edits image or array files with a trained model and a function of `diffusion_jax.editing`."""

from __future__ import annotations

import dataclasses
import inspect
import os
from typing import Any

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
from diffusion_jax.images import to_model_range
from diffusion_jax.provenance import array_digest
from diffusion_jax.run_dir import RunDir, open_run_dir
from diffusion_jax.runs.examples import read_channels
from diffusion_jax.runs.sample import make_provenance, write_samples
from diffusion_jax.runs.sampling_setup import check_finite, load_arrays, resolve_sampling
from diffusion_jax.runs.workdir import open_model, to_dict
from diffusion_jax.storage.downloads import local_path
from diffusion_jax.untrusted import read_image

_GRAY = 127  # for pixels that the model paints; mask values above 127 of 255 mark known pixels


def run(config: ConfigDict, workdir: RunDir | str | os.PathLike) -> None:
    """Edits `editing.image`: writes a picture with the inputs and the results, and an .npz with the results.

    The .npz has arr_0, uint8 [N, *spatial, C], or float32 in data units for continuous data.

    Raises: UserError, PretrainedError.
    """
    config, workdir = resolve(config), open_run_dir(workdir)
    task, options = config.editing.task, config.editing
    net = open_model(config, workdir, sharding.one_device_mesh())
    setup, files = resolve_sampling(config, net), _Files(config, net)
    needed = inspect.signature(editing.EDITS[task]).parameters
    mask = files.read_mask() if "mask" in needed else None
    image = files.read("image", options.factor if "factor" in needed else None, mask)
    kind = "image" if net.is_images else "example"
    given = {kind: image}
    if mask is not None:  # unknown values may be NaN; the picture shows them gray
        given["known"] = np.where(mask, image, np.nan if net.levels is None else _GRAY).astype(image.dtype)
        image = np.where(mask, image, 0).astype(image.dtype)
    inputs: dict[str, Any] = {"image": files.to_model(image, options.num_samples), "mask": mask}
    if "other" in needed:
        for setting, rows in (("class", setup.labels), ("conditions", setup.conditions.get("condition"))):
            if rows is not None and len(rows) > 1:
                raise UserError(
                    f"editing.task={task!r} needs a single row of sampling.{setting}, not {len(rows)}; give one"
                )
        given["other"] = files.read("other")
        inputs["other"] = files.to_model(given["other"])
    arguments = {**options.to_dict(), **inputs}
    with as_user_error("config.editing"):
        edit = editing.EDITS[task](**{name: arguments[name] for name in needed})
    if edit.shown is not None:
        caption, measured = edit.shown
        measured = data.to_data_units(np.asarray(measured), net.normalizations.get("x"))
        given = {caption: setup.to_examples(measured)[0]}

    setup = dataclasses.replace(setup, net=pretrained.load_weights(net, config, workdir, config.sampling.use_ema))
    if jax.process_index() != 0:
        return
    for note in setup.notes:
        log(f"Note: {note}.")
    log(f"Compiling {task} ...")
    rows = np.arange(1 if "other" in needed else options.num_samples)
    with as_user_error("config.editing"):
        results = setup.to_examples(setup.generate(jax.random.key(config.sampling.seed), rows, algorithm=edit.draw))
    if net.levels is None and mask is not None:  # known values stay exactly as in the file, without rounding
        results = np.where(mask, given[kind], results).astype(results.dtype)
    check_finite(results)
    shown = np.stack(list(given.values()))
    provenance = make_provenance(setup, editing=to_dict(options), given_digest=array_digest(shown))
    title = f"Edit: {task.replace('_', ' ')}, {provenance.name}"
    provenance = dataclasses.replace(provenance, name=f"{task}_{provenance.name}_{provenance.digest[:6]}")
    captions = [f"result {i}" for i in range(1, len(results) + 1)]
    if "other" in needed:
        captions = [f"weight {weight:.2g}" for weight in np.linspace(0, 1, len(results))]
    picture = pictures.draw_edit(shown, results, [*given, *captions], title, read_channels(config, workdir))
    path = workdir / "samples" / "edits" / f"{provenance.name}.npz"
    write_samples(workdir, path, provenance, {"arr_0": results}, picture)
    noun = "images" if net.is_images else "examples"
    log(f"The given {noun} and {len(results)} results: {path.with_suffix('.png')}; the results alone: {path}")


class _Files:
    """Reads the files of `config.editing` as examples [*spatial, C]: uint8, or floats in data units."""

    def __init__(self, config: ConfigDict, net: pretrained.Model):
        self._options, self._net = config.editing, net
        self._shape, self._size = net.example_shape, net.image_size

    def _open(self, setting: str) -> Any:
        """Opens the image or array file that `config.editing[setting]` names. Raises: UserError."""
        path = self._options[setting]
        if not path:
            file = "FILE is needed: the path of an image" if self._net.is_images else "FILE.npy is needed: an array"
            raise UserError(f"editing.{setting}={file}")
        if not self._net.is_images:
            array = load_arrays(f"editing.{setting}", path)
            if not isinstance(array, np.ndarray):
                raise UserError(f"editing.{setting}={path!r} holds several arrays; save the one to use with np.save")
            return array
        try:
            return read_image(local_path(path))
        except (OSError, ValueError) as error:
            raise UserError(f"editing.{setting}={path!r} cannot be read as an image file: {error}") from None

    def read(self, setting: str, factor: int | None = None, known: np.ndarray | None = None) -> np.ndarray:
        """Reads the example that `config.editing[setting]` names.

        factor: the example is smaller by this factor along both axes. known: mask of the values that must be finite and
        within `data.limits`; None for all values. Raises: UserError.
        """
        size, is_continuous, limits = self._size, self._net.levels is None, self._net.limits
        if factor is not None:
            if len(size) != 2:
                raise UserError(
                    f"editing.task={self._options.task!r} is for images and fields with two spatial axes, not for examples "
                    f"of shape {list(self._shape)}; use inpaint, replace, sdedit or interpolate"
                )
            if any(n % factor for n in size):
                raise UserError(f"editing.factor={factor} must divide the model's {size[0]}x{size[1]} pixels")
            size = tuple(n // factor for n in size)
        example, shape = self._open(setting), (*size, self._shape[-1])
        if self._net.is_images:
            height, width, channels = shape
            return data.fit(example, (height, width), channels)
        is_allowed = example.dtype.kind in "iuf" if is_continuous else example.dtype == np.uint8
        if example.shape != shape or not is_allowed:
            raise UserError(
                f"editing.{setting}={self._options[setting]!r} holds {example.dtype} {list(example.shape)}; it must be one "
                f"example with shape {list(shape)} and {'real numbers in data units' if is_continuous else 'type uint8'}"
            )
        values = example if known is None else example[np.broadcast_to(known, shape)]
        if not np.isfinite(values).all():
            raise UserError(
                f"editing.{setting} has values that are not finite; repair them (editing.task=inpaint generates values that "
                "editing.mask leaves out)"
            )
        if values.size and limits and (values.min() < limits[0] or values.max() > limits[1]):
            raise UserError(
                f"editing.{setting} has values from {values.min():g} to {values.max():g}, outside data.limits="
                f"{tuple(limits)}; clip them"
            )
        return example.astype(np.float64) if is_continuous and example.dtype.kind != "f" else example

    def read_mask(self) -> np.ndarray:
        """Reads the mask, bool [*spatial, 1] or [*spatial, C], True where values are known.

        Mask images are white at known pixels: above 127 of 255, or 1 if all values are 0 and 1.
        """
        mask = self._open("mask")
        if self._net.is_images:
            image = self._open("image")
            if image.size != mask.size:
                raise UserError(
                    f"editing.mask={self._options.mask!r} has {mask.width}x{mask.height} pixels and the image has "
                    f"{image.width}x{image.height}: they must have the same size, because both are cropped alike"
                )
            values, (height, width) = np.asarray(mask.convert("L")), self._size
            values = values * 255 if values.max() == 1 else values
            known = data.fit(Image.fromarray(values), (height, width), 1) > _GRAY
        else:
            allowed = [self._shape, (*self._size, 1), self._size] if self._size else [self._shape]
            if mask.dtype != bool or mask.shape not in allowed:
                raise UserError(
                    f"editing.mask={self._options.mask!r} holds {mask.dtype} {list(mask.shape)}; it must be bool of shape "
                    f"{' or '.join(str(list(shape)) for shape in allowed)}, True where values are known"
                )
            known = mask if mask.ndim == len(self._shape) else mask[..., None]
        if known.all() or not known.any():
            color, problem = ("white", "nothing is left to generate") if known.all() else ("black", "nothing is kept")
            value = color if self._net.is_images else known.all()
            raise UserError(
                f"editing.mask={self._options.mask!r} is {value} everywhere: {problem}. "
                "Use white (above 127 of 255) or True for values to keep, and black or False for values to generate"
            )
        everywhere = np.broadcast_to(known, self._shape)
        log(
            f"The mask keeps {everywhere.sum():,} of {everywhere.size:,} values ({100 * everywhere.mean():.0f}%), where it "
            "is white or True, and the model generates all other values."
        )
        return known

    def to_model(self, example: np.ndarray, copies: int = 1) -> jax.Array:
        """Repeats an example: float32 [copies, *spatial, C] in the model's range."""
        if self._net.levels is None:
            x = jnp.asarray(data.to_model_units(example[None], self._net.normalizations.get("x")))
        else:
            x = to_model_range(jnp.asarray(example))[None]
        return jnp.repeat(x, copies, axis=0)
