"""Ho et al.'s weights: TensorFlow checkpoints of their code, and the same in the PyTorch port (pesser/pytorch_diffusion).

The tensors decide the network. What it was trained for is known of the published shapes; others must say it.
"""

from __future__ import annotations

import dataclasses
import pathlib
import re
from collections.abc import Mapping
from typing import Any

from diffusion_jax.errors import PretrainedError, list_names
from diffusion_jax.models import UNet, preset
from diffusion_jax.pretrained import layers
from diffusion_jax.pretrained.description import DIFFUSION, Description, describe
from diffusion_jax.pretrained.files import Tensors

# Presets of `models`: the image's size, and what differs from `DIFFUSION`.
PRESETS: dict[str, tuple[int, dict[str, Any]]] = {
    "ddpm_cifar10": (32, {"variance": "fixed_large"}),
    "ddpm_256": (256, {"variance": "fixed_small"}),
}
_LEAVES = {"W": "weight", "b": "bias", "gamma": "weight", "beta": "bias"}


def _port_name(variable: str) -> str:
    """model/down_1/block_0/conv1/W as down.1.block.0.conv1.weight."""
    *scopes, leaf = variable.split("/")
    name = re.sub(r"dense(\d)", r"dense.\1", ".".join(scopes[1:]))
    if not name.startswith("mid."):
        name = re.sub(r"(down|up|block|attn)_(\d+)", r"\1.\2", name)
    return f"{name}.{_LEAVES.get(leaf, leaf)}"


def is_ho(names) -> bool:
    """Whether tensors of these names are Ho et al.'s, of either kind."""
    return any(name.endswith(("temb/dense0/W", "temb.dense.0.weight")) for name in names)


def _structure(path: pathlib.Path, tensors: Tensors, names: Mapping[str, str]) -> UNet:
    shapes = {name: tensors.shapes[own] for name, own in names.items()}
    if tensors.source == "TensorFlow":
        shapes = {name: shape[::-1] for name, shape in shapes.items()}  # HWIO and [in, out]: the outputs first
    try:
        channels = shapes["conv_in.weight"][0]
        levels = len({name.split(".")[1] for name in shapes if name.startswith("down.")})
        widths = [shapes[f"down.{level}.block.0.conv1.weight"][0] for level in range(levels)]
        blocks = len({name.split(".")[3] for name in shapes if name.startswith("down.0.block.")})
        return UNet(
            channels=channels,
            channel_multipliers=layers.multipliers(widths, channels),
            num_res_blocks=blocks,
            attention_levels=tuple(i for i in range(levels) if f"down.{i}.attn.0.q.weight" in shapes),
            out_channels=shapes["conv_out.weight"][0],
            dropout=0.0,
        )
    except (KeyError, IndexError) as error:
        raise PretrainedError(f"{path} is not one of Ho et al.'s networks: its tensor {error} is missing") from None


def load_ho(
    path: pathlib.Path, tensors: Tensors, flags: str | Mapping[str, Any] | None, with_params: bool
) -> tuple[Description, dict | None]:
    """What a checkpoint is, and its parameters where they are asked for.

    flags: None for a published network; its preset's name; or image_size, variance and other leaves of `config.diffusion`.
    Raises: PretrainedError.
    """
    own = tensors.source == "TensorFlow"
    names = {_port_name(name) if own else name: name for name in tensors}
    model = _structure(path, tensors, names)
    match = [name for name in PRESETS if dataclasses.replace(preset(name), dropout=0.0, parent=None) == model]
    if isinstance(flags, str):
        if flags not in PRESETS:
            raise PretrainedError(f"flags={flags!r} is no preset of Ho et al.'s; known: {', '.join(PRESETS)}")
        if flags not in match:
            raise PretrainedError(f"{path}: its tensors are not those of {flags}, but of {model}")
        match, flags = [flags], {}
    given = dict(flags or {})
    unknown = sorted(set(given) - set(DIFFUSION) - {"image_size"})
    if unknown:
        raise PretrainedError(f"flags: {list_names(unknown)} is unknown; known: image_size, {', '.join(DIFFUSION)}")
    size, diffusion = PRESETS[match[0]] if match else (None, {})
    size, diffusion = given.pop("image_size", size), diffusion | given
    if size is None or "variance" not in diffusion:
        raise PretrainedError(
            f"{path}: not a published network, so flags must say image_size and variance (fixed_small or fixed_large)"
        )
    channels = tensors.shapes[names["conv_in.weight"]][2 if own else 1]
    try:
        found = describe(f"Ho et al., {match[0] if match else 'another'}", model, size, diffusion, channels=channels)
    except (ValueError, TypeError) as error:
        raise PretrainedError(f"flags: {error}") from None
    if not with_params:
        return found, None

    def read(name, parameter, shape):
        value = tensors[names[name]]
        return value if own else layers.from_torch(value, parameter, shape)

    shapes = layers.shapes_of(model, found.image_size, channels)
    return found, layers.fill(str(path), shapes, names, lambda p: layers.HO(p, model), read)
