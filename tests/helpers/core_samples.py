"""Compares a work directory's samples with samples from the core alone."""

import numpy as np

from diffusion_jax import pretrained, schedules, training
from diffusion_jax.images import to_uint8


def core_inputs(config, directory, steps=5, spacing="trailing"):
    """(respaced schedule, full schedule, model, EMA parameters) of a work directory, for sampling with the core alone."""
    built = training.build_program(config)
    params = pretrained.load(directory, network=True).params
    return schedules.respace(built.schedule, steps, spacing), built.schedule, built.model, params


def agree(images, x, distinct=10):
    """Checks that uint8 images equal the float values, except for values halfway between levels."""
    assert abs(images.astype(int) - np.asarray(to_uint8(x)).astype(int)).max() <= 1
    assert len(np.unique(images)) > distinct
