"""Notes at launch about settings with which a run cannot give good results, each with what to type instead."""

from __future__ import annotations

import math

import numpy as np
from ml_collections import ConfigDict

from diffusion_jax import data
from diffusion_jax.config import is_classifier, is_continuous, resolve_clip
from diffusion_jax.errors import DataError
from diffusion_jax.runs.console import log
from diffusion_jax.training import schedule_from_config
from diffusion_jax.training.ema import MAX_INITIAL_SHARE, initial_share

__all__ = ["log_notes", "notes"]

_MAX_TRIAL_STEPS = 20  # shorter runs only show that the program works
_MAX_TERMINAL_ALPHA_BAR = 0.01
_NUM_CHECKED_IMAGES = 64


def log_notes(config: ConfigDict, source: data.Source | None = None) -> None:
    """Logs the `notes`, one line each."""
    for note in notes(config, source):
        log(f"Note: {note}.")


def notes(config: ConfigDict, source: data.Source | None = None) -> list[str]:
    """The problems of a complete config, and of its training data if they are given; none of them stops the run."""
    found = [_warmup(config), _ema(config), _unclipped_eps(config), _terminal_signal(config)]
    if source is not None:
        found += [_batch_size(config, source), _levels(config, source)]
    return [note for note in found if note]


def _warmup(config: ConfigDict) -> str | None:
    """A warm-up that the run does not finish."""
    options, num_steps = config.optimizer, config.training.num_steps
    if num_steps <= _MAX_TRIAL_STEPS or options.warmup_steps < num_steps:
        return None
    return (
        f"optimizer.warmup_steps={options.warmup_steps} is not below training.num_steps={num_steps}, so the learning rate "
        f"never reaches {options.learning_rate:g}; use --config.optimizer.warmup_steps={num_steps // 20}, or more steps"
    )


def _ema(config: ConfigDict) -> str | None:
    """An EMA that still holds much of the random initial weights at the end."""
    num_steps, decay = config.training.num_steps, config.ema.decay
    share = initial_share(config, num_steps)
    if num_steps <= _MAX_TRIAL_STEPS or share <= MAX_INITIAL_SHARE:
        return None
    longer = f", or --config.training.num_steps={math.ceil(math.log(MAX_INITIAL_SHARE, decay))}" if decay < 1 else ""
    return (
        f"at training.num_steps={num_steps} the EMA (ema.decay={decay:g}) still holds {share:.0%} of the random initial "
        f"weights, so samples use the raw weights; use --config.ema.warmup=True{longer}"
    )


def _unclipped_eps(config: ConfigDict) -> str | None:
    """Continuous data whose x_0 is computed from a predicted noise and not clipped."""
    prediction = config.diffusion.prediction
    if is_classifier(config) or not is_continuous(config) or prediction not in ("eps", "score") or resolve_clip(config):
        return None
    return (
        f"diffusion.prediction={prediction} of continuous data (data.levels=None) without a clip amplifies the errors of the "
        "network at the first steps of a sampler; use --config.diffusion.prediction=v"
    )


def _terminal_signal(config: ConfigDict) -> str | None:
    """A chain that does not end in noise, from which samplers start."""
    options = config.diffusion
    alpha_bar = schedule_from_config(options).alpha_bar[-1]
    if is_classifier(config) or alpha_bar <= _MAX_TERMINAL_ALPHA_BAR:
        return None
    return (
        f"diffusion.num_timesteps={options.num_timesteps} with the schedule {options.schedule} ends at alpha_bar="
        f"{alpha_bar:.2g} instead of nearly 0, but samples start from pure noise; use --config.diffusion.num_timesteps=1000, "
        "or --config.diffusion.schedule=cosine"
    )


def _batch_size(config: ConfigDict, source: data.Source) -> str | None:
    """A batch with some examples twice."""
    batch_size, num_examples = config.training.batch_size, len(source)
    if batch_size <= num_examples:
        return None
    return (
        f"training.batch_size={batch_size} exceeds the {num_examples} examples of the data, so every batch repeats some; use "
        f"--config.training.batch_size={2 ** int(math.log2(num_examples))}"
    )


def _levels(config: ConfigDict, source: data.Source) -> str | None:
    """Images with other gray levels than `data.levels`, which --mode=evaluate refuses."""
    if config.data.levels in (None, 256):
        return None
    images = source.read(np.arange(min(_NUM_CHECKED_IMAGES, len(source))))["image"]
    try:
        data.check_levels(images, config.data.levels)
    except DataError as error:
        return f"{error} (otherwise --mode=evaluate cannot measure the likelihood)"
    return None
