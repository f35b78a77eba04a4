"""DDPM's LSUN cat model at 256x256 (Ho et al. 2020): the network of lsun_church_256.py, 1.8 million steps.

    python main.py --config=configs/lsun_cat_256.py --workdir=DIR

Published result: FID 19.75. Expected, not measured: days on a TPU v3-8 or on eight GPUs. Needs the TFDS set
lsun/cat, which TFDS downloads and prepares.
"""

from diffusion_jax.config import ConfigDict, experiment


def get_config() -> ConfigDict:
    """As the church, with another data set and length, and no flips (as in the published command)."""
    config = experiment("lsun_church_256")
    config.data.update(dataset="lsun/cat", random_flip=False)
    config.training.num_steps = 1_800_000
    return config
