"""Improved DDPM's ImageNet 64x64 models (Nichol & Dhariwal 2021), T = 4000.

    python main.py --config=configs/imagenet64_improved.py --workdir=DIR
    python main.py --config=configs/imagenet64_improved.py:vlb --workdir=DIR
    python main.py --config=configs/imagenet64_improved.py:conditional --workdir=DIR

| | parameters | training | published result |
|---|---|---|---|
| unconditional, hybrid loss | 121,063,942 | 1,500,000 steps of batch 128 | FID 19.2 |
| unconditional, vlb | 121,063,942 | 1,500,000 steps of batch 128 | 3.53 bits per dimension |
| conditional, hybrid loss | 273,049,350 | 250,000 steps of batch 2,048 | FID 2.92 |

Expected, not measured: weeks on one current GPU. Needs a data set that TFDS downloads and prepares:
downsampled_imagenet/64x64 (the published bits per dimension use it), or imagenet_resized/64x64 for the conditional model.
"""

from diffusion_jax.config import ConfigDict, default


def get_config(variant: str = "hybrid") -> ConfigDict:
    """variant: "hybrid", "vlb" or "conditional"."""
    if variant not in ("hybrid", "vlb", "conditional"):
        raise ValueError(f"imagenet64_improved.py:{variant}: known are hybrid, vlb, conditional")
    config = default()
    config.data.update(dataset="downsampled_imagenet/64x64", image_size=64, random_flip=False)
    config.model.update(channel_multipliers=(1, 2, 3, 4), num_res_blocks=3, attention_levels=(2, 3))
    config.model.update(num_heads=4, scale_shift_norm=True)
    config.model.update(embedding_cos_first=True, embedding_freq_shift=0.0, downsample_padding=(1, 1))
    config.model.update(norm_epsilon=1e-5, initializer="openai", dropout=0.0)
    config.diffusion.update(schedule="cosine", num_timesteps=4000, rescale_timesteps=True)
    config.diffusion.update(variance="learned_range", loss="hybrid")
    config.training.num_steps = 1_500_000
    config.optimizer.update(name="adamw", learning_rate=1e-4, warmup_steps=0, grad_clip=0.0)
    config.evaluation.split = "validation"
    if variant == "vlb":
        config.diffusion.update(loss="vlb", timestep_sampler="loss_second_moment")
    if variant == "conditional":
        config.data.dataset = "imagenet_resized/64x64"
        config.model.update(channels=192, num_classes=1000)
        # The published run rescaled neither the timesteps nor the bound: one sampled term had weight 1, so
        # the whole bound, a sum of T terms, had weight 1 / T.
        config.diffusion.update(rescale_timesteps=False, vlb_weight=1 / 4000)
        config.training.update(num_steps=250_000, batch_size=2048)
        config.optimizer.learning_rate = 3e-4
    return config
