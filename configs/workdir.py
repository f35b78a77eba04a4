"""The config that a work directory was trained with: --config=configs/workdir.py:DIR (what main.py uses where no config is
named)."""

import difflib
import json
import pathlib

from ml_collections import ConfigDict

from configs import default


def get_config(directory: str) -> ConfigDict:
    """The defaults, overwritten by DIR/config.json; a classifier's model has leaves of its own, none of the default's."""
    config = default.get_config()
    path = pathlib.Path(directory).expanduser() / "config.json"
    stored = _tuples(json.loads(path.read_text()))
    groups = [name for name, value in config.items() if isinstance(value, ConfigDict)]
    for name in groups:
        if not isinstance(stored.get(name, {}), dict):
            raise ValueError(f"{path}: {name}={stored[name]!r} must be a group of leaves, {{...}}; was it edited?")
    if stored.get("diffusion", {}).get("loss") == "classify":
        config.model = ConfigDict()
    for name, value in stored.items():
        _update(config, name, value, str(path))
    return config


def _update(config: ConfigDict, name: str, value, path: str, group: str = "") -> None:
    """Sets a leaf, or the leaves of a group. Raises: ValueError for another type, and for what looks like a misspelled leaf.

    Other leaves that the defaults do not have are taken: another version may have had them, or a config of the user's own.
    """
    leaf = f"{group}{name}"
    if isinstance(value, dict) and isinstance(config.get(name), ConfigDict):
        for key, item in value.items():
            _update(config[name], key, item, path, f"{leaf}.")
        return
    near = difflib.get_close_matches(name, config, n=1, cutoff=0.85)
    if name not in config and near and group != "model.":  # a classifier's model has no defaults to be like
        raise ValueError(
            f"{path}: unknown leaf {leaf}; did you mean {group}{near[0]}? Correct the name or remove the line"
        )
    try:
        config.update({name: value})
    except (TypeError, ValueError):
        usual = config[name]
        raise ValueError(
            f"{path}: {leaf}={value!r} must be of type {type(usual).__name__}, such as {usual!r}"
        ) from None


def _tuples(value):
    """JSON's lists as tuples, which is what overrides can replace."""
    if isinstance(value, dict):
        return {key: _tuples(leaf) for key, leaf in value.items()}
    return tuple(_tuples(leaf) for leaf in value) if isinstance(value, list) else value
