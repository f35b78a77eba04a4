"""Configs for runs that take seconds."""

import numpy as np
from ml_collections import ConfigDict

from diffusion_jax.config import default_classifier, experiment, override

TINY_CLASSIFIER = {"channels": 8, "channel_multipliers": (1, 2), "num_res_blocks": 1, "attention_levels": ()}
TINY_CLASSIFIER |= {"num_groups": 4, "head_channels": 4, "num_classes": 3}
TINY_CLASSIFIER |= {"resample_blocks": True, "scale_shift_norm": True, "initializer": "openai"}
T = 20
CONDITIONAL = {"diffusion.num_timesteps": T, "model.num_classes": 10, "model.label_dropout": 0.1}
DRAWN = {"sampling.num_samples": 6, "sampling.batch_size": 4, "sampling.steps": 5, "sampling.trajectory": 0}

FEW_SAMPLES = {
    "sampling.steps": 2,
    "sampling.sampler": "ddim",
    "sampling.batch_size": 8,
    "evaluation.num_samples": 20,
    "evaluation.likelihood": False,
}
FEW_DRAWN = FEW_SAMPLES | {"sampling.num_samples": 20}


def digits_config() -> ConfigDict:
    return experiment("digits")


def small_run(config, **overrides):
    """The config with four steps, few samples and no sample metrics."""
    config.training.update(batch_size=8, num_steps=4, log_every=2, sample_every=0, checkpoint_every=2)
    config.sampling.update(preview_samples=2, preview_steps=2, num_samples=3, batch_size=2, steps=2, trajectory=0)
    config.optimizer.warmup_steps = 0
    config.evaluation.num_samples = 0
    config.update_from_flattened_dict(overrides)
    return config


def convolutions_config(**overrides):
    """The digits with two convolutions, which compile in a third of the time: for tests of runs, not of networks."""
    return small_run(override(experiment("digits"), {"model.kind": "helpers.own_networks:linen"}), **overrides)


def tiny_config(**overrides):
    """The digits with a network of one resolution, which compiles in half the time of two."""
    config = experiment("digits")
    config.model.update(channels=8, channel_multipliers=(1,), num_res_blocks=1, num_groups=4)
    return small_run(config, **overrides)


def a_batch(config, key=0, batch_size=None):
    rng = np.random.default_rng(key)
    shape = (batch_size or config.training.batch_size, 8, 8, 1)
    return {"image": rng.integers(0, 256, shape, dtype=np.uint8), "label": np.zeros(shape[0], np.int32)}


def classifier_config(**overrides):
    config = tiny_config()
    config.model = default_classifier().model
    config.model.update(TINY_CLASSIFIER | {"num_classes": 10})
    config.diffusion.loss = "classify"
    config.update_from_flattened_dict(overrides)
    return config


def upsampler_config(**overrides):
    return tiny_config(**{"data.low_resolution": 4, **overrides})


def conditional(**overrides):
    return convolutions_config(**{**CONDITIONAL, **DRAWN, **overrides})
