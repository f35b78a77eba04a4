"""ADM's LSUN cat model at 256x256 (Dhariwal & Nichol 2021): the network and the length of lsun_bedroom_adm.py.

    python main.py --config=configs/lsun_cat_adm.py --workdir=DIR

Published result: FID 5.57. Needs the TFDS set lsun/cat, which TFDS downloads and prepares.
"""

from diffusion_jax.config import ConfigDict, experiment


def get_config() -> ConfigDict:
    """As the bedroom, with another data set."""
    config = experiment("lsun_bedroom_adm")
    config.data.dataset = "lsun/cat"
    return config
