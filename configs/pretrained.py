"""The config of published weights: --config=configs/pretrained.py:PATH (what main.py uses for --pretrained=PATH).

PATH|FLAGS where the file does not say all of itself; see diffusion_jax.pretrained.load.
"""

import pathlib

from ml_collections import ConfigDict

from configs import default
from diffusion_jax import pretrained


def get_config(where: str) -> ConfigDict:
    """The defaults, with the network, the schedule and the images of the weights, which training begins with."""
    path, flags = (where, "") if pathlib.Path(where).expanduser().exists() else (where.partition("|")[::2])
    config = default.get_config()
    config.update(pretrained.config_leaves(pretrained.describe(path, pretrained.read_flags(flags))))
    config.init_from, config.init_flags = path, flags
    config.data.update(dataset="folder", random_flip=False)
    return config
