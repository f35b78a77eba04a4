"""diffusers' `UNet2DModel` in the shape of google/ddpm-cifar10-32, and its weights under this project's names.

As a program (it needs `make parity`'s packages), it writes the fixture that test_parity.py reads without them:

    python tests/diffusers_unet.py
"""

import pathlib
import re

import numpy as np

FIXTURE = pathlib.Path(__file__).parent / "fixtures" / "unet_ddpm_cifar10_narrow.npz"

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
NARROW = {**PUBLISHED, "block_out_channels": (8, 16, 16, 16), "norm_num_groups": 4}
NARROW_FIELDS = {"channels": 8, "num_groups": 4}

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
}


def our_path(name: str, levels: int) -> tuple[str, ...]:
    """Where a layer of diffusers' stands in our tree: ("down_1_block_0", "conv1") for down_blocks.1.resnets.0.conv1."""
    block = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(resnets|attentions)\.(\d+)\.(.+)", name)
    if block:
        way, level, kind, j, layer = block.groups()
        level = int(level) if way == "down" else levels - 1 - int(level)
        return f"{way}_{level}_{'block' if kind == 'resnets' else 'attn'}_{j}", _LAYERS.get(layer, layer)
    resample = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(down|up)samplers\.0\.conv", name)
    if resample:
        way, level, _ = resample.groups()
        level = int(level) if way == "down" else levels - 1 - int(level)
        return (f"{way}_{level}_{way}sample",)
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


def run_peer(model, x: np.ndarray, time: np.ndarray) -> np.ndarray:
    """The PyTorch network on NHWC images."""
    import torch

    with torch.no_grad():
        out = model(torch.from_numpy(x.transpose(0, 3, 1, 2)), torch.from_numpy(time)).sample
    return out.numpy().transpose(0, 2, 3, 1)


def main() -> None:
    """Writes the fixture."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, 16, 32, 3)).astype(np.float32)  # not square, so that no axis can be swapped
    time = np.array([0, 31, 999])
    model = random_peer(NARROW)
    out = run_peer(model, x, time)
    weights = {name: value.numpy() for name, value in model.state_dict().items()}
    FIXTURE.parent.mkdir(exist_ok=True)
    np.savez_compressed(
        FIXTURE, x=x, time=time, out=out, **{f"weights/{name}": value for name, value in weights.items()}
    )
    print(f"{FIXTURE}: {sum(w.size for w in weights.values()):,} weights, output std {out.std():.3f}")


if __name__ == "__main__":
    main()
