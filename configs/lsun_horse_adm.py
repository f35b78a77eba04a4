"""ADM's LSUN horse model at 256x256 (Dhariwal & Nichol 2021): the network and the length of lsun_bedroom_adm.py.

    python main.py --config=configs/lsun_horse_adm.py --workdir=DIR

Published result: FID 2.57. Needs the TFDS set lsun/horse, which TFDS downloads and prepares.
"""

from diffusion_jax.config import ConfigDict, experiment


def get_config() -> ConfigDict:
    """As the bedroom, with another data set."""
    config = experiment("lsun_bedroom_adm")
    config.data.dataset = "lsun/horse"
    return config
