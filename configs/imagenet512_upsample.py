"""ADM's ImageNet upsampler from 128x128 to 512x512 (Dhariwal & Nichol 2021, section 5.3): 308,835,270 parameters.

    python main.py --config=configs/imagenet512_upsample.py --workdir=DIR

Published result, from guided samples of the 128-pixel model: FID 3.85. Otherwise as imagenet256_upsample.py.
"""

from diffusion_jax.config import ConfigDict, default


def get_config() -> ConfigDict:
    """Six levels from 512 to 16 pixels, attention at 32 and 16, 64 channels per head."""
    config = default()
    config.data.update(dataset="imagenet2012", image_size=512, low_resolution=128)
    config.model.update(channels=192, channel_multipliers=(1, 1, 2, 2, 4, 4), attention_levels=(4, 5))
    config.model.update(head_channels=64, resample_blocks=True, scale_shift_norm=True)
    config.model.update(embedding_cos_first=True, embedding_freq_shift=0.0, downsample_padding=(1, 1))
    config.model.update(norm_epsilon=1e-5, initializer="openai", dropout=0.0, num_classes=1000)
    config.diffusion.update(variance="learned_range", loss="hybrid")
    config.training.update(num_steps=500_000, batch_size=256)
    config.optimizer.update(name="adamw", learning_rate=1e-4, warmup_steps=0, grad_clip=0.0)
    config.sampling.update(num_samples=4, batch_size=4)
    return config
