"""`SamplingSetup`: a model with the sampler, steps, classes, conditions and guidance of `config.sampling`."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import warnings
import zipfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from diffusion_jax import data, pretrained, sampling, schedules
from diffusion_jax.config import check, find_broken, resolve, resolve_clip
from diffusion_jax.console import log
from diffusion_jax.data.sources import read_conditions
from diffusion_jax.denoiser import Denoiser, dynamic_threshold
from diffusion_jax.errors import UserError, as_user_error, closest_names, list_names
from diffusion_jax.functions import find_function
from diffusion_jax.images import to_uint8
from diffusion_jax.storage.downloads import local_path
from diffusion_jax.untrusted import check_regular, open_npz, read_header

_GUIDANCE = ("guidance_scale", "guidance_rescale", "classifier_scale", "classifier_form")  # same names in `denoiser`
_MAX_SHOWN_NUMBERS = 4  # of a condition in a caption


@dataclasses.dataclass(frozen=True)
class SamplingSetup:
    """A model with its sampling settings, made by `resolve_sampling`.

    net: its parameters may be added later, with `dataclasses.replace`. config: complete, with a resolved clip. schedule: the
    steps of the sampler. options: clip and guidance, as arguments of `pretrained.Model.denoiser`. labels: int32 [N], or None.
    conditions: "condition" [N, ...] in data units and "condition_missing" bool [N], either may be absent. small_images: uint8
    [N, h, w, C] for an upsampler, or None. Sample i uses row i modulo N of each array.
    """

    net: pretrained.Model
    config: ConfigDict
    sampler: sampling.Sampler
    schedule: schedules.Schedule
    options: Mapping[str, Any]
    labels: np.ndarray | None
    conditions: Mapping[str, np.ndarray]
    small_images: np.ndarray | None

    @property
    def classifier(self) -> pretrained.Model | None:
        """The guiding classifier, or None."""
        return self.options["classifier"]

    @property
    def title(self) -> str:
        """The weights, the sampler, guidance and the seed, for titles of pictures."""
        net, options, count = self.net, self.config.sampling, self.schedule.num_timesteps
        kind = "EMA" if net.weights == "ema" else net.weights
        parts = [net.provenance.name if net.step is None else f"step {net.step:,}, {kind} weights"]
        parts.append(f"{options.sampler.rpartition(':')[2]}, {count} step{'s' * (count != 1)}")
        parts[-1] += f", {options.spacing}" * (options.spacing is not None)
        parts += [f"guidance {options.guidance_scale:g}"] * (options.guidance_scale != 1)
        return "; ".join([*parts, f"seed {options.seed}"])

    def on_mesh(self, mesh: Mesh) -> SamplingSetup:
        """Returns the same setup with the parameters replicated over a mesh."""
        classifier = None if self.classifier is None else self.classifier.on_mesh(mesh)
        return dataclasses.replace(self, net=self.net.on_mesh(mesh), options={**self.options, "classifier": classifier})

    def rows(self, indices: np.ndarray) -> dict[str, Any]:
        """Returns the labels "y", the conditions and the small images "low" of the samples with these indices."""
        rows = {"y": _rows(self.labels, indices), "low": _rows(self.small_images, indices)}
        return rows | {name: values[indices % len(values)] for name, values in self.conditions.items()}

    def generate(
        self,
        key,
        indices: np.ndarray,
        wrap: Callable[[Denoiser], Denoiser] = lambda denoiser: denoiser,
        **arguments: Any,
    ) -> Any:
        """Draws the samples with these indices.

        wrap: a function that is applied to the denoiser. arguments: trajectory and algorithm of `pretrained.Model.draw`.
        """
        denoiser = wrap(self.denoiser(indices))
        return self.net.draw(key, len(indices), self.schedule, denoiser, self.sampler, **arguments)

    def denoiser(self, indices: np.ndarray) -> Denoiser:
        """Returns the denoiser of the samples with these indices."""
        noise_std = self.config.sampling.low_resolution_noise
        with warnings.catch_warnings():  # `resolve_sampling` has logged these warnings
            warnings.simplefilter("ignore")
            rows = self.rows(indices)
            inputs = self.net.inputs(len(indices), **rows, noise_std=noise_std, classifier=self.classifier)
        return self.net.denoiser(**inputs, **self.options)

    def generate_batch(
        self,
        seed: int,
        index: int,
        batch_size: int,
        wrap: Callable[[Denoiser], Denoiser] = lambda denoiser: denoiser,
    ) -> np.ndarray:
        """Draws batch number `index` of the samples, in the format of files (`to_examples`).

        wrap: as for `generate`. Every process must call this method; each process gets all samples of the batch.
        """
        indices = index * batch_size + np.arange(batch_size)
        return self.to_examples(self.generate(keys_of_samples(seed, indices), indices, wrap))

    def to_examples(self, samples: Any) -> np.ndarray:
        """Converts results of `net.sample` for files: images to uint8; continuous data stay in data units."""
        return np.asarray(samples if self.net.levels is None else to_uint8(samples))

    def captions(self, count: int) -> list[str] | None:
        """Returns captions for the first `count` samples; None if samples have neither classes nor shown conditions."""
        rows = np.arange(count)
        return make_captions(self.net, _rows(self.labels, rows), read_conditions(self.rows(rows)))


def keys_of_samples(seed: int, indices: np.ndarray) -> jax.Array:
    """Returns the key of each sample, so that a sample does not depend on the batch that it is drawn in."""
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), indices)


def _rows(values: np.ndarray | None, indices: np.ndarray) -> np.ndarray | None:
    return None if values is None else values[indices % len(values)]


def resolve_sampling(
    config: ConfigDict,
    net: pretrained.Model,
    conditions: Mapping[str, np.ndarray] | None = None,
    read_files: bool = True,
) -> SamplingSetup:
    """Returns the setup that `config.sampling` describes; checks settings before anything is compiled, and logs notes.

    conditions: replaces `sampling.conditions`, with the arrays of `SamplingSetup.conditions`. read_files: False skips the
    files that the config names, the notes, and `sampling.label`, whose names and classes the data or a classifier may have.
    Raises: UserError for values that are not allowed, do not fit the model, or contradict each other; DataError.
    """
    config = resolve(config)
    config.sampling.clip = resolve_clip(config)
    options = config.sampling.to_dict()
    check(config, "samples")
    classifier = labels = small_images = given_labels = None
    with as_user_error("config.sampling"), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        clip = dynamic_threshold(options["clip_quantile"]) if options["clip"] == "dynamic" else options["clip"]
        sampler = sampler_from_config(options)
        sampler, schedule = net.configure(net.denoiser(clip=clip), sampler, *steps_from_config(options))
        if ":" in options["sampler"]:
            _check_steps(sampler, schedule, net.denoiser(clip=clip), net.example_shape)
        net.check_small_images(bool(net.low_resolution), options["low_resolution_noise"])
        if read_files:
            if options["classifier"]:
                classifier = _load_classifier(options, net)
            if net.low_resolution:
                small_images, given_labels = _read_small_images(options["low_resolution"], net)
            if conditions is None and options["conditions"]:
                conditions = _load_conditions(options["conditions"], net)
            if conditions is None and net.condition_shape is not None and not net.model.condition_dropout:
                expected = ", ".join(map(str, ("N", *net.condition_shape)))
                raise UserError(
                    f"this model needs conditions: set sampling.conditions=FILE.npy, numbers [{expected}] in data units"
                )
        if read_files or conditions:
            with as_user_error(f"sampling.conditions={options['conditions']!r}"):
                count = len(conditions["condition"]) if conditions else 1
                net.check_condition(num_examples=count, **(conditions or {}))
        num_classes = net.num_classes or (0 if classifier is None else classifier.num_classes)
        if read_files or options["label"] is None:
            labels = parse_classes(options["label"], num_classes, net.class_names)
        if given_labels is not None and labels is not None and options["label"] is None:
            labels = np.asarray(net.check_labels(given_labels, len(given_labels), classifier))
        has_condition = conditions is not None or (not read_files and net.condition_shape is not None)
        net.check_guidance(options["guidance_scale"], has_condition, classifier)
    notes = [str(found.message).removesuffix(".") for found in caught if found.category is UserWarning]
    if labels is not None and net.class_names and (unknown := labels[labels >= len(net.class_names)]).size:
        notes.append(
            f"class {unknown[0]} is not among the {len(net.class_names)} classes of the training data; its samples may be "
            "noise"
        )
    if read_files:
        for note in [*notes, *find_broken(config, "without effect")]:
            log(f"Note: {note}.")
    if options["steps"] is None:
        config.sampling.spacing = None  # without steps, spacing has no effect, so names and provenance omit it
    guidance = {
        "clip": clip,
        "guidance_interval": options["guidance_interval"] or None,
        "classifier": classifier,
        **{name: options[name] for name in _GUIDANCE},
    }
    return SamplingSetup(net, config, sampler, schedule, guidance, labels, conditions or {}, small_images)


def _load_classifier(options: Mapping[str, Any], net: pretrained.Model) -> pretrained.Model:
    """Loads the guiding classifier onto the model's devices. Raises: UserError."""
    path = options["classifier"]
    with as_user_error(f"sampling.classifier={path}", pretrained.PretrainedError):
        classifier = pretrained.load(path, ema=options["use_ema"])
    return classifier if net.mesh is None else classifier.on_mesh(net.mesh)


# ---- Sampler and steps


def sampler_from_config(options: Mapping[str, Any]) -> sampling.Sampler:
    """Builds the sampler that `config.sampling` names; each constructor argument gets the setting with the same name.

    Raises: ValueError for values that the sampler does not allow, and for a user's function that returns no sampler.
    """
    make_sampler = find_function(options["sampler"], "sampling.sampler", sampling.SAMPLERS)
    settings = {name: value for name, value in options.items() if name != "churn_range" or value}
    arguments = {name: settings[name] for name in sampling.arguments_of(make_sampler) & settings.keys()}
    expected = f"sampling.sampler={options['sampler']} must be a class derived from sampling.Sampler"
    try:
        sampler = make_sampler(**arguments)
    except TypeError as error:
        raise ValueError(f"{expected}, whose arguments are settings or have defaults ({error})") from error
    if not isinstance(sampler, sampling.Sampler):
        raise ValueError(expected)
    return sampler


def _check_steps(sampler: sampling.Sampler, schedule: schedules.Schedule, denoiser: Denoiser, shape: Any) -> None:
    """Traces a user's sampler, with x_t as the network's output. Raises: ValueError as `sampling.sample`; its own errors."""
    denoiser = dataclasses.replace(denoiser, network=lambda x_t, time: x_t, variance="fixed_large")
    arrays = jax.random.split(jax.random.key(0)), schedule, denoiser, jax.ShapeDtypeStruct((2, *shape), np.float32)
    with contextlib.suppress(AttributeError, LookupError):  # of a sampler that reads denoiser.inputs, not yet known
        jax.eval_shape(lambda key, schedule, *others: sampling.sample(key, schedule, *others, sampler=sampler), *arrays)


def steps_from_config(options: Mapping[str, Any]) -> tuple[Any, str | None]:
    """Converts `config.sampling` to the arguments `steps` and `spacing` of `pretrained.Model.sample`."""
    steps, spacing = options["steps"], options["spacing"]
    if steps is None:
        return None, None
    if spacing == "given":
        return [float(t) for t in steps], None
    return steps, "openai" if isinstance(steps, tuple | list) and spacing is None else spacing


# ---- Samples


def check_finite(samples: np.ndarray) -> None:
    """Raises: UserError for samples that are not finite. Images are not checked, because they are already gray levels."""
    if samples.dtype != np.uint8 and not np.isfinite(samples).all():
        raise UserError(
            "the samples have values that are not finite: use more sampling.steps, another sampling.sampler, or "
            "sampling.clip=True",
            exit_code=1,
        )


# ---- Captions and classes


def make_captions(
    net: pretrained.Model, labels: np.ndarray | None, conditions: Mapping[str, np.ndarray]
) -> list[str] | None:
    """Returns captions with classes and condition vectors; None if there are neither. conditions: as in `SamplingSetup`.

    Captions of images are short: the class, or the numbers of the condition.
    """
    names = None if labels is None else class_captions(labels, net.class_names)
    values = conditions.get("condition")
    if values is None or values.ndim != 2:
        return names
    is_long = values.shape[1] > _MAX_SHOWN_NUMBERS
    if net.is_images and (names or is_long):
        return names
    missing = conditions.get("condition_missing", np.zeros(len(values), bool))
    word, end = "" if net.is_images else "condition ", ", ..." if is_long else ""
    shown = [
        "no condition" if is_missing else word + ", ".join(f"{number:.3g}" for number in row) + end
        for row, is_missing in zip(values[:, :_MAX_SHOWN_NUMBERS].tolist(), missing, strict=True)
    ]
    return [f"{name}, {condition}" for name, condition in zip(names, shown, strict=True)] if names else shown


def class_captions(labels: np.ndarray, names: Sequence[str]) -> list[str]:
    """Returns captions such as "class 1: cats", or "class 1" if the class has no other name."""
    known = [names[y] if y < len(names) else "" for y in labels.tolist()]
    pairs = zip(labels.tolist(), known, strict=True)
    return [f"class {y}" if name in ("", str(y)) else f"class {y}: {name}" for y, name in pairs]


def parse_classes(value, num_classes: int, names: Sequence[str]) -> np.ndarray | None:
    """Returns the classes of `sampling.label` as int32; None for a model without classes. Raises: UserError.

    value: a class or several, each an index or a name; a string may list several, as in "3,cats"; None for all classes.
    """
    if value is None:
        return np.arange(num_classes, dtype=np.int32) if num_classes else None
    if not num_classes:
        raise UserError(f"sampling.label={value}, but the model has no classes (model.num_classes=0)")
    classes = value
    if isinstance(value, str) and value not in names:
        classes = [part.strip(" '\"") for part in value.strip("()[] ,").split(",")]
    indices = []
    for y in classes if isinstance(classes, tuple | list) else (classes,):
        if isinstance(y, str):
            y = names.index(y) if y in names else int(y) if y.isdecimal() else y
        elif str(y) in names and names.index(str(y)) != y:
            raise UserError(
                f"sampling.label={y} is ambiguous: {str(y)!r} is the name of class {names.index(str(y))}; give the name of "
                f"the class, as in --config.sampling.label=\"'{y}'\""
            )
        if type(y) is not int or not 0 <= y < num_classes:
            known = f" ({list_names(names, 20)})" if names else ""
            near = closest_names(y, names, count=3) if isinstance(y, str) else []
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise UserError(f"sampling.label={value} must be classes in 0 ... {num_classes - 1}{known}{hint}")
        indices.append(y)
    return np.array(indices, np.int32)


# ---- Conditions


def check_sampling(config: ConfigDict, net: pretrained.Model) -> None:
    """Raises the errors of `resolve_sampling` that depend neither on data nor on a classifier."""
    path = config.sampling.conditions
    resolve_sampling(config, net, _load_conditions(path, net) if path else None, read_files=False)


def _load_conditions(path: str, net: pretrained.Model) -> dict[str, np.ndarray]:
    """Loads `sampling.conditions`, as in `SamplingSetup`. Raises: UserError for an unreadable or empty file."""
    loaded = load_arrays("sampling.conditions", path)
    loaded = {"condition": loaded} if isinstance(loaded, np.ndarray) else loaded
    if "condition" not in loaded or not loaded["condition"].size:
        found = "an empty array" if "condition" in loaded else f"only {list_names(map(repr, loaded), 8)}"
        raise UserError(
            f"sampling.conditions={path!r} has {found}; give an .npy of numbers, or an .npz with the array 'condition'"
        )
    if loaded["condition"].shape == net.condition_shape:  # one condition for all samples
        loaded["condition"] = loaded["condition"][None]
    return read_conditions(loaded)


def load_arrays(setting: str, path: str) -> np.ndarray | dict[str, np.ndarray]:
    """Reads the array in an .npy, or all arrays in an .npz by name. setting: for error messages. Raises: UserError."""
    with as_user_error(f"{setting}={path!r} cannot be read as an .npy or .npz file", OSError, EOFError):
        file = local_path(path)
        check_regular(file)
        if zipfile.is_zipfile(file):
            with open_npz(file) as arrays:
                return dict(arrays)
        with open(file, "rb") as opened:
            read_header(opened, os.stat(file).st_size)
        return np.load(file, allow_pickle=False)


# ---- Small images


def _read_small_images(path: str, net: pretrained.Model) -> tuple[np.ndarray, np.ndarray | None]:
    """Reads `sampling.low_resolution`: uint8 images [N, h, w, C], and labels [N] or None. Raises: UserError, DataError."""
    if not path:
        raise UserError(
            "this model enlarges images: set sampling.low_resolution to an .npz from --mode=sample or to an image folder"
        )
    height, width, channels = net.example_shape
    size = (net.low_resolution, width * net.low_resolution // height)
    source = local_path(path)
    if source.is_dir():
        folder = data.Folder(str(source), size, channels)
        return folder.read(np.arange(len(folder)))["image"], None
    arrays = load_arrays("sampling.low_resolution", path)
    arrays, problem = arrays if isinstance(arrays, dict) else {}, ""
    images, labels = arrays.get("arr_0"), arrays.get("arr_1")
    if images is None:
        problem = "is neither a folder nor an .npz with arr_0"
    elif images.dtype != np.uint8 or images.shape[1:] != (*size, channels):
        problem = (
            f"holds {images.dtype} {images.shape}; this model enlarges uint8 images of {size[0]}x{size[1]} with {channels} "
            "channels"
        )
    elif labels is not None and labels.shape != images.shape[:1]:
        problem = (
            f"holds {len(images)} images and labels of shape {labels.shape}; there must be one label for each image"
        )
    if images is None or problem:
        raise UserError(f"sampling.low_resolution={path!r} {problem}")
    return images, labels
