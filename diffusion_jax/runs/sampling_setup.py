"""What `config.sampling` makes of a trained network: the sampler and its steps, the classes asked for, and the guidance."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax import data, guidance, models, pretrained, process, sampling, schedules
from diffusion_jax.distributed import sharding
from diffusion_jax.errors import UserError
from diffusion_jax.models import upsampling
from diffusion_jax.runs.artifacts import digest

# Leaves of `config.sampling` whose values are paths, which no name spells out: their digest stands there.
_PATHS = ("classifier", "low_resolution")


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


# Leaves that only some samplers read, and the values at which they change nothing.
_READ_BY: dict[str, tuple[Any, tuple[str, ...]]] = {
    "eta": (0.0, ("ddim",)),
    "order": (2, ("dpm_solver_pp", "unipc", "deis")),
    "variant": ("bh2", ("unipc",)),
    "singlestep": (False, ("dpm_solver_pp",)),
    "sde": (False, ("dpm_solver_pp",)),
    "churn": (0.0, ("heun",)),
}


def ignored(options: Mapping) -> list[str]:
    """Leaves of `config.sampling` that change nothing beside the others, each with what would read it."""
    found = [
        f"sampling.{leaf}={options[leaf]!r} (only of sampling.sampler={', '.join(samplers)})"
        for leaf, (usual, samplers) in _READ_BY.items()
        if options[leaf] != usual and options["sampler"] not in samplers
    ]
    if options["classifier_scale"] != 1 and not options["classifier"]:
        found.append(f"sampling.classifier_scale={options['classifier_scale']!r} (only with sampling.classifier)")
    for leaf in ("guidance_interval", "guidance_rescale"):
        if options[leaf] and options["guidance_scale"] == 1:
            found.append(f"sampling.{leaf}={options[leaf]!r} (only with a sampling.guidance_scale other than 1)")
    return found


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


def spacing_of(options: Mapping, sampler: sampling.Sampler, schedule: schedules.Schedule) -> str:
    """The spacing of `config.sampling`, or the one that suits what is asked for where it names none."""
    if options["spacing"] is not None:
        return options["spacing"]
    return "openai" if isinstance(options["steps"], tuple | list) else sampling.default_spacing(sampler, schedule)


def respaced(schedule: schedules.Schedule, options: Mapping, sampler: sampling.Sampler) -> schedules.Schedule:
    """The schedule that `config.sampling` walks: all of it, or `steps` of it. Raises: ValueError."""
    steps = options["steps"]
    if steps is None:
        return schedule
    if isinstance(steps, bool):
        raise ValueError(f"sampling.steps={steps} must be None or a number of steps")
    if isinstance(steps, str):
        raise ValueError(_string_steps(steps))
    spacing, row = spacing_of(options, sampler, schedule), isinstance(steps, tuple | list)
    if spacing == "given":
        if not row:
            raise ValueError(f"sampling.spacing='given' needs sampling.steps=(t, t, ...), network times, not {steps!r}")
        return schedules.respace(schedule, [float(t) for t in steps])
    if spacing == "openai":
        if not all(type(count) is int for count in (steps if row else (steps,))):
            raise ValueError(
                f"sampling.steps={steps!r} with spacing=openai must be a whole number, or several: (10, 15, 20)"
            )
        return schedules.respace(schedule, ",".join(map(str, steps)) if row else str(steps))
    if row:
        raise ValueError(
            f"sampling.steps={steps!r} are several numbers, which spacing={spacing} does not take; use "
            "sampling.spacing=openai (steps in equal sections of the chain) or given (network times)"
        )
    if spacing == "openai_ddim":
        if type(steps) is not int:
            raise ValueError(f"sampling.steps={steps!r} with spacing=openai_ddim must be a whole number")
        return schedules.respace(schedule, f"ddim{steps}")
    if spacing not in schedules.SPACINGS:
        known = ", ".join([*schedules.SPACINGS, "openai_ddim", "given"])
        raise ValueError(f"sampling.spacing={spacing!r} is unknown; known: {known}")
    return schedules.respace(schedule, steps, spacing)


def _string_steps(steps: str) -> str:
    """What to type instead of OpenAI's strings."""
    counts = steps.removeprefix("ddim")
    spacing = "openai_ddim" if counts != steps else "openai"
    if not all(count.strip().isdecimal() for count in counts.split(",")):
        counts, spacing = "50", "NAME"
    return (
        f"sampling.steps={steps!r} is a string; steps are a number, and how they are spread is sampling.spacing: type "
        f"--config.sampling.steps={counts.replace(' ', '')} --config.sampling.spacing={spacing}"
    )


def _number(value: float) -> str:
    """A number as a file's name has it, short and exact."""
    return f"{value:g}" if float(f"{value:g}") == value else repr(float(value))


def class_captions(labels: np.ndarray, names: Sequence[str]) -> list[str]:
    """Each label with its name, as "1: cats"; the number alone where there is no other name."""
    named = [names[y] if y < len(names) else "" for y in labels.tolist()]
    return [str(y) if name in ("", str(y)) else f"{y}: {name}" for y, name in zip(labels.tolist(), named, strict=True)]


class SamplingSetup:
    """All that a config decides about drawing, checked before anything is compiled.

    schedule: the one that is walked. classes: those asked for, which samples have in turn; None where nothing has a class.
    guide: parameters of the guiding classifier, None without one; an argument of `draw`, for compiled code.
    """

    def __init__(
        self,
        config: Mapping,
        model,
        schedule: schedules.Schedule,
        mesh,
        class_names: Sequence[str] = (),
        load_classifier: bool = True,
    ):
        """class_names: by which `sampling.label` may name classes. load_classifier: False where nothing is drawn, only
        checked; then the classes are, too, only without a classifier. Raises: UserError or ValueError for what does not fit.
        """
        self._class_names = tuple(class_names)
        self._config, self._model, self._full = config, model, schedule
        options = self._options = config["sampling"]
        sampler = sampler_from_config(options, config["diffusion"])
        self._spacing = spacing_of(options, sampler, schedule)
        self.schedule = respaced(schedule, options, sampler)
        self.guide, self._classifier = None, None
        num_classes = model.num_classes
        if options["classifier"] and load_classifier:
            self._load_classifier(options["classifier"], mesh)
            if num_classes not in (0, self._classifier.num_classes):
                raise UserError(
                    f"sampling.classifier={options['classifier']} knows {self._classifier.num_classes} classes, the model "
                    f"{num_classes}"
                )
            num_classes = self._classifier.num_classes
        unknown = options["classifier"] and not load_classifier
        self.classes = None if unknown else self._chosen_classes(num_classes)
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
        self._shifts_mean = bool(options["classifier"]) and options["classifier_form"] == "mean"
        if self._shifts_mean and options["sampler"] != "ddpm":
            raise UserError("sampling.classifier_form='mean' shifts the ancestral mean: use sampling.sampler='ddpm'")
        self._check_steps(sampler)
        blur = sampling.find_blur(self.schedule)
        self.warning = blur and f"{blur}; use {self._other_steps()}"

    @property
    def notes(self) -> list[str]:
        """Lines for a person: what is allowed and will look wrong, and leaves that change nothing."""
        unread = [f"{leaf} changes nothing here" for leaf in ignored(self._options)]
        return [self.warning, *unread] if self.warning else unread

    def _other_steps(self) -> str:
        """What to type where these steps do not do."""
        if self._spacing == "log_snr" or self._full.zero_terminal_snr:
            return "more steps (sampling.steps)"
        return "sampling.spacing=log_snr or more steps (sampling.steps)"

    def _check_steps(self, sampler: sampling.Sampler) -> None:
        """Raises: UserError for steps on which the sampler is known to fail."""
        problem = sampling.find_problem(sampler, self.schedule)
        if problem is None:
            return
        options = self._options
        asked = f"sampling.sampler={options['sampler']}"
        if options["steps"] is not None:
            asked += f" with sampling.steps={options['steps']} and spacing {self._spacing}"
        raise UserError(f"{asked}: {problem}; use {self._other_steps()}, or sampling.sampler=ddim")

    def _load_classifier(self, path: str, mesh) -> None:
        try:
            flags = pretrained.read_flags(self._options["classifier_flags"])
            net = pretrained.load(path, flags, self._options["use_ema"])
        except pretrained.PretrainedError as error:
            raise UserError(f"sampling.classifier={path}: {error}") from error
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
            raise UserError(f"sampling.class={chosen}, but the model has no classes (model.num_classes=0)")
        if isinstance(chosen, str) and chosen not in self._class_names:
            chosen = [part.strip(" '\"") for part in chosen.strip("()[] ,").split(",")]
        chosen = tuple(chosen) if isinstance(chosen, tuple | list) else (chosen,)
        if not chosen:
            raise UserError(self._must_be_classes(num_classes))
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
            raise UserError(
                f"sampling.class={y!r} is no class of this run; "
                + (f"did you mean {' or '.join(near)}?" if near else f"its classes are {self._known_names()}")
            )
        unnamed = "" if names or not isinstance(y, str) else ", as no class names are stored with these weights"
        raise UserError(self._must_be_classes(num_classes) + unnamed)

    def _known_names(self) -> str:
        names = self._class_names
        return ", ".join(names[:20]) + (f" and {len(names) - 20:,} more" if len(names) > 20 else "")

    def _must_be_classes(self, num_classes: int) -> str:
        named = f" ({self._known_names()})" if self._class_names else ""
        return f"sampling.class={self._options['label']} must be classes in 0 ... {num_classes - 1}{named}"

    def _class_in_name(self, y: int) -> str:
        """A class as the name of a file has it: its own name where that is short, plain and of no other class."""
        names = self._class_names
        name = names[y] if y < len(names) else ""
        plain = re.fullmatch("[A-Za-z0-9_-]{1,20}", name) and re.search("[A-Za-z]", name)
        return name if plain and [other.lower() for other in names].count(name.lower()) == 1 else str(y)

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
        """The part of a file's name that tells samples of other recipes apart; a digest stands for what it cannot spell."""
        options = self._options
        parts = [f"{options['sampler']}{self.schedule.num_timesteps}", *self._steps_in_name(), *self._options_in_name()]
        unspelled = {leaf: options[leaf] for leaf in _PATHS if options[leaf]}
        if self._given is not None:
            unspelled["labels"] = self._given.tolist()
        if self._spacing == "given":
            unspelled["steps"] = options["steps"]
        if options["label"] is not None:
            told = [self._class_in_name(y) for y in self.classes]
            # A class's own name may hold a "-".
            told = "class" + ("-" if all(map(str.isdecimal, told)) else "+").join(told)
            if len(told) > 40:
                unspelled["classes"], told = self.classes, f"{len(self.classes)}classes"
            parts.append(told)
        if self.guided:
            parts.append(f"guided{_number(options['guidance_scale'])}")
            if self._interval:
                parts.append("interval" + "-".join(map(_number, self._interval)))
            if options["guidance_rescale"]:
                parts.append(f"rescale{_number(options['guidance_rescale'])}")
        if self._classifier is not None:
            form = "-mean" * self._shifts_mean
            parts.append(f"classifier{_number(options['classifier_scale'])}{form}")
        if options["low_resolution_noise"]:
            parts.append(f"noise{_number(options['low_resolution_noise'])}")
        return "_".join(parts + ([digest(unspelled)[:6]] if unspelled else []))

    def _steps_in_name(self) -> list[str]:
        steps = self._options["steps"]
        if steps is None or self._spacing == "trailing":
            return []
        sections = "-".join(map(str, steps)) if self._spacing == "openai" and not isinstance(steps, int) else ""
        return [self._spacing + sections]

    def _options_in_name(self) -> list[str]:
        """Of the sampler, where they are not the usual ones."""
        options, sampler, parts = self._options, self._options["sampler"], []
        if sampler in ("dpm_solver_pp", "unipc", "deis"):
            parts += [f"order{options['order']}"] * (options["order"] != 2)
            parts += ["fullorder"] * (not options["lower_order_final"])
        if sampler == "unipc" and options["variant"] != "bh2":
            parts.append(options["variant"])
        if sampler == "dpm_solver_pp":
            parts += ["singlestep"] * options["singlestep"] + ["sde"] * options["sde"]
        if sampler == "ddim" and options["eta"]:
            parts.append(f"eta{_number(options['eta'])}")
        if sampler == "heun" and options["churn"]:
            within = _interval("churn_range", options["churn_range"])
            parts.append(f"churn{_number(options['churn'])}")
            parts += ["range" + "-".join(map(_number, within))] if within else []
            parts += [f"noise{_number(options['churn_noise'])}"] * (options["churn_noise"] != 1)
        if options["clip"] == "dynamic":
            parts.append(f"clip-dynamic{_number(options['clip_quantile'])}")
        elif not options["clip"]:
            parts.append("clip-none")
        return parts

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
            apply = models.precompute_time_embeddings(self._model, params, self.schedule.timesteps)

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
