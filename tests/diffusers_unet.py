"""diffusers' `UNet2DModel` in the shapes of google/ddpm-cifar10-32, of Improved DDPM and of ADM, and its weights under this
project's names.

As a program (it needs `make parity`'s packages), it writes the fixtures that test_parity.py reads without them:

    python tests/diffusers_unet.py
"""

import pathlib
import re

import numpy as np

FIXTURES = pathlib.Path(__file__).parent / "fixtures"

# The published configuration; its fields differ from the library's defaults in five places that change no shape.
PUBLISHED = {
    "sample_size": 32,
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (128, 256, 256, 256),
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-6,
    "norm_num_groups": 32,
    "attention_head_dim": None,
}
# OpenAI's choices in diffusers' words: scale-shift norm, [cos, sin], eps 1e-5, padding on both sides, 4 heads, classes.
IMPROVED = {
    **PUBLISHED,
    "out_channels": 6,
    "layers_per_block": 1,
    "block_out_channels": (8, 16, 16),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "norm_eps": 1e-5,
    "norm_num_groups": 4,
    "attention_head_dim": 4,
    "resnet_time_scale_shift": "scale_shift",
    "attn_norm_num_groups": 4,  # or the middle's attention has no norm there
    "num_class_embeds": 5,
}
# ADM's: residual blocks change the resolution, and wider layers have more heads (of attention_head_dim channels each).
ADM = {
    **IMPROVED,
    "block_out_channels": (8, 16, 24),
    "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "downsample_type": "resnet",
    "upsample_type": "resnet",
}
_OPENAI = {
    "channels": 8,
    "num_res_blocks": 1,
    "attention_levels": (1, 2),
    "scale_shift_norm": True,
    "embedding_cos_first": True,
    "embedding_freq_shift": 0.0,
    "downsample_padding": (1, 1),
    "num_groups": 4,
    "norm_epsilon": 1e-5,
    "num_classes": 5,
    "out_channels": 6,
}
# Narrow networks, each as diffusers' configuration and as our fields; a fixture of each is stored.
NARROW = {
    "unet_ddpm_cifar10_narrow": (
        {**PUBLISHED, "block_out_channels": (8, 16, 16, 16), "norm_num_groups": 4},
        {"channels": 8, "num_groups": 4},
    ),
    "unet_improved_narrow": (
        IMPROVED,
        _OPENAI | {"channel_multipliers": (1, 2, 2), "num_heads": 4},
    ),
    "unet_adm_narrow": (
        ADM,
        _OPENAI | {"channel_multipliers": (1, 2, 3), "head_channels": 4, "resample_blocks": True},
    ),
}

_LAYERS = {
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj",
    "time_emb_proj": "time_proj",
    "conv_shortcut": "skip",
    "time_embedding.linear_1": "time_0",
    "time_embedding.linear_2": "time_1",
    "conv_norm_out": "norm_out",
    "class_embedding": "class",
}


def our_path(name: str, levels: int) -> tuple[str, ...]:
    """Where a layer of diffusers' stands in our tree: ("down_1_block_0", "conv1") for down_blocks.1.resnets.0.conv1."""
    block = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(resnets|attentions)\.(\d+)\.(.+)", name)
    if block:
        way, level, kind, j, layer = block.groups()
        level = int(level) if way == "down" else levels - 1 - int(level)
        return f"{way}_{level}_{'block' if kind == 'resnets' else 'attn'}_{j}", _LAYERS.get(layer, layer)
    resample = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(down|up)samplers\.0\.(.+)", name)
    if resample:
        way, level, _, layer = resample.groups()
        level = int(level) if way == "down" else levels - 1 - int(level)
        return f"{way}_{level}_{way}sample", *(() if layer == "conv" else (_LAYERS.get(layer, layer),))
    middle = re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)", name)
    if middle:
        kind, j, layer = middle.groups()
        return f"mid_block_{j}" if kind == "resnets" else "mid_attn", _LAYERS.get(layer, layer)
    return (_LAYERS.get(name, name),)


def our_params(weights: dict[str, np.ndarray], levels: int) -> dict:
    """A state dict of diffusers' as the parameters of `models.UNet`."""
    params: dict = {}
    for name, value in weights.items():
        layer, leaf = name.rsplit(".", 1)
        *modules, last = our_path(layer, levels)
        node = params
        for module in modules:
            node = node.setdefault(module, {})
        node = node.setdefault(last, {})
        if "norm" in last:
            node = node.setdefault("norm", {})
            leaf = {"weight": "scale", "bias": "bias"}[leaf]
        elif last == "class":
            leaf = "embedding"
        elif leaf == "weight":
            leaf = "kernel"
            if value.ndim == 4:  # OIHW to HWIO, and 1x1 convolutions to matrices
                value = value.transpose(2, 3, 1, 0)
                value = value[0, 0] if last == "skip" else value
            else:
                value = value.T
        node[leaf] = value
    return params


def random_peer(config: dict, seed: int = 0):
    """The PyTorch network with every tensor redrawn, so that none is zero and none hides another."""
    import torch
    from diffusers import UNet2DModel

    torch.manual_seed(seed)
    model = UNet2DModel(**config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                fan_in = parameter[0].numel()
                parameter.normal_(0, fan_in**-0.5)
            elif "norm" in name and name.endswith("weight"):
                parameter.normal_(1, 0.2)
            else:
                parameter.normal_(0, 0.2)
    return model


def run_peer(model, x: np.ndarray, time: np.ndarray, y: np.ndarray | None = None) -> np.ndarray:
    """The PyTorch network on NHWC images."""
    import torch

    labels = None if y is None else torch.from_numpy(y)
    with torch.no_grad():
        out = model(torch.from_numpy(x.transpose(0, 3, 1, 2)), torch.from_numpy(time), labels).sample
    return out.numpy().transpose(0, 2, 3, 1)


def main() -> None:
    """Writes the fixtures that are not there."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, 16, 32, 3)).astype(np.float32)  # not square, so that no axis can be swapped
    time, y = np.array([0, 31, 999]), np.array([4, 0, 2])
    FIXTURES.mkdir(exist_ok=True)
    for name, (config, fields) in NARROW.items():
        if (FIXTURES / f"{name}.npz").exists():
            continue
        model = random_peer(config)
        arrays = {"x": x, "time": time} | ({"y": y} if fields.get("num_classes") else {})
        out = run_peer(model, **arrays)
        weights = {key: value.numpy() for key, value in model.state_dict().items()}
        arrays |= {"out": out} | {f"weights/{key}": value for key, value in weights.items()}
        np.savez_compressed(FIXTURES / f"{name}.npz", **arrays)
        print(f"{name}: {sum(w.size for w in weights.values()):,} weights, output std {out.std():.3f}")


if __name__ == "__main__":
    main()
