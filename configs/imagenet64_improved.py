"""Improved DDPM's ImageNet 64x64 models (Nichol & Dhariwal 2021), T = 4000.

    python main.py --config=configs/imagenet64_improved.py --workdir=DIR
    python main.py --config=configs/imagenet64_improved.py:vlb --workdir=DIR
    python main.py --config=configs/imagenet64_improved.py:conditional --workdir=DIR

| | parameters | training | published result |
|---|---|---|---|
| unconditional, hybrid loss | 121,063,942 | 1,500,000 steps of batch 128 | FID 19.2 |
| unconditional, vlb | 121,063,942 | 1,500,000 steps of batch 128 | 3.53 bits per dimension |
| conditional, hybrid loss | 273,049,350 | 250,000 steps of batch 2,048 | FID 2.92 |

Expected, not measured: weeks on one current GPU. Needs a TFDS set that TFDS downloads and prepares:
downsampled_imagenet/64x64, which the bits per dimension are of, and for the conditional model imagenet_resized/64x64.
"""

from diffusion_jax.config import ConfigDict, default, experiment, preset_fields


def get_config(variant: str = "hybrid") -> ConfigDict:
    """variant: "hybrid", "vlb" or "conditional"."""
    if variant not in ("hybrid", "vlb", "conditional"):
        raise ValueError(f"imagenet64_improved.py:{variant}: known are hybrid, vlb, conditional")
    conditional = variant == "conditional"
    config = experiment("cifar10_improved:hybrid" if conditional else f"cifar10_improved:{variant}")
    config.data.update(dataset="downsampled_imagenet/64x64", image_size=64)
    config.model = default().model
    config.model.update(preset_fields("improved_imagenet64" + ("_conditional" if conditional else "")))
    config.training.num_steps = 1_500_000
    config.evaluation.split = "validation"
    if conditional:
        config.data.dataset = "imagenet_resized/64x64"
        # Its run rescaled neither the timesteps nor the bound: one sampled term had weight 1, the whole bound 1 / T.
        config.diffusion.update(rescale_timesteps=False, vlb_weight=1 / config.diffusion.num_timesteps)
        config.training.update(num_steps=250_000, batch_size=2048)
        config.optimizer.learning_rate = 3e-4
    return config
