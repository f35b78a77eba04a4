"""What `config.sampling` makes of a trained network: the sampler and its steps, the classes asked for, and the guidance."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax import data, guidance, models, pretrained, process, sampling, schedules
from diffusion_jax.models import upsampling
from diffusion_jax.runs.errors import UserError
from diffusion_jax.runs.parts import digest
from diffusion_jax.training import sharding

# Leaves of `config.sampling` that change what is drawn and that `Recipe.name` does not spell out, and their usual values.
_UNTOLD: dict[str, Any] = {
    "guidance_interval": (),
    "guidance_rescale": 0.0,
    "clip": True,
    "classifier": "",
    "classifier_form": "eps",
    "low_resolution": "",
    "low_resolution_noise": 0.0,
    "lower_order_final": True,
    "variant": "bh2",
    "churn_range": (),
    "churn_noise": 1.0,
}


def _interval(leaf: str, value) -> tuple[float, float] | None:
    """(low, high), or None for (). Raises: UserError."""
    if not value:
        return None
    numbers = isinstance(value, tuple | list) and all(isinstance(v, int | float) for v in value)
    if not numbers or len(value) != 2 or not value[0] <= value[1]:
        raise UserError(f"sampling.{leaf}={value} must be two numbers (low, high), or () for all")
    return tuple(value)


def _final(options: Mapping) -> dict[str, bool]:
    return {"lower_order_final": options["lower_order_final"]}


SAMPLERS: dict[str, Callable[..., sampling.Sampler]] = {
    "ddpm": lambda options, **says: sampling.ddpm(**says),
    "ddim": lambda options, **says: sampling.ddim(options["eta"], **says),
    "euler": lambda options, **says: sampling.euler(**says),
    "euler_ancestral": lambda options, **says: sampling.euler_ancestral(**says),
    "heun": lambda options, **says: sampling.heun(
        churn=options["churn"],
        churn_range=_interval("churn_range", options["churn_range"]) or (0.0, float("inf")),
        churn_noise=options["churn_noise"],
        **says,
    ),
    "dpm_solver_pp": lambda options, **says: sampling.dpm_solver_pp(
        options["order"], sde=options["sde"], singlestep=options["singlestep"], **_final(options), **says
    ),
    "unipc": lambda options, **says: sampling.unipc(
        options["order"], variant=options["variant"], **_final(options), **says
    ),
    "deis": lambda options, **says: sampling.deis(options["order"], **_final(options), **says),
    "pndm": lambda options, **says: sampling.pndm(**says),
    "plms": lambda options, **says: sampling.pndm(runge_kutta=False, **says),
}


def sampler_from_config(options: Mapping, diffusion: Mapping, clip: Callable | None = None, **more) -> sampling.Sampler:
    """The sampler of `config.sampling`, for what `config.diffusion` says the network predicts.

    clip: instead of `sampling.clip`, given that one. Raises: ValueError for values that fit no sampler.
    """
    if options["sampler"] not in SAMPLERS:
        raise ValueError(f"sampling.sampler={options['sampler']!r} is unknown; known: {', '.join(SAMPLERS)}")
    own = options["clip"]
    if own == "dynamic":
        own = process.dynamic_threshold(options["clip_quantile"])
    elif not isinstance(own, bool):
        raise ValueError(f"sampling.clip={own!r} must be True, False or 'dynamic'")
    says = {"prediction": diffusion["prediction"], "variance": diffusion["variance"]}
    return SAMPLERS[options["sampler"]](options, clip=own if clip is None else clip(own), **says, **more)


def respaced(schedule: schedules.Schedule, options: Mapping) -> schedules.Schedule:
    """The schedule that `config.sampling` walks: all of it, or `steps` of it. Raises: ValueError."""
    steps = options["steps"]
    if steps is None:
        return schedule
    if options["spacing"] == "given":
        if not isinstance(steps, tuple | list):
            raise ValueError(f"sampling.spacing='given' needs sampling.steps=(t, t, ...), network times, not {steps!r}")
        return schedules.respace(schedule, [float(t) for t in steps])
    if isinstance(steps, tuple | list):  # the command line reads 10,15,20 as a tuple; sections are what is meant
        steps = ",".join(map(str, steps))
    return schedules.respace(schedule, steps, options["spacing"])


def class_captions(labels: np.ndarray, names: Sequence[str]) -> list[str]:
    """Each label with its name, as "1: cats"; the number alone where there is no other name."""
    named = [names[y] if y < len(names) else "" for y in labels.tolist()]
    return [str(y) if name in ("", str(y)) else f"{y}: {name}" for y, name in zip(labels.tolist(), named, strict=True)]


class Recipe:
    """All that a config decides about drawing, checked before anything is compiled.

    schedule: the one that is walked. classes: those asked for, which samples have in turn; None where nothing has a class.
    guide: parameters of the guiding classifier, None without one; an argument of `draw`, for compiled code.
    """

    def __init__(self, config: Mapping, model, schedule: schedules.Schedule, mesh, class_names: Sequence[str] = ()):
        """class_names: by which `sampling.label` may name classes. Raises: UserError or ValueError for what does not fit."""
        self._class_names = tuple(class_names)
        self._config, self._model, self._full = config, model, schedule
        options = self._options = config["sampling"]
        self.schedule = respaced(schedule, options)
        self.guide, self._classifier = None, None
        num_classes = model.num_classes
        if options["classifier"]:
            self._load_classifier(options["classifier"], mesh)
            if num_classes not in (0, self._classifier.num_classes):
                raise UserError(
                    f"sampling.classifier={options['classifier']} knows {self._classifier.num_classes} classes, the model "
                    f"{num_classes}"
                )
            num_classes = self._classifier.num_classes
        self.classes = self._chosen_classes(num_classes)
        self._given: np.ndarray | None = None
        self.guided = options["guidance_scale"] != 1
        if self.guided and not (model.num_classes and model.label_dropout):
            raise UserError(
                f"sampling.guidance_scale={options['guidance_scale']} needs a model trained with model.num_classes and "
                "model.label_dropout above 0; use 1, or sampling.classifier"
            )
        self._interval = _interval("guidance_interval", options["guidance_interval"])
        for leaf in ("guidance_scale", "classifier_scale"):
            if not math.isfinite(options[leaf]):
                raise UserError(f"sampling.{leaf}={options[leaf]} must be a finite number")
        if not 0 <= options["guidance_rescale"] <= 1:
            raise UserError(f"sampling.guidance_rescale={options['guidance_rescale']} must lie in [0, 1]")
        said, most = options["low_resolution_noise"], config["diffusion"]["conditioning_noise"]
        if not 0 <= said <= most:
            raise UserError(
                f"sampling.low_resolution_noise={said} must lie in 0 ... {most}, the noise that the model was trained with "
                "(diffusion.conditioning_noise)"
            )
        if options["classifier_form"] not in ("eps", "mean"):
            raise UserError(f"sampling.classifier_form={options['classifier_form']!r} must be 'eps' or 'mean'")
        self._shifts_mean = self._classifier is not None and options["classifier_form"] == "mean"
        if self._shifts_mean and options["sampler"] != "ddpm":
            raise UserError("sampling.classifier_form='mean' shifts the ancestral mean: use sampling.sampler='ddpm'")
        self.sampler()  # for its errors
        self.warning = self._warn()

    def _warn(self) -> str | None:
        """What is allowed and will look wrong, in a line."""
        snr = self.schedule.snr[self.schedule.snr > 0]  # from noise alone these samplers step as DDIM does
        octaves = np.abs(np.diff(np.log2(snr))).max(initial=0.0) / 2
        if self._options["sampler"] in ("heun", "pndm", "plms") and octaves > 5:
            return (
                f"sampling.sampler={self._options['sampler']} is not for steps over {octaves:.0f} octaves of noise, and "
                "these have one: use sampling.spacing=karras or log_snr"
            )
        return None

    def _load_classifier(self, path: str, mesh) -> None:
        flags = pretrained.read_flags(self._options["classifier_flags"])
        net = pretrained.load(path, flags, self._options["use_ema"])
        if not isinstance(net.model, models.Classifier):
            raise UserError(f"sampling.classifier={path} holds no classifier; --mode=train_classifier makes one")
        differing = []
        for name in ("timesteps", "alpha_bar"):
            if not np.array_equal(getattr(net.schedule, name), getattr(self._full, name)):
                differing.append("another noise schedule")
                break
        theirs, own = (*net.image_size, net.channels), data.image_shape(self._config["data"])
        if theirs != own:
            differing.append(f"images: {theirs} there, {own} here")
        if differing:
            raise UserError(f"sampling.classifier={path} looks at other x_t ({'; '.join(differing)})")
        self._classifier, self.guide = net.model, jax.device_put(net.params, sharding.replicated(mesh))

    def _chosen_classes(self, num_classes: int) -> tuple[int, ...] | None:
        chosen = self._options["label"]
        if chosen is None:
            return tuple(range(num_classes)) or None
        if not num_classes:
            raise UserError(f"sampling.label={chosen}, but the model has no classes (model.num_classes=0)")
        if isinstance(chosen, str) and chosen not in self._class_names:
            chosen = [part.strip(" '\"") for part in chosen.strip("()[] ,").split(",")]
        chosen = tuple(chosen) if isinstance(chosen, tuple | list) else (chosen,)
        if not chosen:
            raise UserError(f"sampling.label={self._options['label']} must be classes in 0 ... {num_classes - 1}")
        return tuple(self._class_index(y, num_classes) for y in chosen)

    def _class_index(self, y, num_classes: int) -> int:
        """The class of an index or a name. Raises: UserError."""
        names = self._class_names
        if y in names:
            return names.index(y)
        if isinstance(y, str) and y.isdecimal():  # of "3,cats"
            y = int(y)
        if type(y) is int and 0 <= y < num_classes:
            if str(y) in names and names.index(str(y)) != y:
                raise UserError(
                    f"sampling.class={y} is ambiguous: {names[y]!r} is class {y}, and {str(y)!r} is the name of class "
                    f"{names.index(str(y))}; give the name, as in --config.sampling.class=\"'{names[y]}'\""
                )
            return y
        if isinstance(y, str) and names:
            near = difflib.get_close_matches(y, names, n=3)
            known = ", ".join(names[:20]) + (f" and {len(names) - 20:,} more" if len(names) > 20 else "")
            raise UserError(
                f"sampling.class={y!r} is no class of this run; "
                + (f"did you mean {' or '.join(near)}?" if near else f"its classes are {known}")
            )
        unnamed = "" if names or not isinstance(y, str) else ", as no class names are stored with these weights"
        raise UserError(f"sampling.label={self._options['label']} must be classes in 0 ... {num_classes - 1}{unnamed}")

    def captions(self, indices: np.ndarray) -> list[str] | None:
        """Class and name, as "1: cats", of the samples of these numbers; None where they have no class."""
        labels = self.labels(indices)
        return None if labels is None else class_captions(labels, self._class_names)

    def take_labels(self, labels: np.ndarray) -> None:
        """Labels of small images, which what is enlarged from them shares where no class is asked for. Raises: UserError."""
        if self.classes is None or self._options["label"] is not None:
            return
        if labels.dtype.kind not in "iu" or labels.min() < 0 or labels.max() >= len(self.classes):
            raise UserError(f"the small images' labels (arr_1) must be classes in 0 ... {len(self.classes) - 1}")
        self._given = labels.astype(np.int32)

    def labels(self, indices: np.ndarray) -> np.ndarray | None:
        """int32, the labels of the samples of these numbers; None where they have none."""
        if self._given is not None:
            return self._given[indices % len(self._given)]
        return None if self.classes is None else np.array(self.classes, np.int32)[indices % len(self.classes)]

    @property
    def name(self) -> str:
        """The part of a file's name that tells samples of other recipes apart."""
        options = self._options
        name = f"{options['sampler']}{self.schedule.num_timesteps}"
        if options["steps"] is not None and options["spacing"] != "trailing":
            name += f"_{options['spacing']}"
        untold = {leaf: options[leaf] for leaf, usual in _UNTOLD.items() if options[leaf] not in (usual, [])}
        if not isinstance(options["steps"], int | None):
            untold["steps"] = options["steps"]
        if options["clip"] == "dynamic":
            untold["clip_quantile"] = options["clip_quantile"]
        if self._given is not None:
            untold["labels"] = self._given.tolist()
        if options["sampler"] in ("dpm_solver_pp", "unipc", "deis") and options["order"] != 2:
            name += f"_order{options['order']}"
        if options["sampler"] == "dpm_solver_pp":
            name += "_singlestep" * options["singlestep"] + "_sde" * options["sde"]
        if options["sampler"] == "ddim" and options["eta"]:
            name += f"_eta{options['eta']:g}"
        if options["sampler"] == "heun" and options["churn"]:
            name += f"_churn{options['churn']:g}"
        if options["label"] is not None:
            name += "_class" + "-".join(map(str, self.classes))[:40]
        if self.guided:
            name += f"_guided{options['guidance_scale']:g}"
        if self._classifier is not None:
            name += f"_classifier{options['classifier_scale']:g}"
        return f"{name}_{digest(untold)[:6]}" if untold else name

    def sampler(self, guide=None, y=None, clip: Callable | None = None) -> sampling.Sampler:
        """The sampler; guide, y: as `network`, where the classifier shifts its mean. clip: as `sampler_from_config`."""
        more = {}
        if self._shifts_mean and guide is not None:
            shift = guidance.log_prob_gradient(self._log_prob(guide, y), self._options["classifier_scale"])
            more = {"mean_shift": shift}
        return sampler_from_config(self._options, self._config["diffusion"], clip, **more)

    @property
    def stochastic(self) -> bool:
        """Whether two draws from one x_T differ."""
        options = self._options
        return options["sampler"] in ("ddpm", "euler_ancestral") or any(
            options["sampler"] == name and options[leaf]
            for name, leaf in (("ddim", "eta"), ("dpm_solver_pp", "sde"), ("heun", "churn"))
        )

    @property
    def _between_steps(self) -> bool:
        """Whether the sampler also calls the network at times between those of the steps."""
        options = self._options
        return options["sampler"] == "pndm" or (options["sampler"] == "heun" and options["churn"] > 0)

    @property
    def says(self) -> dict[str, str]:
        """What the network's output stands for, as samplers take it."""
        return {key: self._config["diffusion"][key] for key in ("prediction", "variance")}

    def _log_prob(self, guide, y) -> Callable:
        return guidance.class_log_prob(lambda x, time: self._classifier.apply({"params": guide}, x, time), y)

    def network(self, params, guide, y, low=None) -> Callable:
        """The guided denoise_fn(x_t, time), pure. y: int32 [B] or None; low: [B, h, w, C], for an upsampler."""
        options, diffusion = self._options, self._config["diffusion"]
        if self._between_steps:
            apply = lambda x_t, time, y: self._model.apply({"params": params}, x_t, time, y)  # noqa: E731
        else:
            apply = models.tabulate(self._model, params, self.schedule.timesteps)

        def conditional(x_t, time, y):
            if low is not None:
                times = x_t.shape[0] // low.shape[0]  # guidance doubles the batch
                noise = None
                if diffusion["conditioning_noise"]:
                    noise = jnp.full(x_t.shape[:1], options["low_resolution_noise"])
                x_t = upsampling.condition(x_t, jnp.tile(low, (times, 1, 1, 1)), noise)
            return apply(x_t, time, y)

        if self.guided:
            denoise_fn = guidance.classifier_free(
                conditional,
                y,
                self._model.null_label,
                options["guidance_scale"],
                interval=self._interval,
                rescale=options["guidance_rescale"],
            )
        else:
            own = y if self._model.num_classes else None
            denoise_fn = lambda x_t, time: conditional(x_t, time, own)  # noqa: E731
        if self._classifier is not None and not self._shifts_mean:
            denoise_fn = guidance.classifier(
                denoise_fn,
                self._log_prob(guide, y),
                self._full,
                options["classifier_scale"],
                prediction=diffusion["prediction"],
            )
        return denoise_fn

    def draw(
        self,
        params,
        guide,
        key,
        shape: tuple[int, ...],
        y=None,
        low=None,
        *,
        constrain: Callable = lambda x: x,
        **options: Any,
    ):
        """Images [B, H, W, C] in [-1, 1] from noise, or what `sampling.sample` gives with `options`; pure.

        shape: (B, H, W, C). y, low: as `network`. constrain: applied to x_T, to place it on a mesh.
        """
        key_noise, key_steps = jax.random.split(key)
        x_T = constrain(jax.random.normal(key_noise, shape))
        denoise_fn, sampler = self.network(params, guide, y, low), self.sampler(guide, y)
        return sampling.sample(key_steps, self.schedule, denoise_fn, x_T, sampler, **options)
