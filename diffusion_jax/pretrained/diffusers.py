"""diffusers' folders, in and out: a UNet2DModel and a scheduler, each with its config.

Every field of both configs is honored or refused by name: diffusers' own defaults load the published shapes too, and give
silently wrong images.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import shutil
from collections.abc import Callable, Mapping
from typing import Any

import flax.traverse_util
import numpy as np

from diffusion_jax import schedules
from diffusion_jax.errors import PretrainedError, list_names
from diffusion_jax.models import UNet
from diffusion_jax.models.unet import split_heads
from diffusion_jax.pretrained import layers
from diffusion_jax.pretrained.description import DIFFUSION, Description, clip_to, describe
from diffusion_jax.pretrained.files import open_tensors, read_json, save_tensors

# What a config that does not name a field means.
_DEFAULTS: dict[str, Any] = {
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
    "num_train_timesteps": None,  # of learned time embeddings, which are refused
}
# Fields with one value that our network has.
_ONLY: dict[str, tuple] = {
    "center_input_sample": (False,),
    "time_embedding_type": ("positional",),
    "mid_block_type": ("UNetMidBlock2D",),
    "mid_block_scale_factor": (1,),
    "act_fn": ("silu", "swish"),
    "add_attention": (True,),
    "class_embed_type": (None,),
    "resnet_time_scale_shift": ("default", "scale_shift"),
}
_DOWN = {"DownBlock2D": (False, False), "AttnDownBlock2D": (True, None), "ResnetDownsampleBlock2D": (False, True)}
_UP = {"UpBlock2D": (False, False), "AttnUpBlock2D": (True, None), "ResnetUpsampleBlock2D": (False, True)}

# Types of the fields that reach our network as they are.
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

# Schedulers of the DDPM kind, and whether each clips x_0 where its config does not say; others have another process.
_SCHEDULERS = {
    "DDPMScheduler": True,
    "DDIMScheduler": True,
    "DDIMInverseScheduler": True,
    "PNDMScheduler": False,
    "DEISMultistepScheduler": False,
    "DPMSolverMultistepScheduler": False,
    "DPMSolverSinglestepScheduler": False,
    "UniPCMultistepScheduler": False,
}
_SCHEDULER_FIELDS = {
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "variance_type",
    "clip_sample",
    "clip_sample_range",
    "prediction_type",
    "rescale_betas_zero_snr",
    "thresholding",
}
# Of how fewer steps are taken, which is a sampler's choice here.
_STEPPING = {
    "timestep_spacing",
    "steps_offset",
    "set_alpha_to_one",
    "set_alpha_to_zero",
    "skip_prk_steps",
    "dynamic_thresholding_ratio",
    "sample_max_value",
    "solver_order",
    "solver_type",
    "algorithm_type",
    "lower_order_final",
    "euler_at_final",
    "final_sigmas_type",
    "lambda_min_clipped",
    "predict_x0",
    "disable_corrector",
    "solver_p",
    "use_lu_lambdas",
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "tensor_format",  # of versions before 0.4
}

_SCHEDULES = {"linear": "linear", "scaled_linear": "quadratic", "squaredcos_cap_v2": "cosine", "sigmoid": "sigmoid"}
_PREDICTIONS = {"epsilon": "eps", "sample": "x_0", "v_prediction": "v"}
_VARIANCES = {
    "fixed_small": "fixed_small",
    "fixed_small_log": "fixed_small",
    "fixed_large": "fixed_large",
    "fixed_large_log": "fixed_large",
    "learned_range": "learned_range",
}


def _levels(field: str, types, known: Mapping[str, tuple], resample_type: str) -> tuple[list[bool], set[bool]]:
    """Whether each block attends, and which ways of resampling occur in all but the last, which has none."""
    attends, resampled = [], set()
    for i, kind in enumerate(types):
        if kind not in known:
            raise PretrainedError(f"{field} has {kind!r}; known: {', '.join(known)}")
        attention, residual = known[kind]
        attends.append(attention)
        if i < len(types) - 1:
            resampled.add(resample_type == "resnet" if residual is None else residual)
    return attends, resampled


def unet_from_config(config: Mapping[str, Any]) -> UNet:
    """The network of a UNet2DModel's config. Raises: PretrainedError that names the field which cannot be had."""
    unknown = sorted(name for name in config if name not in _DEFAULTS and not name.startswith("_"))
    if unknown:
        raise PretrainedError(f"the config has fields that UNet2DModel has not: {list_names(unknown)}")
    fields = _DEFAULTS | {name: value for name, value in config.items() if not name.startswith("_")}
    for name, types in _TYPES.items():
        value = fields[name]
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            raise PretrainedError(f"{name}={value!r} is no {' or '.join(kind.__name__ for kind in types)}")
    for name in ("downsample_type", "upsample_type"):
        if fields[name] not in _RESAMPLING:
            raise PretrainedError(f"{name}={fields[name]!r} is not supported, only {' or '.join(_RESAMPLING)}")
    for name, values in _ONLY.items():
        if fields[name] not in values:
            raise PretrainedError(f"{name}={fields[name]!r} is not supported, only {' or '.join(map(repr, values))}")
    widths = fields["block_out_channels"]
    base = widths[0]
    if fields["time_embedding_dim"] not in (None, 4 * base):
        raise PretrainedError(f"time_embedding_dim={fields['time_embedding_dim']} is not supported, only {4 * base}")
    down, halves = _levels("down_block_types", fields["down_block_types"], _DOWN, fields["downsample_type"])
    up, doubles = _levels("up_block_types", fields["up_block_types"], _UP, fields["upsample_type"])
    if len(widths) != len(down) or up[::-1] != down:
        raise PretrainedError(
            f"up_block_types={list(fields['up_block_types'])} do not mirror "
            f"down_block_types={list(fields['down_block_types'])}"
        )
    if len(halves | doubles) > 1:
        raise PretrainedError("down_block_types and up_block_types mix residual blocks and convolutions between levels")
    shifts = fields["resnet_time_scale_shift"] == "scale_shift"
    groups = fields["norm_num_groups"]
    middle = fields["attn_norm_num_groups"] or (None if shifts else groups)
    if middle != groups:
        raise PretrainedError(
            f"attn_norm_num_groups={fields['attn_norm_num_groups']} is not supported, only norm_num_groups={groups}"
        )
    classes, padding = fields["num_class_embeds"] or 0, fields["downsample_padding"]
    return UNet(
        channels=base,
        channel_multipliers=layers.multipliers(widths, base),
        num_res_blocks=fields["layers_per_block"],
        attention_levels=tuple(i for i, attends in enumerate(down) if attends),
        head_channels=fields["attention_head_dim"],
        resample_blocks=True in halves,
        scale_shift_norm=shifts,
        embedding_cos_first=fields["flip_sin_to_cos"],
        embedding_freq_shift=float(fields["freq_shift"]),
        downsample_padding=(padding, padding) if padding else (0, 1),
        num_groups=groups,
        norm_epsilon=fields["norm_eps"],
        dropout=fields["dropout"],
        num_classes=classes,
        out_channels=fields["out_channels"],
    )


def scheduler_from_config(config: Mapping[str, Any]) -> tuple[dict[str, Any], np.ndarray | None, bool | Callable]:
    """Leaves of `config.diffusion`, betas where the config gives them as a table, and the clip. Raises: PretrainedError."""
    kind, prediction = config.get("beta_schedule", "linear"), config.get("prediction_type", "epsilon")
    variance = config.get("variance_type") or "fixed_small"
    for name, value, known in (
        ("beta_schedule", kind, _SCHEDULES),
        ("prediction_type", prediction, _PREDICTIONS),
        ("variance_type", variance, _VARIANCES),
    ):
        if value not in known:
            raise PretrainedError(f"the scheduler's {name}={value!r} is not supported; known: {', '.join(known)}")
    own = config.get("_class_name", "DDPMScheduler")
    if own not in _SCHEDULERS:
        raise PretrainedError(f"the scheduler's _class_name={own!r} is not supported; known: {', '.join(_SCHEDULERS)}")
    unknown = sorted(n for n in config if n not in _SCHEDULER_FIELDS | _STEPPING and not n.startswith("_"))
    if unknown:
        raise PretrainedError(f"the scheduler's {list_names(unknown)} is unknown here")
    table = config.get("trained_betas")
    for name in ("rescale_betas_zero_snr", "thresholding"):
        if config.get(name):
            raise PretrainedError(f"the scheduler's {name}=True is not supported")
    clip: bool | Callable = config.get("clip_sample", _SCHEDULERS[own])
    if not isinstance(clip, bool):
        raise PretrainedError(f"the scheduler's clip_sample={clip!r} must be true or false")
    bound = float(config.get("clip_sample_range", 1.0))
    if clip and bound != 1:
        clip = clip_to(bound)
    leaves = {
        "schedule": _SCHEDULES[kind],
        "num_timesteps": len(table) if table is not None else config.get("num_train_timesteps", 1000),
        "beta_start": config.get("beta_start", 1e-4),
        "beta_end": config.get("beta_end", 0.02),
        "prediction": _PREDICTIONS[prediction],
        "variance": _VARIANCES[variance],
    }
    return leaves, None if table is None else np.asarray(table, np.float64), clip


def find(folder: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path] | None:
    """(the network's folder, the scheduler's config) of a pipeline's folder, in its newer or older layout; else None."""
    for network in (folder / "unet", folder):
        config = network / "config.json"
        if config.is_file() and '"_class_name"' in config.read_text(errors="replace"):
            own = [folder / "scheduler", folder, folder.parent / "scheduler", folder.parent]
            configs = [path / "scheduler_config.json" for path in own]
            return network, next((path for path in configs if path.is_file()), configs[0])
    return None


def load_diffusers(
    folder: pathlib.Path, flags: Mapping[str, Any] | None, with_params: bool
) -> tuple[Description, dict | None]:
    """A pipeline's folder. flags: fields of the scheduler's config, where it has none. Raises: PretrainedError."""
    network, scheduler_path = find(folder)
    config, index = read_json(network / "config.json"), folder / "model_index.json"
    parts = {name for name in (read_json(index) if index.is_file() else {}) if not name.startswith("_")}
    if parts - {"unet", "scheduler"}:
        raise PretrainedError(
            f"{folder}: a pipeline with {list_names(sorted(parts - {'unet', 'scheduler'}))} is not supported, only an unet and a "
            "scheduler: what its unet draws are no images"
        )
    kind = config.get("_class_name")
    if kind != "UNet2DModel":
        raise PretrainedError(f"{network}: {kind} is not supported, only UNet2DModel")
    if isinstance(flags, str):
        raise PretrainedError(
            f"flags={flags!r}: of a diffusers folder they are fields of the scheduler's config, as a dict"
        )
    given = dict(flags or {})
    scheduler = read_json(scheduler_path) if scheduler_path.is_file() else {}
    if not scheduler_path.is_file() and not given:
        raise PretrainedError(
            f"{folder} holds no scheduler_config.json: name the pipeline's whole folder, or give its fields as flags"
        )
    size = given.pop("sample_size", None) or config.get("sample_size")
    try:
        model = unet_from_config(config)
        leaves, table, clip = scheduler_from_config(scheduler | given)
        channels = _DEFAULTS["in_channels"] if "in_channels" not in config else config["in_channels"]
        if size is None:
            raise PretrainedError("the config does not say sample_size, the image's pixels: give it in flags")
        found = describe(
            f"diffusers, {config.get('_diffusers_version', '')}", model, size, leaves, channels=channels, clip=clip
        )
        needed = channels * (2 if found.variance.startswith("learned") else 1)
        if model.out_channels != needed:
            raise PretrainedError(
                f"out_channels={model.out_channels} and variance_type={found.variance!r} do not fit in_channels={channels}, "
                f"which would need {needed}"
            )
        if table is not None:
            found = dataclasses.replace(found, schedule=schedules.from_betas(table), diffusion=None)
    except PretrainedError as error:
        raise PretrainedError(f"{network}: {error}") from None
    except (ValueError, TypeError, LookupError, ArithmeticError) as error:
        raise PretrainedError(f"{network} or {scheduler_path}: {error}") from None
    if not with_params:
        return found, None
    return found, _params(network, found)


_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def _params(network: pathlib.Path, found: Description) -> dict:
    names = [f"diffusion_pytorch_model.{kind}" for kind in ("safetensors", "bin")]
    path = next((network / name for name in names if (network / name).is_file()), None)
    if path is None:
        raise PretrainedError(f"{network} holds no weights: neither {' nor '.join(names)}")
    tensors = open_tensors(path)

    def modern(name):
        parts = name.split(".")
        return ".".join(_OLD_ATTENTION.get(part, part) for part in parts) if "attentions" in parts else name

    own = {modern(name): name for name in tensors}
    shapes = layers.shapes_of(found.model, found.image_size, found.in_channels)

    def read(name, parameter, shape):
        return layers.from_torch(tensors[own[name]], parameter, shape)

    return layers.fill(str(path), shapes, own, lambda p: layers.DIFFUSERS(p, found.model), read)


def config_of(found: Description) -> tuple[dict[str, Any], dict[str, Any]]:
    """The configs of UNet2DModel and DDPMScheduler for our weights. Raises: PretrainedError naming what they cannot say."""
    model = found.model
    if not isinstance(model, UNet):
        raise PretrainedError("diffusers has no such classifier; use save_safetensors")
    if found.low_resolution:
        raise PretrainedError("low_resolution: DDPMPipeline has no upsampler; use save_safetensors")
    widths = [model.width(level) for level in range(len(model.channel_multipliers))]
    if widths[0] != model.channels:
        raise PretrainedError(
            f"channel_multipliers={model.channel_multipliers}: UNet2DModel's first level is as wide as its embedding of time"
        )
    if model.num_heads_up not in (None, model.num_heads):
        raise PretrainedError(f"num_heads_up={model.num_heads_up}: UNet2DModel has the same heads up and down")
    attending = {widths[level] for level in model.attention_levels} | {widths[-1]}
    per_head = {c // split_heads(c, model.num_heads, model.head_channels) for c in attending}
    if model.head_channels is None and model.num_heads == 1:
        per_head = {None}
    if len(per_head) > 1:
        raise PretrainedError(
            f"num_heads={model.num_heads}: UNet2DModel has heads of one width, and these are {sorted(per_head)} wide"
        )
    paddings = {(0, 1): 0, (1, 1): 1}
    if model.downsample_padding not in paddings and not model.resample_blocks:
        raise PretrainedError(f"downsample_padding={model.downsample_padding}: UNet2DModel has (0, 1) and (1, 1)")
    if model.scale_shift_norm and model.num_groups <= 0:
        raise PretrainedError(f"num_groups={model.num_groups}")
    residual = "resnet" if model.resample_blocks else "conv"
    plain = {"down": "DownBlock2D", "up": "UpBlock2D"}
    if model.resample_blocks:
        plain = {"down": "ResnetDownsampleBlock2D", "up": "ResnetUpsampleBlock2D"}
    levels = range(len(widths))
    down = ["AttnDownBlock2D" if i in model.attention_levels else plain["down"] for i in levels]
    up = ["AttnUpBlock2D" if i in model.attention_levels else plain["up"] for i in reversed(levels)]
    height, width = found.image_size
    network = {
        "_class_name": "UNet2DModel",
        "_diffusers_version": "0.35.0",
        "sample_size": height if height == width else [height, width],
        "in_channels": found.in_channels,
        "out_channels": model.out_channels or found.channels,
        "block_out_channels": widths,
        "layers_per_block": model.num_res_blocks,
        "down_block_types": down,
        "up_block_types": up,
        "attention_head_dim": per_head.pop(),
        "downsample_type": residual,
        "upsample_type": residual,
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
    return network, _scheduler_config(found)


def _scheduler_config(found: Description) -> dict[str, Any]:
    schedule = found.schedule
    if not np.array_equal(schedule.timesteps, np.arange(schedule.num_timesteps)):
        raise PretrainedError("rescale_timesteps: diffusers' network is told the index itself")
    predictions = {ours: theirs for theirs, ours in _PREDICTIONS.items()}
    if found.prediction not in predictions:
        raise PretrainedError(f"prediction={found.prediction!r}: DDPMScheduler has {', '.join(predictions)}")
    if found.variance not in _VARIANCES.values():
        raise PretrainedError(f"variance={found.variance!r}: DDPMScheduler has no such variance")
    if not isinstance(found.clip, bool):
        raise PretrainedError("clip: only True and False can be said")
    config = {
        "_class_name": "DDPMScheduler",
        "_diffusers_version": "0.35.0",
        "num_train_timesteps": schedule.num_timesteps,
        "prediction_type": predictions[found.prediction],
        "variance_type": found.variance,
        "clip_sample": found.clip,
    }
    leaves = found.diffusion or {}
    named = {ours: theirs for theirs, ours in _SCHEDULES.items()}
    if leaves.get("schedule") in named:
        return config | {
            "beta_schedule": named[leaves["schedule"]],
            "beta_start": leaves.get("beta_start", DIFFUSION["beta_start"]),
            "beta_end": leaves.get("beta_end", DIFFUSION["beta_end"]),
        }
    return config | {"trained_betas": [float(beta) for beta in schedule.betas]}


def write_folder(found: Description, params, folder: pathlib.Path) -> None:
    """Writes the folder of a DDPMPipeline, whole or not at all. Raises: PretrainedError, before writing; OSError."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise PretrainedError(f"{folder} exists already and is not empty: name another place")
    network, scheduler = config_of(found)
    flat = flax.traverse_util.flatten_dict(params)
    tensors = {
        layers.DIFFUSERS(path, found.model): layers.to_torch(np.asarray(value), path) for path, value in flat.items()
    }
    index = {
        "_class_name": "DDPMPipeline",
        "_diffusers_version": "0.35.0",
        "scheduler": ["diffusers", "DDPMScheduler"],
        "unet": ["diffusers", "UNet2DModel"],
    }
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of an interrupted time
    for name in ("unet", "scheduler"):
        (partial / name).mkdir(parents=True)
    save_tensors(tensors, partial / "unet" / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    for name, content in (
        ("unet/config.json", network),
        ("scheduler/scheduler_config.json", scheduler),
        ("model_index.json", index),
    ):
        (partial / name).write_text(json.dumps(content, indent=2) + "\n")
    partial.replace(folder)
