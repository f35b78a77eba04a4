"""DDPM's LSUN bedroom model at 256x256 (Ho et al. 2020): the network of lsun_church_256.py, 2.4 million steps.

    python main.py --config=configs/lsun_bedroom_256.py --workdir=DIR

Published result: FID 6.36 (4.90 with a larger network). Expected, not measured: days on a TPU v3-8 or on eight GPUs.
Needs the TFDS set lsun/bedroom, which TFDS downloads and prepares.
"""

from diffusion_jax.config import ConfigDict, experiment


def get_config() -> ConfigDict:
    """As the church, with another data set and length."""
    config = experiment("lsun_church_256")
    config.data.update(dataset="lsun/bedroom")
    config.training.num_steps = 2_400_000
    return config
