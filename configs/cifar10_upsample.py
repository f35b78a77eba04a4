"""CIFAR-10 from 16x16 to 32x32: DDPM's network, with the smaller image as input beside x_t (as in SR3 and ADM).

    python main.py --config=configs/cifar10_upsample.py --workdir=DIR

35,749,763 parameters. No published result. Expected, not measured: as many images per second as cifar10.py, with a quarter
of the steps. Training uses exact small images; with --config.diffusion.conditioning_noise=0.2 the model also accepts samples
as small images.
"""

from diffusion_jax.config import ConfigDict, default


def get_config() -> ConfigDict:
    """The defaults, with a smaller image as input."""
    config = default()
    config.data.low_resolution = 16
    config.training.num_steps = 200_000
    return config
