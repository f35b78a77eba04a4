"""DDPM's CelebA-HQ model at 256x256 (Ho et al. 2020): the network of lsun_church_256.py, 500,000 steps.

    python main.py --config=configs/celeba_hq_256.py --workdir=DIR

Published: samples, without an FID. Expected, not measured: about two days on a TPU v3-8 or on eight GPUs. Needs the TFDS
set celeb_a_hq/256, whose files TFDS asks you to download by hand.
"""

from diffusion_jax.config import ConfigDict, experiment


def get_config() -> ConfigDict:
    """As the church, with another data set and length."""
    config = experiment("lsun_church_256")
    config.data.dataset = "celeb_a_hq/256"
    config.training.num_steps = 500_000
    config.evaluation.split = "train"  # the only one that TFDS has
    return config
