"""DDPM's CelebA-HQ model at 256x256 (Ho et al. 2020): the network of lsun_church_256.py, 500,000 steps.

    python main.py --config=configs/celeba_hq_256.py --workdir=DIR

Published: samples, without an FID. Expected, not measured: about two days on a TPU v3-8 or on eight GPUs. Needs the TFDS
set celeb_a_hq/256, whose files TFDS asks you to download by hand.
"""

from diffusion_jax.config import ConfigDict, default


def get_config() -> ConfigDict:
    """Six levels from 256 to 8 pixels, attention at 16, no dropout."""
    config = default()
    config.data.update(dataset="celeb_a_hq/256", image_size=256)
    config.model.update(channel_multipliers=(1, 1, 2, 2, 4, 4), attention_levels=(4,), dropout=0.0)
    config.diffusion.variance = "fixed_small"
    config.training.update(num_steps=500_000, batch_size=64)
    config.optimizer.learning_rate = 2e-5
    config.sampling.update(num_samples=32, batch_size=32)
    config.evaluation.split = "train"  # the only split in TFDS
    return config
