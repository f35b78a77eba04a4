"""OpenAI's weights: Improved DDPM's and ADM's plain state dicts (https://github.com/openai/guided-diffusion).

Such a file says nothing of itself. Most is seen from its tensors; the rest (how many heads, the schedule, the image's size)
must be told: by the file's published name, by a preset's name, or by the flags of OpenAI's own scripts.
"""

from __future__ import annotations

import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from diffusion_jax.errors import PretrainedError, list_names
from diffusion_jax.models import Classifier, UNet, preset
from diffusion_jax.models.presets import OPENAI
from diffusion_jax.pretrained import layers
from diffusion_jax.pretrained.description import Description, describe
from diffusion_jax.pretrained.files import Tensors

_LEARNED = {"variance": "learned_range"}
_IMPROVED = _LEARNED | {"schedule": "cosine", "num_timesteps": 4000}
# Improved DDPM's linear schedule has 0.1 / T and 20 / T for its ends.
_LINEAR_4000 = {"num_timesteps": 4000, "beta_start": 2.5e-5, "beta_end": 0.005}
# Presets of `models`: the height of the image (and of the one to enlarge), and what the weights were trained for.
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
# The published files, which are taken at their names.
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
_NEW_ORDER = {"adm_imagenet64"}  # of the rows of its attention's q, k and v

# Flags of OpenAI's scripts that say nothing about what weights compute.
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
_WHOLE = _POSITIVE | {"num_heads", "num_heads_upsample", "num_head_channels"}
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


def is_openai(names) -> bool:
    """Whether tensors of these names are OpenAI's."""
    return "input_blocks.0.0.weight" in names


def describe_openai(
    path: pathlib.Path, tensors: Tensors, flags: str | Mapping[str, Any] | None
) -> tuple[Description, bool]:
    """What a state dict is, and whether its attention has the new order.

    flags: a preset's or a published file's name, or OpenAI's flags, as a dict or as text; None for what the file is called.
    Raises: PretrainedError for flags that its tensors deny, and for those that are needed.
    """
    undropped = flags is None and path.stem.endswith("nodropout")
    if flags is None:
        flags = FILES.get(path.stem, {})
    if isinstance(flags, str):
        flags = parse_flags(flags) if "=" in flags or " " in flags else FILES.get(flags, flags)
    if not isinstance(flags, str):
        return _from_flags(path, tensors, dict(flags))
    if flags not in PRESETS:
        raise PretrainedError(f"flags={flags!r} is no preset of OpenAI's; known: {', '.join(PRESETS)}")
    size, low, diffusion = PRESETS[flags]
    model = preset(flags).clone(dropout=0.0) if undropped else preset(flags)
    return describe(f"OpenAI, {flags}", model, size, diffusion, low_resolution=low), flags in _NEW_ORDER


def parse_flags(text: str) -> dict[str, Any]:
    """OpenAI's flags as their README writes them, "--image_size 64 --class_cond True", as a dict. Raises: PretrainedError."""
    words = text.replace("=", " ").split()
    if len(words) % 2 or not all(word.startswith("--") for word in words[::2]):
        raise PretrainedError(f"flags={text!r} are neither a preset's name nor pairs of --name value")
    return {name.removeprefix("--"): _value(value) for name, value in zip(words[::2], words[1::2], strict=True)}


def _value(text: str) -> Any:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    return int(text) if re.fullmatch(r"-?\d+", text) else float(text) if re.fullmatch(r"-?[\d.]+", text) else text


def _structure(path: pathlib.Path, shapes: Mapping[str, tuple[int, ...]], depth: int | None) -> dict[str, Any]:
    """The fields of a network that its tensors decide. depth: of a classifier, blocks a level, where nothing shows them."""

    def numbers(pattern):
        return sorted({int(found[1]) for name in shapes if (found := re.match(pattern, name))})

    try:
        blocks = len(numbers(r"input_blocks\.(\d+)\."))
        strided = numbers(r"input_blocks\.(\d+)\.0\.op\.")
        doubled = numbers(r"output_blocks\.(\d+)\.[12]\.(?:conv|in_layers)\.")
        n = strided[0] - 1 if strided else doubled[0] if doubled else depth or blocks - 1
        if blocks % (n + 1):
            raise PretrainedError(
                f"{path}: {n} blocks a level do not fit {blocks} input blocks; is it one of OpenAI's?"
            )
        levels = blocks // (n + 1)
        channels = shapes["time_embed.0.weight"][1]
        first = [f"input_blocks.{1 + level * (n + 1)}" for level in range(levels)]
        widths = [shapes[f"{block}.0.out_layers.3.weight"][0] for block in first]
        return {
            "channels": channels,
            "num_res_blocks": n,
            "channel_multipliers": layers.multipliers(widths, channels),
            "attention_levels": tuple(i for i, block in enumerate(first) if f"{block}.1.qkv.weight" in shapes),
            "scale_shift_norm": shapes[f"{first[0]}.0.emb_layers.1.weight"][0] == 2 * widths[0],
            "resample_blocks": levels > 1 and not strided,
        }
    except (KeyError, IndexError) as error:
        raise PretrainedError(f"{path} is not one of OpenAI's networks: its tensor {error} is missing") from None


def _from_flags(path: pathlib.Path, tensors: Tensors, flags: dict[str, Any]) -> tuple[Description, bool]:
    unknown = sorted(set(flags) - _KNOWN - _IGNORED)
    if unknown:
        raise PretrainedError(f"flags: {list_names(unknown)} is none of OpenAI's; known: {', '.join(sorted(_KNOWN))}")
    for name, value in flags.items():
        kind = bool if name in _BOOLEAN else int if name in _WHOLE else None
        if kind and (type(value) is not kind or (name in _POSITIVE and value < 1)):
            raise PretrainedError(
                f"flags: {name}={value!r} must be {'True or False' if kind is bool else 'a whole number'}"
            )
    shapes = tensors.shapes
    if flags.get("classifier_pool", "attention") != "attention":
        raise PretrainedError(f"flags: classifier_pool={flags['classifier_pool']!r} is not supported, only attention")
    classifier = "out.2.positional_embedding" in shapes
    needed = []

    def need(*names, default=None):
        given = [flags[name] for name in names if flags.get(name) not in (None, "", -1)]
        if not given:
            needed.append(" or ".join(names) + ("" if default is None else f" (OpenAI's default: {default})"))
        return given[0] if given else None

    strided = any(re.match(r"input_blocks\.\d+\.0\.op\.", name) for name in shapes)
    depth = need("classifier_depth", default=2) if classifier and not strided else None
    size = need("image_size", "large_size")
    steps, schedule = need("diffusion_steps", default=1000), need("noise_schedule", default="linear")
    rescaled = False
    if steps not in (None, 1000):  # else it changes nothing
        rescaled = need("rescale_timesteps", default="True in Improved DDPM, False in ADM")
    fields = {"head_channels": 64}
    if not classifier:
        own, heads = flags.get("num_head_channels", -1), None
        if own == -1:
            heads = need("num_heads", "num_head_channels", default="--num_heads 4")
        fields = {"head_channels": None if own == -1 else own, "num_heads": heads or 1}
        if own != -1 or heads not in (None, 1):
            need("use_new_attention_order", default="False, but True for ADM at 64 pixels")
        if flags.get("num_heads_upsample", -1) not in (-1, heads):
            fields["num_heads_up"] = flags["num_heads_upsample"]
    in_channels = shapes["input_blocks.0.0.weight"][1]
    low, channels = 0, in_channels
    if not classifier and ("large_size" in flags or in_channels == 6):
        low, channels = need("small_size"), in_channels // 2
    if needed:
        advice = f"or flags=NAME of a preset: {', '.join(PRESETS)}"
        raise PretrainedError(f"{path}: its tensors do not say {'; '.join(needed)}; give these flags, {advice}")
    fields |= _structure(path, shapes, depth)
    if classifier:
        model = Classifier(**OPENAI | fields | {"num_classes": shapes["out.2.c_proj.weight"][0]})
    else:
        classes = shapes.get("label_emb.weight", (0,))[0]
        fields |= {"num_classes": classes, "out_channels": shapes["out.2.weight"][0]}
        model = UNet(**OPENAI | fields | {"dropout": float(flags.get("dropout", 0.0))})
    _check_flags(path, flags, model, size, channels)
    learned = not classifier and shapes["out.2.weight"][0] == 2 * channels
    diffusion = {
        "schedule": schedule,
        "num_timesteps": steps,
        "rescale_timesteps": rescaled,
        "prediction": "x_0" if flags.get("predict_xstart") else "eps",
        "variance": "learned_range" if learned else "fixed_large",
    }
    if schedule == "linear":
        diffusion |= {"beta_start": 0.1 / steps, "beta_end": 20 / steps}
    try:
        found = describe("OpenAI", model, size, diffusion, channels=channels, low_resolution=low or 0)
    except (ValueError, TypeError) as error:
        raise PretrainedError(f"flags: {error}") from None
    return found, bool(flags.get("use_new_attention_order", False)) and not classifier


def _check_flags(
    path: pathlib.Path, flags: Mapping[str, Any], model: UNet | Classifier, size: int, channels: int
) -> None:
    """Raises: PretrainedError where flags say of the network what its tensors deny."""
    prefix = "classifier_" if isinstance(model, Classifier) else ""
    at = sorted((size >> level for level in model.attention_levels), reverse=True)
    seen = {
        ("classifier_width" if prefix else "num_channels"): model.channels,
        ("classifier_depth" if prefix else "num_res_blocks"): model.num_res_blocks,
        f"{prefix}use_scale_shift_norm": model.scale_shift_norm,
        f"{prefix}resblock_updown": model.resample_blocks,
        "class_cond": model.num_classes > 0,
    }
    if not prefix:
        seen["learn_sigma"] = model.out_channels == 2 * channels
    wrong = [f"{name}={flags[name]}, not {value}" for name, value in seen.items() if flags.get(name, value) != value]
    said = str(flags.get(f"{prefix}attention_resolutions", ""))
    if said and sorted((int(one) for one in said.split(",") if one.strip().isdecimal()), reverse=True) != at:
        wrong.append(f"{prefix}attention_resolutions={said} at {size} pixels, not {','.join(map(str, at))}")
    said = str(flags.get("channel_mult", ""))
    if said and tuple(map(float, said.split(","))) != tuple(map(float, model.channel_multipliers)):
        wrong.append(f"channel_mult={said}, not {','.join(map(str, model.channel_multipliers))}")
    if wrong:
        raise PretrainedError(f"{path}: the flags say otherwise than its tensors: {'; '.join(wrong)}")


def load_params(path: pathlib.Path, tensors: Tensors, found: Description, new_order: bool) -> dict:
    """The parameters. Raises: PretrainedError."""
    # qkv is one tensor there and three layers here; the classifier's pooling has other names for the same.
    whole, combined = {}, {}
    for name in tensors:
        joined = re.fullmatch(r"(.+)\.(?:qkv|qkv_proj)\.(weight|bias)", name)
        if joined:
            combined |= {f"{joined[1]}.{layer}.{joined[2]}": name for layer in "qkv"}
        else:
            whole[name.replace("out.2.c_proj.", "out.2.proj_out.")] = name
    split: dict[str, np.ndarray] = {}  # parts of tensors that were read, and not yet asked for

    def read(own, path, shape):
        if own in whole:
            return layers.from_torch(tensors[whole[own]], path, shape)
        if own not in split:
            value = tensors[combined[own]]
            channels = value.shape[0] // 3
            if new_order or path[0] == "pool":
                value = value.reshape(3, channels, *value.shape[1:])
            else:  # (head, 3, d)
                heads = layers.heads_of(path, found.model, channels)
                value = value.reshape(heads, 3, channels // heads, *value.shape[1:]).swapaxes(0, 1)
                value = value.reshape(3, channels, *value.shape[3:])
            stem, leaf = re.fullmatch(r"(.+)\.[qkv]\.(\w+)", own).groups()
            split.update({f"{stem}.{layer}.{leaf}": part for layer, part in zip("qkv", value, strict=True)})
        return layers.from_torch(split.pop(own), path, shape)

    shapes = layers.shapes_of(found.model, found.image_size, found.in_channels)
    return layers.fill(str(path), shapes, (*whole, *combined), lambda p: layers.OPENAI(p, found.model), read)
