"""Conditions of super-resolution networks, as in SR3 and ADM (Dhariwal & Nichol 2021, section 5.3).

The small image, resized to x_t's size, is an array condition for the network (`models.Conditional.condition_channels`). With
noise augmentation (Ho et al. 2021, Cascaded Diffusion Models, section 4) the small image is noisy, and an extra channel
holds the standard deviation of the noise.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def downsample(x_0, height: int) -> jax.Array:
    """Downsamples images [B, H, W, C] to `height` and the proportional width, by means over squares of side H / height.

    Raises: ValueError if the squares do not divide the image.
    """
    b, h, w, c = x_0.shape
    if not 1 <= height <= h or h % height or w % (h // height):
        raise ValueError(f"a low resolution of {height} pixels does not divide {h}x{w} images")
    side = h // height
    return x_0.reshape(b, height, side, w // side, side, c).mean(axis=(2, 4))


def augment(key, low, noise_std) -> jax.Array:
    """Returns low + noise_std eps: the small images [B, h, w, C] with noise of standard deviation noise_std [B]."""
    return low + noise_std[:, None, None, None] * jax.random.normal(key, low.shape, low.dtype)


def enlarge(low, shape: tuple[int, int]) -> jax.Array:
    """Resizes images [B, h, w, C] to (H, W) by bilinear interpolation of pixel centers, as in ADM's super-resolution."""
    return jax.image.resize(low, (low.shape[0], *shape, low.shape[-1]), "bilinear")


def condition_channels(channels: int, conditioning_noise: float) -> int:
    """Returns a super-resolution network's `condition_channels` for images with C channels: C, or C + 1 with noise."""
    return channels + (1 if conditioning_noise else 0)


def condition(low, shape: tuple[int, ...], noise_std=None) -> jax.Array:
    """Makes a super-resolution network's condition: the resized small image and, if given, a channel of the value noise_std.

    low: [B, h, w, C], in [-1, 1] plus any noise; images of H x W are not resized. shape: (B, H, W, C) of x_t. noise_std:
    float, or [B], the standard deviation of the noise, for a network trained with `diffusion.conditioning_noise`.
    Returns: [B, H, W, C], or C + 1 channels with noise_std. Raises: ValueError if batch or channels differ from x_t's.
    """
    if low.shape[0] != shape[0] or low.shape[-1] != shape[-1]:
        raise ValueError(f"x_t {shape} needs as many small images with as many channels, got {low.shape}")
    parts = [low if low.shape == shape else enlarge(low, (shape[1], shape[2]))]
    if noise_std is not None:
        parts.append(jnp.broadcast_to(jnp.reshape(noise_std, (-1, 1, 1, 1)), (*shape[:-1], 1)))
    return jnp.concatenate(parts, axis=-1)
