"""Editing images and arrays with a trained model: pure functions around the samplers.

    inpainting           `repaint`, `replacement` (wraps a sampler), `project` with `masked`
    image to image       `sdedit`
    linear measurements  `project`: colorization, super-resolution, any y = A x_0 without noise, with any sampler;
                         `measurements` has the operators, and `posterior` handles y with noise
    between two images   `interpolate`

`EDITS` maps the names of edits in `--mode=edit` to functions; `MEASUREMENTS` maps the names of measurements to operators.

A mask is 1 (or True) where pixels are known, and has x_0's shape or broadcasts to it.

Results are float32, or float64 for float64 images under x64; lower precisions are promoted. Images that are not float raise
ValueError.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, ArrayLike, Float, Key, Real, Shaped

from diffusion_jax import measurements, process, sampling
from diffusion_jax.arrays import as_float, broadcasts_to, check_same_shape, promote
from diffusion_jax.denoiser import Denoiser, as_denoiser
from diffusion_jax.errors import require_number
from diffusion_jax.measurements import LinearOperator, Measurement, as_mask, average_pool, gray, masked
from diffusion_jax.sampling import Sampler, Step, WrappedSampler
from diffusion_jax.sampling.driver import check_sampler, fold_in
from diffusion_jax.schedules import Schedule, Transition
from diffusion_jax.types import Batch, BatchLike, DenoiseFn

__all__ = [
    "EDITS",
    "MEASUREMENTS",
    "LinearOperator",
    "as_mask",
    "average_pool",
    "gray",
    "interpolate",
    "masked",
    "project",
    "repaint",
    "replacement",
    "sdedit",
    "slerp",
]

Draw: TypeAlias = Callable[[Key[Array, ""], Schedule, Denoiser, Batch, Sampler], Batch]


def sdedit(
    key: Key[Array, ""],
    schedule: Schedule,
    denoiser: Denoiser | DenoiseFn,
    x_0: BatchLike,
    sampler: Sampler,
    *,
    strength: float = 0.5,
    **options: Any,
) -> Any:
    """Image to image (Meng et al. 2022): noises x_0 to the fraction `strength` of the schedule, then denoises.

    x_0: for example a sketch, a collage or a photo. strength: in (0, 1]; 0.3 keeps the layout, 1 keeps almost nothing.
    options: final_step and trajectory, as `sampling.sample`. Returns: as `sampling.sample`.
    Raises: ValueError for a strength outside (0, 1].
    """
    require_number("strength", strength, 0, 1, above=True)
    start = max(round(strength * schedule.num_timesteps), 1) - 1
    key_noise, key_sample = jax.random.split(key)
    x_t = _add_noise(key_noise, schedule, x_0, start)
    return sampling.sample(key_sample, schedule, denoiser, x_t, sampler, start=start, **options)


def _add_noise(key, schedule, x_0, t):
    x_0 = as_float("x_0", x_0)
    return process.q_sample(schedule, x_0, t, jax.random.normal(key, x_0.shape, x_0.dtype))


def _as_mask_for(mask, x_0, several=False):
    """Returns `as_mask(mask)`. several: allows masks [B, ...] for one x_0. Raises: ValueError if a mask does not fit x_0."""
    mask, shape = as_mask(mask), jnp.shape(x_0)
    has_rows = several and shape[0] == 1 and mask.ndim == len(shape)
    if not broadcasts_to(mask.shape, mask.shape[:1] + shape[1:] if has_rows else shape):
        raise ValueError(f"the mask has shape {mask.shape}, which does not broadcast to x_0's shape, {shape}")
    return mask


def _replace_known(key, transition, x_prev, x_0, mask):
    """Returns x_{t-1} with the known pixels drawn from q(x_{t-1} | x_0); after the last step, known pixels equal x_0."""
    target, x_0 = transition.target, x_0.astype(x_prev.dtype)
    noised = target.alpha * x_0 + target.sigma * sampling.normal(key, x_prev)
    return jnp.where(mask, jnp.where(target.sigma > 0, noised, x_0), x_prev)


@dataclasses.dataclass(frozen=True, eq=False)
class replacement(WrappedSampler, traced=("x_0", "mask")):
    """Inpainting by replacement (Song et al. 2021, appendix I.2): each step draws the known pixels from q(x_{t-1} | x_0).

    Wraps any other sampler. Known pixels are returned exactly. The network alone connects unknown pixels to known pixels, so
    borders may be visible; `repaint` reduces them.
    """

    x_0: BatchLike
    mask: Shaped[ArrayLike, "..."]

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "x_0", as_float("x_0", self.x_0))
        object.__setattr__(self, "mask", _as_mask_for(self.mask, self.x_0, several=True))

    @property
    def is_stochastic(self) -> bool:
        return True

    def step(self, key, denoiser, x_t, transition, state) -> Step:
        new = self.sampler.step(key, denoiser, x_t, transition, state)
        return new._replace(x_prev=_replace_known(fold_in(key, 1), transition, new.x_prev, self.x_0, self.mask))


def _repaint_steps(num_timesteps: int, resamplings: int, jump: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the index of each of RePaint's denoising steps, and the index to which x is noised after it (-1: not noised).

    Each multiple of `jump` below num_timesteps - jump is visited `resamplings` times (Lugmayr et al. 2022, appendix B).
    """
    remaining = dict.fromkeys(range(0, num_timesteps - jump, jump), resamplings - 1)
    t, denoise_from, noise_to = num_timesteps - 1, [], []
    while t >= 0:
        denoise_from.append(t)
        t -= 1
        if remaining.get(t, 0) > 0:
            remaining[t] -= 1
            t += jump
            noise_to.append(t)
        else:
            noise_to.append(-1)
    return np.array(denoise_from, np.int32), np.array(noise_to, np.int32)


def repaint(
    key: Key[Array, ""],
    schedule: Schedule,
    denoiser: Denoiser | DenoiseFn,
    x_0: BatchLike,
    mask: Shaped[ArrayLike, "..."],
    sampler: Sampler | None = None,
    *,
    resamplings: int = 10,
    jump: int = 10,
) -> Batch:
    """RePaint (Lugmayr et al. 2022): inpainting by replacement that repeats groups of `jump` steps, for smoother borders.

    Args:
      key, schedule, denoiser: as `sampling.sample`.
      x_0: the images; their pixels where `mask` is 0 are ignored.
      sampler: a sampler without a state that changes between steps; the default is `sampling.ddpm()`.
      resamplings: how often each interval of `jump` steps is denoised; 1 is `replacement`. The paper uses 10, with jump 10,
        on a schedule with 250 steps. The network is called about `resamplings` times per step.
    Returns: images with the known pixels of x_0. With more resamplings, the mean of the unknown pixels approaches their
      conditional mean, but their variance falls below the conditional variance.
    Raises: ValueError for a sampler whose steps change its state, a mask that does not broadcast to x_0, numbers below 1,
      prediction eps or score if alpha_bar ends at 0, or, with resamplings above 1, a jump that is not below the number of
      steps.
    """
    require_number("resamplings", resamplings, 1, whole=True)
    require_number("jump", jump, 1, whole=True)
    if resamplings > 1 and jump >= schedule.num_timesteps:
        raise ValueError(f"jump={jump} must be below the {schedule.num_timesteps} steps of the schedule")
    sampler = sampling.ddpm() if sampler is None else sampler
    check_sampler(sampler)
    denoiser, x_0 = as_denoiser(denoiser), as_float("x_0", x_0)
    process.check_terminal_snr(schedule, denoiser.prediction)
    mask = _as_mask_for(mask, x_0)
    state = sampler.init_state(schedule, x_0, schedule.num_timesteps)
    denoise_from, noise_to = _repaint_steps(schedule.num_timesteps, resamplings, jump)
    key_first, key_steps = jax.random.split(key)

    def step(x_t, row):
        i, t, noise_to = row
        key_step, key_known, key_noise = jax.random.split(jax.random.fold_in(key_steps, i), 3)
        transition = schedule.transition(t, x_t)
        new = sampler.step(key_step, denoiser, x_t, transition, state)
        before, after = jax.tree.leaves(state), jax.tree.leaves(new.state)
        if after and [*map(id, after)] != [*map(id, before)]:
            name = type(sampler).__name__
            raise ValueError(f"repaint cannot use {name}, whose steps change its state; use ddpm, ddim, euler or heun")
        x_prev = _replace_known(key_known, transition, new.x_prev, x_0, mask)
        # Draws from q(x_s | x_{t-1}), s = noise_to, at once, because several steps of DDPM eq. 2 compose to one Gaussian.
        beta = Transition.between(schedule.at(jnp.maximum(noise_to, 0), x_t), transition.target).beta
        noise = jax.random.normal(key_noise, x_t.shape, x_t.dtype)
        x_s = jnp.sqrt(1 - beta) * x_prev + jnp.sqrt(jnp.maximum(beta, 0.0)) * noise
        return jnp.where(noise_to >= 0, x_s, x_prev).astype(x_t.dtype), None

    x_T = jax.random.normal(key_first, x_0.shape, x_0.dtype)
    x, _ = jax.lax.scan(step, x_T, (jnp.arange(len(denoise_from)), jnp.asarray(denoise_from), jnp.asarray(noise_to)))
    return x


def project(denoiser: Denoiser | DenoiseFn, measurement: Measurement) -> Denoiser:
    """Returns a denoiser that projects x_0, after a clip, on A x_0 = y: x_0 + A+ (y - A x_0) (DDNM, Wang et al. 2023 eq. 12).

    With `sampling.ddpm()` or `sampling.ddim(eta)`, `project(denoiser, Measurement(average_pool(4), y))` samples images whose
    4x4 means are y. The last step returns a projected x_0, so samples satisfy A x_0 = y up to rounding.
    For prediction x_prev, `sampling.ddpm` raises ValueError, because the network then predicts the step's mean itself.
    Raises: ValueError for a noise other than 0, and an operator without a right inverse.
    """
    noise: Any = measurement.noise
    if callable(noise) or not (isinstance(noise, Tracer) or np.all(np.asarray(noise) == 0)):
        raise ValueError(
            "project is for y without noise; use posterior.mmps, or noise=0 to repeat the noise of y in x_0"
        )
    if measurement.operator.invert is None:
        raise ValueError(
            "project needs an operator with a right inverse (invert); use posterior.mmps with a small noise"
        )
    denoiser = as_denoiser(denoiser)
    projection = _Projection(as_float("y", measurement.y), measurement.operator)
    return dataclasses.replace(denoiser, limits=(*denoiser.limits, projection))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class _Projection:
    y: Any
    operator: Any

    def __call__(self, x_0):
        return x_0 + self.operator.invert(self.y.astype(x_0.dtype) - self.operator.measure(x_0))


def slerp(x: BatchLike, y: BatchLike, weight: Real[ArrayLike, ""]) -> Batch:
    """Spherical interpolation from x (weight 0) to y (weight 1), with each example as one vector; keeps the norm of noise."""
    x, y = promote(x=x, y=y)
    weight = jnp.asarray(weight, x.dtype)
    axes = tuple(range(1, x.ndim))

    def dot(a, b):
        return jnp.sum(a * b, axis=axes, keepdims=True)

    lengths = dot(x, x) * dot(y, y)
    cosine = dot(x, y) / jnp.sqrt(jnp.where(lengths > 0, lengths, 1.0))
    # Parallel vectors and zero vectors define no arc, so the interpolation is linear.
    straight = (lengths == 0) | (jnp.abs(cosine) > 1 - 1e-7)
    angle = jnp.arccos(jnp.where(straight, 0.0, cosine))
    a = jnp.where(straight, 1 - weight, jnp.sin((1 - weight) * angle) / jnp.sin(angle))
    b = jnp.where(straight, weight, jnp.sin(weight * angle) / jnp.sin(angle))
    return a * x + b * y


def interpolate(
    key: Key[Array, ""],
    schedule: Schedule,
    denoiser: Denoiser | DenoiseFn,
    x: BatchLike,
    y: BatchLike,
    weights: Sequence[float] | Real[ArrayLike, "W"],
    sampler: Sampler,
    *,
    t: int | np.integer | None = None,
    **encoding: Any,
) -> Float[Array, "W B *shape"]:
    """Returns images between x (weight 0) and y (weight 1).

    If t is None, both images are encoded to noise (DDIM section 5.3), mixed by `slerp`, and decoded by a deterministic
    sampler. If t is an index, both images are noised to x_t, mixed linearly, and denoised (DDPM section 4.3); all weights
    share the noise. A small t keeps the details of both images, a large t gives new images.

    encoding: order and start, as in `sampling.encode`; only with t None. Encoding does not clip. The images are mixed at the
    noise level of index `start`, T - 1 by default.
    Raises: ValueError for encoding options with an index t, for a stochastic sampler with t None, and if x and y differ in
      shape; also as `sampling.sample` and, with t None, as `sampling.encode`, for instance for a projection.
    """
    if t is not None and encoding:
        raise ValueError(
            f"interpolate does not take {', '.join(encoding)} with t={t}; options of sampling.encode are for t=None, where "
            "images are encoded"
        )
    check_sampler(sampler)
    if t is None and sampler.is_stochastic:
        raise ValueError(
            "interpolate mixes the encodings of both images, which only a deterministic sampler decodes: use the sampler "
            "ddim (eta 0) or heun, or give an index t (editing.level)"
        )
    check_same_shape("x", x, "y", y)
    denoiser, (x, y) = as_denoiser(denoiser), promote(x=x, y=y)
    key_x, key_y, key_sample = jax.random.split(key, 3)
    if t is None:
        unclipped = dataclasses.replace(denoiser, clip=False)
        start, end = (sampling.encode(schedule, unclipped, image, **encoding) for image in (x, y))
    else:
        start, end = _add_noise(key_x, schedule, x, t), _add_noise(key_y, schedule, y, t)

    first = encoding.get("start") if t is None else t

    def sample_between(weight):
        mixed = slerp(start, end, weight) if t is None else (1 - weight) * start + weight * end
        return sampling.sample(key_sample, schedule, denoiser, mixed, sampler, start=first)

    return jax.lax.map(sample_between, jnp.asarray(weights, start.dtype))


# ---- Edits and measurements by name


def _inpaint(image, mask, *, resamplings: int, jump: int) -> Draw:
    def draw(key, schedule, denoiser, x_T, sampler):
        return repaint(key, schedule, denoiser, image, mask, sampler, resamplings=resamplings, jump=jump)

    return draw


def _replace(image, mask) -> Draw:
    def draw(key, schedule, denoiser, x_T, sampler):
        return sampling.sample(key, schedule, denoiser, x_T, replacement(sampler, image, jnp.asarray(mask)))

    return draw


def _sdedit(image, *, strength: float) -> Draw:
    def draw(key, schedule, denoiser, x_T, sampler):
        return sdedit(key, schedule, denoiser, image, sampler, strength=strength)

    return draw


def _interpolate(image, other, *, num_samples: int, level: int | None) -> Draw:
    require_number("num_samples of interpolate", num_samples, 2)
    weights = np.linspace(0, 1, num_samples)

    def draw(key, schedule, denoiser, x_T, sampler):
        if level is not None:
            require_number("level, an index of the steps or None,", level, 0, schedule.num_timesteps - 1)
        return interpolate(key, schedule, denoiser, image[:1], other[:1], weights, sampler, t=level)[:, 0]

    return draw


# The edits by config name. Each function takes, as keyword arguments, examples [N, ...] in the network's range (`image`, and
# `other` to mix with it), a `mask`, and settings of `config.editing`; it returns a function with the arguments and the result
# of `sampling.sample`.
EDITS: dict[str, Callable[..., Draw]] = {
    "inpaint": _inpaint,
    "replace": _replace,
    "sdedit": _sdedit,
    "interpolate": _interpolate,
}


def _colorize(shape) -> LinearOperator:
    if shape[-1] == 1:
        raise ValueError("colorize needs a model of color images, and this model has 1 channel")
    return gray(shape[-1])


def _super_resolution(shape, *, factor: int) -> LinearOperator:
    if any(size % factor for size in shape[:-1]):
        raise ValueError(f"factor={factor} must divide the model's {'x'.join(map(str, shape[:-1]))} pixels")
    return average_pool(factor, len(shape) - 1)


def _deblur(shape, array, *, blur: float) -> LinearOperator:
    if array is None:  # a Gaussian, cut at three deviations
        steps = np.arange(-math.ceil(3 * blur), math.ceil(3 * blur) + 1)
        line = np.exp(-0.5 * (steps / blur) ** 2)
        array = functools.reduce(np.multiply.outer, [line / line.sum()] * (len(shape) - 1))
    return measurements.blur(array)


def _sparse(shape, array, *, share: float) -> LinearOperator:
    if array is None:
        size = math.prod(shape[:-1])
        chosen = np.random.default_rng(0).choice(size, max(1, round(share * size)), replace=False)
        array = np.stack(np.unravel_index(np.sort(chosen), shape[:-1]), axis=-1)
    return measurements.at_points(np.asarray(array, np.float32))


def _fourier(shape, array, *, share: float) -> LinearOperator:
    if array is None:
        array = np.random.default_rng(0).random(shape[:-1]) < share
        array.flat[0] = True  # the mean is always measured
    return measurements.fourier(array)


def _tomography(shape, array, *, share: float) -> LinearOperator:
    if array is None:
        count = max(1, round(share * shape[0]))
        array = np.arange(count) * 180 / count
    return measurements.radon(np.deg2rad(np.asarray(array, np.float32)))


# The measurements by config name. Each function takes the shape of an example, [*spatial, C], and as keyword arguments a
# `mask`, the `array` of editing.operator (a function for linear) or None, and settings of `config.editing`.
MEASUREMENTS: dict[str, Callable[..., LinearOperator]] = {
    "inpaint": lambda shape, mask: masked(mask),
    "colorize": _colorize,
    "super_resolution": _super_resolution,
    "deblur": _deblur,
    "sparse": _sparse,
    "fourier": _fourier,
    "tomography": _tomography,
    "linear": lambda shape, array: LinearOperator(array),
}
