"""The commands that train a run again and draw its samples, with every leaf that must be given."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from diffusion_jax import config as configs

__all__ = ["differences_from_defaults", "sampling_command", "train_command"]

_PROGRAM = "diffusion-jax"


def differences_from_defaults(config: ConfigDict) -> dict[str, tuple[Any, Any, str]]:
    """{leaf: (value, default, description)} of the leaves that differ from the defaults."""
    leaves = configs.CLASSIFIER_LEAVES if configs.is_classifier(config) else configs.LEAVES
    values = {name: _plain(value) for name, value in configs.flatten(config).items()}
    return {
        name: (values[name], leaf.default, leaf.description)
        for name, leaf in leaves.items()
        if values[name] != _plain(leaf.default)
    }


def _plain(value: Any) -> Any:
    """Lists of JSON as the tuples of a config."""
    return tuple(map(_plain, value)) if isinstance(value, list | tuple) else value


def train_command(config: ConfigDict) -> str:
    """Trains the config in a new directory: the experiment with the fewest differing leaves, and these."""
    best: tuple[str, dict[str, Any]] | None = None
    for name, experiment in _experiments(config):
        changes = _changes(config, experiment)
        if changes is not None and (best is None or len(changes) < len(best[1])):
            best = name, changes
    assert best is not None  # every config of a kind differs from an experiment of that kind only in values
    mode = ["--mode=train_classifier"] if configs.is_classifier(config) else []
    return _command([f"--config={best[0]}", "--workdir=DIR", *mode], best[1])


def _experiments(config: ConfigDict) -> Iterable[tuple[str, ConfigDict]]:
    size = config.data.image_size
    for name in configs.experiment_names():
        for variant in (name, f"{name}:{size}"):
            with contextlib.suppress(configs.ConfigError):  # the experiment takes no argument, or not this one
                yield variant, configs.resolve(configs.experiment(variant))


def _changes(config: ConfigDict, experiment: ConfigDict) -> dict[str, Any] | None:
    """The leaves to override; None if the experiment is of another kind of network."""
    wanted, given = configs.flatten(config), configs.flatten(experiment)
    if wanted.keys() != given.keys() or configs.is_classifier(config) != configs.is_classifier(experiment):
        return None
    return {name: value for name, value in wanted.items() if _plain(value) != _plain(given[name])}


def _command(arguments: Sequence[str], overrides: Mapping[str, Any]) -> str:
    changed = [f"--config.{name}={_plain(value)}" for name, value in overrides.items()]
    return shlex.join([_PROGRAM, *arguments, *changed])


def sampling_command(config: ConfigDict, stored: Mapping[str, Any]) -> str:
    """Draws samples again. stored: as `read_settings` returns them."""
    settings, drawn_with = stored["settings"], stored.get("drawn_with", {})
    files = {name: drawn_with[name] for name in ("classifier", "low_resolution", "conditions") if name in drawn_with}
    sampling = settings.get("sampling", {}) | files
    if settings.get("batch_size") != min(config.sampling.batch_size, sampling.get("num_samples", 0)):
        sampling |= {"batch_size": settings.get("batch_size", config.sampling.batch_size)}
    known = {name: _plain(value) for name, value in config.sampling.items()} | {"clip": configs.resolve_clip(config)}
    changes = {
        f"sampling.{name}": value for name, value in sampling.items() if name in known and known[name] != _plain(value)
    }
    return _command(["--workdir=DIR", "--mode=sample"], changes)
