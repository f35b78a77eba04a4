"""Notes at launch about settings with which a run cannot give good results, each with what to type instead."""

from __future__ import annotations

import math

import numpy as np
from ml_collections import ConfigDict

from diffusion_jax import data
from diffusion_jax.config import is_classifier, is_continuous, resolve_clip
from diffusion_jax.console import log
from diffusion_jax.errors import DataError
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
    found, diffusion, num_steps = [], config.diffusion, config.training.num_steps
    warmup_steps, share = config.optimizer.warmup_steps, initial_share(config, num_steps)
    if num_steps > _MAX_TRIAL_STEPS and warmup_steps >= num_steps:
        found.append(
            f"optimizer.warmup_steps={warmup_steps} is not below training.num_steps={num_steps}, so the learning rate "
            f"never reaches {config.optimizer.learning_rate:g}; use --config.optimizer.warmup_steps={num_steps // 20}, or "
            "more steps"
        )
    if num_steps > _MAX_TRIAL_STEPS and share > MAX_INITIAL_SHARE:
        decay, longer = config.ema.decay, ""
        if decay < 1:
            longer = f", or --config.training.num_steps={math.ceil(math.log(MAX_INITIAL_SHARE, decay))}"
        found.append(
            f"at training.num_steps={num_steps} the EMA (ema.decay={decay:g}) still holds {share:.0%} of the random initial "
            f"weights, so samples use the raw weights; use --config.ema.warmup=True{longer}"
        )
    if not is_classifier(config):
        if is_continuous(config) and diffusion.prediction in ("eps", "score") and not resolve_clip(config):
            found.append(
                f"diffusion.prediction={diffusion.prediction} of continuous data (data.levels=None) without a clip amplifies "
                "the errors of the network at the first steps of a sampler; use --config.diffusion.prediction=v"
            )
        alpha_bar = schedule_from_config(diffusion).alpha_bar[-1]
        if alpha_bar > _MAX_TERMINAL_ALPHA_BAR:
            found.append(
                f"diffusion.num_timesteps={diffusion.num_timesteps} with the schedule {diffusion.schedule} ends at alpha_bar="
                f"{alpha_bar:.2g} instead of nearly 0, but samples start from pure noise; use "
                "--config.diffusion.num_timesteps=1000, or --config.diffusion.schedule=cosine"
            )
    if source is not None:
        batch_size, levels = config.training.batch_size, config.data.levels
        if batch_size > len(source):
            found.append(
                f"training.batch_size={batch_size} exceeds the {len(source)} examples of the data, so every batch repeats "
                f"some; use --config.training.batch_size={2 ** int(math.log2(len(source)))}"
            )
        if levels not in (None, 256):
            try:
                data.check_levels(source.read(np.arange(min(_NUM_CHECKED_IMAGES, len(source))))["image"], levels)
            except DataError as error:
                found.append(f"{error} (otherwise --mode=evaluate cannot measure the likelihood)")
    return found
