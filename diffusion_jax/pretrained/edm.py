"""EDM's weights (Karras et al. 2022, https://github.com/NVlabs/edm): pickles of the networks, read by `pickles`.

`Tensors.metadata` holds the arguments of the network's class from the file; the code in the file is not used. EDM's ADM
(DhariwalUNet), DDPM++ and NCSN++ (SongUNet) become this package's U-Net. Only the names of tensors, the order of the rows of
q, k and v, and the layout of the class embedding differ.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
import re
from typing import Any

import numpy as np

from diffusion_jax.config.presets import OPENAI
from diffusion_jax.errors import PretrainedError, list_names
from diffusion_jax.models import UNet
from diffusion_jax.pretrained import parameters
from diffusion_jax.pretrained.model import Model, make_model
from diffusion_jax.pretrained.openai import EDM_DIFFUSION, EDM_SAMPLING, split_attention

_PRECONDITIONING = {"sigma_min": 0, "sigma_max": math.inf, "sigma_data": 0.5, "use_fp16": False}
_VARIANT = ("embedding_type", "channel_mult_noise", "encoder_type", "decoder_type", "resample_filter")
_VARIANTS = {  # SongUNet's arguments named in `_VARIANT`, for each `architecture`; other values raise an error
    "ddpm++": ("positional", 1, "standard", "standard", [1, 1]),
    "ncsn++": ("fourier", 2, "residual", "standard", [1, 3, 3, 1]),
}
_COMMON = {"augment_dim": 0, "channel_mult_emb": 4, "dropout": 0.1, "label_dropout": 0}
_NETWORKS: dict[str, dict[str, Any]] = {  # the arguments of each network that are read, with their defaults
    "DhariwalUNet": {
        "model_channels": 192,
        "channel_mult": [1, 2, 3, 4],
        "num_blocks": 3,
        "attn_resolutions": [32, 16, 8],
    },
    "SongUNet": {"model_channels": 128, "channel_mult": [1, 2, 2, 2], "num_blocks": 4, "attn_resolutions": [16]}
    | dict(zip(_VARIANT, _VARIANTS["ddpm++"], strict=True)),
}
_ADM = OPENAI | {
    "head_channels": 64,
    "scale_shift_norm": True,
}  # fields of `UNet` that the pickle's arguments do not give
NAMING = parameters.Naming(  # the tensors' names after `_rename`
    {
        "block": "{direction}.{level}.block{number}",
        "attn": "{direction}.{level}.block{number}",
        "downsample": "down.{level}.resample",
        "upsample": "up.{level}.resample",
        "time_fourier": "map_noise",
        "conv_in": "down.0.conv",
        "mid_block_0": "in0",
        "mid_attn": "in0",
        "mid_block_1": "in1",
        "time_0": "map_layer0",
        "time_1": "map_layer1",
        "class": "map_label",
        "norm_out": "out_norm",
        "conv_out": "out_conv",
        "norm1": "norm0",
        "conv1": "conv0",
        "time_proj": "affine",
        "norm2": "norm1",
        "conv2": "conv1",
        "norm": "norm2",
    }
)


def is_edm(tensors: parameters.Tensors) -> bool:
    """Returns whether a file is one of EDM's pickles."""
    return tensors.framework == "PyTorch" and "class" in tensors.metadata


def load_edm(path: pathlib.Path, tensors: parameters.Tensors, with_params: bool) -> Model:
    """Loads the network of a pickle; with its parameters if `with_params`. Raises: PretrainedError."""
    kind, stored = tensors.metadata["class"], json.loads(tensors.metadata["arguments"])
    if kind != "EDMPrecond":
        raise PretrainedError(f"{path} is a {kind}, whose preconditioning is not supported, only EDMPrecond")
    network = stored.pop("model_type", "DhariwalUNet")
    if network not in _NETWORKS:
        raise PretrainedError(f"{path}: the network {network} is not supported, only {list_names(_NETWORKS)}")
    size, channels, num_classes = stored.pop("img_resolution"), stored.pop("img_channels"), stored.pop("label_dim", 0)
    arguments = _PRECONDITIONING | _COMMON | _NETWORKS[network]
    if unknown := sorted(set(stored) - set(arguments)):
        raise PretrainedError(f"{path}: the arguments {list_names(unknown)} of {network} are not known")
    arguments |= stored
    if (factor := arguments["channel_mult_emb"]) != 4:
        raise PretrainedError(f"{path}: {network} with channel_mult_emb={factor} is not supported, only 4")
    variant = tuple(arguments[name] for name in _VARIANT if name in arguments)
    architecture = next((name for name, values in _VARIANTS.items() if values == variant), "ddpm")
    if variant and architecture == "ddpm":
        found = ", ".join(f"{name}={value}" for name, value in zip(_VARIANT, variant, strict=True))
        raise PretrainedError(f"{path}: {network} with {found} is neither DDPM++ nor NCSN++, and is not supported")
    widths = arguments["channel_mult"] + ([1] if network == "SongUNet" else [])  # 1: before the first block
    if arguments["model_channels"] * min(widths) < 128:
        raise PretrainedError(f"{path}: layers of fewer than 128 channels have other norms, which are not supported")
    levels = [size >> level for level in range(len(arguments["channel_mult"]))]
    if arguments["num_blocks"] * len(levels) > len(tensors.shapes):  # more blocks take hours to describe
        raise PretrainedError(f"{path}: num_blocks={arguments['num_blocks']} is more than its tensors fill")
    model = UNet(
        **(_ADM if network == "DhariwalUNet" else {})
        | {
            "channels": arguments["model_channels"],
            "channel_multipliers": tuple(arguments["channel_mult"]),
            "num_res_blocks": arguments["num_blocks"],
            "attention_levels": tuple(i for i, width in enumerate(levels) if width in arguments["attn_resolutions"]),
            "architecture": architecture,
            "resample_blocks": True,
            "num_classes": num_classes,
            "label_dropout": float(arguments["label_dropout"]) if num_classes else 0.0,
            "out_channels": channels,
            "dropout": arguments["dropout"],
        }
    )
    diffusion = EDM_DIFFUSION | {"sigma_data": arguments["sigma_data"]}
    sampling = EDM_SAMPLING | {"steps": 18 if size <= 32 else 40}  # section 3
    net = make_model(f"EDM, {network}", model, size, diffusion, channels, clip=False, published_sampling=sampling)
    if not with_params:
        return net
    renamed = _rename(path, tensors, levels, model)
    return net.read_params(path, split_attention(renamed, model, new_order=True), NAMING)


def _rename(path: pathlib.Path, tensors: parameters.Tensors, levels: list[int], model: UNet) -> parameters.Tensors:
    """Returns the tensors with levels instead of sizes in their names, and with rows in this package's order.

    levels: the size at each level. Leaves out the resampling filters, after checking that they equal the network's filter,
    and the layer for augmentation labels, which are zeros in sampling.
    """
    taps = np.array([1, 3, 3, 1] if model.is_ncsnpp else [1, 1])
    old: dict[str, str] = {}
    for name in tensors.shapes:
        new = name.removeprefix("model.")
        if new.endswith("resample_filter"):
            if not np.array_equal(tensors.read(name)[0, 0], np.outer(taps, taps) / taps.sum() ** 2):
                raise PretrainedError(f"{path}: {name} is another filter than {taps.tolist()}")
        elif not new.startswith("map_augment."):
            if match := re.fullmatch(r"(enc|dec)\.(\d+)x\d+_(\w+?)(\d*)\.(.+)", new):
                half, size, block, number, rest = match.groups()
                level, direction = levels.index(int(size)), "down" if half == "enc" else "up"
                module = f"in{number}" if block == "in" else f"{direction}.{level}.{block}{number}"
                if block in ("down", "up"):  # belongs to the level before the change of size
                    module = f"{direction}.{level + (1 if block == 'up' else -1)}.resample"
                elif block == "aux_residual":
                    module = f"down_{level - 1}_input"
                new = f"{module}.{rest}"
            old[new.replace("up.0.aux_", "out_").replace(".freqs", ".weight")] = name
    label_bias = old.pop("map_label.bias", "map_label.bias") if model.is_plus_plus else ""

    def read(name: str) -> np.ndarray:
        value = tensors.read(old[name])
        if ".qkv." in name:  # the rows (head, d, 3) become (3, head, d): q, then k, then v
            value = np.moveaxis(value.reshape(-1, 3, *value.shape[1:]), 1, 0).reshape(value.shape)
        elif name == "map_label.weight":  # multiplies a one-hot vector, or zeros for no class
            value = np.pad(value.T, ((0, 1 if model.label_dropout else 0), (0, 0)))
            if model.is_plus_plus:  # the one-hot vector has length sqrt(classes), and the layer has a bias
                value = value * math.sqrt(model.num_classes) + tensors.read(label_bias)
        return value

    return dataclasses.replace(tensors, shapes={new: tensors.shapes[name] for new, name in old.items()}, read=read)
