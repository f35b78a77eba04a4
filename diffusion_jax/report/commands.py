"""The settings of a run that differ from the defaults, and the command that trains it again."""

from __future__ import annotations

import contextlib
import shlex
from typing import Any

from ml_collections import ConfigDict

from diffusion_jax import config as configs
from diffusion_jax.provenance import Provenance

__all__ = ["differences_from_defaults", "sample_command", "train_command"]


def differences_from_defaults(config: ConfigDict) -> dict[str, tuple[Any, Any, str]]:
    """{leaf: (value, default, description)} of the leaves that differ from the defaults."""
    values = {name: _plain(value) for name, value in configs.flatten(config).items()}
    defaults = configs.defaults(values)
    return {
        name: (values[name], default, configs.LEAVES[name].description)
        for name, default in defaults.items()
        if values[name] != _plain(default)
    }


def _plain(value: Any) -> Any:
    """Lists of JSON as the tuples of a config."""
    return tuple(map(_plain, value)) if isinstance(value, list | tuple) else value


def train_command(config: ConfigDict) -> str:
    """Trains the config in a new directory: the experiment with the fewest differing leaves, and these."""
    wanted, is_classifier = configs.flatten(config), configs.is_classifier(config)
    candidates: list[tuple[str, dict[str, Any]]] = []
    for name in configs.experiment_names():
        for variant in (name, f"{name}:{config.data.image_size}"):
            with contextlib.suppress(configs.ConfigError):  # the experiment takes no argument, or not this one
                experiment = configs.resolve(configs.experiment(variant))
                given = configs.flatten(experiment)
                if given.keys() == wanted.keys() and configs.is_classifier(experiment) == is_classifier:
                    changes = {leaf: _plain(value) for leaf, value in wanted.items()}
                    changes = {leaf: value for leaf, value in changes.items() if value != _plain(given[leaf])}
                    candidates.append((variant, changes))
    name, changes = min(candidates, key=lambda candidate: len(candidate[1]))
    mode = ["--mode=train_classifier"] if is_classifier else []
    changed = [f"--config.{leaf}={value}" for leaf, value in changes.items()]
    return shlex.join(["diffusion-jax", f"--config={name}", "--workdir=DIR", *mode, *changed])


def sample_command(config: ConfigDict, provenance: Provenance) -> str:
    """Draws the samples of a record again, with the newest weights of the run in the directory DIR. config: the run's."""
    stored = config.sampling.to_dict() | {"clip": configs.resolve_clip(config)}
    files = {name: path for name, path in provenance.details.items() if name in stored}
    wanted = {name: _plain(value) for name, value in (provenance.settings["sampling"] | files).items()}
    changed = [f"--config.sampling.{name}={value}" for name, value in wanted.items() if value != _plain(stored[name])]
    return shlex.join(["diffusion-jax", "--workdir=DIR", "--mode=sample", *changed])
