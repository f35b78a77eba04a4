"""PyTorch networks that this package's networks must equal: diffusers' `UNet2DModel`, OpenAI's, and the port of Ho et al.'s.

As a program (with `make parity`'s packages, and for the port a checkout of pesser/pytorch_diffusion) writes the fixtures
that helpers/stored_networks.py reads without these packages:

    PYTHONPATH=tests python -m helpers.torch_networks [--port=CHECKOUT]
"""

import argparse
import json
import sys

import numpy as np

from helpers.paths import FIXTURES

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
LARGE = {
    **PUBLISHED,
    "sample_size": 256,
    "block_out_channels": (128, 128, 256, 256, 512, 512),
    "down_block_types": ("DownBlock2D",) * 4 + ("AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D") + ("UpBlock2D",) * 4,
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
DIFFUSERS = {  # the stored ones
    "unet_ddpm_cifar10_narrow": {**PUBLISHED, "block_out_channels": (8, 16, 16, 16), "norm_num_groups": 4},
    "unet_improved_narrow": IMPROVED,
    "unet_adm_narrow": ADM,
}

_COMMON = {
    "learn_sigma": True,
    "num_res_blocks": 1,
    "num_channels": 64,
    "num_heads": 4,
    "num_heads_upsample": -1,
    "num_head_channels": -1,
    "attention_resolutions": "32,16,8",
    "channel_mult": "",
    "dropout": 0.0,
    "class_cond": True,
    "use_checkpoint": False,
    "use_scale_shift_norm": True,
    "resblock_updown": False,
    "use_fp16": False,
    "use_new_attention_order": False,
}
_CLASSIFIER = {
    "image_size": 64,
    "classifier_use_fp16": False,
    "classifier_width": 64,
    "classifier_depth": 1,
    "classifier_attention_resolutions": "32,16,8",
    "classifier_use_scale_shift_norm": True,
    "classifier_resblock_updown": True,
    "classifier_pool": "attention",
}
# Every published set of OpenAI's flags, narrowed: (the script's function, its flags).
OPENAI = {
    "improved": ("create_model", {**_COMMON, "image_size": 64, "attention_resolutions": "16,8"}),
    "improved unconditional": ("create_model", {**_COMMON, "image_size": 64, "class_cond": False}),
    "improved lsun": (
        "create_model",
        {**_COMMON, "image_size": 256, "num_heads": 1, "use_scale_shift_norm": False, "attention_resolutions": "16"}
        | {"class_cond": False},
    ),
    "improved upsampler": ("sr_create_model", {**_COMMON, "large_size": 256, "small_size": 64}),
    "adm 64": (
        "create_model",
        {**_COMMON, "image_size": 64, "num_res_blocks": 3, "num_head_channels": 16, "resblock_updown": True}
        | {"use_new_attention_order": True},
    ),
    "adm 128": ("create_model", {**_COMMON, "image_size": 128, "resblock_updown": True}),
    "adm 256": (
        "create_model",
        {**_COMMON, "image_size": 256, "num_head_channels": 16, "resblock_updown": True, "num_res_blocks": 2},
    ),
    "adm 512": ("create_model", {**_COMMON, "image_size": 512, "num_head_channels": 16, "resblock_updown": True}),
    "adm upsampler": (
        "sr_create_model",
        {**_COMMON, "large_size": 256, "small_size": 64, "resblock_updown": True, "num_head_channels": 16},
    ),
    "classifier": ("create_classifier", _CLASSIFIER),
}
# Stored: one level less than any published network, so that the files are small.
STORED_OPENAI = {
    "openai_narrow": (
        "create_model",
        {
            **_COMMON,
            "num_channels": 32,
            "image_size": 64,
            "channel_mult": "1,2",
            "resblock_updown": True,
            "attention_resolutions": "32",
        }
        | {"num_head_channels": 16},
    ),
    "openai_classifier_narrow": ("EncoderUNetModel", {"image_size": 8, "depth": 1, "width": 64}),
}
# The port's: two levels, attention at the second.
PORT = {"ch": 32, "ch_mult": (1, 2), "num_res_blocks": 1, "attn_resolutions": (8,), "resolution": 16}


def redraw(model, seed: int = 0):
    """The PyTorch network with every tensor redrawn, so that none is zero and none hides another."""
    import torch

    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, parameter[0].numel() ** -0.5)
            elif ("norm" in name and name.endswith("weight")) or name.endswith(("layers.0.weight", "out.0.weight")):
                parameter.normal_(1, 0.2)
            else:
                parameter.normal_(0, 0.2)
    return model.eval()


def diffusers(config: dict):
    from diffusers import UNet2DModel

    return redraw(UNet2DModel(**config))


def openai(function: str, flags: dict):
    """OpenAI's network for a script's flags."""
    from guided_diffusion import script_util, unet

    if function == "EncoderUNetModel":  # the classifier with one level, which no script makes
        model = unet.EncoderUNetModel(
            image_size=flags["image_size"],
            in_channels=3,
            model_channels=flags["width"],
            out_channels=10,
            num_res_blocks=flags["depth"],
            attention_resolutions=(1,),
            channel_mult=(1,),
            num_head_channels=64,
            use_scale_shift_norm=True,
            resblock_updown=True,
            pool="attention",
        )
        return redraw(model)
    if function == "sr_create_model":
        flags = {
            name: value for name, value in flags.items() if name not in ("channel_mult", "use_new_attention_order")
        }
    return redraw(getattr(script_util, function)(**flags))


def port(checkout: str):
    """The PyTorch port of Ho et al.'s network."""
    sys.path.insert(0, checkout)
    from pytorch_diffusion.model import Model

    return redraw(Model(in_channels=3, out_ch=3, dropout=0.0, **PORT))


def images(array: np.ndarray):
    """NHWC as PyTorch's NCHW."""
    import torch

    return torch.from_numpy(np.ascontiguousarray(array.transpose(0, 3, 1, 2)))


def call(model, x: np.ndarray, time: np.ndarray, y: np.ndarray | None = None, low: np.ndarray | None = None):
    """Calls a PyTorch network on NHWC images; returns the output as a tensor, with gradients."""
    import torch

    kind, time = type(model).__name__, torch.from_numpy(time)
    more = {} if y is None else {"class_labels" if kind == "UNet2DModel" else "y": torch.from_numpy(y)}
    if low is not None:
        more["low_res"] = images(low)
    out = model(images(x), time, **more)
    return out.sample if kind == "UNet2DModel" else out


def run(model, *args, **more) -> np.ndarray:
    """As `call`: NHWC, or [B, classes]."""
    out = call(model, *args, **more).detach().numpy()
    return out.transpose(0, 2, 3, 1) if out.ndim == 4 else out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", help="a checkout of pesser/pytorch_diffusion")
    checkout = parser.parse_args().port
    rng = np.random.default_rng(0)
    FIXTURES.mkdir(exist_ok=True)
    makers = {name: (lambda c=config: diffusers(c), config) for name, config in DIFFUSERS.items()}
    makers |= {name: (lambda n=name: openai(*STORED_OPENAI[n]), flags) for name, (_, flags) in STORED_OPENAI.items()}
    if checkout:
        makers["port_narrow"] = (lambda: port(checkout), PORT)
    for name, (make, config) in makers.items():
        if (FIXTURES / f"{name}.npz").exists():
            continue
        model = make()
        for parameter in model.parameters():  # stored in half the space, without a rounding between the two sides
            parameter.data = parameter.data.half().float()
        # Not square where the network allows it, so that no axis can be swapped.
        size = {"openai_classifier_narrow": (8, 8), "port_narrow": (16, 16)}.get(name, (16, 32))
        x = rng.normal(size=(3, *size, 3)).astype(np.float32)
        arrays = {"x": x, "time": np.array([0, 31, 999])}
        if config.get("num_class_embeds") or config.get("class_cond"):
            arrays["y"] = np.array([4, 0, 2])
        out = run(model, **arrays)
        weights = {key: value.numpy().astype(np.float16) for key, value in model.state_dict().items()}
        arrays |= {"out": out, "config": json.dumps(config)} | {
            f"weights/{key}": value for key, value in weights.items()
        }
        np.savez_compressed(FIXTURES / f"{name}.npz", **arrays)
        print(f"{name}: {sum(w.size for w in weights.values()):,} weights, output std {out.std():.3f}")


if __name__ == "__main__":
    main()
