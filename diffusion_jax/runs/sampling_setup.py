"""Sampling of a config: the sampler and its steps, classes and guidance, batches on all devices, and trajectories."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from diffusion_jax import data, guidance, models, pretrained, process, sampling, schedules
from diffusion_jax.config import LEAVES, clips_by_default, is_continuous, is_upsampler, resolve, resolve_clip
from diffusion_jax.distributed import compiler, sharding
from diffusion_jax.errors import UserError
from diffusion_jax.images import to_model_range, to_uint8
from diffusion_jax.models import upsampling
from diffusion_jax.runs.chunk_store import options_digest
from diffusion_jax.runs.sampling_conditions import class_captions, parse_classes, standardize_conditions

__all__ = [
    "LEAVES_WITHOUT_EFFECT",
    "BatchSampler",
    "SamplingSetup",
    "check_finite",
    "picture_steps",
    "respace",
    "sample_trajectory",
    "sampler_from_config",
    "unused_leaves",
]

# Leaves of `config.sampling` that no sample depends on.
LEAVES_WITHOUT_EFFECT = ("preview_samples", "preview_steps", "trajectory", "batch_size", "use_ema")
# Leaves that the name of a file shows.
_NAMED_LEAVES = ("sampler", "steps", "spacing", "label", "guidance_scale", "clip", "num_samples", "seed")
_MAX_CLASSES_IN_NAME = 40


def unused_leaves(options: Mapping) -> list[str]:
    """Leaves of `config.sampling` without effect, each with the setting that would use it."""
    unused = []
    for leaf, value in options.items():
        readers = sampling.samplers_with(leaf)
        if readers and options["sampler"] not in readers and value != LEAVES[f"sampling.{leaf}"].default:
            unused.append(f"sampling.{leaf}={value!r} (only with sampling.sampler={', '.join(readers)})")
    if options["classifier_scale"] != 1 and not options["classifier"]:
        unused.append(f"sampling.classifier_scale={options['classifier_scale']!r} (only with sampling.classifier)")
    for leaf in ("guidance_interval", "guidance_rescale"):
        if options[leaf] and options["guidance_scale"] == 1:
            unused.append(f"sampling.{leaf}={options[leaf]!r} (only with a sampling.guidance_scale other than 1)")
    return unused


def sampler_from_config(
    options: Mapping, parameterization: Mapping[str, Any], clip: Callable | None = None, **arguments
) -> sampling.Sampler:
    """The sampler of `config.sampling`, whose `clip` is resolved: each argument is the setting of its name.

    parameterization: a mapping with `prediction` and `variance`, such as `config.diffusion`. clip: a function from the
    clipping of `sampling.clip` to the one to use instead. arguments: more arguments of the sampler.
    Raises: ValueError for values that the sampler does not take.
    """
    make_sampler = sampling.SAMPLERS[options["sampler"]]
    clipping = options["clip"]
    if clipping == "dynamic":
        clipping = process.dynamic_threshold(options["clip_quantile"])
    settings = {**options, **{name: parameterization[name] for name in ("prediction", "variance")}}
    settings["clip"] = clipping if clip is None else clip(clipping)
    names = inspect.signature(make_sampler).parameters.keys() & settings.keys()
    return make_sampler(**{name: settings[name] for name in names}, **arguments)


def _resolve_spacing(options: Mapping, sampler: sampling.Sampler, schedule: schedules.Schedule) -> str:
    """`sampling.spacing`, or the default of the sampler and of the type of `sampling.steps`."""
    if options["spacing"] is not None:
        return options["spacing"]
    return "openai" if isinstance(options["steps"], tuple | list) else sampling.default_spacing(sampler, schedule)


def respace(schedule: schedules.Schedule, options: Mapping, sampler: sampling.Sampler) -> schedules.Schedule:
    """The schedule that the sampler uses: all of it, or `sampling.steps` of it. Raises: ValueError."""
    steps = options["steps"]
    if steps is None:
        return schedule
    spacing, is_sequence = _resolve_spacing(options, sampler, schedule), isinstance(steps, tuple | list)
    if spacing == "given" and not is_sequence:
        raise ValueError(f"sampling.spacing='given' needs sampling.steps=(t, t, ...), network times, not {steps!r}")
    if spacing == "openai" and not all(type(count) is int for count in (steps if is_sequence else (steps,))):
        raise ValueError(
            f"sampling.steps={steps!r} with spacing=openai must be a whole number, or several: (10, 15, 20)"
        )
    if is_sequence and spacing not in ("given", "openai"):
        raise ValueError(
            f"sampling.steps={steps!r} are several numbers, which spacing={spacing} does not take; use "
            "sampling.spacing=openai (steps in equal sections of the chain) or given (network times)"
        )
    try:
        if spacing == "given":
            return schedules.respace(schedule, [float(t) for t in steps])
        if spacing == "openai":
            return schedules.respace(schedule, ",".join(map(str, steps)) if is_sequence else str(steps))
        if spacing == "openai_ddim":
            return schedules.respace(schedule, f"ddim{steps}")
        return schedules.respace(schedule, steps, spacing)
    except ValueError as error:
        raise ValueError(f"sampling.steps={steps!r}: {error}") from error


class SamplingSetup:
    """All decisions of a config about sampling, checked before anything is compiled.

    schedule: the steps of the sampler. class_names: of captions. classes: the requested classes, None if samples have none.
    labels: int32 [N], of which sample i has entry i modulo N, None without classes. conditions: [N, ...], standardized, of
    which sample i has row i modulo N, and for an upsampler the small images, uint8 [N, h, w, C]; None for samples without
    one. classifier_params: of the guiding classifier, None without one; they are an argument of `draw` because they
    are too large for constants of compiled code. warning: a reason why samples will look wrong, None if none is known.
    """

    def __init__(
        self,
        config: Mapping,
        model: models.UNet | models.MLP,
        schedule: schedules.Schedule,
        mesh: Mesh | None,
        class_names: Sequence[str] = (),
        load_classifier: bool = True,
        conditions: np.ndarray | None = None,
        normalizations: Mapping[str, data.Normalization] = types.MappingProxyType({}),
    ):
        """Checks the config and prepares the networks and functions that sampling needs.

        class_names: names that `sampling.label` may use. load_classifier: False to only check the config; classes are
        then checked only if no classifier guides. mesh: None for a single device without a classifier. conditions: [N, ...]
        in the units of the data. normalizations: of the data and the conditions.

        Raises: UserError or ValueError for values that are not allowed, or do not fit the model or one another.
        """
        config = resolve(config)
        self.config, self.mesh, self._model, self._full_schedule = config, mesh, model, schedule
        self.normalization = normalizations.get("x")
        config.sampling.clip = resolve_clip(config)
        options = self._options = config["sampling"]
        sampler = sampler_from_config(options, config["diffusion"])
        self.schedule = respace(schedule, options, sampler)
        self.classifier_params = self._classifier = None
        self.class_names, self._num_classes = class_names, model.num_classes
        if options["classifier"] and load_classifier:
            self._load_classifier()
        self.classes = None
        if load_classifier or not options["classifier"]:
            self.classes = parse_classes(options["label"], self._num_classes, class_names)
        self.labels = None if self.classes is None else np.array(self.classes, np.int32)
        self.conditions = standardize_conditions(conditions, normalizations)
        self.is_guided = options["guidance_scale"] != 1
        self._check_guidance()
        self._shifts_mean = bool(options["classifier"]) and options["classifier_form"] == "mean"
        if self._shifts_mean and options["sampler"] != "ddpm":
            raise UserError("sampling.classifier_form='mean' shifts the ancestral mean: use sampling.sampler='ddpm'")
        self.warning = self._check_steps(sampler)

    @property
    def notes(self) -> list[str]:
        """Lines to log: the warning, and leaves that have no effect."""
        unused = [f"{leaf} has no effect here" for leaf in unused_leaves(self._options)]
        return [self.warning, *unused] if self.warning else unused

    @property
    def name(self) -> str:
        """The part of a file name that distinguishes samples with different options.

        It shows the sampler, the steps, the classes and the guidance. A digest stands for all other options that differ from
        their defaults.
        """
        options, num_steps = self._options, self.schedule.num_timesteps
        hashed = {
            name: value
            for name, value in options.to_dict().items()
            if name not in (*LEAVES_WITHOUT_EFFECT, *_NAMED_LEAVES) and value != LEAVES[f"sampling.{name}"].default
        }
        if options["clip"] != clips_by_default(self.config):
            hashed["clip"] = options["clip"]
        if isinstance(options["steps"], tuple | list):
            hashed["steps"] = options["steps"]
        parts = [f"{options['sampler']}{num_steps}"] + [options["spacing"]] * (options["spacing"] is not None)
        if options["label"] is not None and self.classes is not None:
            classes = "class" + "-".join(map(str, self.classes))
            if len(classes) > _MAX_CLASSES_IN_NAME:
                classes, hashed["classes"] = f"{len(self.classes)}classes", self.classes
            parts.append(classes)
        if self.is_guided:
            parts.append(f"guided{options['guidance_scale']}")
        return "_".join(parts + ([options_digest(hashed)[:6]] if hashed else []))

    @property
    def is_stochastic(self) -> bool:
        """Whether two samples from the same x_T differ."""
        return sampler_from_config(self._options, self.parameterization).is_stochastic

    @property
    def parameterization(self) -> dict[str, str]:
        """`prediction` and `variance` of the network, as samplers take them."""
        return {key: self.config["diffusion"][key] for key in ("prediction", "variance")}

    def set_small_images(self, images: np.ndarray, labels: np.ndarray | None) -> None:
        """Sets the images that an upsampler enlarges; their labels replace the classes unless `sampling.label` is set.

        Raises: UserError.
        """
        self.conditions = images
        if labels is None or self.classes is None or self._options["label"] is not None:
            return
        if labels.dtype.kind not in "iu" or labels.min() < 0 or labels.max() >= self._num_classes:
            raise UserError(f"the small images' labels (arr_1) must be classes in 0 ... {self._num_classes - 1}")
        self.labels = labels.astype(np.int32)

    def label(self, indices: np.ndarray) -> np.ndarray | None:
        """The labels of the samples of these numbers; None if they have none."""
        return None if self.labels is None else self.labels[indices % len(self.labels)]

    def condition(self, indices: np.ndarray) -> np.ndarray | None:
        """The rows of `conditions` for the samples of these numbers; None if they have none."""
        return None if self.conditions is None else self.conditions[indices % len(self.conditions)]

    def class_captions(self, indices: np.ndarray) -> list[str] | None:
        """The classes of the samples of these numbers, as "class 1: cats"; None if they have none."""
        labels = self.label(indices)
        return None if labels is None else class_captions(labels, self.class_names)

    def _check_guidance(self) -> None:
        options, model = self._options, self._model
        if self.is_guided and model.null_label is None and model.null_condition is None:
            raise UserError(
                f"sampling.guidance_scale={options['guidance_scale']} needs a model trained with model.num_classes and "
                "model.label_dropout above 0, or with conditions and model.condition_dropout above 0; use 1, or "
                "sampling.classifier"
            )
        if options["low_resolution"] and not is_upsampler(self.config):
            raise UserError(
                f"sampling.low_resolution={options['low_resolution']!r} is for models that enlarge images "
                "(data.low_resolution)"
            )
        noise, maximum = options["low_resolution_noise"], self.config["diffusion"]["conditioning_noise"]
        if noise > maximum:
            raise UserError(
                f"sampling.low_resolution_noise={noise} must lie in 0 ... {maximum}, the noise that the model was trained "
                "with (diffusion.conditioning_noise)"
            )

    def _check_steps(self, sampler: sampling.Sampler) -> str | None:
        """The reason why samples will look wrong on these steps, with advice; None if none is known.

        Raises: UserError for steps on which the sampler is known to fail.
        """
        options, spacing = self._options, _resolve_spacing(self._options, sampler, self._full_schedule)
        advice = more = "more steps (sampling.steps)"
        if spacing != "log_snr" and not self._full_schedule.zero_terminal_snr:
            advice = f"sampling.spacing=log_snr or {more}"
        problem = sampling.find_problem(sampler, self.schedule)
        if problem is not None:
            leaves = f"sampling.sampler={options['sampler']}"
            if options["steps"] is not None:
                leaves += f" with sampling.steps={options['steps']} and spacing {spacing}"
            raise UserError(f"{leaves}: {problem}; use {advice}, or sampling.sampler=ddim")
        blur, growth = sampling.find_blur(self.schedule), sampling.find_error_growth(sampler, self.schedule)
        if growth is None:
            return f"{blur}; use {advice}" if blur else None
        steps = more if spacing == "log_snr" else "--config.sampling.spacing=log_snr"
        if options["steps"] is None:
            steps = "--config.sampling.steps=250 --config.sampling.spacing=log_snr"
        return f"{growth}; use {steps}, --config.sampling.clip=True for data in [-1, 1], or a model that predicts v"

    def _load_classifier(self) -> None:
        path = self._options["classifier"]
        try:
            net = pretrained.load(path, ema=self._options["use_ema"])
        except pretrained.PretrainedError as error:
            raise UserError(f"sampling.classifier={path}: {error}") from error
        if not isinstance(net.model, models.Classifier):
            raise UserError(f"sampling.classifier={path} holds no classifier; --mode=train_classifier makes one")
        differences = []
        if any(
            not np.array_equal(getattr(net.schedule, name), getattr(self._full_schedule, name))
            for name in ("timesteps", "alpha_bar")
        ):
            differences.append("another noise schedule")
        classifier_shape, image_shape = (*net.image_size, net.channels), data.example_shape(self.config["data"])
        if classifier_shape != image_shape:
            differences.append(f"images: {classifier_shape} there, {image_shape} here")
        if differences:
            raise UserError(f"sampling.classifier={path} was trained on other x_t ({'; '.join(differences)})")
        if self._num_classes not in (0, net.model.num_classes):
            raise UserError(
                f"sampling.classifier={path} has {net.model.num_classes} classes and the model has {self._num_classes}; they "
                "must agree"
            )
        if net.normalizations.get("x") != self.normalization:
            raise UserError(
                f"sampling.classifier={path} was trained on data with other constants of data.normalization (data.json); "
                "train both on the same data"
            )
        assert self.mesh is not None
        self._classifier, self._num_classes = net.model, net.model.num_classes
        self.classifier_params = jax.device_put(net.params, sharding.replicated(self.mesh))

    def _class_log_prob(self, classifier_params, y) -> Callable:
        assert self._classifier is not None
        apply: Callable[..., Any] = self._classifier.apply
        return guidance.class_log_prob(lambda x_t, time: apply({"params": classifier_params}, x_t, time), y)

    def sampler(self, classifier_params=None, y=None, clip: Callable | None = None) -> sampling.Sampler:
        """The sampler.

        classifier_params, y: as in `network`, if the classifier shifts its mean. clip: as in `sampler_from_config`.
        """
        arguments = {}
        if self._shifts_mean and classifier_params is not None:
            log_prob, scale = self._class_log_prob(classifier_params, y), self._options["classifier_scale"]
            arguments["mean_shift"] = guidance.log_prob_gradient(log_prob, scale)
        return sampler_from_config(self._options, self.parameterization, clip, **arguments)

    def network(self, params, classifier_params, y, condition=None) -> Callable:
        """The guided denoise_fn(x_t, time), pure.

        y: int32 [B] or None. condition: rows of `conditions`, or None.
        """
        options, given = self._options, {"y": y} if self._model.num_classes else {}
        if condition is not None and is_upsampler(self.config):
            noise_std = options["low_resolution_noise"] if self.config["diffusion"]["conditioning_noise"] else None
            shape = (condition.shape[0], *data.example_shape(self.config["data"]))
            condition = upsampling.condition(to_model_range(condition), shape, noise_std)
        given |= {} if condition is None else {"condition": condition}

        def conditional(x_t, time, given) -> Any:
            return self._model.apply({"params": params}, x_t, time, **given)

        denoise_fn: Callable[..., Any] = functools.partial(conditional, given=given)
        if self.is_guided:
            nulls, scale = self._model.nulls_of(given), options["guidance_scale"]
            limits = {"interval": options["guidance_interval"] or None, "rescale": options["guidance_rescale"]}
            denoise_fn = guidance.classifier_free(conditional, given, nulls, scale, **limits)
        if self._classifier is not None and not self._shifts_mean:
            denoise_fn = guidance.classifier(
                denoise_fn,
                self._class_log_prob(classifier_params, y),
                self._full_schedule,
                options["classifier_scale"],
                prediction=self.parameterization["prediction"],
            )
        return denoise_fn

    def draw(
        self,
        params,
        classifier_params,
        key,
        shape: tuple[int, ...],
        y=None,
        condition=None,
        *,
        constrain: Callable = lambda x: x,
        **options: Any,
    ) -> Any:
        """Samples [B, *spatial, C] in the model's range from noise, or what `sampling.sample` returns with `options`; pure.

        shape: (B, *spatial, C). y, condition: as in `network`. constrain: applied to x_T, to place it on a mesh.
        """
        key_noise, key_steps = jax.random.split(key)
        x_T = constrain(jax.random.normal(key_noise, shape))
        denoise_fn = self.network(params, classifier_params, y, condition)
        sampler = self.sampler(classifier_params, y)
        return sampling.sample(key_steps, self.schedule, denoise_fn, x_T, sampler, **options)


class BatchSampler:
    """Compiled sampling, distributed over the devices: `batch_sampler(params, seed, batch)`.

    Batch i holds samples i B ... (i + 1) B - 1, in the units of the data.
    """

    def __init__(self, setup: SamplingSetup, batch_size: int):
        assert setup.mesh is not None
        self.setup, self.batch_size, continuous = setup, batch_size, is_continuous(setup.config)
        shape, replicated = (batch_size, *data.example_shape(setup.config["data"])), sharding.replicated(setup.mesh)
        by_rows = sharding.batch_sharding(setup.mesh)

        def constrain(x):
            return jax.lax.with_sharding_constraint(x, by_rows)

        def sample_batch(params, classifier_params, seed, batch, y, condition):
            # Sharded parameters of a run in progress are gathered once: every step needs all of them, and there are no
            # gradients or activations that would compete for the memory.
            params = jax.lax.with_sharding_constraint(params, replicated)
            y, condition = jax.tree.map(constrain, (y, condition))
            key = jax.random.fold_in(jax.random.key(seed), batch)
            x = setup.draw(params, classifier_params, key, shape, y, condition, constrain=constrain)
            return x if continuous else to_uint8(x)

        self._sample_batch = jax.jit(
            sample_batch,
            # None: parameters keep their own sharding.
            in_shardings=(None, *[replicated] * 5),
            out_shardings=by_rows,
            compiler_options=compiler.options(),
        )

    def __call__(self, params, seed: int, batch: int = 0) -> np.ndarray:
        """One batch, uint8 [B, *spatial, C], gathered on every process; float32 in the units of continuous data."""
        indices = batch * self.batch_size + np.arange(self.batch_size)
        y = self.setup.label(indices)
        condition = self.setup.condition(indices)
        numbers = np.uint32(seed), np.int32(batch)
        samples = self._sample_batch(params, self.setup.classifier_params, *numbers, y, condition)
        samples = np.asarray(multihost_utils.process_allgather(samples, tiled=True))
        return data.to_data_units(samples, self.setup.normalization)


def check_finite(samples: np.ndarray) -> None:
    """Raises: UserError for samples that are not finite; those of images are rounded to gray levels before."""
    if samples.dtype != np.uint8 and not np.isfinite(samples).all():
        raise UserError(
            "the samples have values that are not finite: use more sampling.steps, another sampling.sampler, or "
            "sampling.clip=True",
            exit_code=1,
        )


def picture_steps(schedule: schedules.Schedule, count: int) -> np.ndarray:
    """At most `count` increasing indices of a schedule: its last one, and indices evenly spaced in alpha_bar.

    The share of the signal changes alike between neighbors. Even distances of the index would mostly show noise, or the
    finished image, in schedules that take many steps there.
    """
    alpha_bar = np.asarray(schedule.alpha_bar, np.float64)
    wanted = alpha_bar[-1] + (1 - alpha_bar[-1]) * np.arange(count) / count
    return np.unique(np.abs(alpha_bar - wanted[:, None]).argmin(axis=1))


def sample_trajectory(key, setup: SamplingSetup, params, columns: int, rows: int) -> dict[str, np.ndarray]:
    """`rows` samples being denoised, as uint8 or in the units of continuous data.

    key: that of a batch gives the first rows of this batch, up to rounding.

    Returns: {"x_t": at up to `columns - 1` steps of `picture_steps`, the noisiest first [steps, rows, *spatial, C], "x_0": as
    the network predicts it at these steps (DDPM figure 6), "times": the network times, "samples": [rows, *spatial, C]}.
    """
    steps = picture_steps(setup.schedule, columns - 1)
    # One process draws this, on one device.
    params, classifier_params = jax.device_get((params, setup.classifier_params))
    shape, indices = (rows, *data.example_shape(setup.config["data"])), np.arange(rows)

    def draw(params, classifier_params, key, y, condition):
        return setup.draw(params, classifier_params, key, shape, y, condition, trajectory=steps)

    draw = jax.jit(draw, compiler_options=compiler.options())
    x_0, trajectory = draw(params, classifier_params, key, setup.label(indices), setup.condition(indices))

    def to_data(x):
        x = np.asarray(x) if is_continuous(setup.config) else np.asarray(to_uint8(x))
        return data.to_data_units(x, setup.normalization)

    times = np.asarray(setup.schedule.timesteps)[steps[::-1]]
    arrays = {"x_t": to_data(trajectory.x_t), "x_0": to_data(trajectory.x_0), "times": times}
    return arrays | {"samples": to_data(x_0)}
