"""The config of diffusers' UNet2DModel, to and from `models.UNet`.

Every field is used or raises an error that names it, because with diffusers' own defaults the published shapes load too, but
give wrong images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from diffusion_jax.errors import PretrainedError, list_names
from diffusion_jax.models import UNet
from diffusion_jax.models.blocks import split_heads
from diffusion_jax.pretrained import parameters
from diffusion_jax.pretrained.description import Description

__all__ = ["UNET_DEFAULTS", "unet_from_config", "unet_to_config"]

# The defaults of UNet2DModel, for fields that a config does not name.
UNET_DEFAULTS: dict[str, Any] = {
    "sample_size": None,
    "in_channels": 3,
    "out_channels": 3,
    "center_input_sample": False,
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "freq_shift": 0,
    "flip_sin_to_cos": True,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
    "mid_block_type": "UNetMidBlock2D",
    "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (224, 448, 672, 896),
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "downsample_padding": 1,
    "downsample_type": "conv",
    "upsample_type": "conv",
    "dropout": 0.0,
    "act_fn": "silu",
    "attention_head_dim": 8,
    "norm_num_groups": 32,
    "attn_norm_num_groups": None,
    "norm_eps": 1e-5,
    "resnet_time_scale_shift": "default",
    "add_attention": True,
    "class_embed_type": None,
    "num_class_embeds": None,
    "num_train_timesteps": None,  # of learned time embeddings, which are not supported
}
# Fields of which `models.UNet` supports these values only.
_SUPPORTED_VALUES: dict[str, tuple] = {
    "center_input_sample": (False,),
    "time_embedding_type": ("positional",),
    "mid_block_type": ("UNetMidBlock2D",),
    "mid_block_scale_factor": (1,),
    "act_fn": ("silu", "swish"),
    "add_attention": (True,),
    "class_embed_type": (None,),
    "resnet_time_scale_shift": ("default", "scale_shift"),
}
# (whether a block has attention, whether it resamples with a residual block; None: by downsample_type or upsample_type).
_DOWN = {"DownBlock2D": (False, False), "AttnDownBlock2D": (True, None), "ResnetDownsampleBlock2D": (False, True)}
_UP = {"UpBlock2D": (False, False), "AttnUpBlock2D": (True, None), "ResnetUpsampleBlock2D": (False, True)}

# Types of the fields that are passed to `models.UNet`.
_TYPES: dict[str, tuple[type, ...]] = {
    "in_channels": (int,),
    "out_channels": (int,),
    "layers_per_block": (int,),
    "norm_num_groups": (int,),
    "downsample_padding": (int,),
    "attention_head_dim": (int, type(None)),
    "attn_norm_num_groups": (int, type(None)),
    "num_class_embeds": (int, type(None)),
    "flip_sin_to_cos": (bool,),
    "freq_shift": (int, float),
    "norm_eps": (int, float),
    "dropout": (int, float),
    "block_out_channels": (list, tuple),
    "down_block_types": (list, tuple),
    "up_block_types": (list, tuple),
}
_RESAMPLING = ("conv", "resnet")


def _read_blocks(field: str, types, known: Mapping[str, tuple], resample_type: str) -> tuple[list[bool], set[bool]]:
    """Whether each block has attention, and whether resampling is residual, in all blocks but the last, which has none."""
    has_attention, is_residual = [], set()
    for i, kind in enumerate(types):
        if kind not in known:
            raise PretrainedError(f"{field} contains {kind!r}; known: {', '.join(known)}")
        attention, residual = known[kind]
        has_attention.append(attention)
        if i < len(types) - 1:
            is_residual.add(resample_type == "resnet" if residual is None else residual)
    return has_attention, is_residual


def _read_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """All fields of a UNet2DModel's config. Raises: PretrainedError for unknown fields and unsupported types and values."""
    unknown = sorted(name for name in config if name not in UNET_DEFAULTS and not name.startswith("_"))
    if unknown:
        raise PretrainedError(f"the config has fields that UNet2DModel does not have: {list_names(unknown)}")
    fields = UNET_DEFAULTS | {name: value for name, value in config.items() if not name.startswith("_")}
    for name, types in _TYPES.items():
        value = fields[name]
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            raise PretrainedError(f"{name}={value!r} must be {' or '.join(kind.__name__ for kind in types)}")
    for name in ("downsample_type", "upsample_type"):
        if fields[name] not in _RESAMPLING:
            raise PretrainedError(f"{name}={fields[name]!r} is not supported, only {' or '.join(_RESAMPLING)}")
    for name, values in _SUPPORTED_VALUES.items():
        if fields[name] not in values:
            raise PretrainedError(f"{name}={fields[name]!r} is not supported, only {' or '.join(map(repr, values))}")
    return fields


def unet_from_config(config: Mapping[str, Any]) -> UNet:
    """The network of a UNet2DModel's config. Raises: PretrainedError that names the field which is not supported."""
    fields = _read_fields(config)
    widths = fields["block_out_channels"]
    channels = widths[0]
    if fields["time_embedding_dim"] not in (None, 4 * channels):
        raise PretrainedError(
            f"time_embedding_dim={fields['time_embedding_dim']} is not supported, only {4 * channels}"
        )
    down, down_residual = _read_blocks("down_block_types", fields["down_block_types"], _DOWN, fields["downsample_type"])
    up, up_residual = _read_blocks("up_block_types", fields["up_block_types"], _UP, fields["upsample_type"])
    if len(widths) != len(down) or up[::-1] != down:
        raise PretrainedError(
            f"up_block_types={list(fields['up_block_types'])} do not mirror "
            f"down_block_types={list(fields['down_block_types'])}"
        )
    if len(down_residual | up_residual) > 1:
        raise PretrainedError("down_block_types and up_block_types mix residual blocks and convolutions between levels")
    scale_shift = fields["resnet_time_scale_shift"] == "scale_shift"
    groups = fields["norm_num_groups"]
    middle_groups = fields["attn_norm_num_groups"] or (None if scale_shift else groups)
    if middle_groups != groups:
        raise PretrainedError(
            f"attn_norm_num_groups={fields['attn_norm_num_groups']} is not supported, only norm_num_groups={groups}"
        )
    padding = fields["downsample_padding"]
    return UNet(
        channels=channels,
        channel_multipliers=parameters.channel_multipliers(widths, channels),
        num_res_blocks=fields["layers_per_block"],
        attention_levels=tuple(i for i, has_attention in enumerate(down) if has_attention),
        head_channels=fields["attention_head_dim"],
        resample_blocks=True in down_residual,
        scale_shift_norm=scale_shift,
        embedding_cos_first=fields["flip_sin_to_cos"],
        embedding_freq_shift=float(fields["freq_shift"]),
        downsample_padding=(padding, padding) if padding else (0, 1),
        num_groups=groups,
        norm_epsilon=fields["norm_eps"],
        dropout=fields["dropout"],
        num_classes=fields["num_class_embeds"] or 0,
        out_channels=fields["out_channels"],
    )


def unet_to_config(description: Description) -> dict[str, Any]:
    """The config of UNet2DModel. Raises: PretrainedError that names a field which UNet2DModel does not support."""
    model = description.model
    if not isinstance(model, UNet):
        raise PretrainedError(f"{type(model).__name__}: diffusers has no such network; use save_safetensors")
    _check_data(description, model)
    if description.low_resolution:
        raise PretrainedError("low_resolution: DDPMPipeline has no super-resolution; use save_safetensors")
    widths = [model.width(level) for level in range(len(model.channel_multipliers))]
    if widths[0] != model.channels:
        raise PretrainedError(
            f"channel_multipliers={model.channel_multipliers}: the first level of UNet2DModel has the width of the time "
            "embedding"
        )
    if model.num_heads_up not in (None, model.num_heads):
        raise PretrainedError(
            f"num_heads_up={model.num_heads_up}: UNet2DModel has the same number of heads on both paths"
        )
    paddings = {(0, 1): 0, (1, 1): 1}
    if model.downsample_padding not in paddings and not model.resample_blocks:
        raise PretrainedError(f"downsample_padding={model.downsample_padding}: UNet2DModel supports (0, 1) and (1, 1)")
    if model.scale_shift_norm and model.num_groups <= 0:
        raise PretrainedError(f"num_groups={model.num_groups}")
    resampling, down_block, up_block = "conv", "DownBlock2D", "UpBlock2D"
    if model.resample_blocks:
        resampling, down_block, up_block = "resnet", "ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D"
    levels = range(len(widths))
    down = ["AttnDownBlock2D" if i in model.attention_levels else down_block for i in levels]
    up = ["AttnUpBlock2D" if i in model.attention_levels else up_block for i in reversed(levels)]
    height, width = description.image_size
    return {
        "_class_name": "UNet2DModel",
        "_diffusers_version": "0.35.0",
        "sample_size": height if height == width else [height, width],
        "in_channels": description.channels,
        "out_channels": model.out_channels or description.channels,
        "block_out_channels": widths,
        "layers_per_block": model.num_res_blocks,
        "down_block_types": down,
        "up_block_types": up,
        "attention_head_dim": _head_channels(model, widths),
        "downsample_type": resampling,
        "upsample_type": resampling,
        "downsample_padding": paddings.get(model.downsample_padding, 1),
        "resnet_time_scale_shift": "scale_shift" if model.scale_shift_norm else "default",
        "attn_norm_num_groups": model.num_groups if model.scale_shift_norm else None,
        "flip_sin_to_cos": model.embedding_cos_first,
        "freq_shift": model.embedding_freq_shift,
        "norm_num_groups": model.num_groups,
        "norm_eps": model.norm_epsilon,
        "dropout": model.dropout,
        "num_class_embeds": (model.num_classes + bool(model.label_dropout)) or None,
        "center_input_sample": False,
        "time_embedding_type": "positional",
        "act_fn": "silu",
        "mid_block_scale_factor": 1,
        "add_attention": True,
    }


def _check_data(description: Description, model: UNet) -> None:
    """Raises: PretrainedError for data and conditions that UNet2DModel does not support."""
    problem = None
    if model.spatial_dims != 2:
        problem = f"spatial_dims={model.spatial_dims}: UNet2DModel has two"
    elif description.condition_shape:
        problem = f"conditions of shape {list(description.condition_shape)}: UNet2DModel takes classes alone"
    elif model.padding != "zeros":
        problem = f"padding={model.padding!r}: UNet2DModel pads with zeros"
    elif any(size % model.divisor for size in description.image_size):
        problem = f"image_size={description.image_size}: UNet2DModel needs multiples of {model.divisor}"
    elif "x" in description.normalizations:
        problem = "normalizations: a diffusers folder cannot store the units of the data"
    if problem:
        raise PretrainedError(f"{problem}; use save_safetensors")


def _head_channels(model: UNet, widths: Sequence[int]) -> int | None:
    """attention_head_dim. Raises: PretrainedError if the layers have heads of different widths."""
    attention_widths = {widths[level] for level in model.attention_levels} | {widths[-1]}
    head_channels = {c // split_heads(c, model.num_heads, model.head_channels) for c in attention_widths}
    if model.head_channels is None and model.num_heads == 1:
        return None
    if len(head_channels) > 1:
        raise PretrainedError(
            f"num_heads={model.num_heads}: UNet2DModel has heads of one width, and these are {sorted(head_channels)} wide"
        )
    return head_channels.pop()
