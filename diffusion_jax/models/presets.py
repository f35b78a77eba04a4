"""The published networks by name, as fields of `UNet` and `Classifier`.

| preset | parameters | weights |
|---|---|---|
| ddpm_cifar10 | 35,746,307 | DDPM, CIFAR-10 |
| ddpm_256 | 113,673,219 | DDPM, CelebA-HQ and LSUN at 256 pixels |
| improved_cifar10 | 52,546,438 | Improved DDPM, CIFAR-10 |
| improved_imagenet64 | 121,063,942 | Improved DDPM, ImageNet at 64 pixels |
| improved_imagenet64_conditional | 273,049,350 | the same with classes |
| improved_lsun | 113,676,678 | Improved DDPM, LSUN bedroom at 256 pixels |
| improved_upsampler_64_256 | 279,792,390 | Improved DDPM, from 64 to 256 pixels |
| adm_imagenet64 | 295,904,454 | ADM, ImageNet at 64 pixels |
| adm_imagenet128 | 421,529,606 | at 128 |
| adm_imagenet256 | 553,838,086 | at 256 |
| adm_imagenet256_unconditional | 552,814,086 | without classes |
| adm_imagenet512 | 558,997,638 | at 512 |
| adm_lsun | 552,814,086 | ADM, LSUN at 256 pixels |
| adm_upsampler_64_256 | 311,795,910 | ADM, from 64 to 256 pixels |
| adm_upsampler_128_512 | 308,835,270 | from 128 to 512 |
| adm_classifier64 | 65,438,568 | ADM's classifiers of noisy images |
| adm_classifier128 | 42,568,040 | |
| adm_classifier256 | 54,096,360 | |
| adm_classifier512 | 54,448,360 | |

Super-resolution networks take the small image as their condition: see `models.upsampling`.
"""

from __future__ import annotations

from diffusion_jax.config.presets import OPENAI, PRESETS, UNET_PRESETS, preset_fields
from diffusion_jax.models.classifier import Classifier
from diffusion_jax.models.unet import UNet

__all__ = ["OPENAI", "PRESETS", "preset", "preset_fields"]


def preset(name: str) -> UNet | Classifier:
    """A published network by name, one of the table above. Raises: ValueError for an unknown name."""
    fields = preset_fields(name)
    return UNet(**UNET_PRESETS[name]) if name in UNET_PRESETS else Classifier(**fields)
