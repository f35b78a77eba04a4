"""Digits by their class, with classifier-free guidance: about two minutes to the digit asked for on two CPU cores.

python main.py --config=configs/digits_conditional.py --workdir=runs/conditional
"""

from diffusion_jax.config import ConfigDict, experiment


def get_config() -> ConfigDict:
    """The digits' network with ten classes, each label left out one time in ten."""
    config = experiment("digits")
    config.model.update(num_classes=10, label_dropout=0.1)
    return config
