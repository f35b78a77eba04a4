"""OpenAI's weights: Improved DDPM's and ADM's plain state dicts (https://github.com/openai/guided-diffusion).

Such a file contains no description. Its tensors determine most of the network; the rest (the number of heads, the schedule,
the image size) comes from the file's published name, from the name of a preset, or from the flags of OpenAI's own scripts.
"""

from __future__ import annotations

import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from diffusion_jax.config.presets import OPENAI
from diffusion_jax.errors import PretrainedError
from diffusion_jax.models import Classifier, UNet, preset
from diffusion_jax.pretrained import parameters
from diffusion_jax.pretrained.description import Description, make_description
from diffusion_jax.pretrained.openai_flags import (
    FILES,
    NEW_ATTENTION_ORDER,
    PRESETS,
    FlagReader,
    check_flags,
    check_model_flags,
    parse_flags,
)
from diffusion_jax.pretrained.tensors import Tensors

__all__ = ["describe_openai", "is_openai", "load_params"]

_Shapes = Mapping[str, tuple[int, ...]]


def is_openai(names) -> bool:
    """Whether tensors of these names are OpenAI's."""
    return "input_blocks.0.0.weight" in names


def describe_openai(
    path: pathlib.Path, tensors: Tensors, flags: str | Mapping[str, Any] | None
) -> tuple[Description, bool]:
    """(the description of a state dict, whether its attention has the new order).

    flags: the name of a preset or a published file, or OpenAI's flags, as a dict or as text; None for the file's own name.
    Raises: PretrainedError for flags that contradict the tensors, and for required flags that are missing.
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
    description = make_description(f"OpenAI, {flags}", model, size, diffusion, low_resolution=low_resolution)
    return description, flags in NEW_ATTENTION_ORDER


def _describe_by_flags(path: pathlib.Path, shapes: _Shapes, flags: Mapping[str, Any]) -> tuple[Description, bool]:
    check_flags(flags)
    reader = FlagReader(flags)
    is_classifier = "out.2.positional_embedding" in shapes
    has_strided = any(re.match(r"input_blocks\.\d+\.0\.op\.", name) for name in shapes)
    depth = reader.require("classifier_depth", default=2) if is_classifier and not has_strided else None
    size = reader.require("image_size", "large_size")
    diffusion = _read_diffusion(reader)
    heads = {"head_channels": 64} if is_classifier else _read_heads(reader)
    in_channels = shapes["input_blocks.0.0.weight"][1]
    low_resolution, channels = 0, in_channels
    if not is_classifier and ("large_size" in flags or in_channels == 6):
        low_resolution, channels = reader.require("small_size"), in_channels // 2
    reader.check_complete(path)

    fields: dict[str, Any] = OPENAI | heads | _infer_fields(path, shapes, depth)
    if is_classifier:
        fields |= {"num_classes": shapes["out.2.c_proj.weight"][0]}
        model = Classifier(**fields)
    else:
        out_channels = shapes["out.2.weight"][0]
        fields |= {"num_classes": shapes.get("label_emb.weight", (0,))[0], "out_channels": out_channels}
        fields |= {"dropout": float(flags.get("dropout", 0.0))}
        model = UNet(**fields)
        if out_channels == 2 * channels:
            diffusion["variance"] = "learned_range"
    check_model_flags(path, flags, model, size, channels)
    if diffusion["schedule"] == "linear":
        num_timesteps = diffusion["num_timesteps"]
        diffusion |= {"beta_start": 0.1 / num_timesteps, "beta_end": 20 / num_timesteps}
    try:
        description = make_description(
            "OpenAI", model, size, diffusion, channels=channels, low_resolution=low_resolution or 0
        )
    except (ValueError, TypeError) as error:
        raise PretrainedError(f"flags: {error}") from None
    return description, bool(flags.get("use_new_attention_order", False)) and not is_classifier


def _read_diffusion(reader: FlagReader) -> dict[str, Any]:
    """Leaves of `config.diffusion` of weights with a fixed variance."""
    num_timesteps = reader.require("diffusion_steps", default=1000)
    schedule = reader.require("noise_schedule", default="linear")
    rescale = False
    if num_timesteps not in (None, 1000):  # at 1000 it changes nothing
        rescale = reader.require("rescale_timesteps", default="True in Improved DDPM, False in ADM")
    return {
        "schedule": schedule,
        "num_timesteps": num_timesteps,
        "rescale_timesteps": rescale,
        "prediction": "x_0" if reader.get("predict_xstart") else "eps",
        "variance": "fixed_large",
    }


def _read_heads(reader: FlagReader) -> dict[str, Any]:
    """The fields of a U-Net about attention heads, which its tensors do not determine."""
    head_channels, num_heads = reader.get("num_head_channels", -1), None
    if head_channels == -1:
        num_heads = reader.require("num_heads", "num_head_channels", default="--num_heads 4")
    fields = {"head_channels": None if head_channels == -1 else head_channels, "num_heads": num_heads or 1}
    if head_channels != -1 or num_heads not in (None, 1):
        reader.require("use_new_attention_order", default="False, but True for ADM at 64 pixels")
    if reader.get("num_heads_upsample", -1) not in (-1, num_heads):
        fields["num_heads_up"] = reader.get("num_heads_upsample")
    return fields


def _infer_fields(path: pathlib.Path, shapes: _Shapes, depth: int | None) -> dict[str, Any]:
    """The fields of a network that its tensors determine. depth: blocks of a level, for a classifier without strides."""

    def numbers(pattern):
        return sorted({int(match[1]) for name in shapes if (match := re.match(pattern, name))})

    try:
        num_blocks = len(numbers(r"input_blocks\.(\d+)\."))
        strided = numbers(r"input_blocks\.(\d+)\.0\.op\.")
        upsampling = numbers(r"output_blocks\.(\d+)\.[12]\.(?:conv|in_layers)\.")
        n = strided[0] - 1 if strided else upsampling[0] if upsampling else depth or num_blocks - 1
        if num_blocks % (n + 1):
            raise PretrainedError(
                f"{path}: {n} blocks a level do not fit {num_blocks} input blocks; is it one of OpenAI's?"
            )
        num_levels = num_blocks // (n + 1)
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
    except (KeyError, IndexError) as error:
        raise PretrainedError(f"{path} is not one of OpenAI's networks: its tensor {error} is missing") from None


def load_params(path: pathlib.Path, tensors: Tensors, description: Description, new_order: bool) -> dict:
    """The parameters. new_order: of the attention's q, k and v, as `describe_openai` returns it. Raises: PretrainedError."""
    # q, k and v are one tensor in the file and three layers here; the classifier's pooling has other names for the same.
    stored, joined = {}, {}
    for name in tensors:
        match = re.fullmatch(r"(.+)\.(?:qkv|qkv_proj)\.(weight|bias)", name)
        if match:
            joined |= {f"{match[1]}.{layer}.{match[2]}": name for layer in "qkv"}
        else:
            stored[name.replace("out.2.c_proj.", "out.2.proj_out.")] = name
    split: dict[str, np.ndarray] = {}  # parts of tensors that were read, and are not yet used

    def read(name, parameter, shape):
        if name in stored:
            return parameters.from_torch(tensors[stored[name]], parameter, shape)
        if name not in split:
            value = tensors[joined[name]]
            channels = value.shape[0] // 3
            if new_order or parameter[0] == "pool":
                value = value.reshape(3, channels, *value.shape[1:])
            else:  # (head, 3, d)
                heads = parameters.num_heads_of(parameter, description.model, channels)
                value = value.reshape(heads, 3, channels // heads, *value.shape[1:]).swapaxes(0, 1)
                value = value.reshape(3, channels, *value.shape[3:])
            stem, _, leaf = name.rsplit(".", 2)
            split.update({f"{stem}.{layer}.{leaf}": part for layer, part in zip("qkv", value, strict=True)})
        return parameters.from_torch(split.pop(name), parameter, shape)

    shapes = parameters.parameter_shapes(description.model, description.example_shape)
    names = (*stored, *joined)
    return parameters.build_params(str(path), shapes, names, lambda p: parameters.OPENAI(p, description.model), read)
