"""The description of pretrained weights: the network, the schedule, and everything else that is needed to use them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax import guidance, labels, sampling, schedules, training
from diffusion_jax.models import Classifier, UNet, apply_network, upsampling

__all__ = ["DIFFUSION_DEFAULTS", "Description", "Pretrained", "make_clip", "make_description"]

# The leaves of `config.diffusion` that describe trained weights, with Ho et al.'s values.
DIFFUSION_DEFAULTS: dict[str, Any] = {
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
    """The description of pretrained weights: all of `Pretrained` except the parameters.

    family: a text that names the source. model: the network. channels: of an image. image_size: (height, width). schedule:
    the one of training; its timesteps are the network times. prediction, variance, clip: as the samplers take them.
    low_resolution: height of the small images of a super-resolution network, else 0. conditioning_noise: the largest
    standard deviation of the noise on these. diffusion: leaves of `config.diffusion`; None if the schedule is a table of
    betas, which no leaves describe.
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
        """Input channels of the network: an image, and for super-resolution the small image and the channel of its noise."""
        return self.channels * (2 if self.low_resolution else 1) + (1 if self.conditioning_noise else 0)

    @property
    def num_classes(self) -> int:
        """The number of classes; 0 for an unconditional network."""
        return self.model.num_classes


@dataclasses.dataclass(frozen=True)
class Pretrained(Description):
    """Pretrained weights with their description, as returned by `pretrained.load`.

    params: the tree for `model.apply({"params": params}, x_t, time)`, float32.
    """

    params: Any = dataclasses.field(default=None, repr=False)

    def denoise_fn(self, x_t, time, y=None, low=None, noise_std=None) -> jax.Array:
        """The output [B, H, W, channels or 2 channels] of the network, as samplers and losses call it.

        y: labels int [B] of a conditional network. low: the small images [B, h, w, C] in [-1, 1] of a super-resolution
        network; noise_std: [B], that of their noise. Under jit the parameters are constants of the program; for a large
        network use `model.apply` with the parameters as an argument. Raises: TypeError for a classifier.
        """
        if isinstance(self.model, Classifier):
            raise TypeError("these weights are a classifier; use logits(x_t, time)")
        if self.low_resolution:
            if low is None:
                raise TypeError("this is a super-resolution network: give low=, the small images")
            x_t = upsampling.condition(x_t, low, noise_std)
        return apply_network(self.model, self.params, x_t, time, y)

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
        """Images float32 [N, H, W, C] in [-1, 1] (beyond it if nothing clips x_0); `images.to_uint8` converts them.

        The first call compiles one program, with the parameters as an argument. Later calls with the same sampler, number of
        images and steps reuse it for every key, every labels and every guidance scale other than 1.

        Args:
          num_images: N, sampled in one batch.
          y: a label for all images or int [N], for a conditional network.
          sampler: the ancestral `sampling.ddpm` by default. Its prediction is set to the network's, and so is its variance if
            the network's is learned; its clip does not change.
          steps, spacing: as `schedules.respace`; by default the whole schedule, and for a number of steps the spacing that
            suits the sampler.
          guidance_scale: of classifier-free guidance; 1 for none.
          low, noise_std: the images to enlarge [N, h, w, C] in [-1, 1] and the standard deviation [N] of their noise, for a
            super-resolution network.
        Raises: ValueError for labels, guidance or small images that do not fit the network, or steps for which the sampler is
          known to fail; TypeError for a classifier.
        """
        if isinstance(self.model, Classifier):
            raise TypeError("these weights are a classifier; use logits(x_t, time)")
        if not isinstance(num_images, int | np.integer) or num_images < 1:
            raise ValueError(f"num_images must be a whole number of at least 1, got {num_images}")
        if sampler is not None and not isinstance(sampler, sampling.Sampler):
            raise ValueError(f"sampler must be a sampler such as sampling.ddim(), got {sampler!r}")
        if steps is None and spacing is not None:
            raise ValueError(f"spacing={spacing!r} needs a number of steps; give steps, or omit spacing")
        if guidance_scale != 1 and self.model.null_label is None:
            raise ValueError(f"guidance_scale={guidance_scale} needs a network trained with label_dropout; use 1")
        if (low is not None) != bool(self.low_resolution):
            raise ValueError("low= is required by super-resolution networks and allowed for no other")
        if noise_std is not None and not self.conditioning_noise:
            raise ValueError("noise_std= needs a super-resolution network that was trained with conditioning_noise")
        sampler = self._configure_sampler(sampler)
        schedule = self.schedule
        if steps is not None:
            if isinstance(steps, np.integer):
                steps = int(steps)
            if spacing is None and isinstance(steps, int):
                spacing = sampling.default_spacing(sampler, schedule)
            schedule = schedules.respace(schedule, steps, spacing)
        problem = sampling.find_problem(sampler, schedule)
        if problem:
            raise ValueError(f"{sampler}: {problem}; use spacing='log_snr', more steps, or sampling.ddim()")
        return _sample(
            self.params,
            key,
            schedule,
            self._check_labels(y, num_images),
            jnp.float32(guidance_scale),
            low,
            noise_std,
            model=self.model,
            sampler=sampler,
            shape=(int(num_images), *self.image_size, self.channels),
            use_guidance=guidance_scale != 1,
        )

    def _configure_sampler(self, sampler: sampling.Sampler | None) -> sampling.Sampler:
        """The sampler with the network's prediction, and its variance if that is learned."""
        if sampler is None:
            return sampling.ddpm(self.variance, prediction=self.prediction, clip=self.clip)
        options = dataclasses.fields(sampler) if dataclasses.is_dataclass(sampler) else ()
        fields = {field.name for field in options if field.init}
        changes: dict[str, Any] = {"prediction": self.prediction}
        if self.variance.startswith("learned"):
            changes["variance"] = self.variance
        inner = getattr(sampler, "sampler", None)
        if isinstance(inner, sampling.Sampler):  # a sampler that wraps another
            changes["sampler"] = self._configure_sampler(inner)
        sampler = _replace(sampler, {name: value for name, value in changes.items() if name in fields})
        if sampler.prediction != self.prediction:
            raise ValueError(
                f"{sampler} needs the prediction {sampler.prediction!r}, and this network predicts {self.prediction!r}"
            )
        return sampler

    def _check_labels(self, y, num_images: int) -> jax.Array | None:
        """y as int32 [N]; None for an unconditional network. Raises: ValueError."""
        if not self.num_classes:
            if y is not None:
                raise ValueError(f"this network has no classes, got y={y}; omit y")
            return None
        if y is None:
            raise ValueError(f"this network has {self.num_classes} classes: give y, one label or {num_images}")
        if np.shape(y) not in ((), (num_images,)):
            raise ValueError(f"y must be one label or {num_images}, one for each image; got shape {np.shape(y)}")
        null_label = self.model.null_label is not None
        y = labels.in_range(np.asarray(y), self.num_classes + null_label, null_label)
        return jnp.broadcast_to(y, (num_images,)).astype(jnp.int32)

    def logits(self, x_t, time) -> jax.Array:
        """The logits [B, num_classes] of a classifier. Raises: TypeError for a diffusion model."""
        if isinstance(self.model, UNet):
            raise TypeError("these weights are a diffusion model; use denoise_fn(x_t, time)")
        return apply_network(self.model, self.params, x_t, time)


def _replace(sampler, changes: Mapping[str, Any]) -> sampling.Sampler:
    return dataclasses.replace(sampler, **changes)


@partial(jax.jit, static_argnames=("model", "sampler", "shape", "use_guidance"))
def _sample(params, key, schedule, y, guidance_scale, low, noise_std, *, model, sampler, shape, use_guidance):
    """The program of `Pretrained.sample`. It depends on its arguments only, so that networks of one model share it."""
    key_noise, key_steps = jax.random.split(key)

    def network(x_t, time, y=None):
        if low is not None:
            copies = x_t.shape[0] // low.shape[0]  # guidance doubles the batch
            noise = None if noise_std is None else jnp.tile(jnp.broadcast_to(noise_std, low.shape[:1]), copies)
            x_t = upsampling.condition(x_t, jnp.tile(low, (copies, 1, 1, 1)), noise)
        return apply_network(model, params, x_t, time, y)

    denoise_fn = lambda x_t, time: network(x_t, time, y)  # noqa: E731
    if use_guidance:
        denoise_fn = guidance.classifier_free(network, y, model.null_label, guidance_scale)
    x_T = jax.random.normal(key_noise, shape, jnp.float32)
    return sampling.sample(key_steps, schedule, denoise_fn, x_T, sampler)


def make_clip(clip: bool | float) -> bool | Callable:
    """A clip of x_0 as samplers take it: True for [-1, 1], False for none, or a number for another range."""
    return clip if isinstance(clip, bool) else partial(jnp.clip, min=-clip, max=clip)


def make_description(
    family: str,
    model: UNet | Classifier,
    image_size,
    diffusion: Mapping[str, Any],
    *,
    channels: int = 3,
    clip: bool | Callable = True,
    low_resolution: int = 0,
) -> Description:
    """A Description from leaves of `config.diffusion`, by default those of `DIFFUSION_DEFAULTS`.

    Raises: ValueError for values that `training.schedule_from_config` does not allow; `pretrained.load` turns it into a
    PretrainedError.
    """
    leaves = DIFFUSION_DEFAULTS | dict(diffusion)
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
