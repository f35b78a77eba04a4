"""`Model`, a trained network with everything needed to use it, and the compiled sampling program."""

from __future__ import annotations

import dataclasses
import functools
import math
import pathlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from diffusion_jax import guidance, labels, sampling, schedules, training
from diffusion_jax.data import Normalization, Normalizations, to_data_units, to_model_units
from diffusion_jax.denoiser import Denoiser, as_node
from diffusion_jax.distributed import devices, sharding
from diffusion_jax.errors import list_differences, visible
from diffusion_jax.images import is_image_shape, to_model_range
from diffusion_jax.models import Classifier, Conditional, condition_shape, to_config, upsampling
from diffusion_jax.pretrained import parameters
from diffusion_jax.provenance import Provenance
from diffusion_jax.sampling.driver import check_sampler, is_batch_of_keys, split
from diffusion_jax.training.state import Network
from diffusion_jax.types import Clip

__all__ = ["DIFFUSION_DEFAULTS", "Model", "format_summary", "make_clip", "make_model"]

# The settings of `config.diffusion` that describe trained weights, with Ho et al.'s values.
DIFFUSION_DEFAULTS: dict[str, Any] = {
    "schedule": "linear",
    "num_timesteps": 1000,
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "rescale_timesteps": False,
    "path": None,
    "log_snr_shift": 0.0,
    "preconditioning": "none",
    "sigma_data": None,
    "prediction": "eps",
    "variance": "fixed_large",
}


@dataclasses.dataclass(frozen=True)
class Model:
    """A trained network with everything needed to use it; `pretrained.load` and `pretrained.from_config` return a `Model`.

    family: a text that names the source. model: the network. channels: channels in an example. image_size: sizes of the 0 to
    3 spatial axes, (height, width) for images. schedule: the training schedule; its timesteps are the network times.
    prediction, variance, clip: as `Denoiser` takes them. params: the float32 tree for `model.apply({"params": params}, x_t,
    time)`; None from `pretrained.describe`. low_resolution: height of the small images for a super-resolution network, else
    0. conditioning_noise: the largest standard deviation of the noise on small images. diffusion: settings of
    `config.diffusion`; None if the schedule is a table of betas that no setting describes. levels: gray levels; None for
    continuous data. normalizations: `data.Normalization`, from data units to network units, for "x" (continuous data) and
    "condition"; arrays without an entry are already in network units. limits: (low, high) if the normalization of "x" maps
    these values to [-1, 1]. class_names: the labels' names, () if unknown. provenance: where the weights are from: a name
    for output files, and the "step" and "weights" (ema or raw) of a run. sigma_data: the standard deviation of x_0 for EDM's
    preconditioning; None for no preconditioning. sigma_min: as `Denoiser` takes it. published_sampling: the
    sampler of the weights' authors, as settings of `config.sampling`: "sampler", "steps", "spacing"; {} for the ancestral
    sampler with all steps. mesh: the devices that `sample` splits its batch over; None for one device.
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
    class_names: tuple[str, ...] = field(default=(), repr=False)
    provenance: Provenance = field(default_factory=lambda: Provenance("weights"), repr=False)
    sigma_data: float | None = None
    sigma_min: float = 0.0
    published_sampling: Mapping[str, Any] = field(default_factory=dict, repr=False)
    mesh: Mesh | None = field(default=None, repr=False)

    @property
    def example_shape(self) -> tuple[int, ...]:
        """The shape of an example, (*spatial, C)."""
        return (*self.image_size, self.channels)

    @property
    def is_images(self) -> bool:
        """Whether the examples are images of gray levels with 1 or 3 channels."""
        return self.levels is not None and is_image_shape(self.example_shape)

    @property
    def condition_shape(self) -> tuple[int, ...] | None:
        """The shape of a condition, (D,) or (*spatial, K); None without conditions, and for super-resolution."""
        return None if self.low_resolution else condition_shape(vars(self.model), self.image_size)

    @property
    def num_classes(self) -> int:
        """The number of classes; 0 for a network without classes."""
        return self.model.num_classes

    @property
    def step(self) -> int | None:
        """The training step of the weights; None if unknown (other projects and single files)."""
        return self.provenance.settings.get("step")

    @property
    def weights(self) -> str | None:
        """The kind of a run's weights, ema or raw; None if unknown (other projects and single files)."""
        return self.provenance.settings.get("weights")

    @property
    def num_devices(self) -> int:
        """The number of devices that `sample` splits its batch over."""
        return 1 if self.mesh is None else self.mesh.size

    def with_params(self, params: Any) -> Model:
        """Returns the same model with other parameters, which may be traced."""
        return dataclasses.replace(self, params=params)

    def read_params(
        self,
        path: pathlib.Path,
        tensors: parameters.Tensors,
        tensor_name: Callable[[parameters.Path, Any], str],
        convert: Callable = parameters.from_torch,
    ) -> Model:
        """Returns the same model with the parameters of a file, built by `parameters.build_params`.

        tensor_name: (parameter path, network) -> tensor name.
        """
        shapes = parameters.parameter_shapes(self.model, self.example_shape)
        params = parameters.build_params(path, shapes, tensors, lambda p: tensor_name(p, self.model), convert)
        return self.with_params(params)

    def on_mesh(self, mesh: Mesh) -> Model:
        """Returns the same model with parameters replicated over a mesh; `sample` splits its batch over the devices."""
        params = jax.device_put(jax.device_get(self.params), sharding.replicated(mesh))
        return dataclasses.replace(self, params=params, mesh=mesh)

    def find_differences(self, other: Model) -> list[str]:
        """Returns a phrase for each difference of two models in x_t, its units or the output, with `other`'s value first."""
        arrays, names = ["x"], []
        if not isinstance(self.model, Classifier) and not isinstance(other.model, Classifier):
            arrays, names = ["x", "condition"], ["prediction", "sigma_data", "sigma_min"]
            if any(variance.startswith("learned") for variance in (self.variance, other.variance)):
                names.append("variance")  # the output does not depend on a fixed variance
        if (self.levels is None) != (other.levels is None):
            names.append("levels")
        differences = list_differences(*({name: getattr(net, name) for name in names} for net in (other, self)))
        for name in arrays:
            there, here = other.normalizations.get(name), self.normalizations.get(name)
            if there != here:
                differences.append(f"{name}: {_format_normalization(there)} there, {_format_normalization(here)} here")
        tables = ("timesteps", "alpha_bar")
        if not all(np.array_equal(getattr(self.schedule, name), getattr(other.schedule, name)) for name in tables):
            differences.append("another noise schedule")
        return differences

    def denoiser(
        self,
        *,
        y=None,
        condition=None,
        extra=None,
        clip: Clip | None = None,
        guidance_scale: float = 1.0,
        guidance_interval: tuple[float, float] | None = None,
        guidance_rescale: float = 0.0,
        classifier: Model | None = None,
        classifier_scale: float = 1.0,
        classifier_form: str = "eps",
    ) -> Denoiser:
        """Returns the network as the `Denoiser` that samplers, losses and likelihoods take; arrays may be traced.

        y: labels int [B] for a network with classes, or for the classifier. condition: float [B, D] or [B, *spatial, K] for a
        conditional network, in network units as x_t; for a super-resolution network, `models.upsampling.condition(low, shape,
        noise_std)`. `inputs` makes y and condition from the arguments of `sample`. extra: [B, K], further numbers for a
        network of your own that takes them.

        clip: the clip of x_0. None means the network's clip; for continuous data, True means the network's clip, too.
        guidance_scale, guidance_interval, guidance_rescale: classifier-free guidance (`guidance.classifier_free`), which
        drops the labels and conditions for which the network has a null (label_dropout, condition_dropout). A scale of 1
        turns guidance off. classifier: a classifier's model for the same x_t, which guides with classifier_scale in the form
        "eps" or, for `sampling.ddpm`, "mean" (`guidance.classifier`).

        Raises: ValueError for guidance that the network does not allow, or a classifier for another x_t; TypeError for a
        classifier's weights.
        """
        self.check_guidance(guidance_scale, condition is not None, classifier)
        given = {"y": y if self.num_classes else None, "condition": condition, "extra": extra}
        given = {name: value for name, value in given.items() if value is not None}
        if clip is None or (clip is True and self.levels is None):
            clip = self.clip
        denoiser = Denoiser(
            _Apply(self.model, self.params),
            prediction=self.prediction,
            variance=self.variance,
            clip=clip,
            sigma_data=self.sigma_data,
            sigma_min=self.sigma_min,
            inputs=given,
        )
        if guidance_scale != 1:
            assert isinstance(self.model, Conditional)
            conditions = {name: value for name, value in given.items() if name != "extra"}
            interval: Any = guidance_interval and tuple(map(np.float32, guidance_interval))
            nulls, scale = self.model.nulls(conditions), np.float32(guidance_scale)
            denoiser = guidance.classifier_free(
                denoiser, conditions, nulls, scale, interval=interval, rescale=guidance_rescale
            )
        if classifier is not None:
            log_prob = guidance.class_log_prob(_Apply(classifier.model, classifier.params), y)
            denoiser = guidance.classifier(denoiser, log_prob, np.float32(classifier_scale), form=classifier_form)
        return denoiser

    def sample(
        self,
        key,
        num_images: int = 1,
        *,
        sampler: sampling.Sampler | None = None,
        steps=None,
        spacing: str | None = None,
        trajectory: bool | Sequence[int] | np.ndarray = False,
        algorithm: Callable = sampling.sample,
        y=None,
        condition=None,
        condition_missing=None,
        low=None,
        noise_std=0.0,
        **options: Any,
    ) -> Any:
        """Draws samples, float32 [N, *spatial, C]: images in [-1, 1], continuous data in data units.

        If the offset of the normalization is more than 1000 times the scale, the result is a float64 NumPy array. The first
        call compiles one program. Later calls with the same sampler, number of samples and steps reuse the program for every
        key, label, condition, parameters (`with_params`) and guidance scale other than 1, and for every image or measurement
        that the sampler holds (`editing.replacement`, `posterior.dps`).

        With a mesh, every process must call this method, the parameters may have any sharding on the mesh, and every process
        gets the result as a NumPy array.

        Args:
          key: one key for the batch, or a key for each sample [N], so that the noise of a sample depends on its key only;
            with another `algorithm`, one key.
          num_images: N, the number of samples, drawn in one batch; with a mesh, a multiple of the device count.
          sampler: if sampler, steps and spacing are all None, the sampler and steps of the weights' authors are used, if
            known (`published_sampling`). Otherwise the default is the ancestral `sampling.ddpm`, or `sampling.consistency`
            for a consistency network, which takes no other sampler.
          steps, spacing: as for `schedules.respace`, or a Schedule from `schedules.respace`; by default all its steps, or
            one step for a consistency network. If steps is a number, the default spacing suits the sampler.
          trajectory: as for `sampling.sample`; the result is then (samples, Trajectory), both in data units.
          algorithm: a function to call instead of `sampling.sample`, with the same arguments and result, for example an
            edit of `editing.EDITS`. Each function is compiled once. If it is a pytree, such as a `jax.tree_util.Partial`, all
            its leaves are traced, and new arrays do not compile it again.
          y: for a network or a classifier with classes, one label for all samples or int [N].
          condition: for a conditional network, one condition for all samples, [D] or [*spatial, K], or one for each sample,
            with a leading axis N, in data units. With condition_dropout, None means no conditions.
          condition_missing: bool [N], True for samples without a condition, if only some of the samples have one.
          low, noise_std: for a super-resolution network, the images to enlarge [N, h, w, C], uint8 or float in [-1, 1], and
            the standard deviation of their noise, one number or [N].
          options: other arguments of `denoiser`: clip, extra, and the arguments for guidance.
        Raises: ValueError for labels, conditions, guidance or small images that do not fit the network, or steps for which
          the sampler is known to fail; TypeError for a classifier.
        """
        if num_images < 1:
            raise ValueError(f"num_images={num_images} must be at least 1")
        given = {"y": y, "condition": condition, "condition_missing": condition_missing, "low": low}
        classifier = options.get("classifier")
        self.check_guidance(options.get("guidance_scale", 1.0), condition is not None or low is not None, classifier)
        inputs = self.inputs(num_images, **given, noise_std=noise_std, classifier=classifier)
        denoiser = self.denoiser(**inputs, **options)
        sampler, schedule = self.configure(denoiser, sampler, steps, spacing)
        if is_batch_of_keys(key) and algorithm is not sampling.sample:
            raise ValueError("an algorithm draws its samples with one key; give one key")
        return self.draw(key, num_images, schedule, denoiser, sampler, trajectory, algorithm)

    def inputs(
        self,
        num_images: int,
        *,
        y=None,
        condition=None,
        condition_missing=None,
        low=None,
        noise_std=0.0,
        classifier: Model | None = None,
    ) -> dict[str, Any]:
        """Checks the arguments of `sample`, and converts them to arguments of `denoiser`: a row per sample, in network units.

        Raises: ValueError.
        """
        self.check_small_images(low is not None, noise_std)
        given = self.check_condition(condition, num_images, condition_missing)
        if given is not None:
            given = jnp.asarray(to_model_units(given, self.normalizations.get("condition")))
        y = self.check_labels(y, num_images, classifier)
        if low is not None:
            low = to_model_range(low) if low.dtype == np.uint8 else low
            std = noise_std if self.conditioning_noise else None
            given = upsampling.condition(low, (num_images, *self.example_shape), std)
        return {"y": y, "condition": given}

    def draw(
        self,
        key,
        num_images: int,
        schedule: schedules.Schedule,
        denoiser: Denoiser,
        sampler: sampling.Sampler,
        trajectory: bool | Sequence[int] | np.ndarray = False,
        algorithm: Callable = sampling.sample,
    ) -> Any:
        """Draws samples like `sample`, but from a denoiser, a sampler and a schedule that were already checked."""
        options = {}
        if trajectory is not False:
            options["trajectory"] = trajectory if trajectory is True else tuple(np.asarray(trajectory).tolist())
        is_static = any(isinstance(leaf, sampling.Sampler) for leaf in jax.tree.leaves(sampler))
        static = sampler if is_static else None, (num_images, *self.example_shape), tuple(options.items())
        arrays = key, schedule, denoiser, as_node(algorithm), None if is_static else sampler
        if self.mesh is not None:
            sharding.check_divides(num_images, self.mesh, "num_images")
            arrays = sharding.place((jax.random.key_data(key), *arrays[1:]), self.mesh)
        result = _compile(self.mesh)(static, *arrays)
        result = result if self.mesh is None else jax.tree.map(_gather, result)
        if not options:
            return self._to_data(result)
        x_0, frames = result
        return self._to_data(x_0), frames._replace(x_t=self._to_data(frames.x_t), x_0=self._to_data(frames.x_0))

    def _to_data(self, x):
        return to_data_units(x, self.normalizations.get("x"))

    def configure(
        self, denoiser: Denoiser, sampler: sampling.Sampler | None = None, steps=None, spacing: str | None = None
    ) -> tuple[sampling.Sampler, schedules.Schedule]:
        """Returns the sampler and the steps that `sample` uses for these arguments.

        Warns of steps with which samples will look wrong. Raises: ValueError for steps with which the sampler is known to
        fail.
        """
        if sampler is None and steps is None and spacing is None and self.published_sampling:
            sampler = sampling.SAMPLERS[self.published_sampling["sampler"]]()
            steps, spacing = self.published_sampling["steps"], self.published_sampling["spacing"]
        if sampler is None:
            sampler = sampling.consistency() if self.sigma_min else sampling.ddpm()
        schedule = self.schedule
        check_sampler(sampler)
        if isinstance(sampler, sampling.consistency) != bool(self.sigma_min):
            raise ValueError(
                f"the sampler {type(sampler).__name__} does not fit these weights: a consistency network needs the sampler "
                "consistency, and other networks need another sampler"
            )
        if self.sigma_min and steps is None and spacing is None:
            steps, spacing = 1, "trailing"
        if steps is None and spacing is not None:
            raise ValueError(f"spacing={spacing!r} needs a number of steps; give steps, or omit spacing")
        if isinstance(steps, schedules.Schedule):
            schedule = steps
        elif steps is not None:
            if spacing is None and isinstance(steps, int | np.integer):
                spacing = sampling.default_spacing(sampler, schedule, denoiser, is_continuous=self.levels is None)
            try:
                schedule = schedules.respace(schedule, steps, spacing)
            except ValueError as error:
                raise ValueError(f"steps={steps!r}: {error}") from error
        only_more = self.schedule.zero_terminal_snr or spacing == "log_snr"
        advice = "more steps" if only_more else "spacing='log_snr' or more steps"
        if problem := sampling.find_problem(sampler, schedule):
            raise ValueError(f"{type(sampler).__name__}: {problem}; use {advice}, or the sampler ddim")
        if growth := sampling.find_error_growth(sampler, schedule, denoiser):
            advice += ", a clip for data in [-1, 1], or a network that predicts v"
            warnings.warn(f"{growth}; use {advice}", stacklevel=3)
        elif not self.sigma_min and (blur := sampling.find_blur(schedule, self.sigma_data or 1.0)):
            warnings.warn(f"{blur}; use {advice}", stacklevel=3)
        return sampler, schedule

    def check_guidance(self, guidance_scale: float, has_condition: bool, classifier: Model | None) -> None:
        """Raises: ValueError for guidance that does not suit the network; TypeError for a classifier's weights."""
        if isinstance(self.model, Classifier):
            raise TypeError("these weights are a classifier; use logits(x_t, time)")
        assert isinstance(self.model, Conditional)
        if guidance_scale != 1 and self.model.null_label is None:
            if self.model.null_condition is None:
                raise ValueError(
                    f"guidance_scale={guidance_scale} needs a network trained with label_dropout or condition_dropout; "
                    "use 1, or a classifier"
                )
            if not has_condition:
                raise ValueError(f"guidance_scale={guidance_scale} needs a condition; give condition, or use 1")
        if classifier is None:
            return
        if not isinstance(classifier.model, Classifier):
            raise ValueError("the classifier holds another network; --mode=train_classifier makes a classifier")
        differences = self.find_differences(classifier)
        differences += list_differences(
            {"shape": classifier.example_shape, "classes": classifier.num_classes},
            {"shape": self.example_shape, "classes": self.num_classes or classifier.num_classes},
        )
        if differences:
            raise ValueError(f"the classifier was trained on other data or x_t ({'; '.join(differences)})")

    def check_small_images(self, is_given: bool, noise_std) -> None:
        """Raises: ValueError if small images are missing or not allowed, or have more noise than the network allows."""
        if is_given != bool(self.low_resolution):
            raise ValueError("low= is for super-resolution networks only, which require it")
        if np.max(noise_std) > self.conditioning_noise:
            raise ValueError(
                f"noise_std={noise_std} must lie in 0 ... {self.conditioning_noise}, the noise that the network was "
                "trained with (conditioning_noise)"
            )

    def check_condition(self, condition=None, num_examples: int = 1, condition_missing=None) -> np.ndarray | None:
        """Returns conditions [N, ...] in data units, NaN in rows without a condition; None for a network without conditions.

        Warns of conditions far outside the training data. Raises: ValueError.
        """
        shape = self.condition_shape
        if shape is None:
            if condition is not None or condition_missing is not None:
                raise ValueError("this network takes no conditions; omit condition")
            return None
        assert isinstance(self.model, Conditional)  # only Conditional networks have conditions
        has_null, rows = self.model.null_condition is not None, (num_examples, *shape)
        if condition is None and condition_missing is not None:
            raise ValueError("condition_missing is for samples with and without a condition; give condition, too")
        if condition is None and not has_null:
            raise ValueError(f"this network needs condition, an array of shape {list(shape)} or {list(rows)}")
        if condition is None:
            return np.full(rows, np.nan, np.float32)
        missing = np.zeros(num_examples, bool) if condition_missing is None else np.asarray(condition_missing)
        if missing.dtype != bool or missing.shape != (num_examples,):
            raise ValueError(
                f"condition_missing must be bool of shape [{num_examples}], True for samples without a condition; got "
                f"{missing.dtype} {list(missing.shape)}"
            )
        if missing.any() and not has_null:
            raise ValueError(
                f"condition_missing: sample {int(missing.argmax())} has no condition, which only networks trained with "
                "condition_dropout allow; give it a condition"
            )
        values = np.asarray(condition)
        is_real = values.dtype.kind in "iuf" or jnp.issubdtype(values.dtype, jnp.floating)
        if values.shape not in (shape, rows) or not is_real:
            raise ValueError(
                f"condition must be real numbers of shape {list(shape)} or {list(rows)}; got {values.dtype} "
                f"{list(values.shape)}"
            )
        values = np.broadcast_to(values, rows)
        wrong = ~np.isfinite(values).reshape(num_examples, -1).all(axis=1) & ~missing
        if wrong.any():
            row = int(wrong.argmax())
            advice = f", or set condition_missing[{row}] (in an .npz) to True for no condition" if has_null else ""
            raise ValueError(f"condition {row} has values that are not finite; correct it{advice}")
        if missing.any():
            values = np.where(np.expand_dims(missing, tuple(range(1, values.ndim))), np.nan, values)
        normalization = self.normalizations.get("condition")
        if normalization and (found := normalization.describe_outside(values)):
            warnings.warn(f"{found}.", stacklevel=3)
        return values

    def check_labels(self, y, num_images: int, classifier: Model | None = None) -> jax.Array | None:
        """Returns y as int32 [N]; None if neither the network nor the classifier has classes. Raises: ValueError."""
        num_classes = self.num_classes or (0 if classifier is None else classifier.num_classes)
        if not num_classes:
            if y is not None:
                raise ValueError(f"this network has no classes, got y={y}; omit y")
            return None
        if y is None:
            raise ValueError(f"this network has {num_classes} classes: give y, one label or {num_images}")
        if np.shape(y) not in ((), (num_images,)):
            raise ValueError(f"y must be one label or {num_images}, one for each example; got shape {np.shape(y)}")
        null_label = self.model.null_label is not None
        y = labels.in_range(np.asarray(y), num_classes + null_label, null_label)
        return jnp.broadcast_to(y, (num_images,)).astype(jnp.int32)

    def logits(self, x_t, time) -> jax.Array:
        """Computes the logits [B, num_classes] of a classifier.

        Raises: TypeError for a diffusion model, ValueError for examples in another shape than the classifier's.
        """
        if not isinstance(self.model, Classifier):
            raise TypeError("these weights are a diffusion model; use denoiser()")
        if (shape := jnp.shape(x_t)[1:]) != self.example_shape:
            raise ValueError(f"this classifier takes examples of shape {list(self.example_shape)}, got {list(shape)}")
        return _Apply(self.model, self.params)(x_t, time)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class _Apply:
    """A network and its parameters as a function, which is also a pytree of the parameters."""

    model: Network = field(metadata={"static": True})
    params: Any

    def __call__(self, x_t, time, **inputs) -> Any:
        return self.model.apply({"params": self.params}, x_t, time, **inputs)


@functools.cache
def _compile(mesh: Mesh | None) -> Callable:
    """Returns the compiled function (static, key, schedule, denoiser, algorithm, sampler) -> samples.

    static: (sampler, shape of x_T, further arguments). If the sampler is a pytree, it is the last argument instead, and
    `static` holds None. With a mesh, the batch is split over the devices, and `key` is the data of the random key.
    """

    def draw(static, key, schedule, denoiser, algorithm, sampler):
        static_sampler, shape, options = static
        if mesh is not None:
            # Sharded parameters of a run in progress are gathered once, because every step needs all parameters, and memory
            # is not needed for gradients or activations.
            denoiser = jax.lax.with_sharding_constraint(denoiser, sharding.replicated(mesh))
            inputs = jax.lax.with_sharding_constraint(dict(denoiser.inputs), sharding.batch_sharding(mesh))
            denoiser, key = dataclasses.replace(denoiser, inputs=inputs), jax.random.wrap_key_data(key)
        key_noise, key_steps = split(key)
        x_T = sampling.normal(key_noise, jnp.zeros(shape, jnp.float32))
        if mesh is not None:
            x_T = jax.lax.with_sharding_constraint(x_T, sharding.batch_sharding(mesh))
        sampler = static_sampler if sampler is None else sampler
        return algorithm(key_steps, schedule, denoiser, x_T, sampler, **dict(options))

    return jax.jit(draw, static_argnums=0, compiler_options=None if mesh is None else devices.compiler_options())


def _gather(x: jax.Array) -> np.ndarray:
    """Returns the whole array, on every process."""
    return np.asarray(x if x.is_fully_addressable else multihost_utils.process_allgather(x, tiled=True))


def make_clip(clip: bool | float) -> bool | Callable:
    """Returns the sampler's clip of x_0. clip: True for [-1, 1], False for none, or a number for another range."""
    return clip if isinstance(clip, bool) else partial(jnp.clip, min=-clip, max=clip)


def make_model(
    family: str,
    model: Network,
    image_size: int | Sequence[int],
    diffusion: Mapping[str, Any],
    channels: int = 3,
    **fields: Any,
) -> Model:
    """Builds a `Model` without parameters. diffusion: settings of `config.diffusion`, by default `DIFFUSION_DEFAULTS`.

    image_size: the size of each spatial axis, or one number for two axes. fields: further fields of `Model`.
    Raises: ValueError for values that `training.schedule_from_config` does not allow.
    """
    settings = DIFFUSION_DEFAULTS | dict(diffusion)
    schedule = training.schedule_from_config(
        settings | {"loss": "classify" if isinstance(model, Classifier) else "simple"}
    )
    if settings["preconditioning"] != "none":
        fields["sigma_data"] = training.sigma_data(settings, is_continuous=fields.get("levels", 256) is None)
    if settings["preconditioning"] == "consistency":
        path = schedule.path
        fields["sigma_min"] = float(np.exp(-path.log_snr(np.float64(path.interval[0])) / 2))
    if fields.get("low_resolution"):
        noise = fields.get("conditioning_noise", 0.0)
        model = model.clone(condition_channels=upsampling.condition_channels(channels, noise))
    return Model(
        family,
        model,
        channels,
        (image_size, image_size) if isinstance(image_size, int) else tuple(image_size),
        schedule,
        settings["prediction"],
        settings["variance"],
        diffusion=settings,
        **fields,
    )


def format_schedule(diffusion: Mapping[str, Any]) -> str:
    """Returns the name of the schedule in `config.diffusion`, or the path with the shift of its log SNR."""
    if not diffusion["path"]:
        return diffusion["schedule"]
    shift = diffusion["log_snr_shift"]
    return f"path {diffusion['path']}" + (f", log SNR {shift:+g}" if shift else "")


def format_summary(net: Model) -> str:
    """Returns a description of the weights, with one line for each setting."""
    shapes = parameters.parameter_shapes(net.model, net.example_shape)
    values = "continuous" if net.levels is None else f"{net.levels} levels"
    values += " in {:g} ... {:g}".format(*net.limits) if net.limits else ""
    normalizations = {name: _format_normalization(value) for name, value in net.normalizations.items()}
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
        "sigma_data": net.sigma_data,
        "variance": net.variance,
        "clip": net.clip,
        "schedule": "a table of betas" if net.diffusion is None else format_schedule(net.diffusion),
        "timesteps": "{}, network times {:g} ... {:g}".format(
            net.schedule.num_timesteps, *net.schedule.timesteps[[0, -1]]
        ),
        **{f"model.{name}": value for name, value in to_config(net.model).items()},
    }
    rows = {name: value for name, value in rows.items() if value is not None}
    width = max(map(len, rows))
    return "\n".join(f"{name:{width}}  {visible(str(value))}" for name, value in rows.items())


def _format_normalization(normalization: Normalization | None, limit: int = 6) -> str:
    """Returns the text "(data - offset) / scale" with the numbers of the first channels; "none" for None."""
    if normalization is None:
        return "none"
    offset, scale = (
        ", ".join([f"{value:.4g}" for value in values[:limit]] + ["..."] * (len(values) > limit))
        for values in (normalization.offset, normalization.scale)
    )
    return f"(data - ({offset})) / ({scale})"
