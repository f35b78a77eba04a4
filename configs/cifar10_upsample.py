"""CIFAR-10 from 16x16 to 32x32: DDPM's network, given the smaller image beside x_t (as SR3 and ADM do).

    python main.py --config=configs/cifar10_upsample.py --workdir=DIR

35,749,763 parameters. No published result. Expected, not measured: as many images a second as cifar10.py, for a quarter of
its steps. It is trained on exact small images; --config.diffusion.conditioning_noise=0.2 makes it forgive those of a model.
"""

from diffusion_jax.config import ConfigDict, default


def get_config() -> ConfigDict:
    """The defaults, with a smaller image to start from."""
    config = default()
    config.data.low_resolution = 16
    config.training.num_steps = 200_000
    return config
