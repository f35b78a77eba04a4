"""A trained network, its schedule, and everything else that is needed to use it."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax import guidance, labels, sampling, schedules, training
from diffusion_jax.data import Normalization, Normalizations, to_data_units, to_model_units
from diffusion_jax.models import Classifier, Conditional, apply_network, fields_of, upsampling
from diffusion_jax.pretrained import parameters
from diffusion_jax.training.state import Network

__all__ = [
    "DIFFUSION_DEFAULTS",
    "Pretrained",
    "format_normalization",
    "format_summary",
    "make_clip",
    "make_description",
]

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
class Pretrained:
    """A trained network with its description, as `pretrained.load` returns it.

    family: a text that names the source. model: the network. channels: of an example. image_size: the size of each of its
    0 to 3 spatial axes, (height, width) for images. schedule: the one of training; its timesteps are the network times.
    prediction, variance, clip: as the samplers take them. params: the tree for `model.apply({"params": params}, x_t, time)`,
    float32; None from `pretrained.describe`. low_resolution: height of the small images of a super-resolution network, else
    0. conditioning_noise: the largest standard deviation of the noise on these. diffusion: leaves of `config.diffusion`; None
    if the schedule is a table of betas, which no leaves describe. levels: gray levels of the data; None for continuous data.
    normalizations: the `data.Normalization` of "x", continuous data, and of "condition", from their units to the network's;
    an array without one has the network's units. limits: (low, high) if that of "x" maps them to [-1, 1].
    """

    family: str
    model: Network = field(repr=False)
    channels: int
    image_size: tuple[int, ...]
    schedule: schedules.Schedule
    prediction: str
    variance: str
    clip: bool | Callable = True
    params: Any = field(default=None, repr=False)
    low_resolution: int = 0
    conditioning_noise: float = 0.0
    diffusion: Mapping[str, Any] | None = field(default=None, repr=False)
    levels: int | None = 256
    normalizations: Normalizations = field(default_factory=dict, repr=False)
    limits: tuple[float, ...] = ()

    @property
    def example_shape(self) -> tuple[int, ...]:
        """(*spatial, C) of an example."""
        return (*self.image_size, self.channels)

    @property
    def is_images(self) -> bool:
        """Whether the examples are images of gray levels."""
        return self.levels is not None and len(self.image_size) == 2

    @property
    def condition_shape(self) -> tuple[int, ...] | None:
        """(D,) or (*spatial, K) of an example's condition; None without conditions, and for super-resolution."""
        if not isinstance(self.model, Conditional) or self.low_resolution:
            return None
        return self.model.condition_shape(self.image_size)

    @property
    def num_classes(self) -> int:
        """The number of classes; 0 for an unconditional network."""
        return self.model.num_classes

    def denoise_fn(self, x_t, time, y=None, low=None, noise_std=None, condition=None) -> jax.Array:
        """The output [B, *spatial, channels or 2 channels] of the network, as samplers and losses call it.

        y: labels int [B] of a network with classes. low: the small images [B, h, w, C] in [-1, 1] of a super-resolution
        network; noise_std: [B], that of their noise. condition: float [B, D] or [B, *spatial, K] of a network with
        conditions, in the network's units, as x_t: `normalizations["condition"].apply` converts the data's. Under jit the
        parameters are constants of the program; for a large network use `model.apply` with the parameters as an argument.
        Raises: TypeError for a classifier.
        """
        if isinstance(self.model, Classifier):
            raise TypeError("these weights are a classifier; use logits(x_t, time)")
        if self.low_resolution:
            if low is None or condition is not None:
                raise TypeError("this is a super-resolution network: give low=, the small images, and no condition")
            condition = upsampling.condition(low, x_t.shape, noise_std)
        options = {} if condition is None else {"condition": condition}
        return apply_network(self.model, self.params, x_t, time, y, **options)

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
        condition=None,
    ) -> jax.Array | np.ndarray:
        """Examples [N, *spatial, C] float32: images of gray levels in [-1, 1], continuous data in their units.

        An offset of the data of more than 1000 times its scale makes it a float64 NumPy array. The first call compiles one
        program, which later calls with the same sampler, number of examples and steps reuse for every key, labels, conditions
        and guidance scale other than 1.

        Args:
          num_images: N, the number of examples, sampled in one batch.
          y: a label for all examples or int [N], for a network with classes.
          sampler: the ancestral `sampling.ddpm` by default. Its prediction is set to the network's, and so is its variance if
            the network's is learned. Its clip does not change, except that for continuous data True becomes the network's.
          steps, spacing: as `schedules.respace`; by default the whole schedule, and for a number of steps the spacing that
            suits the sampler.
          guidance_scale: of classifier-free guidance, which drops the labels and the conditions for which the network has a
            null (label_dropout, condition_dropout); 1 for none.
          low, noise_std: the images to enlarge [N, h, w, C] in [-1, 1] and the standard deviation [N] of their noise, for a
            super-resolution network.
          condition: for a network with conditions one for all examples, [D] or [*spatial, K], or one for each, with the
            axis N in front, in the units of the data. With condition_dropout, None or a row of NaN for none.
        Raises: ValueError for labels, conditions, guidance or small images that do not fit the network, or steps for which
          the sampler is known to fail; TypeError for a classifier.
        """
        if not isinstance(self.model, Conditional):
            raise TypeError("these weights are a classifier; use logits(x_t, time)")
        if sampler is not None and not isinstance(sampler, sampling.Sampler):
            raise ValueError(f"sampler must be a sampler such as sampling.ddim(), got {sampler!r}")
        if steps is None and spacing is not None:
            raise ValueError(f"spacing={spacing!r} needs a number of steps; give steps, or omit spacing")
        if guidance_scale != 1 and self.model.null_label is None:
            if self.model.null_condition is None:
                raise ValueError(
                    f"guidance_scale={guidance_scale} needs a network trained with label_dropout or condition_dropout; use 1"
                )
            if condition is None:
                raise ValueError(f"guidance_scale={guidance_scale} needs a condition; give condition, or use 1")
        if (low is not None) != bool(self.low_resolution):
            raise ValueError("low= is required by super-resolution networks and allowed for no other")
        if noise_std is not None and not self.conditioning_noise:
            raise ValueError("noise_std= needs a super-resolution network that was trained with conditioning_noise")
        sampler = self._configure_sampler(sampler)
        schedule = self.schedule
        if steps is not None:
            if spacing is None and isinstance(steps, int | np.integer):
                spacing = sampling.default_spacing(sampler, schedule)
            schedule = schedules.respace(schedule, steps, spacing)
        problem = sampling.find_problem(sampler, schedule)
        if problem:
            raise ValueError(f"{sampler}: {problem}; use spacing='log_snr', more steps, or sampling.ddim()")
        growth = sampling.find_error_growth(sampler, schedule)
        if growth:
            warnings.warn(f"{growth}; use a number of steps with spacing='log_snr', or a clip", stacklevel=2)
        shape = (num_images, *self.example_shape)
        given = self._to_conditions(condition, num_images)
        if low is not None:
            given = upsampling.condition(low, shape, noise_std)
        x = _sample(
            self.params,
            key,
            schedule,
            self._check_labels(y, num_images),
            given,
            jnp.float32(guidance_scale),
            model=self.model,
            sampler=sampler,
            shape=shape,
            use_guidance=guidance_scale != 1,
        )
        return to_data_units(x, self.normalizations.get("x"))

    def _configure_sampler(self, sampler: sampling.Sampler | None) -> sampling.Sampler:
        """The sampler with the network's prediction, its variance if that is learned, and its clip for continuous data."""
        if sampler is None:
            return sampling.ddpm(self.variance, prediction=self.prediction, clip=self.clip)
        fields = {name for name, field in getattr(sampler, "__dataclass_fields__", {}).items() if field.init}
        changes: dict[str, Any] = {"prediction": self.prediction}
        if self.variance.startswith("learned"):
            changes["variance"] = self.variance
        if self.levels is None and getattr(sampler, "clip", None) is True:  # the default, for data in [-1, 1]
            changes["clip"] = self.clip
        inner = getattr(sampler, "sampler", None)
        if isinstance(inner, sampling.Sampler):  # a sampler that wraps another
            changes["sampler"] = self._configure_sampler(inner)
        replace: Any = dataclasses.replace
        changed: sampling.Sampler = replace(sampler, **{name: changes[name] for name in changes.keys() & fields})
        if changed.prediction != self.prediction:
            raise ValueError(
                f"{changed} needs the prediction {changed.prediction!r}, and this network predicts {self.prediction!r}"
            )
        return changed

    def _to_conditions(self, condition, num_examples: int) -> jax.Array | None:
        """Conditions float32 [N, ...] in the network's units; None for a network without. Raises: ValueError."""
        shape = self.condition_shape
        if shape is None:
            if condition is not None:
                raise ValueError("this network takes no conditions; omit condition")
            return None
        assert isinstance(self.model, Conditional)  # others have no conditions
        has_null = self.model.null_condition is not None
        rows = (num_examples, *shape)
        if condition is None:
            if not has_null:
                raise ValueError(f"this network needs condition, an array of shape {list(shape)} or {list(rows)}")
            return jnp.full(rows, jnp.nan, jnp.float32)
        values = np.asarray(condition)
        is_real = values.dtype.kind in "iuf" or jnp.issubdtype(values.dtype, jnp.floating)
        if values.shape not in (shape, rows) or not is_real:
            raise ValueError(
                f"condition must be real numbers of shape {list(shape)} or {list(rows)}; got {values.dtype} "
                f"{list(values.shape)}"
            )
        values = np.broadcast_to(values, rows)
        wrong = ~np.isfinite(values).reshape(num_examples, -1)
        if has_null:
            wrong &= ~np.isnan(values).reshape(num_examples, -1).all(axis=1, keepdims=True)
        if wrong.any():
            allowed = "; a row of NaN alone stands for no condition" if has_null else ""
            raise ValueError(
                f"condition {int(wrong.any(axis=1).argmax())} has values that are not finite{allowed}; correct it"
            )
        normalization = self.normalizations.get("condition")
        if normalization and (found := normalization.describe_outside(values)):
            warnings.warn(f"{found}.", stacklevel=3)
        return jnp.asarray(to_model_units(values, normalization))

    def _check_labels(self, y, num_images: int) -> jax.Array | None:
        """y as int32 [N]; None for an unconditional network. Raises: ValueError."""
        if not self.num_classes:
            if y is not None:
                raise ValueError(f"this network has no classes, got y={y}; omit y")
            return None
        if y is None:
            raise ValueError(f"this network has {self.num_classes} classes: give y, one label or {num_images}")
        if np.shape(y) not in ((), (num_images,)):
            raise ValueError(f"y must be one label or {num_images}, one for each example; got shape {np.shape(y)}")
        null_label = self.model.null_label is not None
        y = labels.in_range(np.asarray(y), self.num_classes + null_label, null_label)
        return jnp.broadcast_to(y, (num_images,)).astype(jnp.int32)

    def logits(self, x_t, time) -> jax.Array:
        """The logits [B, num_classes] of a classifier. Raises: TypeError for a diffusion model."""
        if not isinstance(self.model, Classifier):
            raise TypeError("these weights are a diffusion model; use denoise_fn(x_t, time)")
        return apply_network(self.model, self.params, x_t, time)


@partial(jax.jit, static_argnames=("model", "sampler", "shape", "use_guidance"))
def _sample(params, key, schedule, y, condition, guidance_scale, *, model, sampler, shape, use_guidance):
    """The program of `Pretrained.sample`. It depends on its arguments only, so that networks of one model share it."""
    key_noise, key_steps = jax.random.split(key)
    network = lambda x_t, time, given: apply_network(model, params, x_t, time, **given)  # noqa: E731
    given = {name: value for name, value in (("y", y), ("condition", condition)) if value is not None}
    denoise_fn = lambda x_t, time: network(x_t, time, given)  # noqa: E731
    if use_guidance:
        denoise_fn = guidance.classifier_free(network, given, model.nulls_of(given), guidance_scale)
    x_T = jax.random.normal(key_noise, shape, jnp.float32)
    return sampling.sample(key_steps, schedule, denoise_fn, x_T, sampler)


def make_clip(clip: bool | float) -> bool | Callable:
    """A clip of x_0 as samplers take it: True for [-1, 1], False for none, or a number for another range."""
    return clip if isinstance(clip, bool) else partial(jnp.clip, min=-clip, max=clip)


def make_description(
    family: str,
    model: Network,
    image_size: int | Sequence[int],
    diffusion: Mapping[str, Any],
    channels: int = 3,
    **fields: Any,
) -> Pretrained:
    """A `Pretrained` without parameters, from leaves of `config.diffusion`, by default those of `DIFFUSION_DEFAULTS`.

    image_size: the size of each spatial axis, or one number for two axes. fields: further ones of `Pretrained`.
    Raises: ValueError for values that `training.schedule_from_config` does not allow.
    """
    leaves = DIFFUSION_DEFAULTS | dict(diffusion)
    if fields.get("low_resolution"):
        noise = fields.get("conditioning_noise", 0.0)
        model = model.clone(condition_channels=upsampling.condition_channels(channels, noise))
    return Pretrained(
        family,
        model,
        channels,
        (image_size, image_size) if isinstance(image_size, int) else tuple(image_size),
        training.schedule_from_config(leaves | {"loss": "simple"}),
        leaves["prediction"],
        leaves["variance"],
        diffusion=leaves,
        **fields,
    )


def format_summary(net: Pretrained) -> str:
    """The description of weights, one line for each setting."""
    shapes = parameters.parameter_shapes(net.model, net.example_shape)
    values = "continuous" if net.levels is None else f"{net.levels} levels"
    values += " in {:g} ... {:g}".format(*net.limits) if net.limits else ""
    normalizations = {name: format_normalization(value) for name, value in net.normalizations.items()}
    conditions = None
    if net.condition_shape is not None and isinstance(net.model, Conditional):
        null = "or none" if net.model.condition_dropout else None
        parts = [f"shape {list(net.condition_shape)}", null, normalizations.get("condition")]
        conditions = ", ".join(filter(None, parts))
    rows = {
        "family": net.family,
        "network": type(net.model).__name__,
        "parameters": f"{sum(map(math.prod, shapes.values())):,} in {len(shapes)} tensors",
        "shape": f"{' x '.join(map(str, net.image_size)) or 'vectors'}, {net.channels} channels",
        "values": values,
        "normalization": normalizations.get("x"),
        "conditions": conditions,
        "enlarges": f"images {net.low_resolution} pixels high" if net.low_resolution else None,
        "classes": net.num_classes or None,
        "prediction": net.prediction,
        "variance": net.variance,
        "clip": net.clip,
        "schedule": "a table of betas" if net.diffusion is None else net.diffusion["schedule"],
        "timesteps": f"{net.schedule.num_timesteps}, network times 0 ... {net.schedule.timesteps[-1]:g}",
        **{f"model.{name}": value for name, value in fields_of(net.model).items()},
    }
    rows = {name: value for name, value in rows.items() if value is not None}
    width = max(map(len, rows))
    return "\n".join(f"{name:{width}}  {value}" for name, value in rows.items())


def format_normalization(normalization: Normalization, limit: int = 6) -> str:
    """(data - offset) / scale of the first channels."""
    offset, scale = (
        ", ".join([f"{value:.4g}" for value in values[:limit]] + ["..."] * (len(values) > limit))
        for values in (normalization.offset, normalization.scale)
    )
    return f"(data - ({offset})) / ({scale})"
