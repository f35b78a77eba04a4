"""Editing images with an unconditional model: pure functions around the samplers.

    inpainting          `repaint` (goes back and forth), `replacement` (a sampler around a sampler), `project` with `masked`
    image to image      `sdedit`
    linear measurements `project`: colorization, super-resolution, any y = A x_0, as the `clip` of any sampler
    between two images  `interpolate`

A mask is 1 (or True) where pixels are known, of x_0's shape or broadcast to it.

Results are float32, or float64 for float64 images under x64; lower precisions are promoted. Images that are not float raise
ValueError.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax import process, sampling
from diffusion_jax.sampling import Sampler, Step
from diffusion_jax.schedules import Schedule


def as_mask(mask) -> jax.Array:
    """The mask as bool. Raises: ValueError for values other than 0 and 1, where they can be seen (not traced)."""
    if not isinstance(mask, jax.core.Tracer):
        values = np.asarray(mask)
        other = values[(values != 0) & (values != 1)]
        if other.size:
            raise ValueError(
                f"a mask holds 1 where pixels are known and 0 elsewhere, got {other.flat[0]}; use image > 127"
            )
    return jnp.asarray(mask, bool)


def sdedit(
    key, schedule: Schedule, denoise_fn: Callable, x_0, sampler: Sampler, *, strength: float = 0.5, **options
) -> jax.Array:
    """Image to image (Meng et al. 2022): x_0 is noised to a part of the chain, `strength` of it, and denoised again.

    x_0: float [B, ...], a sketch, a collage, a photo. strength: in (0, 1]; 0.3 keeps the layout, 1 keeps next to nothing.
    options: as `sampling.sample`. Raises: ValueError for another strength.
    """
    if not 0 < strength <= 1:
        raise ValueError(f"strength must lie in (0, 1], got {strength}")
    start = max(round(strength * schedule.num_timesteps), 1) - 1
    key_noise, key_sample = jax.random.split(key)
    x_t = _noised(key_noise, schedule, x_0, start)
    return sampling.sample(key_sample, schedule, denoise_fn, x_t, sampler, start=start, **options)


def _noised(key, schedule, x_0, t: int):
    x_0 = process.as_float("x_0", x_0)
    index = jnp.full(x_0.shape[:1], t, jnp.int32)
    return process.q_sample(schedule, x_0, index, jax.random.normal(key, x_0.shape, x_0.dtype))


def _with_known(key, schedule, x_prev, x_0, mask, t):
    """x_{t-1} with its known pixels drawn from q(x_{t-1} | x_0); at t = 0 those of x_0 itself."""
    alpha = jnp.sqrt(process.lookup(schedule.alpha_bar_prev, t, x_prev))
    sigma = process.lookup(schedule.sqrt_one_minus_alpha_bar_prev, t, x_prev)
    x_0 = x_0.astype(x_prev.dtype)
    noised = alpha * x_0 + sigma * jax.random.normal(key, x_prev.shape, x_prev.dtype)
    return jnp.where(mask, jnp.where(t > 0, noised, x_0), x_prev)


@dataclasses.dataclass(frozen=True, eq=False)
class replacement(Sampler):
    """Inpainting by replacement (Song et al. 2021, appendix I.2): each step ends with known pixels of q(x_{t-1} | x_0).

    A sampler around any other. Known pixels come back exactly; the unknown ones see them only through the network, so that
    borders may not fit: `repaint` mends that.
    """

    sampler: Sampler
    x_0: jax.Array
    mask: jax.Array

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "x_0", process.as_float("x_0", self.x_0))
        object.__setattr__(self, "mask", as_mask(self.mask))

    @property
    def prediction(self) -> str:
        return self.sampler.prediction

    def start(self, schedule, x_T, num_steps: int):
        return self.sampler.start(schedule, x_T, num_steps)

    def step(self, key, schedule, denoise_fn, x_t, t, memory) -> Step:
        new = self.sampler.step(key, schedule, denoise_fn, x_t, t, memory)
        x_prev = _with_known(jax.random.fold_in(key, 1), schedule, new.x_prev, self.x_0, self.mask, t)
        return Step(x_prev, new.x_0, new.memory)


def _walk(num_timesteps: int, resamplings: int, jump: int) -> tuple[np.ndarray, np.ndarray]:
    """RePaint's way through the chain: the index of each step down, and the index to climb to after it (-1 for not).

    Every `jump`-th level from 0 but the top ones is reached `resamplings` times (Lugmayr et al. 2022, appendix B).
    """
    left = dict.fromkeys(range(0, num_timesteps - jump, jump), resamplings - 1)
    t, downs, climbs = num_timesteps - 1, [], []
    while t >= 0:
        downs.append(t)
        t -= 1
        if left.get(t, 0):
            left[t] -= 1
            t += jump
            climbs.append(t)
        else:
            climbs.append(-1)
    return np.array(downs, np.int32), np.array(climbs, np.int32)


def repaint(
    key,
    schedule: Schedule,
    denoise_fn: Callable,
    x_0,
    mask,
    sampler: Sampler | None = None,
    *,
    resamplings: int = 10,
    jump: int = 10,
) -> jax.Array:
    """RePaint (Lugmayr et al. 2022): inpainting by replacement that goes back `jump` steps and forth again, to fit borders.

    Args:
      key, schedule, denoise_fn: as `sampling.sample`.
      x_0: float [B, ...], whose pixels where `mask` is 0 may hold anything.
      sampler: one without a memory, `sampling.ddpm()` unless given.
      resamplings: how often each stretch of `jump` steps is walked; 1 is `replacement`. The paper: 10, and jump 10, on a
        schedule of 250 steps. The work is about `resamplings` times the steps.
    Returns: float32 [B, ...] with the known pixels of x_0. More resamplings bring the mean of the unknown pixels closer to
      their conditional mean, but not their spread: it falls below the true one.
    Raises: ValueError for a sampler with a memory, numbers below 1, or a jump over the whole schedule.
    """
    if resamplings < 1 or jump < 1:
        raise ValueError(f"resamplings and jump must be at least 1, got {resamplings} and {jump}")
    if resamplings > 1 and jump >= schedule.num_timesteps:
        raise ValueError(f"jump={jump} leaves nothing to walk again in a schedule of {schedule.num_timesteps} steps")
    sampler = sampler or sampling.ddpm()
    process.check_terminal_snr(schedule, sampler.prediction)
    x_0 = process.as_float("x_0", x_0)
    mask = as_mask(mask)
    if jax.tree.leaves(sampler.start(schedule, x_0, schedule.num_timesteps)):
        raise ValueError("repaint goes back, which a sampler with a memory cannot; use ddpm, ddim or heun")
    downs, climbs = _walk(schedule.num_timesteps, resamplings, jump)
    key_first, key_steps = jax.random.split(key)

    def step(x_t, place):
        i, t, climb = place
        key_step, key_known, key_climb = jax.random.split(jax.random.fold_in(key_steps, i), 3)
        new = sampler.step(key_step, schedule, denoise_fn, x_t, t, ())
        x_prev = _with_known(key_known, schedule, new.x_prev, x_0, mask, t)
        # q(x_climb | x_{t-1}) in one draw (DDPM eq. 2, several times).
        top = jnp.maximum(climb, 0)
        kept = process.lookup(schedule.alpha_bar, top, x_t) / process.lookup(schedule.alpha_bar_prev, t, x_t)
        noise = jax.random.normal(key_climb, x_t.shape, x_t.dtype)
        climbed = jnp.sqrt(kept) * x_prev + jnp.sqrt(jnp.maximum(1 - kept, 0.0)) * noise
        return jnp.where(climb >= 0, climbed, x_prev).astype(x_t.dtype), None

    x_T = jax.random.normal(key_first, x_0.shape, x_0.dtype)
    x, _ = jax.lax.scan(step, x_T, (jnp.arange(len(downs)), jnp.asarray(downs), jnp.asarray(climbs)))
    return x


class Linear(NamedTuple):
    """A measurement A and a right inverse A+, with A A+ = I on what A can give: arrays [B, ...] to arrays [B, ...]."""

    measure: Callable
    invert: Callable


def gray(channels: int = 3) -> Linear:
    """The mean over the channels: colorization. y: [B, H, W, 1]."""
    return Linear(
        lambda x: jnp.mean(process.as_float("x", x), axis=-1, keepdims=True),
        lambda y: jnp.broadcast_to(process.as_float("y", y), (*y.shape[:-1], channels)),
    )


def average_pool(factor: int) -> Linear:
    """The mean over squares of `factor` pixels: super-resolution. y: [B, H / factor, W / factor, C]."""

    def measure(x):
        x = process.as_float("x", x)
        b, h, w, c = x.shape
        if h % factor or w % factor:
            raise ValueError(f"images of {h}x{w} do not divide into squares of {factor} pixels")
        return x.reshape(b, h // factor, factor, w // factor, factor, c).mean(axis=(2, 4))

    def invert(y):
        return jnp.repeat(jnp.repeat(process.as_float("y", y), factor, axis=1), factor, axis=2)

    return Linear(measure, invert)


def masked(mask) -> Linear:
    """The known pixels: inpainting. y: as the image, 0 where nothing is known."""
    mask = as_mask(mask)
    return Linear(
        lambda x: jnp.where(mask, process.as_float("x", x), 0.0),
        lambda y: jnp.where(mask, process.as_float("y", y), 0.0),
    )


def project(linear: Linear, y, clip: bool | Callable = True) -> Callable:
    """A `clip` for any sampler: x_0 + A+ (y - A x_0), the nearest x_0 that was measured as y (DDNM, Wang et al. 2023 eq. 12).

    `sampling.ddpm(clip=project(average_pool(4), y))` samples images whose 4x4 means are y; with eta, by `sampling.ddim`.
    clip: what is done to x_0 before, as `process.p_mean_variance`. The last step returns such an x_0, so A x_0 = y holds
    there but for rounding; not with `sampling.ddpm(prediction="x_prev")`, whose mean is the output itself.
    """

    y = process.as_float("y", y)

    def projected(x_0):
        x_0 = process.clip_x_0(x_0, clip)
        return x_0 + linear.invert(y.astype(x_0.dtype) - linear.measure(x_0))

    return projected


def slerp(x, y, weight) -> jax.Array:
    """The great circle from x (weight 0) to y (1), each example [B, ...] as one vector: noise stays as long as noise is."""
    x, y = process.promote(x=x, y=y)
    weight = jnp.asarray(weight, x.dtype)
    axes = tuple(range(1, x.ndim))

    def dot(a, b):
        return jnp.sum(a * b, axis=axes, keepdims=True)

    lengths = dot(x, x) * dot(y, y)
    cosine = dot(x, y) / jnp.sqrt(jnp.where(lengths > 0, lengths, 1.0))
    # On one line there is no circle to follow, or any, and none from 0; there it is the line.
    straight = (lengths == 0) | (jnp.abs(cosine) > 1 - 1e-7)
    angle = jnp.arccos(jnp.where(straight, 0.0, cosine))
    a = jnp.where(straight, 1 - weight, jnp.sin((1 - weight) * angle) / jnp.sin(angle))
    b = jnp.where(straight, weight, jnp.sin(weight * angle) / jnp.sin(angle))
    return a * x + b * y


def interpolate(
    key,
    schedule: Schedule,
    denoise_fn: Callable,
    x,
    y,
    weights,
    sampler: Sampler,
    *,
    t: int | None = None,
    **encoding,
) -> jax.Array:
    """Images between x (weight 0) and y (weight 1).

    t None: both are encoded to noise (DDIM section 5.3), mixed by `slerp` there, and sampled; for deterministic samplers.
    t an index: both are noised to x_t, mixed linearly, and denoised from there (DDPM section 4.3), with the same noise for
    every weight. Small t keep details of both, large t give new images.

    x, y: float [B, ...], of one shape; weights: float [W]. encoding: options of `sampling.encode` (prediction, variance,
    order), for t None only.
    Returns: [W, B, ...].
    Raises: ValueError for options of the encoding with an index t, for images of two shapes, and as `sampling.sample`.
    """
    if t is not None and encoding:
        raise ValueError(
            f"interpolate does not take {', '.join(encoding)} with t={t}; options of sampling.encode are for t=None, where "
            "images are encoded"
        )
    if jnp.shape(x) != jnp.shape(y):
        raise ValueError(f"x has shape {jnp.shape(x)} but y has {jnp.shape(y)}; they must agree")
    x, y = process.promote(x=x, y=y)
    key_x, key_y, key_sample = jax.random.split(key, 3)
    if t is None:
        ends = [sampling.encode(schedule, denoise_fn, image, **encoding) for image in (x, y)]
    else:
        ends = [_noised(k, schedule, image, t) for k, image in ((key_x, x), (key_y, y))]

    def between(weight):
        mixed = slerp(*ends, weight) if t is None else (1 - weight) * ends[0] + weight * ends[1]
        return sampling.sample(key_sample, schedule, denoise_fn, mixed, sampler, start=t)

    return jax.lax.map(between, jnp.asarray(weights, ends[0].dtype))
