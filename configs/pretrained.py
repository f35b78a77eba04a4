"""The config of published weights: --config=configs/pretrained.py:PATH (what main.py uses for --pretrained=PATH).

PATH|FLAGS where the file does not say all of itself; see diffusion_jax.pretrained.load.
"""

import pathlib

from ml_collections import ConfigDict

from configs import default, workdir
from diffusion_jax import pretrained


def get_config(where: str) -> ConfigDict:
    """The config of a run of this program, data and all; for other weights the defaults, with their network, schedule and
    images. Training begins with the weights."""
    path, flags = (where, "") if pathlib.Path(where).expanduser().exists() else (where.partition("|")[::2])
    found = pretrained.describe(path, pretrained.read_flags(flags))
    if pretrained.is_workdir(path):
        config = workdir.get_config(path)
    else:
        config = default.get_config()
        leaves = pretrained.config_leaves(found)
        if leaves["diffusion"]["loss"] == "classify":
            config.model = ConfigDict()  # a classifier lacks some of the default's fields
        config.update(leaves)
        config.data.update(dataset="folder", random_flip=False)
    config.init_from, config.init_flags = path, flags
    return config
