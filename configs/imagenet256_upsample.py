"""ADM's ImageNet upsampler from 64x64 to 256x256 (Dhariwal & Nichol 2021, section 5.3): 311,795,910 parameters.

    python main.py --config=configs/imagenet256_upsample.py --workdir=DIR

Published result, from guided samples of the 64-pixel model: FID 3.94. The published code does not give the training length:
here 500,000 steps of batch 256. Expected, not measured: weeks on eight GPUs. Needs the TFDS data set imagenet2012, whose
files TFDS asks you to download by hand.
"""

from diffusion_jax.config import ConfigDict, default


def get_config() -> ConfigDict:
    """Six levels from 256 to 8 pixels, attention at 32, 16 and 8, 1,000 classes, a learned variance."""
    config = default()
    config.data.update(dataset="imagenet2012", image_size=256, low_resolution=64)
    config.model.update(channels=192, channel_multipliers=(1, 1, 2, 2, 4, 4), attention_levels=(3, 4, 5), num_heads=4)
    config.model.update(resample_blocks=True, scale_shift_norm=True)
    config.model.update(embedding_cos_first=True, embedding_freq_shift=0.0, downsample_padding=(1, 1))
    config.model.update(norm_epsilon=1e-5, initializer="openai", dropout=0.0, num_classes=1000)
    config.diffusion.update(variance="learned_range", loss="hybrid")
    config.training.update(num_steps=500_000, batch_size=256)
    config.optimizer.update(name="adamw", learning_rate=1e-4, warmup_steps=0, grad_clip=0.0)
    config.sampling.update(num_samples=16, batch_size=16)
    return config
