"""OpenAI's weights: Improved DDPM's and ADM's plain state dicts (https://github.com/openai/guided-diffusion).

The files contain no description. The tensors determine most of the network; the rest (number of heads, schedule, image size)
comes from the file's published name, a preset's name, or flags for OpenAI's own scripts.
"""

from __future__ import annotations

import dataclasses
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from diffusion_jax.config.presets import OPENAI
from diffusion_jax.config.values import Boolean, Integer, Number, Text, ValueKind, parse
from diffusion_jax.errors import PretrainedError, list_names
from diffusion_jax.models import Classifier, UNet, preset
from diffusion_jax.models.layers import split_heads
from diffusion_jax.pretrained import parameters
from diffusion_jax.pretrained.model import Model, make_model

_LEARNED = {"variance": "learned_range"}
_IMPROVED = _LEARNED | {"schedule": "cosine", "num_timesteps": 4000}
# Improved DDPM's linear schedule goes from 0.1 / T to 20 / T.
_LINEAR_4000 = {"num_timesteps": 4000, "beta_start": 2.5e-5, "beta_end": 0.005}

# EDM's preconditioning and noise levels (Karras et al. 2022), and its deterministic sampler.
EDM_DIFFUSION = {"path": "edm", "preconditioning": "edm", "prediction": "x_0", "variance": "fixed_small"}
EDM_SAMPLING = {"sampler": "heun", "spacing": "karras"}
# A consistency network with EDM's noise levels (Song et al. 2023), and its sampler with one step.
_CONSISTENCY = EDM_DIFFUSION | {"preconditioning": "consistency"}
_CONSISTENCY_SAMPLING = {"sampler": "consistency", "steps": 1, "spacing": "trailing"}

# {preset of `models`: (image height, height of the low-resolution image or 0, settings of `config.diffusion`)}
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
    "edm_imagenet64": (64, 0, EDM_DIFFUSION),
    "edm_lsun": (256, 0, EDM_DIFFUSION),
    "consistency_imagenet64": (64, 0, _CONSISTENCY),
    "consistency_lsun": (256, 0, _CONSISTENCY),
    "adm_upsampler_64_256": (256, 64, _LEARNED),
    "adm_upsampler_128_512": (512, 128, _LEARNED),
    "adm_classifier64": (64, 0, {"schedule": "cosine"}),
    "adm_classifier128": (128, 0, {}),
    "adm_classifier256": (256, 0, {}),
    "adm_classifier512": (512, 0, {}),
}
# The presets of the published files, by file name.
FILES = {
    **dict.fromkeys(("cifar10_uncond_50M_500K", "cifar10_uncond_vlb_50M_500K"), "improved_cifar10"),
    **dict.fromkeys(("imagenet64_uncond_100M_1500K", "imagenet64_uncond_vlb_100M_1500K"), "improved_imagenet64"),
    "imagenet64_cond_270M_250K": "improved_imagenet64_conditional",
    "upsample_cond_500K": "improved_upsampler_64_256",
    **dict.fromkeys(("lsun_uncond_100M_1200K_bs128", "lsun_uncond_100M_2400K_bs64"), "improved_lsun"),
    **{f"{size}x{size}_diffusion": f"adm_imagenet{size}" for size in (64, 128, 256, 512)},
    "256x256_diffusion_uncond": "adm_imagenet256_unconditional",
    "edm_imagenet64_ema": "edm_imagenet64",
    **dict.fromkeys(("edm_bedroom256_ema", "edm_cat256_ema"), "edm_lsun"),
    **dict.fromkeys(("cd_imagenet64_l2", "cd_imagenet64_lpips", "ct_imagenet64"), "consistency_imagenet64"),
    **{
        f"{kind}_{data}256{norm}": "consistency_lsun"
        for data in ("bedroom", "cat")
        for kind, norm in (("cd", "_l2"), ("cd", "_lpips"), ("ct", ""))
    },
    **{f"{sizes}_upsampler": f"adm_upsampler_{sizes}" for sizes in ("64_256", "128_512")},
    **dict.fromkeys(("lsun_bedroom", "lsun_cat", "lsun_horse", "lsun_horse_nodropout"), "adm_lsun"),
    **{f"{size}x{size}_classifier": f"adm_classifier{size}" for size in (64, 128, 256, 512)},
}
# Presets whose files store q, k and v one after the other (the new order), instead of q, k and v of head after head.
_NEW_ATTENTION_ORDER = {"adm_imagenet64", "edm_imagenet64", "edm_lsun", "consistency_imagenet64", "consistency_lsun"}

# Flags in OpenAI's scripts that describe a network, with the kinds of their values.
_FLAGS: dict[str, ValueKind] = {
    **dict.fromkeys("image_size large_size small_size diffusion_steps classifier_depth".split(), Integer()),
    **dict.fromkeys("num_heads num_heads_upsample num_head_channels".split(), Integer()),
    **dict.fromkeys("use_new_attention_order predict_xstart rescale_timesteps".split(), Boolean()),
    "dropout": Number(),
    "noise_schedule": Text(),
}
# Flags in OpenAI's scripts that do not change the network's output, or that the tensors determine.
_IGNORED_FLAGS = (
    "num_channels num_res_blocks channel_mult attention_resolutions class_cond learn_sigma use_scale_shift_norm "
    "resblock_updown classifier_width classifier_pool classifier_attention_resolutions "
    "classifier_use_scale_shift_norm classifier_resblock_updown use_fp16 classifier_use_fp16 use_checkpoint "
    "timestep_respacing use_kl rescale_learned_sigmas batch_size num_samples use_ddim clip_denoised classifier_scale"
).split()


NAMING = parameters.Naming(  # in the files, q, k and v are one tensor (`split_attention`)
    {
        "block": "{half}_blocks.{position}.0",
        "attn": "{half}_blocks.{position}.1",
        "downsample": "input_blocks.{position}.0",
        "downsample_conv": "input_blocks.{position}.0.op",
        "upsample": "output_blocks.{position}.{after_attention}",
        "upsample_conv": "output_blocks.{position}.{after_attention}.conv",
        "conv_in": "input_blocks.0.0",
        "mid_block_0": "middle_block.0",
        "mid_attn": "middle_block.1",
        "mid_block_1": "middle_block.2",
        "time_0": "time_embed.0",
        "time_1": "time_embed.2",
        "class": "label_emb",
        "norm_out": "out.0",
        "conv_out": "out.2",
        "pool": "out.2",
        "norm1": "in_layers.0",
        "conv1": "in_layers.2",
        "time_proj": "emb_layers.1",
        "norm2": "out_layers.0",
        "conv2": "out_layers.3",
        "skip": "skip_connection",
        "proj": "proj_out",
    }
)


def parse_flags(text: str) -> dict[str, str]:
    """Parses OpenAI's flags, such as "--image_size 64 --class_cond True", into a dict. Raises: PretrainedError."""
    words = text.replace("=", " ").split()
    if len(words) % 2 or not all(word.startswith("--") for word in words[::2]):
        raise PretrainedError(f"flags={text!r} are neither a preset name nor --name value pairs")
    return {name.removeprefix("--"): value for name, value in zip(words[::2], words[1::2], strict=True)}


def _convert_flags(flags: Mapping[str, Any]) -> dict[str, Any]:
    """Converts the flags that describe a network to their types. Raises: PretrainedError for unknown flags or wrong types."""
    known, converted = [*_FLAGS, *_IGNORED_FLAGS], {}
    unknown = sorted(set(flags) - set(known))
    if unknown:
        raise PretrainedError(
            f"flags: {list_names(unknown)} is not a flag of OpenAI's scripts; known: {', '.join(sorted(known))}"
        )
    for name in flags.keys() & _FLAGS.keys():
        try:
            converted[name] = parse(_FLAGS[name], str(flags[name]))
        except ValueError:
            raise PretrainedError(f"flags: {name}={flags[name]} must be {_FLAGS[name].allowed}") from None
    return converted


def is_openai(names) -> bool:
    """Returns whether these tensor names are OpenAI's."""
    return "input_blocks.0.0.weight" in names


def describe_openai(
    path: pathlib.Path, tensors: parameters.Tensors, flags: str | Mapping[str, Any] | None
) -> tuple[Model, bool]:
    """Infers the model of a state dict. Returns: (model without parameters, whether its attention rows have the new order).

    flags: the name of a preset or a published file, or OpenAI's flags, as a dict or as text; None to use the file's name.
    Raises: PretrainedError for unknown or missing flags.
    """
    without_dropout = flags is None and path.stem.endswith("nodropout")
    if flags is None:
        flags = FILES.get(path.stem, {})
    if isinstance(flags, str):
        flags = parse_flags(flags) if "=" in flags or " " in flags else FILES.get(flags, flags)
    if not isinstance(flags, str):
        return _describe_by_flags(path, tensors.shapes, flags)
    if flags not in PRESETS:
        raise PretrainedError(f"flags={flags!r} is not a preset of OpenAI's; known: {', '.join(PRESETS)}")
    size, low_resolution, diffusion = PRESETS[flags]
    model = preset(flags).clone(dropout=0.0) if without_dropout else preset(flags)
    published: dict[str, Any] = {"edm": EDM_SAMPLING | {"steps": 40}, "consistency": _CONSISTENCY_SAMPLING}
    fields = {"published_sampling": published.get(diffusion.get("preconditioning", ""), {})}
    net = make_model(f"OpenAI, {flags}", model, size, diffusion, low_resolution=low_resolution, **fields)
    return net, flags in _NEW_ATTENTION_ORDER


def _describe_by_flags(
    path: pathlib.Path, shapes: Mapping[str, tuple[int, ...]], flags: Mapping[str, Any]
) -> tuple[Model, bool]:
    flags, missing = _convert_flags(flags), []

    def require(*names: str, default: object = None) -> Any:
        """Returns the first given flag of `names`. default: the default in OpenAI's scripts, for the error message."""
        values = [flags[name] for name in names if flags.get(name, -1) != -1]
        if not values:
            missing.append(" or ".join(names) + ("" if default is None else f" (OpenAI's default: {default})"))
        return values[0] if values else None

    is_classifier = "out.2.positional_embedding" in shapes
    has_strided = any(re.match(r"input_blocks\.\d+\.0\.op\.", name) for name in shapes)
    depth = require("classifier_depth", default=2) if is_classifier and not has_strided else None
    size = require("image_size", "large_size")
    num_timesteps: Any = require("diffusion_steps", default=1000)
    diffusion: dict[str, Any] = {
        "schedule": require("noise_schedule", default="linear"),
        "num_timesteps": num_timesteps,
        "prediction": "x_0" if flags.get("predict_xstart") else "eps",
        "variance": "fixed_large",
    }
    if num_timesteps not in (None, 1000):  # with 1000 steps, rescaling changes nothing
        diffusion["rescale_timesteps"] = require("rescale_timesteps", default="True in Improved DDPM, False in ADM")
    fields: dict[str, Any] = {"head_channels": 64}
    if not is_classifier:
        head_channels, num_heads = flags.get("num_head_channels", -1), 1
        if head_channels == -1:
            head_channels, num_heads = None, require("num_heads", "num_head_channels", default="--num_heads 4")
            if flags.get("num_heads_upsample", -1) not in (-1, num_heads):
                raise PretrainedError(f"flags: num_heads_upsample={flags['num_heads_upsample']} is not supported")
        fields = {"head_channels": head_channels, "num_heads": num_heads}
        if head_channels is not None or num_heads not in (None, 1):
            require("use_new_attention_order", default="False, but True for ADM at 64 pixels")
    channels, low_resolution = shapes["input_blocks.0.0.weight"][1], 0
    if not is_classifier and ("large_size" in flags or channels == 6):
        channels, low_resolution = channels // 2, require("small_size")
    if missing:
        raise PretrainedError(
            f"{path}: its tensors do not determine {'; '.join(missing)}; give these flags, or flags=NAME of a preset: "
            f"{', '.join(PRESETS)}"
        )
    fields = OPENAI | fields | _infer_fields(shapes, depth)
    if is_classifier:
        model = Classifier(**fields, num_classes=shapes["out.2.c_proj.weight"][0])
    else:
        out_channels, num_classes = shapes["out.2.weight"][0], shapes.get("label_emb.weight", (0,))[0]
        fields |= {"num_classes": num_classes, "out_channels": out_channels, "dropout": flags.get("dropout", 0.0)}
        model = UNet(**fields)
        if out_channels == 2 * channels:
            diffusion["variance"] = "learned_range"
    if diffusion["schedule"] == "linear":
        diffusion |= {"beta_start": 0.1 / diffusion["num_timesteps"], "beta_end": 20 / diffusion["num_timesteps"]}
    net = make_model("OpenAI", model, size, diffusion, channels, low_resolution=low_resolution)
    return net, flags.get("use_new_attention_order", False) and not is_classifier


def _infer_fields(shapes: Mapping[str, tuple[int, ...]], depth: int | None) -> dict[str, Any]:
    """Infers network fields from tensor shapes. depth: blocks in each level, for a classifier without stride 2."""

    def numbers(pattern):
        return sorted({int(match[1]) for name in shapes if (match := re.match(pattern, name))})

    num_blocks = len(numbers(r"input_blocks\.(\d+)\."))
    strided = numbers(r"input_blocks\.(\d+)\.0\.op\.")
    upsampling = numbers(r"output_blocks\.(\d+)\.[12]\.(?:conv|in_layers)\.")
    n = strided[0] - 1 if strided else upsampling[0] if upsampling else depth or num_blocks - 1
    num_levels, rest = divmod(num_blocks, n + 1)
    if rest:
        raise PretrainedError(f"{n} blocks a level do not fit {num_blocks} input blocks; is the file one of OpenAI's?")
    channels = shapes["time_embed.0.weight"][1]
    first = [f"input_blocks.{1 + level * (n + 1)}" for level in range(num_levels)]
    widths = [shapes[f"{block}.0.out_layers.3.weight"][0] for block in first]
    return {
        "channels": channels,
        "num_res_blocks": n,
        "channel_multipliers": parameters.channel_multipliers(widths, channels),
        "attention_levels": tuple(i for i, block in enumerate(first) if f"{block}.1.qkv.weight" in shapes),
        "scale_shift_norm": shapes[f"{first[0]}.0.emb_layers.1.weight"][0] == 2 * widths[0],
        "resample_blocks": num_levels > 1 and not strided,
    }


def load_openai(
    path: pathlib.Path, tensors: parameters.Tensors, flags: str | Mapping[str, Any] | None, with_params: bool
) -> Model:
    """Loads a state dict's network; with its parameters if `with_params`. Raises: PretrainedError, as `describe_openai`."""
    net, new_order = describe_openai(path, tensors, flags)
    if not with_params:
        return net
    return net.read_params(path, split_attention(tensors, net.model, new_order), NAMING)


def split_attention(tensors: parameters.Tensors, model: Any, new_order: bool) -> parameters.Tensors:
    """Returns the tensors with q, k and v, which are one tensor in the file, under separate names.

    The classifier's pooling has other tensor names, and always the new order.
    """
    sources: dict[str, tuple[str, list[str]]] = {}  # {name: (name in the file, all names of this tensor)}
    for source in tensors.shapes:
        match = re.fullmatch(r"(.+)\.(?:qkv|qkv_proj)\.(weight|bias)", source)
        names = [source.replace("out.2.c_proj.", "out.2.proj_out.")]
        if match:
            names = [f"{match[1]}.{layer}.{match[2]}" for layer in "qkv"]
        sources |= dict.fromkeys(names, (source, names))
    split: dict[str, np.ndarray] = {}  # slices of tensors that were read, but not used yet

    def read(name: str) -> np.ndarray:
        source, names = sources[name]
        if len(names) == 1:
            return tensors.read(source)
        if name not in split:
            value = tensors.read(source)
            channels, rest = value.shape[0] // 3, value.shape[1:]
            heads = 1  # the rows are (head, 3, d), and in the new order (3, head, d)
            if not (new_order or "qkv_proj" in source):
                heads = split_heads(channels, model.num_heads, model.head_channels)
            parts = value.reshape(heads, 3, channels // heads, *rest).swapaxes(0, 1).reshape(3, channels, *rest)
            split.update(zip(names, parts, strict=True))
        return split.pop(name)

    return dataclasses.replace(tensors, shapes=dict.fromkeys(sources, ()), read=read)
