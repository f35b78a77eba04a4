"""The decisions of `config.sampling` for a trained network: the sampler and its steps, the classes, and the guidance."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from diffusion_jax import data, guidance, models, pretrained, sampling, schedules
from diffusion_jax.config import LEAVES, clips_by_default, is_upsampler, resolve, resolve_clip
from diffusion_jax.distributed import sharding
from diffusion_jax.errors import UserError
from diffusion_jax.images import to_model_range
from diffusion_jax.models import upsampling
from diffusion_jax.runs.chunk_store import options_digest
from diffusion_jax.runs.sampler_config import (
    is_stochastic,
    resolve_spacing,
    respace,
    sampler_from_config,
    unused_leaves,
)
from diffusion_jax.runs.sampling_conditions import ClassLabels, parse_classes

__all__ = ["LEAVES_WITHOUT_EFFECT", "SamplingSetup"]

# Leaves of `config.sampling` that no sample depends on.
LEAVES_WITHOUT_EFFECT = ("preview_samples", "preview_steps", "trajectory", "batch_size", "use_ema")
# Leaves that the name of a file shows.
_NAMED_LEAVES = ("sampler", "steps", "spacing", "label", "guidance_scale", "clip", "num_samples", "seed")
_MAX_CLASSES_IN_NAME = 40


class _Classifier(NamedTuple):
    """A guiding classifier, its parameters replicated on every device."""

    model: models.Classifier
    params: Any
    normalizations: data.Normalizations


class SamplingSetup:
    """All decisions of a config about sampling, checked before anything is compiled.

    schedule: the steps of the sampler. labels: a `ClassLabels`. conditions: [N, ...], standardized, of which sample i has row
    i modulo N, and for an upsampler the small images, uint8 [N, h, w, C]; None for a model without conditions, or for samples
    without one. classifier_params: of the guiding classifier, None without one; they are an argument of `draw` because they
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
    ):
        """Checks the config and prepares the networks and functions that sampling needs.

        class_names: names that `sampling.label` may use. load_classifier: False to only check the config; classes are
        then checked only if no classifier guides. mesh: None for a single device without a classifier.

        Raises: UserError or ValueError for values that are not allowed, or do not fit the model or one another.
        """
        config = resolve(config)
        self._config, self._model, self._full_schedule = config, model, schedule
        config.sampling.clip = resolve_clip(config)
        options = self._options = config["sampling"]
        sampler = sampler_from_config(options, config["diffusion"])
        self._spacing = resolve_spacing(options, sampler, schedule)
        self.schedule = respace(schedule, options, sampler)
        self._classifier = self._load_classifier(mesh) if options["classifier"] and load_classifier else None
        self.classifier_params = None if self._classifier is None else self._classifier.params
        self.labels = ClassLabels(self._parse_classes(class_names, load_classifier), class_names)
        self.conditions = conditions
        self.is_guided = options["guidance_scale"] != 1
        self._interval = options["guidance_interval"] or None
        self._check_guidance()
        self._shifts_mean = bool(options["classifier"]) and options["classifier_form"] == "mean"
        if self._shifts_mean and options["sampler"] != "ddpm":
            raise UserError("sampling.classifier_form='mean' shifts the ancestral mean: use sampling.sampler='ddpm'")
        self._check_steps(sampler)
        self.warning = self._find_warning(sampler)

    @property
    def classes(self) -> tuple[int, ...] | None:
        """The classes that samples have in turn; None if they have none."""
        return self.labels.classes

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
        if options["clip"] != clips_by_default(self._config):
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
        return is_stochastic(self._options)

    @property
    def parameterization(self) -> dict[str, str]:
        """`prediction` and `variance` of the network, as samplers take them."""
        return {key: self._config["diffusion"][key] for key in ("prediction", "variance")}

    def set_labels(self, labels: np.ndarray) -> None:
        """Uses the labels of small images for the images that are enlarged from them, unless `sampling.label` is set.

        Raises: UserError.
        """
        if self.classes is not None and self._options["label"] is None:
            self.labels.set_given(labels)

    def condition(self, indices: np.ndarray) -> np.ndarray | None:
        """The rows of `conditions` for the samples of these numbers; None if they have none."""
        return None if self.conditions is None else self.conditions[indices % len(self.conditions)]

    def _parse_classes(self, class_names: Sequence[str], load_classifier: bool) -> tuple[int, ...] | None:
        path, num_classes = self._options["classifier"], self._model.num_classes
        if self._classifier is not None:
            classifier_classes = self._classifier.model.num_classes
            if num_classes not in (0, classifier_classes):
                raise UserError(
                    f"sampling.classifier={path} has {classifier_classes} classes and the model has {num_classes}; they "
                    "must agree"
                )
            num_classes = classifier_classes
        if path and not load_classifier:
            return None
        return parse_classes(self._options["label"], num_classes, class_names)

    def _check_guidance(self) -> None:
        options, model = self._options, self._model
        if self.is_guided and model.null_label is None and model.null_condition is None:
            raise UserError(
                f"sampling.guidance_scale={options['guidance_scale']} needs a model trained with model.num_classes and "
                "model.label_dropout above 0, or with conditions and model.condition_dropout above 0; use 1, or "
                "sampling.classifier"
            )
        if options["low_resolution"] and not is_upsampler(self._config):
            raise UserError(
                f"sampling.low_resolution={options['low_resolution']!r} is for models that enlarge images "
                "(data.low_resolution)"
            )
        noise, maximum = options["low_resolution_noise"], self._config["diffusion"]["conditioning_noise"]
        if noise > maximum:
            raise UserError(
                f"sampling.low_resolution_noise={noise} must lie in 0 ... {maximum}, the noise that the model was trained "
                "with (diffusion.conditioning_noise)"
            )

    def _advice_on_steps(self) -> str:
        """Advice for an error: settings with which the sampler works."""
        if self._spacing == "log_snr" or self._full_schedule.zero_terminal_snr:
            return "more steps (sampling.steps)"
        return "sampling.spacing=log_snr or more steps (sampling.steps)"

    def _find_warning(self, sampler: sampling.Sampler) -> str | None:
        """The reason why samples will look wrong on these steps, with advice; None if none is known."""
        blur, growth = sampling.find_blur(self.schedule), sampling.find_error_growth(sampler, self.schedule)
        if growth is None:
            return f"{blur}; use {self._advice_on_steps()}" if blur else None
        if self._options["steps"] is None:
            steps = "--config.sampling.steps=250 --config.sampling.spacing=log_snr"
        else:
            steps = "more steps (sampling.steps)" if self._spacing == "log_snr" else "--config.sampling.spacing=log_snr"
        return f"{growth}; use {steps}, --config.sampling.clip=True for data in [-1, 1], or a model that predicts v"

    def _check_steps(self, sampler: sampling.Sampler) -> None:
        """Raises: UserError for steps on which the sampler is known to fail."""
        problem = sampling.find_problem(sampler, self.schedule)
        if problem is None:
            return
        options = self._options
        leaves = f"sampling.sampler={options['sampler']}"
        if options["steps"] is not None:
            leaves += f" with sampling.steps={options['steps']} and spacing {self._spacing}"
        raise UserError(f"{leaves}: {problem}; use {self._advice_on_steps()}, or sampling.sampler=ddim")

    def _load_classifier(self, mesh: Mesh | None) -> _Classifier:
        path = self._options["classifier"]
        try:
            net = pretrained.load(path, ema=self._options["use_ema"])
        except pretrained.PretrainedError as error:
            raise UserError(f"sampling.classifier={path}: {error}") from error
        if not isinstance(net.model, models.Classifier):
            raise UserError(f"sampling.classifier={path} holds no classifier; --mode=train_classifier makes one")
        differences = []
        for name in ("timesteps", "alpha_bar"):
            if not np.array_equal(getattr(net.schedule, name), getattr(self._full_schedule, name)):
                differences.append("another noise schedule")
                break
        classifier_shape, image_shape = (*net.image_size, net.channels), data.example_shape(self._config["data"])
        if classifier_shape != image_shape:
            differences.append(f"images: {classifier_shape} there, {image_shape} here")
        if differences:
            raise UserError(f"sampling.classifier={path} was trained on other x_t ({'; '.join(differences)})")
        assert mesh is not None
        return _Classifier(net.model, jax.device_put(net.params, sharding.replicated(mesh)), net.normalizations)

    def check_classifier_scale(self, normalizations: data.Normalizations) -> None:
        """Raises: UserError for a classifier of data that were scaled by other constants than those of the model."""
        if self._classifier is not None and self._classifier.normalizations.get("x") != normalizations.get("x"):
            raise UserError(
                f"sampling.classifier={self._options['classifier']} was trained on data with other constants of "
                "data.normalization (data.json); train both on the same data"
            )

    def _class_log_prob(self, classifier_params, y) -> Callable:
        assert self._classifier is not None
        apply: Callable[..., Any] = self._classifier.model.apply
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
        options = self._options
        conditional: Callable[..., Any]
        denoise_fn: Callable[..., Any]
        given = {"y": y} if self._model.num_classes else {}
        given |= {} if condition is None else {"condition": self._to_network(condition)}
        conditional = lambda x_t, time, given: self._model.apply({"params": params}, x_t, time, **given)  # noqa: E731
        if self.is_guided:
            denoise_fn = guidance.classifier_free(
                conditional,
                given,
                self._model.nulls_of(given),
                options["guidance_scale"],
                interval=self._interval,
                rescale=options["guidance_rescale"],
            )
        else:
            denoise_fn = lambda x_t, time: conditional(x_t, time, given)  # noqa: E731
        if self._classifier is not None and not self._shifts_mean:
            denoise_fn = guidance.classifier(
                denoise_fn,
                self._class_log_prob(classifier_params, y),
                self._full_schedule,
                options["classifier_scale"],
                prediction=self.parameterization["prediction"],
            )
        return denoise_fn

    def _to_network(self, condition) -> jax.Array:
        """Rows of `conditions` as the network takes them."""
        if not is_upsampler(self._config):
            return condition
        noise_std = self._options["low_resolution_noise"] if self._config["diffusion"]["conditioning_noise"] else None
        shape = (condition.shape[0], *data.example_shape(self._config["data"]))
        return upsampling.condition(to_model_range(condition), shape, noise_std)

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
