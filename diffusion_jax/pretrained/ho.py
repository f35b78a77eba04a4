"""Ho et al.'s weights: TensorFlow checkpoints from their code, and files of the PyTorch port (pesser/pytorch_diffusion).

The tensors determine the network. The schedule and variance are known for the published shapes; other shapes need flags.
"""

from __future__ import annotations

import dataclasses
import pathlib
import re
from collections.abc import Mapping
from typing import Any

from diffusion_jax.errors import PretrainedError, list_names
from diffusion_jax.models import UNet, preset
from diffusion_jax.pretrained import parameters
from diffusion_jax.pretrained.model import DIFFUSION_DEFAULTS, Model, make_model

# {preset of `models`: (image size, variance)}; other settings of `config.diffusion` are `DIFFUSION_DEFAULTS`.
PRESETS: dict[str, tuple[int, dict[str, Any]]] = {
    "ddpm_cifar10": (32, {"variance": "fixed_large"}),
    "ddpm_256": (256, {"variance": "fixed_small"}),
}
_LEAVES = {"W": "weight", "b": "bias", "gamma": "weight", "beta": "bias"}


NAMING = parameters.Naming(  # names in the PyTorch port
    {
        "block": "{direction}.{level}.block.{number}",
        "attn": "{direction}.{level}.attn.{number}",
        "downsample_conv": "down.{level}.downsample.conv",
        "upsample_conv": "up.{level}.upsample.conv",
        "mid_block_0": "mid.block_1",
        "mid_attn": "mid.attn_1",
        "mid_block_1": "mid.block_2",
        "time_0": "temb.dense.0",
        "time_1": "temb.dense.1",
        "time_proj": "temb_proj",
        "skip": "nin_shortcut",
        "proj": "proj_out",
    }
)


def _port_name(variable: str) -> str:
    """Converts model/down_1/block_0/conv1/W to down.1.block.0.conv1.weight."""
    *scopes, leaf = variable.split("/")
    name = re.sub(r"dense(\d)", r"dense.\1", ".".join(scopes[1:]))
    if not name.startswith("mid."):
        name = re.sub(r"(down|up|block|attn)_(\d+)", r"\1.\2", name)
    return f"{name}.{_LEAVES.get(leaf, leaf)}"


def is_ho(names) -> bool:
    """Returns whether these tensor names are Ho et al.'s, from TensorFlow or from the PyTorch port."""
    return any(name.endswith(("temb/dense0/W", "temb.dense.0.weight")) for name in names)


def _infer_model(shapes: Mapping[str, tuple[int, ...]]) -> UNet:
    """Infers the network from the tensor shapes of the port, in which output channels come first."""
    channels = shapes["conv_in.weight"][0]
    num_levels = len({name.split(".")[1] for name in shapes if name.startswith("down.")})
    widths = [shapes[f"down.{level}.block.0.conv1.weight"][0] for level in range(num_levels)]
    return UNet(
        channels=channels,
        channel_multipliers=parameters.channel_multipliers(widths, channels),
        num_res_blocks=len({name.split(".")[3] for name in shapes if name.startswith("down.0.block.")}),
        attention_levels=tuple(i for i in range(num_levels) if f"down.{i}.attn.0.q.weight" in shapes),
        out_channels=shapes["conv_out.weight"][0],
        dropout=0.0,
    )


def load_ho(
    path: pathlib.Path, tensors: parameters.Tensors, flags: str | Mapping[str, Any] | None, with_params: bool
) -> Model:
    """Loads the network of a checkpoint; with its parameters if `with_params`.

    flags: None for a published network; otherwise image_size, variance and other settings of `config.diffusion`.
    Raises: PretrainedError.
    """
    if isinstance(flags, str):
        raise PretrainedError(f"flags={flags!r}: for Ho et al.'s networks they are JSON with image_size and variance")
    settings = dict(flags or {})
    unknown = sorted(set(settings) - set(DIFFUSION_DEFAULTS) - {"image_size"})
    if unknown:
        known = ", ".join(("image_size", *DIFFUSION_DEFAULTS))
        raise PretrainedError(f"flags: {list_names(unknown)} is unknown; known: {known}")
    is_tensorflow = tensors.framework == "TensorFlow"  # has kernels HWIO and [in, out], the port OIHW and [out, in]
    if is_tensorflow:
        tensors = tensors.rename(_port_name)
    model = _infer_model({n: shape[::-1] if is_tensorflow else shape for n, shape in tensors.shapes.items()})
    matches = [name for name in PRESETS if dataclasses.replace(preset(name), dropout=0.0, parent=None) == model]
    size, diffusion = PRESETS[matches[0]] if matches else (None, {})
    size, diffusion = settings.pop("image_size", size), diffusion | settings
    if size is None or "variance" not in diffusion:
        raise PretrainedError(
            f"{path}: not a published network, so flags need image_size and variance (fixed_small or fixed_large)"
        )
    channels = tensors.shapes["conv_in.weight"][2 if is_tensorflow else 1]
    net = make_model(f"Ho et al., {matches[0] if matches else 'another'}", model, size, diffusion, channels)
    convert = parameters.keep_layout if is_tensorflow else parameters.from_torch
    return net.read_params(path, tensors, NAMING, convert) if with_params else net
