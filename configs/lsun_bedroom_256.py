"""DDPM's LSUN bedroom model at 256x256 (Ho et al. 2020): the network of lsun_church_256.py, 2.4 million steps.

    python main.py --config=configs/lsun_bedroom_256.py --workdir=DIR

Published result: FID 6.36 (4.90 with a larger network). Expected, not measured: days on a TPU v3-8 or on eight GPUs.
Needs the TFDS set lsun/bedroom, which TFDS downloads and prepares.
"""

from diffusion_jax.config import ConfigDict, default


def get_config() -> ConfigDict:
    """Six levels from 256 to 8 pixels, attention at 16, no dropout."""
    config = default()
    config.data.update(dataset="lsun/bedroom", image_size=256)
    config.model.update(channel_multipliers=(1, 1, 2, 2, 4, 4), attention_levels=(4,), dropout=0.0)
    config.diffusion.variance = "fixed_small"
    config.training.update(num_steps=2_400_000, batch_size=64)
    config.optimizer.learning_rate = 2e-5
    config.sampling.update(num_samples=32, batch_size=32)
    config.evaluation.split = "validation"
    return config
