"""The config that a work directory was trained with: --config=configs/workdir.py:DIR (what main.py uses where no config is
named)."""

import json
import pathlib

from ml_collections import ConfigDict

from configs import default


def get_config(directory: str) -> ConfigDict:
    """The defaults, overwritten by DIR/config.json; a classifier's model has leaves of its own, none of the default's."""
    config = default.get_config()
    stored = _tuples(json.loads((pathlib.Path(directory).expanduser() / "config.json").read_text()))
    if stored.get("diffusion", {}).get("loss") == "classify":
        config.model = ConfigDict()
    config.update(stored)
    return config


def _tuples(value):
    """JSON's lists as tuples, which is what overrides can replace."""
    if isinstance(value, dict):
        return {key: _tuples(leaf) for key, leaf in value.items()}
    return tuple(_tuples(leaf) for leaf in value) if isinstance(value, list) else value
