"""What is known of a set of weights beside its numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax import guidance, labels, sampling, schedules, training
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

    def sample(
        self,
        key,
        num_images: int = 1,
        *,
        y=None,
        sampler: sampling.Sampler | None = None,
        steps=None,
        spacing: str | None = None,
        guidance_scale: float = 1.0,
        low=None,
        noise_std=None,
    ) -> jax.Array:
        """Images float32 [N, H, W, C] in [-1, 1] (wider where nothing clips x_0); `(x + 1) * 127.5` rounds to uint8.

        The first call compiles one program, with the weights as an argument. Later calls with the same sampler and numbers of
        images and steps use it again, whatever the key and labels, and whatever the guidance scale but 1.

        Args:
          num_images: N, drawn in one batch.
          y: of a conditional network, a label for all images or int [N].
          sampler: the ancestral `sampling.ddpm` unless given. Its prediction is set to the network's, and its variance where
            the network's is learned; its clip stays what it is.
          steps, spacing: as `schedules.respace`; all of the schedule, and for a number the spacing that suits the sampler,
            unless given.
          guidance_scale: of classifier-free guidance; 1 for none.
          low, noise_std: of an upsampler, the images to enlarge [N, h, w, C] in [-1, 1], and [N], that of their noise.
        Raises: ValueError for labels, guidance or small images that do not fit the network, or steps on which the sampler is
          known to fail; TypeError for a classifier.
        """
        if isinstance(self.model, Classifier):
            raise TypeError("these weights are a classifier's: use logits(x_t, time)")
        if not isinstance(num_images, int | np.integer) or num_images < 1:
            raise ValueError(f"num_images must be a whole number of at least 1, got {num_images}")
        if sampler is not None and not isinstance(sampler, sampling.Sampler):
            raise ValueError(f"sampler must be a sampler such as sampling.ddim(), got {sampler!r}")
        if steps is None and spacing is not None:
            raise ValueError(f"spacing={spacing!r} is for a number of steps; give steps, or leave it out")
        if guidance_scale != 1 and self.model.null_label is None:
            raise ValueError(f"guidance_scale={guidance_scale} needs a network trained with label_dropout; use 1")
        if (low is not None) != bool(self.low_resolution):
            raise ValueError("low= is needed by networks that enlarge images, and by no other")
        if noise_std is not None and not self.conditioning_noise:
            raise ValueError("noise_std= is for networks that enlarge images and were trained with conditioning_noise")
        sampler = self._fitted(sampler)
        schedule = self.schedule
        if steps is not None:
            if spacing is None and isinstance(steps, int | np.integer):
                spacing = sampling.default_spacing(sampler, schedule)
            schedule = schedules.respace(schedule, steps, spacing)
        problem = sampling.find_problem(sampler, schedule)
        if problem:
            raise ValueError(f"{sampler}: {problem}; use spacing='log_snr', more steps, or sampling.ddim()")
        return _draw(
            self.params,
            key,
            schedule,
            self._labels(y, num_images),
            jnp.float32(guidance_scale),
            low,
            noise_std,
            model=self.model,
            sampler=sampler,
            shape=(int(num_images), *self.image_size, self.channels),
            guided=guidance_scale != 1,
        )

    def _fitted(self, sampler: sampling.Sampler | None) -> sampling.Sampler:
        """The sampler with what the network's output stands for."""
        if sampler is None:
            return sampling.ddpm(self.variance, prediction=self.prediction, clip=self.clip)
        fields = {field.name for field in dataclasses.fields(sampler)} if dataclasses.is_dataclass(sampler) else set()
        inner = getattr(sampler, "sampler", None)
        if "sampler" in fields and isinstance(inner, sampling.Sampler):  # one that wraps another
            sampler = dataclasses.replace(sampler, sampler=self._fitted(inner))
        facts = {"prediction": self.prediction}
        if self.variance.startswith("learned"):
            facts["variance"] = self.variance
        sampler = dataclasses.replace(sampler, **{name: fact for name, fact in facts.items() if name in fields})
        if sampler.prediction != self.prediction:
            raise ValueError(
                f"{sampler} takes the prediction {sampler.prediction!r}, and this network gives {self.prediction!r}"
            )
        return sampler

    def _labels(self, y, num_images: int):
        """y as int32 [N]; None for an unconditional network. Raises: ValueError."""
        if not self.num_classes:
            if y is not None:
                raise ValueError(f"this network has no classes, got y={y}; leave y out")
            return None
        if y is None:
            raise ValueError(f"this network has {self.num_classes} classes: give y, a label or {num_images} of them")
        if np.shape(y) not in ((), (num_images,)):
            raise ValueError(f"y must be one label or {num_images}, one for each image; got shape {np.shape(y)}")
        null_label = self.model.null_label is not None
        y = labels.in_range(y, self.num_classes + null_label, null_label)
        return jnp.broadcast_to(y, (num_images,)).astype(jnp.int32)

    def logits(self, x_t, time) -> jax.Array:
        """Of a classifier: [B, num_classes]. Raises: TypeError for a diffusion model."""
        if isinstance(self.model, UNet):
            raise TypeError("these weights are a diffusion model's: use denoise_fn(x_t, time)")
        return self.model.apply({"params": self.params}, x_t, time)


@partial(jax.jit, static_argnames=("model", "sampler", "shape", "guided"))
def _draw(params, key, schedule, y, guidance_scale, low, noise_std, *, model, sampler, shape, guided):
    """The program of `Pretrained.sample`, shared by networks of one model; what it computes is in its arguments alone."""
    key_noise, key_steps = jax.random.split(key)

    def network(x_t, time, y=None):
        if low is not None:
            copies = x_t.shape[0] // low.shape[0]  # guidance doubles the batch
            noise = None if noise_std is None else jnp.tile(jnp.broadcast_to(noise_std, low.shape[:1]), copies)
            x_t = upsampling.condition(x_t, jnp.tile(low, (copies, 1, 1, 1)), noise)
        return model.apply({"params": params}, x_t, time, y)

    denoise_fn = lambda x_t, time: network(x_t, time, y)  # noqa: E731
    if guided:
        denoise_fn = guidance.classifier_free(network, y, model.null_label, guidance_scale)
    x_T = jax.random.normal(key_noise, shape, jnp.float32)
    return sampling.sample(key_steps, schedule, denoise_fn, x_T, sampler)


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
