"""ADM's LSUN bedroom model at 256x256 (Dhariwal & Nichol 2021): 552,814,086 parameters.

    python main.py --config=configs/lsun_bedroom_adm.py --workdir=DIR

Published result: FID 1.90. The published code does not say how long it was trained: here 500,000 steps of batch 256.
Expected, not measured: months on one current GPU. Needs the TFDS set lsun/bedroom, which TFDS downloads and prepares.
"""

from diffusion_jax.config import ConfigDict, experiment


def get_config() -> ConfigDict:
    """The unconditional network of ImageNet, with dropout."""
    config = experiment("imagenet_adm:256_unconditional")
    config.data.dataset = "lsun/bedroom"
    config.model.dropout = 0.1
    config.training.num_steps = 500_000
    return config
