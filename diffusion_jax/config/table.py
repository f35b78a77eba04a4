"""The table of all leaves by full name, and functions of it: identity leaves, similar names and the reference."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from diffusion_jax.config.leaf import Leaf
from diffusion_jax.config.sampling_leaves import EDITING, EVALUATION, SAMPLING
from diffusion_jax.config.training_leaves import (
    CLASSIFIER_MODEL,
    DATA,
    DIFFUSION,
    EMA,
    LOGGING,
    MESH,
    MODEL,
    OPTIMIZER,
    ROOT,
    TRAINING,
)

__all__ = [
    "CLASSIFIER_LEAVES",
    "GROUPS",
    "LEAVES",
    "ROOT_GROUP",
    "clips_by_default",
    "flatten",
    "identity_leaves",
    "is_classifier",
    "is_continuous",
    "is_upsampler",
    "nearest_name",
    "reference",
    "resolve_clip",
]

ROOT_GROUP = ""  # the leaves that belong to no group

# Each group's description and leaves, in the order of the reference.
GROUPS: dict[str, tuple[str, dict[str, Leaf]]] = {
    ROOT_GROUP: ("The run as a whole.", ROOT),
    "data": ("Training data.", DATA),
    "model": ("The network: the fields of `models.UNet`.", MODEL),
    "diffusion": ("The diffusion process and the loss.", DIFFUSION),
    "training": ("Lengths and intervals of training.", TRAINING),
    "optimizer": ("The optimizer.", OPTIMIZER),
    "ema": ("The moving average of the parameters.", EMA),
    "mesh": ("The devices.", MESH),
    "logging": ("Metrics and pictures of training.", LOGGING),
    "sampling": ("Samples (`--mode=sample`, and the pictures during training).", SAMPLING),
    "editing": ("Edits of images and arrays (`--mode=edit`).", EDITING),
    "evaluation": ("Likelihood and metrics of samples (`--mode=evaluate`, `--mode=progressive`).", EVALUATION),
}


def _by_name(groups: Mapping[str, tuple[str, dict[str, Leaf]]]) -> dict[str, Leaf]:
    return {
        f"{group}.{name}" if group else name: leaf
        for group, (_, leaves) in groups.items()
        for name, leaf in leaves.items()
    }


LEAVES = _by_name(GROUPS)
# With diffusion.loss=classify the config trains a classifier, whose network has other fields.
CLASSIFIER_LEAVES = _by_name(GROUPS | {"model": ("The network: the fields of `models.Classifier`.", CLASSIFIER_MODEL)})


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested leaves as {"group.leaf": value}."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping | ConfigDict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def identity_leaves(config: Mapping[str, Any]) -> dict[str, Any]:
    """The leaves that must agree between the launches of one run, as {"group.leaf": value}."""
    return {name: value for name, value in flatten(config).items() if name in LEAVES and LEAVES[name].identity}


def is_classifier(config: Mapping[str, Any]) -> bool:
    """Whether a complete config trains a classifier of noisy images instead of a diffusion model."""
    return config["diffusion"]["loss"] == "classify"


def is_upsampler(config: Mapping[str, Any]) -> bool:
    """Whether the diffusion model of a complete config enlarges small images, which are an input of its network."""
    return bool(config["data"]["low_resolution"])


def is_continuous(config: Mapping[str, Any]) -> bool:
    """Whether the data of a complete config are float numbers without gray levels."""
    return config["data"]["levels"] is None


def clips_by_default(config: Mapping[str, Any]) -> bool:
    """Whether the data of a complete config lie in [-1, 1], so that the predicted x_0 is clipped to it."""
    return not is_continuous(config) or config["data"]["normalization"] == "limits"


def resolve_clip(config: Mapping[str, Any], group: str = "sampling") -> bool | str:
    """The leaf `clip` of a group of a complete config; None follows the data."""
    clip = config[group]["clip"]
    return clips_by_default(config) if clip is None else clip


def nearest_name(name: str, names: Iterable[str], cutoff: float = 0.7) -> str | None:
    """The most similar of `names`, by the mean similarity of the last part and of the whole; None if it is below `cutoff`."""
    last = name.rpartition(".")[2]

    def similarity(known: str) -> float:
        part = difflib.SequenceMatcher(None, last, known.rpartition(".")[2]).ratio()
        return (part + difflib.SequenceMatcher(None, name, known).ratio()) / 2

    best = max(names, key=similarity)
    return best if similarity(best) >= cutoff else None


_INTRODUCTION = """# Configuration

A config is a nested mapping of leaves, `group.leaf`. An experiment of `configs/` differs from the defaults in some leaves,
and so may any mapping:

    from diffusion_jax import config, training

    cfg = config.experiment("digits")                                   # or config.default(), DDPM on CIFAR-10
    state, train_step = training.create({"data": {"dataset": "digits", "image_size": 8, "channels": 1}})

`config.resolve(mapping)` completes a mapping with the defaults and checks it: an unknown leaf, or a value that its leaf does
not allow, raises `ConfigError` with one line that gives the value, what is allowed and what to type. On the command line,
`--config.group.leaf=VALUE` overrides a leaf: whole numbers may be written as 1e4, tuples as `"(1, 2)"`, and `None` if it
is allowed.

The column "identity" shows which leaves decide the numbers of a run: a relaunch in the same work directory must not change
them. The others may change between launches.

`make reference` writes this page from `config.reference()`.
"""


def reference() -> str:
    """The reference of all leaves in Markdown: docs/reference/configuration.md."""
    return "\n".join([_INTRODUCTION, *_reference_lines()])


def _reference_lines() -> Iterator[str]:
    for group, (description, leaves) in GROUPS.items():
        yield from _group_lines(f"`{group}`" if group else "Leaves without a group", description, leaves)
        if group == "model":
            heading = "`model` of a classifier (`diffusion.loss=classify`)"
            text = f"The fields of `models.Classifier`: those of the U-Net, except {_unet_leaves()}."
            yield from _group_lines(heading, text, CLASSIFIER_MODEL)


def _unet_leaves() -> str:
    """The leaves of `model` that a classifier does not have, as a phrase."""
    names = [f"`{name}`" for name in MODEL if name not in CLASSIFIER_MODEL]
    return f"{', '.join(names[:-1])} and {names[-1]}"


def _group_lines(heading: str, description: str, leaves: Mapping[str, Leaf]) -> Iterator[str]:
    yield f"## {heading}"
    yield ""
    yield description
    yield ""
    yield "| leaf | default | allowed | identity | description |"
    yield "|---|---|---|---|---|"
    for name, leaf in leaves.items():
        cells = (
            f"`{name}`",
            f"`{leaf.default!r}`",
            leaf.kind.allowed,
            "yes" if leaf.identity else "no",
            leaf.description,
        )
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
    yield ""
