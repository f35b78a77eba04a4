"""ADM's larger ImageNet models (Dhariwal & Nichol 2021), at 128, 256 or 512 pixels.

    python main.py --config=configs/imagenet_adm.py --workdir=DIR
    python main.py --config=configs/imagenet_adm.py:128 --workdir=DIR

| argument | parameters | steps of batch 256 | published FID, with the classifier's guidance |
|---|---|---|---|
| 128 | 421,529,606 | 4,360,000 | 2.97 |
| 256 (the default) | 553,838,086 | 1,980,000 | 4.59 |
| 256_unconditional | 552,814,086 | 1,980,000 | |
| 512 | 558,997,638 | 1,940,000 | 7.72 |

Expected, not measured: years on one current GPU; these models are for pods. `--config.model.dtype=bfloat16` and
`--config.model.remat=True` save memory. Needs the TFDS data set imagenet2012, whose files TFDS asks you to download by hand.
The guiding classifiers are in imagenet_classifier.py, the upsamplers in imagenet256_upsample.py and imagenet512_upsample.py.
"""

from diffusion_jax.config import ConfigDict, default


def get_config(variant: str = "256") -> ConfigDict:
    """variant: "128", "256", "256_unconditional" or "512"."""
    if variant not in ("128", "256", "256_unconditional", "512"):
        raise ValueError(f"imagenet_adm.py:{variant}: known are 128, 256, 256_unconditional, 512")
    config = default()
    config.data.update(dataset="imagenet2012", image_size=256)
    config.model.update(channels=256, channel_multipliers=(1, 1, 2, 2, 4, 4), attention_levels=(3, 4, 5))
    config.model.update(head_channels=64, resample_blocks=True, scale_shift_norm=True)
    config.model.update(embedding_cos_first=True, embedding_freq_shift=0.0, downsample_padding=(1, 1))
    config.model.update(norm_epsilon=1e-5, initializer="openai", dropout=0.0, num_classes=1000)
    config.diffusion.update(variance="learned_range", loss="hybrid")
    config.training.update(num_steps=1_980_000, batch_size=256)
    config.optimizer.update(name="adamw", learning_rate=1e-4, warmup_steps=0, grad_clip=0.0)
    config.sampling.update(steps=250, spacing="openai", num_samples=16, batch_size=16)
    config.evaluation.split = "validation"
    if variant == "256_unconditional":
        config.model.num_classes = 0
    if variant == "128":
        config.data.image_size = 128
        config.model.update(channel_multipliers=(1, 1, 2, 3, 4), attention_levels=(2, 3, 4))
        config.model.update(num_heads=4, head_channels=None)
        config.training.num_steps = 4_360_000
    if variant == "512":
        config.data.image_size = 512
        config.model.update(channel_multipliers=(0.5, 1, 1, 2, 2, 4, 4), attention_levels=(4, 5, 6))
        config.training.num_steps = 1_940_000
    return config
