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
from diffusion_jax.config import check, resolve
from diffusion_jax.config.rules import edit_method
from diffusion_jax.console import log
from diffusion_jax.data.sources import batch_examples, read_conditions
from diffusion_jax.distributed import sharding
from diffusion_jax.errors import UserError, as_user_error
from diffusion_jax.images import to_gray_levels, to_model_range
from diffusion_jax.provenance import array_digest
from diffusion_jax.run_dir import RunDir, open_run_dir
from diffusion_jax.runs.examples import read_channels
from diffusion_jax.runs.likelihood import load_held_out
from diffusion_jax.runs.posterior import Problem, covariance_of_data, log_fit
from diffusion_jax.runs.sample import make_provenance, write_samples
from diffusion_jax.runs.sampling_setup import SamplingSetup, check_finite, check_sampling, load_arrays, resolve_sampling
from diffusion_jax.runs.workdir import open_model, to_dict
from diffusion_jax.storage.downloads import local_path
from diffusion_jax.untrusted import read_image

# Captions of the measurement in pictures; all other tasks use the caption "measurement".
_CAPTIONS = {"inpaint": "known", "colorize": "gray", "super_resolution": "small", "tomography": "sums along rays"}
_GRAY = 127  # color of unknown pixels in pictures; mask values above 127 of 255 mark known pixels


def run(config: ConfigDict, workdir: RunDir | str | os.PathLike) -> None:
    """Edits `editing.image` or draws samples given a measurement: writes a picture and an .npz with the results.

    The .npz has arr_0, uint8 [N, *spatial, C], or float32 in data units for continuous data. With `editing.noise`, the
    .npz also has chi_squared [N], the solver's residual and, in data units (images: gray levels of 0 to 255), mean and
    deviation of the samples, measurement, noise, operator (`Problem.arrays`), and, if known, truth.

    Raises: UserError, DataError, PretrainedError.
    """
    config, workdir = resolve(config), open_run_dir(workdir)
    task, options = config.editing.task, config.editing
    check(config, "edit")
    method = edit_method(options)
    net = open_model(config, workdir, sharding.one_device_mesh())
    check_sampling(config, net)
    files = EditFiles(config, net)
    mask = files.read_mask() if task in ("inpaint", "replace") else None
    problem = None if method in (None, "repaint") else Problem.from_config(config, net, mask)
    files.held_out, conditions = (None, None) if options.example is None else _read_held_out(config, net)
    setup = resolve_sampling(config, net, conditions)
    if task == "interpolate" or options.noise:
        for setting, rows in (("label", setup.labels), ("conditions", setup.conditions.get("condition"))):
            if rows is not None and len(rows) > 1:
                raise UserError(
                    f"editing.task={task!r} needs a single row of sampling.{setting}, not {len(rows)}; give one"
                )
    if problem is not None and problem.wants_data:
        problem = problem.with_covariance(covariance_of_data(config, net))
    measured = None if problem is None else _Measured(config, problem, files, mask)
    given, algorithm = _read_edit(files, task, options, mask) if measured is None else (measured.given, None)

    setup = dataclasses.replace(setup, net=pretrained.load_weights(net, config, workdir, config.sampling.use_ema))
    if jax.process_index() != 0:
        return
    log(f"Compiling {task} ..." if method is None else f"Compiling {task} with {method} ...")
    key, rows = jax.random.key(config.sampling.seed), np.arange(1 if task == "interpolate" else options.num_samples)
    with as_user_error("config.editing"):
        if measured is None:
            samples = setup.generate(key, rows, algorithm=algorithm)
        else:
            samples = measured.problem.draw(setup, measured.y, options.num_samples, key)[:, 0]
    results = setup.to_examples(samples)
    if measured is None and net.levels is None and mask is not None:  # known values stay exactly as in the file
        results = np.where(mask, next(iter(given.values())), results).astype(results.dtype)
    check_finite(results)
    shown = np.concatenate([np.float64(array).ravel() for array in given.values()])
    provenance = make_provenance(setup, editing=to_dict(options), given_digest=array_digest(shown))
    title = f"Edit, {task.replace('_', ' ')}: {setup.title}"
    provenance = dataclasses.replace(provenance, name=f"{task}_{provenance.name}_{provenance.digest[:6]}")
    arrays, channels = {"arr_0": results}, read_channels(config, workdir)
    if options.noise and measured is not None:
        more, picture = measured.summarize(samples, setup, title, channels)
        arrays |= more
    else:
        captions = [f"result {i}" for i in range(1, len(results) + 1)]
        if task == "interpolate":
            captions = [f"weight {weight:.2g}" for weight in np.linspace(0, 1, len(results))]
        picture = pictures.draw_edit(np.stack(list(given.values())), results, [*given, *captions], title, channels)
    path = workdir / "samples" / "edits" / f"{provenance.name}.npz"
    write_samples(workdir, path, provenance, arrays, picture)
    noun = "images" if net.is_images else "examples"
    log(f"The given {noun} and {len(results)} results: {path.with_suffix('.png')}; the results alone: {path}")


def _read_edit(
    files: EditFiles, task: str, options: ConfigDict, mask: np.ndarray | None
) -> tuple[dict[str, np.ndarray], Any]:
    """Returns ({caption: given example}, the edit that `editing.EDITS` makes). Raises: UserError."""
    needed = inspect.signature(editing.EDITS[task]).parameters
    image = files.read("image", known=mask)
    given = {"image" if files.net.is_images else "example": image}
    if mask is not None:  # unknown values may be NaN; the picture shows them gray
        given["known"] = np.where(mask, image, np.nan if files.net.levels is None else _GRAY).astype(image.dtype)
        image = np.where(mask, image, 0).astype(image.dtype)
    inputs: dict[str, Any] = {"image": files.to_model(image, options.num_samples), "mask": mask}
    if "other" in needed:
        given["other"] = files.read("other")
        inputs["other"] = files.to_model(given["other"])
    arguments = {**options.to_dict(), **inputs}
    with as_user_error("config.editing"):
        return given, editing.EDITS[task](**{name: arguments[name] for name in needed})


class _Measured:
    """A `Problem` with its y, float32 [1, ...] in network units. given: {caption: y or truth, as drawn}."""

    def __init__(self, config: ConfigDict, problem: Problem, files: EditFiles, mask: np.ndarray | None):
        """Reads or simulates y. Raises: UserError."""
        options, task, net = config.editing, config.editing.task, problem.net
        if options.noise and options.num_samples < 2:
            raise UserError(
                f"editing.num_samples={options.num_samples} is too few for a standard deviation; use at least 2"
            )
        if options.noise and config.sampling.guidance_scale != 1:
            log("Note: with a sampling.guidance_scale other than 1, the samples are not posterior samples.")
        self.problem, self.truth = problem, files.held_out
        self.y = files.read_y(self.problem, mask)
        self.given = {} if self.truth is None else {"truth": self.truth}
        self._caption = _CAPTIONS.get(task, "measurement")
        self._values = np.where(np.isfinite(problem.noise), self.problem.to_data(self.y)[0], np.nan)
        shown = self.problem.show(self._values)
        if not options.noise and net.levels is not None:
            shown = np.where(np.isnan(shown), _GRAY, shown).round().clip(0, 255).astype(np.uint8)
        self.given[self._caption] = shown

    def summarize(
        self, samples: np.ndarray, setup: SamplingSetup, title: str, channels: pictures.Channels
    ) -> tuple[dict[str, np.ndarray | None], pictures.Picture]:
        """Logs chi-squared and the solver's residual for samples [N, ...]. Returns: (arrays for the .npz, a picture)."""
        problem, net = self.problem, self.problem.net
        x = samples if net.levels is None else to_gray_levels(samples)
        arrays = {"mean": x.mean(axis=0), "deviation": x.std(axis=0, ddof=1), "measurement": self._values}
        arrays = {name: array.astype(np.float32) for name, array in arrays.items()}
        found = problem.chi_squared(samples[:, None], self.y)[:, 0]
        residual = problem.residual(setup, samples, self.y)
        log_fit(found, residual, problem)
        arrays |= {"residual": np.array(residual, np.float32), **problem.arrays()}
        covariance = "data's covariance" if problem.uses_data else "Jacobian"
        noise = os.path.basename(str(problem.options.noise))
        title += f"; {problem.method}, {covariance}, noise {noise}; mean and deviation of {len(x)} samples"
        shown = self.given[self._caption]
        picture = pictures.draw_posterior(x, shown, self._caption, self.truth, title, channels, net.is_images)
        return arrays | {"chi_squared": found, "truth": self.truth}, picture


def _read_held_out(config: ConfigDict, net: pretrained.Model) -> tuple[np.ndarray, dict[str, np.ndarray] | None]:
    """Returns (example number `editing.example` of `evaluation.split`, in data units; the example's conditions or None).

    Sets `sampling.label` to the class of the example, unless a label is set. Raises: UserError, DataError.
    """
    options = config.editing
    source, _ = load_held_out(config, None, is_trained_here=not config.init_from)
    if options.example >= len(source):
        raise UserError(
            f"editing.example={options.example} must be below {len(source):,}, the number of held-out examples"
        )
    batch = source.read([options.example])
    if net.num_classes and "label" in batch and config.sampling.label is None:
        config.sampling.label = int(batch["label"][0])
    conditions = None if config.sampling.conditions or net.condition_shape is None else read_conditions(batch)
    return batch_examples(batch)[0], conditions


class EditFiles:
    """Reads the files of `config.editing` as examples [*spatial, C]: uint8, or floats in data units."""

    def __init__(self, config: ConfigDict, net: pretrained.Model, held_out: np.ndarray | None = None):
        """held_out: an example that replaces the file `editing.image`."""
        self._options, self.net, self.held_out = config.editing, net, held_out
        self._shape, self._size = net.example_shape, net.image_size

    def _open(self, setting: str) -> Any:
        """Opens the image or array file that `config.editing[setting]` names. Raises: UserError."""
        path = self._options[setting]
        if not path:
            file = "FILE is needed: the path of an image" if self.net.is_images else "FILE.npy is needed: an array"
            raise UserError(f"editing.{setting}={file}")
        if not self.net.is_images or (self._options.noise and path.endswith(".npy")):
            array = load_arrays(f"editing.{setting}", path)
            if not isinstance(array, np.ndarray):
                raise UserError(f"editing.{setting}={path!r} holds several arrays; save the one to use with np.save")
            return array
        with as_user_error(f"editing.{setting}={path!r} cannot be read as an image file", OSError):
            return read_image(local_path(path))

    def read(self, setting: str, shape: tuple[int, ...] = (), known: np.ndarray | None = None) -> np.ndarray:
        """Reads the example that `config.editing[setting]` names.

        shape: the required shape; () for the shape of an example. known: mask of the values that must be finite and in
        `data.limits`; None for all values. Measurements with noise may exceed `data.limits`. Raises: UserError.
        """
        is_continuous, limits = self.net.levels is None, self.net.limits
        is_noisy = bool(self._options.noise)
        if setting == "image" and self.held_out is not None:
            return self.held_out
        example, shape = self._open(setting), shape or self._shape
        numbers = "real numbers in data units" if is_continuous or is_noisy else "type uint8"
        if isinstance(example, Image.Image):
            if len(shape) != 3 or shape[-1] != self._shape[-1]:
                raise UserError(
                    f"editing.{setting} must be an .npy with shape {list(shape)} for editing.task={self._options.task!r}"
                )
            height, width, channels = shape
            return data.fit(example, (height, width), channels)
        is_allowed = example.dtype.kind in "iuf" if is_continuous or is_noisy else example.dtype == np.uint8
        problem = ""
        if example.shape != shape or not is_allowed:
            problem = (
                f"holds {example.dtype} {list(example.shape)}; it must be one example with shape {list(shape)} and"
            )
            problem += f" {numbers}"
        else:
            values = example if known is None else example[np.broadcast_to(known, shape)]
            if not np.isfinite(values).all():
                problem = (
                    "has values that are not finite; replace them, or use editing.task=inpaint with an editing.mask that "
                    "is False there"
                )
            elif values.size and limits and not is_noisy and (values.min() < limits[0] or values.max() > limits[1]):
                low, high = values.min(), values.max()
                problem = f"has values from {low:g} to {high:g}, outside data.limits={tuple(limits)}; clip them"
        if problem:
            raise UserError(f"editing.{setting}={self._options[setting]!r} {problem}")
        return example.astype(np.float64) if is_continuous and example.dtype.kind != "f" else example

    def read_y(self, problem: Problem, mask: np.ndarray | None) -> np.ndarray:
        """Returns y, float32 [1, ...] in network units, read from a file or simulated from the example. Raises: UserError."""
        if self.held_out is not None:
            return problem.simulate(np.asarray(self.to_model(self.held_out)), np.array([self._options.example]))
        task = self._options.task
        if task in ("sparse", "fourier") and not self._options.operator:
            raise UserError(
                f"editing.task={task!r} with a file needs editing.operator=FILE.npy, where the file was measured"
            )
        if task == "colorize":  # the file has an example, whose gray values are the measurement
            return np.asarray(problem.operator.measure(self.to_model(self.read("image"))))
        known = np.isfinite(problem.noise) if mask is None else mask & np.isfinite(problem.noise)
        y = self.read("image", problem.y_shape, known)
        y = np.where(known, y, 0).astype(y.dtype)
        return problem.to_network(y[None])

    def read_mask(self) -> np.ndarray:
        """Reads the mask, bool [*spatial, 1] or [*spatial, C], True where values are known.

        White pixels of a mask image are known: values above 127 of 255, or 1 if all values are 0 and 1.
        """
        mask = self._open("mask")
        if self.net.is_images:
            image = self._open("image") if self._options.image else mask
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
            value = color if self.net.is_images else known.all()
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
        """Converts an example to network units and repeats it: float32 [copies, *spatial, C]."""
        if self.net.levels is None:
            x = jnp.asarray(data.to_model_units(example[None], self.net.normalizations.get("x")))
        elif example.dtype == np.uint8:
            x = to_model_range(jnp.asarray(example))[None]
        else:  # measured gray levels, with noise
            x = jnp.asarray(example, jnp.float32)[None] / 127.5 - 1
        return jnp.repeat(x, copies, axis=0)
