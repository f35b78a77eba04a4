"""The presets of OpenAI's published files, and the flags of OpenAI's scripts.

A file without a published name needs flags, because its tensors do not determine the whole network and no schedule.
"""

from __future__ import annotations

import pathlib
import re
from collections.abc import Mapping
from typing import Any

from diffusion_jax.errors import PretrainedError, list_names
from diffusion_jax.models import Classifier, UNet

__all__ = ["FILES", "NEW_ATTENTION_ORDER", "PRESETS", "FlagReader", "check_flags", "check_model_flags", "parse_flags"]

_LEARNED = {"variance": "learned_range"}
_IMPROVED = _LEARNED | {"schedule": "cosine", "num_timesteps": 4000}
# Improved DDPM's linear schedule goes from 0.1 / T to 20 / T.
_LINEAR_4000 = {"num_timesteps": 4000, "beta_start": 2.5e-5, "beta_end": 0.005}
# Presets of `models`: the height of the image and of the low-resolution image (or 0), and leaves of `config.diffusion`.
PRESETS: dict[str, tuple[int, int, dict[str, Any]]] = {
    "improved_cifar10": (32, 0, _IMPROVED | {"rescale_timesteps": True}),
    "improved_imagenet64": (64, 0, _IMPROVED | {"rescale_timesteps": True}),
    "improved_imagenet64_conditional": (64, 0, _IMPROVED),
    "improved_lsun": (256, 0, _LEARNED),
    "improved_upsampler_64_256": (256, 64, _LEARNED | _LINEAR_4000),
    "adm_imagenet64": (64, 0, _LEARNED | {"schedule": "cosine"}),
    "adm_imagenet128": (128, 0, _LEARNED),
    "adm_imagenet256": (256, 0, _LEARNED),
    "adm_imagenet256_unconditional": (256, 0, _LEARNED),
    "adm_imagenet512": (512, 0, _LEARNED),
    "adm_lsun": (256, 0, _LEARNED),
    "adm_upsampler_64_256": (256, 64, _LEARNED),
    "adm_upsampler_128_512": (512, 128, _LEARNED),
    "adm_classifier64": (64, 0, {"schedule": "cosine"}),
    "adm_classifier128": (128, 0, {}),
    "adm_classifier256": (256, 0, {}),
    "adm_classifier512": (512, 0, {}),
}
# The presets of the published files, by file name.
FILES = {
    "cifar10_uncond_50M_500K": "improved_cifar10",
    "cifar10_uncond_vlb_50M_500K": "improved_cifar10",
    "imagenet64_uncond_100M_1500K": "improved_imagenet64",
    "imagenet64_uncond_vlb_100M_1500K": "improved_imagenet64",
    "imagenet64_cond_270M_250K": "improved_imagenet64_conditional",
    "upsample_cond_500K": "improved_upsampler_64_256",
    "lsun_uncond_100M_1200K_bs128": "improved_lsun",
    "lsun_uncond_100M_2400K_bs64": "improved_lsun",
    "64x64_diffusion": "adm_imagenet64",
    "128x128_diffusion": "adm_imagenet128",
    "256x256_diffusion": "adm_imagenet256",
    "256x256_diffusion_uncond": "adm_imagenet256_unconditional",
    "512x512_diffusion": "adm_imagenet512",
    "64_256_upsampler": "adm_upsampler_64_256",
    "128_512_upsampler": "adm_upsampler_128_512",
    "lsun_bedroom": "adm_lsun",
    "lsun_cat": "adm_lsun",
    "lsun_horse": "adm_lsun",
    "lsun_horse_nodropout": "adm_lsun",
    "64x64_classifier": "adm_classifier64",
    "128x128_classifier": "adm_classifier128",
    "256x256_classifier": "adm_classifier256",
    "512x512_classifier": "adm_classifier512",
}
# Presets whose attention stores the rows of q, k and v one after the other, not head by head.
NEW_ATTENTION_ORDER = {"adm_imagenet64"}

# Flags of OpenAI's scripts that do not change the output of the network.
_IGNORED = {
    "use_fp16",
    "classifier_use_fp16",
    "use_checkpoint",
    "timestep_respacing",
    "use_kl",
    "rescale_learned_sigmas",
    "batch_size",
    "num_samples",
    "use_ddim",
    "clip_denoised",
    "classifier_scale",
}
_BOOLEAN = {
    "class_cond",
    "learn_sigma",
    "use_scale_shift_norm",
    "resblock_updown",
    "use_new_attention_order",
    "predict_xstart",
    "rescale_timesteps",
    "classifier_use_scale_shift_norm",
    "classifier_resblock_updown",
}
_POSITIVE = {
    "image_size",
    "large_size",
    "small_size",
    "num_channels",
    "num_res_blocks",
    "diffusion_steps",
    "classifier_width",
    "classifier_depth",
}
_INTEGER = _POSITIVE | {"num_heads", "num_heads_upsample", "num_head_channels"}
_KNOWN = {
    "image_size",
    "large_size",
    "small_size",
    "num_channels",
    "num_res_blocks",
    "num_heads",
    "num_heads_upsample",
    "num_head_channels",
    "attention_resolutions",
    "channel_mult",
    "dropout",
    "class_cond",
    "use_scale_shift_norm",
    "resblock_updown",
    "use_new_attention_order",
    "learn_sigma",
    "diffusion_steps",
    "noise_schedule",
    "predict_xstart",
    "rescale_timesteps",
    "classifier_width",
    "classifier_depth",
    "classifier_attention_resolutions",
    "classifier_use_scale_shift_norm",
    "classifier_resblock_updown",
    "classifier_pool",
}


def parse_flags(text: str) -> dict[str, Any]:
    """OpenAI's flags as their README writes them, "--image_size 64 --class_cond True", as a dict. Raises: PretrainedError."""
    words = text.replace("=", " ").split()
    if len(words) % 2 or not all(word.startswith("--") for word in words[::2]):
        raise PretrainedError(f"flags={text!r} are neither the name of a preset nor pairs of --name value")
    return {name.removeprefix("--"): _parse_value(value) for name, value in zip(words[::2], words[1::2], strict=True)}


def _parse_value(text: str) -> bool | int | float | str:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    return int(text) if re.fullmatch(r"-?\d+", text) else float(text) if re.fullmatch(r"-?[\d.]+", text) else text


def check_flags(flags: Mapping[str, Any]) -> None:
    """Raises: PretrainedError for an unknown flag, or a value of another type than OpenAI's scripts accept."""
    unknown = sorted(set(flags) - _KNOWN - _IGNORED)
    if unknown:
        raise PretrainedError(
            f"flags: {list_names(unknown)} is not a flag of OpenAI's scripts; known: {', '.join(sorted(_KNOWN))}"
        )
    for name, value in flags.items():
        kind = bool if name in _BOOLEAN else int if name in _INTEGER else None
        if kind and (type(value) is not kind or (name in _POSITIVE and value < 1)):
            allowed = "True or False" if kind is bool else "a whole number"
            raise PretrainedError(f"flags: {name}={value!r} must be {allowed}")
    if flags.get("classifier_pool", "attention") != "attention":
        raise PretrainedError(f"flags: classifier_pool={flags['classifier_pool']!r} is not supported, only attention")


class FlagReader:
    """Reads flags and collects the required ones that are missing, so that one error names all of them."""

    def __init__(self, flags: Mapping[str, Any]):
        self.flags = flags
        self._missing: list[str] = []

    def get(self, name: str, default: Any = None) -> Any:
        """A flag, or its default."""
        return self.flags.get(name, default)

    def require(self, *names: str, default: object = None) -> Any:
        """The first of these flags that is given, else None. default: of OpenAI's scripts, for the error message."""
        values = [self.flags[name] for name in names if self.flags.get(name) not in (None, "", -1)]
        if not values:
            note = "" if default is None else f" (OpenAI's default: {default})"
            self._missing.append(" or ".join(names) + note)
        return values[0] if values else None

    def check_complete(self, path: pathlib.Path) -> None:
        """Raises: PretrainedError if a required flag was missing."""
        if self._missing:
            raise PretrainedError(
                f"{path}: its tensors do not determine {'; '.join(self._missing)}; give these flags, or flags=NAME of a "
                f"preset: {', '.join(PRESETS)}"
            )


def check_model_flags(
    path: pathlib.Path, flags: Mapping[str, Any], model: UNet | Classifier, size: int, channels: int
) -> None:
    """Raises: PretrainedError for flags that contradict the network that the tensors determine.

    size: of the images. channels: of an image.
    """
    is_classifier = isinstance(model, Classifier)
    prefix = "classifier_" if is_classifier else ""
    expected = {
        ("classifier_width" if is_classifier else "num_channels"): model.channels,
        ("classifier_depth" if is_classifier else "num_res_blocks"): model.num_res_blocks,
        f"{prefix}use_scale_shift_norm": model.scale_shift_norm,
        f"{prefix}resblock_updown": model.resample_blocks,
        "class_cond": model.num_classes > 0,
    }
    if isinstance(model, UNet):
        expected["learn_sigma"] = model.out_channels == 2 * channels
    wrong = [
        f"{name}={flags[name]}, not {value}" for name, value in expected.items() if flags.get(name, value) != value
    ]
    resolutions = sorted((size >> level for level in model.attention_levels), reverse=True)
    flag = str(flags.get(f"{prefix}attention_resolutions", ""))
    if (
        flag
        and sorted((int(item) for item in flag.split(",") if item.strip().isdecimal()), reverse=True) != resolutions
    ):
        wrong.append(f"{prefix}attention_resolutions={flag} at {size} pixels, not {','.join(map(str, resolutions))}")
    flag = str(flags.get("channel_mult", ""))
    if flag and tuple(map(float, flag.split(","))) != tuple(map(float, model.channel_multipliers)):
        wrong.append(f"channel_mult={flag}, not {','.join(map(str, model.channel_multipliers))}")
    if wrong:
        raise PretrainedError(f"{path}: the flags contradict its tensors: {'; '.join(wrong)}")
