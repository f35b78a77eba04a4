"""Settings that contradict each other: tables with a row for each contradiction, and `check`, which raises an error."""

from __future__ import annotations

import collections
import fnmatch
import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from diffusion_jax import editing, sampling, schedules
from diffusion_jax.config.table import (
    EDITING,
    SAMPLING,
    flatten,
    is_classifier,
    is_continuous,
    is_upsampler,
    sampler_setting,
)
from diffusion_jax.config.values import FUNCTION_NAME
from diffusion_jax.errors import ConfigError
from diffusion_jax.functions import find_function

# Methods for measurements with noise, and for measurements without noise by task; the first method is the default.
_NOISY = ("mmps",)
_EXACT = {"inpaint": ("repaint", "project"), "colorize": ("project",), "super_resolution": ("project",)}
_READ_BY = {"covariance": ("mmps",), "iterations": ("mmps",)}


class Rule(NamedTuple):
    """A row of a table, for one complete config.

    setting: full name. is_broken: whether the config has the contradiction. problem: a text that follows "setting=value".
    use: a value without the contradiction. instead: a change of another setting that removes it, as "diffusion.path=edm".
    """

    setting: str
    is_broken: Any
    problem: str
    use: Any
    instead: str = ""


def freezes(pattern: str, name: str) -> bool:
    """Returns whether a pattern of `optimizer.frozen` names a parameter, or a module that contains it."""
    return any(fnmatch.fnmatchcase(name, form) for form in (pattern, f"{pattern}/*"))


def _every_config(config: ConfigDict) -> list[Rule]:
    names, channels = config.data, config.data.channels
    problem = f"must have one text for each of data.channels={channels}"
    return [
        Rule("data.channel_names", len(names.channel_names) not in (0, channels), problem, ()),
        Rule("data.channel_units", len(names.channel_units) not in (0, channels), problem, ()),
    ]


def _data(config: Mapping[str, Any]) -> list[Rule]:
    data = config["data"]
    mode, splits = data["normalization"], f"is not one of data.holdout={data['holdout']}, which makes train and test"
    no_limits, is_gray = mode == "limits" and not data["limits"], mode != "auto" and data["levels"] is not None
    gray, needed = "is for float data; gray levels always become [-1, 1]", "needs data.limits, the range of the data"
    return [
        Rule("data.split", data["holdout"] and data["split"] not in ("train", "test"), splits, "train"),
        Rule("data.normalization", no_limits and not is_gray, needed, "auto", "data.limits=LOW,HIGH"),
        Rule("data.normalization", is_gray, gray, "auto", "data.levels=None"),
    ]


def _height_and_width(config: ConfigDict) -> tuple[int, int]:
    """Returns the size of images; (0, 0) for data with another number of spatial axes."""
    size = config.data.image_size
    return (size, size) if isinstance(size, int) else size if len(size) == 2 else (0, 0)


def _has_finite_ends(name: str) -> bool:
    path = find_function(name, "diffusion.path", schedules.PATHS)()
    return bool(np.isfinite(path.log_snr(np.array(path.interval))).all())


def _network(config: ConfigDict) -> list[Rule]:
    low, size, noise = config.data.low_resolution, config.data.image_size, config.diffusion.conditioning_noise
    height, width = _height_and_width(config)
    divides = 0 < low < height and height % low == 0 and width % (height // low) == 0
    problem = f"is not for upsamplers (data.low_resolution={low}), whose condition is the small image"
    model, path = config.model, config.diffusion.path
    is_ncsnpp = model.architecture == "ncsn++"
    joins, joined = is_ncsnpp and not model.resample_blocks, "needs residual blocks that change the resolution"
    is_long = is_ncsnpp and model.time_scale == 1 and path != "edm" and ":" not in f"{path}"
    suited = "has frequencies for network times of about 1"
    shorter = "diffusion.path=edm or --config.model.time_scale=0.001"
    return [
        Rule("model.architecture", joins, joined, "ddpm", "model.resample_blocks=True"),
        Rule("model.architecture", is_long, suited, "ddpm", shorter),
        Rule("diffusion.conditioning_noise", noise and not low, "is for upsamplers (data.low_resolution)", 0),
        Rule("data.low_resolution", low and is_classifier(config), "is for diffusion models, not for classifiers", 0),
        Rule("data.low_resolution", low and not divides, f"must divide the size of images, data.image_size={size}", 0),
        Rule("model.condition_features", low and config.model.condition_features, problem, 0),
        Rule("model.condition_channels", low and config.model.condition_channels, problem, 0),
        Rule("model.condition_dropout", low and config.model.condition_dropout, problem, 0),
    ]


def _train_step(config: ConfigDict) -> list[Rule]:
    diffusion, optimizer = config.diffusion, config.optimizer
    path, loss, draw, weighting = diffusion.path, diffusion.loss, diffusion.draw, diffusion.weighting
    prediction, variance, timesteps = diffusion.prediction, diffusion.variance, diffusion.timestep_sampler
    is_consistency = diffusion.preconditioning == "consistency"
    chain, is_learned, is_edm = not path, variance.startswith("learned"), diffusion.preconditioning != "none"
    classifies, wrong_output = is_edm and is_classifier(config), is_edm and prediction != "x_0"
    uses_std, std = is_edm or weighting == "edm", diffusion.sigma_data
    has_own_draw, has_draw = path and ":" in draw, path and draw != "uniform" and ":" not in draw
    on_own_draw = f"has no effect on {draw}, which draws the levels itself"
    no_effect = f"has no effect with diffusion.timestep_sampler={timesteps!r}"
    has_two_samplers = has_draw and timesteps not in ("uniform", "stratified")
    is_unweighted = loss in ("vlb", "continuous_vlb") or (weighting == "edm" and loss != "simple")
    unknown_std = uses_std and std is None and is_continuous(config) and config.data.normalization in ("none", "limits")
    not_normal = diffusion[sampler_setting(diffusion)] not in ("log_normal", "logit_normal")
    draws_log_snr = timesteps in ("log_normal", "logit_normal", "uniform_log_snr")
    draws_steps = timesteps in ("antithetic", "loss_second_moment")
    decays_early = optimizer.schedule != "constant" and optimizer.decay_steps <= optimizer.warmup_steps
    is_ncsnpp, frozen = config.model.architecture == "ncsn++", optimizer.frozen
    names_them = isinstance(frozen, str) or any(freezes(pattern, "time_fourier/frequencies") for pattern in frozen)
    trains_frequencies = is_ncsnpp and not names_them
    untrained_part = "must name the frequencies of ncsn++, which are not trained"
    exceed = f"must exceed optimizer.warmup_steps={optimizer.warmup_steps}"
    is_simple, is_hybrid, is_adam = chain and loss == "simple", chain and loss == "hybrid", optimizer.name == "adam"
    to_path, to_chain = "diffusion.path=edm", "diffusion.path=None"
    steps = f"needs the steps of a schedule, but diffusion.path={path!r} is continuous"
    normal, scaled = "is for the draws log_normal and logit_normal", "is for preconditioning=edm or weighting=edm"
    x_0 = f"makes the network predict x_0, but diffusion.prediction={prediction!r}"
    unscaled = "does not standardize the data, so their standard deviation is unknown"
    drawn = sampler_setting(diffusion)
    spreads, bounds = path and diffusion[drawn] == "uniform_log_snr", path and loss == "continuous_vlb"
    lacks_ends = (spreads or bounds) and not _has_finite_ends(path)
    ends = f"needs a finite log SNR at both ends of the path, and diffusion.path={path!r} has none"
    mirrors_arrays = config.data.random_flip and (is_continuous(config) or not any(_height_and_width(config)))
    untrained, fixed = "is left untrained by the loss simple", f"needs a learned variance, not {variance!r}"
    return [
        Rule("diffusion.loss", chain and loss == "continuous_vlb", "is for a path", "simple", to_path),
        Rule("diffusion.draw", chain and draw != "uniform", "is for a path", "uniform", to_path),
        Rule("diffusion.timestep_sampler", chain and draws_log_snr, "is for a path", "uniform", to_path),
        Rule("diffusion.log_snr_shift", chain and diffusion.log_snr_shift, "is for a path", 0, to_path),
        Rule("diffusion.loss", path and loss in ("vlb", "hybrid"), steps, "simple", to_chain),
        Rule("diffusion.variance", path and is_learned, steps, "fixed_large", to_chain),
        Rule("diffusion.prediction", path and prediction == "x_prev", steps, "v", to_chain),
        Rule("diffusion.timestep_sampler", path and draws_steps, steps, "uniform", to_chain),
        Rule("diffusion.rescale_timesteps", path and diffusion.rescale_timesteps, steps, False, to_chain),
        Rule("diffusion.timestep_sampler", has_own_draw and timesteps != "uniform", on_own_draw, "uniform"),
        Rule("diffusion.draw", has_two_samplers, no_effect, "uniform", "diffusion.timestep_sampler=uniform"),
        Rule("diffusion.loss", bounds and lacks_ends, ends, "simple", to_path),
        Rule(f"diffusion.{drawn}", spreads and lacks_ends, ends, "uniform", to_path),
        Rule("diffusion.draw_mean", not_normal and diffusion.draw_mean is not None, normal, None),
        Rule("diffusion.draw_std", not_normal and diffusion.draw_std is not None, normal, None),
        Rule("diffusion.preconditioning", is_consistency, "is for published networks, which can only sample", "edm"),
        Rule("diffusion.preconditioning", classifies, "is not for classifiers", "none"),
        Rule("diffusion.preconditioning", wrong_output and not classifies, x_0, "none", "diffusion.prediction=x_0"),
        Rule("diffusion.sigma_data", std is not None and not uses_std, scaled, None),
        Rule("data.normalization", unknown_std, unscaled, "auto", "diffusion.sigma_data=VALUE"),
        Rule(
            "diffusion.weighting",
            weighting not in (None, "none") and is_unweighted,
            f"does not apply to {loss}",
            "none",
        ),
        Rule("diffusion.variance", is_simple and is_learned, untrained, "fixed_large", "diffusion.loss=hybrid"),
        Rule("diffusion.loss", is_hybrid and not is_learned, fixed, "simple", "diffusion.variance=learned_range"),
        Rule("data.random_flip", mirrors_arrays, "mirrors only images of gray levels", False),
        Rule("optimizer.weight_decay", is_adam and optimizer.weight_decay, "is for adamw", 0, "optimizer.name=adamw"),
        Rule("optimizer.frozen", trains_frequencies, untrained_part, ",".join((*frozen, "time_fourier"))),
        Rule("optimizer.decay_steps", decays_early, exceed, config.training.num_steps, "optimizer.schedule=constant"),
    ]


def _training_run(config: ConfigDict) -> list[Rule]:
    training, every, per_call = config.training, config.evaluation.every, config.training.steps_per_call
    takes_input = is_classifier(config) or is_upsampler(config)
    multiple, to_one = f"must be a multiple of training.steps_per_call={per_call}", "training.steps_per_call=1"
    return [
        Rule("training.log_every", training.log_every % per_call, multiple, per_call, to_one),
        Rule("training.sample_every", training.sample_every % per_call, multiple, 0, to_one),
        Rule("training.checkpoint_every", training.checkpoint_every % per_call, multiple, per_call, to_one),
        Rule("evaluation.every", every % per_call, multiple, 0, to_one),
        Rule("evaluation.every", every and takes_input, "is for models that sample from noise alone", 0),
    ]


def _samples(config: ConfigDict) -> list[Rule]:
    options = config.sampling
    lacks_times = options.spacing == "given" and isinstance(options.steps, int)
    times = f"needs network times as the steps, not sampling.steps={options.steps}"
    is_unread = options.low_resolution and not is_upsampler(config)
    is_other = options.sampler != "ddpm" and ":" not in options.sampler
    lacks_mean = options.classifier and options.classifier_form == "mean" and is_other
    shifts = f"shifts the mean in the sampler ddpm, not in {options.sampler}"
    return [
        Rule("sampling.classifier_form", lacks_mean, shifts, "eps", "sampling.sampler=ddpm"),
        Rule("sampling.spacing", lacks_times, times, None, "sampling.steps=TIME,TIME,..."),
        Rule("sampling.low_resolution", is_unread, "is for models that enlarge images (data.low_resolution)", ""),
    ]


def _evaluation(config: ConfigDict) -> list[Rule]:
    options, gray = config.evaluation, "is for data of gray levels, not for data.levels=None"
    is_tested = "calibration" in (options.metrics or ())
    measures_nothing = not (options.likelihood or options.num_samples or is_tested)
    problem = f"and evaluation.num_samples={options.num_samples} leave nothing to measure"
    dequantizes = options.ode and is_continuous(config) and options.ode_dequantization in ("uniform", "variational")
    has_none = options.likelihood and config.diffusion.preconditioning == "consistency"
    model, label, conditions = config.model, config.sampling.label, config.sampling.conditions
    is_given = config.editing.noise or model.num_classes or model.condition_features or model.condition_channels
    given = "tests samples given a measurement, a class or a condition, and the model has no condition"
    own = "has no effect on evaluation.metrics=calibration, which takes the classes and conditions of held-out examples"
    return [
        Rule("evaluation.metrics", is_tested and not is_given, given, None, "editing.noise=VALUE"),
        Rule("sampling.label", is_tested and label is not None, own, None),
        Rule("sampling.conditions", is_tested and conditions, own, '""'),
        Rule("evaluation.likelihood", has_none, "is not defined for a consistency network", False),
        Rule("evaluation.likelihood", measures_nothing, problem, True, "evaluation.num_samples=N"),
        Rule("evaluation.ode_dequantization", dequantizes, gray, None),
    ]


def edit_method(options: ConfigDict) -> str | None:
    """Returns the method of `config.editing`; None for a task that measures nothing, or has no method without noise."""
    methods = _edit_methods(options)
    return options.method if options.method in methods else next(iter(methods), None)


def _edit_methods(options: ConfigDict) -> tuple[str, ...]:
    if options.task not in editing.MEASUREMENTS:
        return ()
    return _NOISY if options.noise else _EXACT.get(options.task, ())


def _edit(config: ConfigDict) -> list[Rule]:
    options, task, is_noisy = config.editing, config.editing.task, bool(config.editing.noise)
    methods, method, measures = _edit_methods(options), edit_method(options), task in editing.MEASUREMENTS
    arguments = inspect.signature(editing.MEASUREMENTS[task]).parameters if measures else ()
    has_effect = {"noise", "method"} if measures else set()
    has_effect |= {"operator" if name == "array" else name for name in arguments}
    has_effect |= {name for name, readers in _READ_BY.items() if method in readers}
    has_effect -= {"share", "blur"} if options.operator else set()
    no_effect = f"has no effect with editing.task={task!r}" + f", editing.method={method!r}" * bool(method)
    is_wrong = methods and options.method not in (None, *methods)
    others, remedy = (_EXACT.get(task, ()), "editing.noise=0") if is_noisy else (_NOISY, "editing.noise=VALUE")
    needed = f"must be the standard deviation of the noise for editing.task={task!r}, which has no exact method"
    allowed = f"is not for editing.task={task!r} with editing.noise={options.noise!r}, but {' or '.join(methods)}"
    names = ("noise", "method", "operator", "share", "blur", *_READ_BY)
    is_unread = {name: name not in has_effect and options[name] != EDITING[name].default for name in names}
    has_two, two = (
        options.example is not None and options.image,
        f"and editing.image={options.image!r} exclude each other",
    )
    has_no_gray = task == "colorize" and is_continuous(config)
    lacks_axes = measures and task != "inpaint" and config.data.image_size == ()
    is_function, is_linear = FUNCTION_NAME.fullmatch(options.operator), task == "linear"
    lacks = f"is not a function, which editing.task={task!r} needs"
    return [
        Rule("editing.example", has_two, two, None, 'editing.image=""'),
        Rule("editing.task", lacks_axes, "needs examples with spatial axes", "inpaint"),
        Rule("editing.task", has_no_gray, "is for images, and data.levels=None is continuous data", "inpaint"),
        Rule("editing.noise", measures and not methods, needed, "VALUE"),
        Rule("editing.method", is_wrong, allowed, method, remedy if options.method in others else ""),
        *(Rule(f"editing.{name}", is_unread[name], no_effect, EDITING[name].default) for name in names),
        Rule("editing.operator", is_linear and not is_function, lacks, "FILE.py:function"),
        Rule("editing.operator", not is_linear and is_function, "is for editing.task=linear", "FILE.npy"),
    ]


def _without_effect(config: ConfigDict) -> list[Rule]:
    options = config.sampling
    rules = [
        Rule(
            f"sampling.{name}",
            ":" not in options.sampler and options.sampler not in readers and options[name] != setting.default,
            f"has no effect on {options.sampler}",
            setting.default,
            f"sampling.sampler={' or '.join(readers)}",
        )
        for name, setting in SAMPLING.items()
        if (readers := sampling.samplers_with(name))
    ]
    is_unused, all_steps = options.spacing and options.steps is None, "has no effect without a number of steps"
    unguided, scale = options.guidance_scale == 1, "sampling.guidance_scale=SCALE"
    no_classifier, no_guidance = "has no effect without a classifier", "has no effect without guidance"
    is_scaled = options.classifier_scale != 1 and not options.classifier
    model = config.model
    is_ncsnpp, own = model.architecture == "ncsn++", "has no effect on ncsn++, which has frequencies of its own"
    return rules + [
        Rule("sampling.spacing", is_unused, all_steps, None, "sampling.steps=N"),
        Rule("model.embedding_cos_first", is_ncsnpp and model.embedding_cos_first, own, False),
        Rule("model.embedding_freq_shift", is_ncsnpp and model.embedding_freq_shift != 1, own, 1.0),
        Rule("sampling.classifier_scale", is_scaled, no_classifier, 1, "sampling.classifier=PATH"),
        Rule("sampling.guidance_interval", options.guidance_interval and unguided, no_guidance, (), scale),
        Rule("sampling.guidance_rescale", options.guidance_rescale and unguided, no_guidance, 0, scale),
    ]


# Tables by the use of their settings. `config.resolve` checks "config"; each other table is checked before its settings are
# used. Broken rules of "without effect" are only logged.
RULES = {
    "config": _every_config,
    "data": _data,
    "network": _network,
    "train step": _train_step,
    "training run": _training_run,
    "samples": _samples,
    "evaluation": _evaluation,
    "edit": _edit,
    "without effect": _without_effect,
}


def find_broken(config: Mapping[str, Any], table: str) -> list[str]:
    """Returns the messages of the broken rules in a table; rules with the same problem share a message.

    config: complete; for the table "data", the group `data` is enough. table: a key of `RULES`.
    """
    values, found = flatten(config), collections.defaultdict(list)
    for rule in RULES[table](config):
        if rule.is_broken:
            found[rule.problem, f" or --config.{rule.instead}" * bool(rule.instead)].append(rule)
    messages = []
    for (problem, instead), rules in found.items():
        settings = ", ".join(f"{rule.setting}={values[rule.setting]!r}" for rule in rules)
        flags = " ".join(f"--config.{rule.setting}={rule.use}" for rule in rules)
        messages.append(f"{settings} {problem}; use {flags}{instead}")
    return messages


def check(config: Mapping[str, Any], table: str) -> None:
    """Raises: ConfigError with all messages of `find_broken`."""
    if messages := find_broken(config, table):
        raise ConfigError(". ".join(messages))
