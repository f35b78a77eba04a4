"""DDPM's CIFAR-10 model (Ho et al. 2020): 35,746,307 parameters, 800,000 steps of batch 128.

    python main.py --config=configs/cifar10.py --workdir=DIR

Published result: FID 3.17 on 50,000 samples with the EMA weights and 1,000 ancestral steps. Expected time, not measured:
Ho et al. report 21 steps a second on a TPU v3-8, so about 11 hours there. On a laptop, try that it runs:

    python main.py --config=configs/cifar10.py --workdir=DIR --config.training.batch_size=8 --config.training.num_steps=4
"""

from diffusion_jax.config import ConfigDict, default


def get_config() -> ConfigDict:
    """The defaults are this model."""
    return default()
