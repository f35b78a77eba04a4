"""The U-Net of diffusers on PyTorch, as a baseline for benchmarks: fields, cost, train step and DDIM."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

from ml_collections import ConfigDict


def unet_fields(config: ConfigDict) -> dict:
    """Returns the `UNet2DModel` fields for a config's network with three output channels."""
    model = config.model
    num_levels, attention = len(model.channel_multipliers), model.attention_levels
    kind = "Resnet{}sampleBlock2D" if model.resample_blocks else "{}Block2D"
    resample = "resnet" if model.resample_blocks else "conv"
    return {
        "sample_size": config.data.image_size,
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": tuple(round(model.channels * m) for m in model.channel_multipliers),
        "layers_per_block": model.num_res_blocks,
        "down_block_types": tuple(
            "AttnDownBlock2D" if i in attention else kind.format("Down") for i in range(num_levels)
        ),
        "up_block_types": tuple(
            "AttnUpBlock2D" if i in attention else kind.format("Up") for i in reversed(range(num_levels))
        ),
        "downsample_type": resample,
        "upsample_type": resample,
        "downsample_padding": model.downsample_padding[0],
        "flip_sin_to_cos": model.embedding_cos_first,
        "freq_shift": int(model.embedding_freq_shift),
        "norm_eps": model.norm_epsilon,
        "norm_num_groups": model.num_groups,
        "attn_norm_num_groups": model.num_groups,
        "attention_head_dim": model.head_channels,
        "resnet_time_scale_shift": "scale_shift" if model.scale_shift_norm else "default",
        "num_class_embeds": model.num_classes or None,
        "dropout": model.dropout,
    }


def count_parameters_and_macs(fields: dict) -> tuple[int, int]:
    """Returns (parameters, multiplications of a call for one image) for diffusers' network, without allocating arrays."""
    import torch
    from diffusers import UNet2DModel
    from torch.utils.flop_counter import FlopCounterMode

    size = fields["sample_size"]
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model = UNet2DModel(**fields)
        labels = {"class_labels": torch.zeros(1, dtype=torch.long)} if fields["num_class_embeds"] else {}
        model(torch.zeros(1, 3, size, size), torch.zeros(1), **labels)
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops() // 2


def make_train_step(
    network, model, x, autocast: AbstractContextManager, labels: dict | None = None, fused: bool = False
) -> Callable[[], None]:
    """Returns a function that trains `model` for one step on x: L_simple, gradient clipping, Adam and the EMA.

    network: the model, or the compiled model. x: float [B, 3, H, W] on the model's device. autocast: context for the forward
    pass. labels: keyword arguments of the network. fused: whether Adam is fused.
    """
    import torch

    weights = list(model.parameters())
    ema = [p.detach().clone() for p in weights]
    adam = torch.optim.Adam(weights, lr=2e-4, fused=fused)
    alpha_bar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, device=x.device), 0)

    def step() -> None:
        t, eps = torch.randint(0, 1000, (len(x),), device=x.device), torch.randn_like(x)
        a = alpha_bar[t].reshape(-1, 1, 1, 1)
        with autocast:
            output = network(a.sqrt() * x + (1 - a).sqrt() * eps, t, **labels or {}).sample
        loss = ((output.float() - eps) ** 2).mean()
        adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        adam.step()
        with torch.no_grad():
            torch._foreach_lerp_(ema, weights, 1e-4)

    return step


def make_ddim(network, x_T, autocast: AbstractContextManager, labels: dict, num_steps: int) -> Callable[[], None]:
    """Returns a function that samples from x_T [B, 3, H, W] with DDIM. Arguments: as for `make_train_step`."""
    import torch
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(beta_start=1e-4, beta_end=0.02, num_train_timesteps=1000)
    scheduler.set_timesteps(num_steps)
    times = [(t, t.to(x_T.device)) for t in scheduler.timesteps]  # the scheduler's tables are on the CPU

    def sample() -> None:
        x_t = x_T
        with torch.no_grad(), autocast:
            for t, device_t in times:
                x_t = scheduler.step(network(x_t, device_t, **labels).sample.float(), t, x_t).prev_sample

    return sample
