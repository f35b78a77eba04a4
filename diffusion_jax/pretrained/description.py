"""What is known of a set of weights beside its numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from diffusion_jax import schedules, training
from diffusion_jax.models import Classifier, UNet, upsampling

# The leaves of `config.diffusion` that say what weights were trained for, with Ho et al.'s values.
DIFFUSION: dict[str, Any] = {
    "schedule": "linear",
    "num_timesteps": 1000,
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "rescale_timesteps": False,
    "prediction": "eps",
    "variance": "fixed_large",
}


@dataclasses.dataclass(frozen=True)
class Description:
    """Everything about published weights but the weights.

    family: whose they are, in words. model: the network. channels: of an image. image_size: (height, width). schedule: the
    one they were trained on; its timesteps are the network's times. prediction, variance, clip: as the samplers take them.
    low_resolution: of an upsampler, the height of the images that it enlarges, else 0. conditioning_noise: of an upsampler,
    the most noise on these. diffusion: leaves of `config.diffusion`; None where no config says them (a given table of betas).
    """

    family: str
    model: UNet | Classifier
    channels: int
    image_size: tuple[int, int]
    schedule: schedules.Schedule
    prediction: str
    variance: str
    clip: bool | Callable = True
    low_resolution: int = 0
    conditioning_noise: float = 0.0
    diffusion: Mapping[str, Any] | None = None

    @property
    def in_channels(self) -> int:
        """Of the network: an image, and for an upsampler the smaller one and the channel of its noise."""
        return self.channels * (2 if self.low_resolution else 1) + (1 if self.conditioning_noise else 0)

    @property
    def num_classes(self) -> int:
        """How many labels the network knows; 0 for none."""
        return self.model.num_classes


@dataclasses.dataclass(frozen=True)
class Pretrained(Description):
    """Weights and all that is known of them: what `pretrained.load` gives.

    params: the tree for `model.apply({"params": params}, x_t, time)`, float32.
    """

    params: Any = dataclasses.field(default=None, repr=False)

    def denoise_fn(self, x_t, time, y=None, low=None, noise_std=None) -> jax.Array:
        """The network as samplers and losses call it, or with labels y int [B].

        low: for an upsampler, the smaller images [B, h, w, C] in [-1, 1]; noise_std: [B], that of their noise. Under jit its
        weights are constants of the program; a large network is better called as `model.apply`, its params an argument.
        Raises: TypeError for a classifier.
        """
        if isinstance(self.model, Classifier):
            raise TypeError("these weights are a classifier's: use logits(x_t, time)")
        if self.low_resolution:
            if low is None:
                raise TypeError("this model enlarges images: give low=, the small ones")
            x_t = upsampling.condition(x_t, low, noise_std)
        return self.model.apply({"params": self.params}, x_t, time, y)

    def logits(self, x_t, time) -> jax.Array:
        """Of a classifier: [B, num_classes]. Raises: TypeError for a diffusion model."""
        if isinstance(self.model, UNet):
            raise TypeError("these weights are a diffusion model's: use denoise_fn(x_t, time)")
        return self.model.apply({"params": self.params}, x_t, time)


def clip_to(clip: bool | float) -> bool | Callable:
    """A clip of x_0 as samplers take it: True for [-1, 1], False for none, or a number for another range."""
    return clip if isinstance(clip, bool) else partial(jnp.clip, min=-clip, max=clip)


def describe(
    family: str,
    model: UNet | Classifier,
    image_size,
    diffusion: Mapping[str, Any],
    *,
    channels: int = 3,
    clip: bool | Callable = True,
    low_resolution: int = 0,
) -> Description:
    """A Description from leaves of `config.diffusion`, those of `DIFFUSION` where they are not given. Raises: ValueError."""
    leaves = DIFFUSION | dict(diffusion)
    return Description(
        family=family,
        model=model,
        channels=channels,
        image_size=(image_size, image_size) if isinstance(image_size, int) else tuple(image_size),
        schedule=training.schedule_from_config(leaves | {"loss": "simple"}),
        prediction=leaves["prediction"],
        variance=leaves["variance"],
        clip=clip,
        low_resolution=low_resolution,
        diffusion=leaves,
    )
