"""Every leaf of a config, by its full name, and what follows from the table: identity, names and the reference."""

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
    MESH,
    MODEL,
    OPTIMIZER,
    ROOT,
    TRAINING,
)

__all__ = ["CLASSIFIER_LEAVES", "GROUPS", "LEAVES", "ROOT_GROUP", "flatten", "identity", "nearest", "reference"]

ROOT_GROUP = ""  # the leaves that belong to no group

# Each group's meaning and leaves, in the order of the reference.
GROUPS: dict[str, tuple[str, dict[str, Leaf]]] = {
    ROOT_GROUP: ("The run as a whole.", ROOT),
    "data": ("Training data.", DATA),
    "model": ("The network: the fields of `models.UNet`.", MODEL),
    "diffusion": ("The diffusion process and the loss.", DIFFUSION),
    "training": ("Lengths and intervals of training.", TRAINING),
    "optimizer": ("The optimizer.", OPTIMIZER),
    "ema": ("The moving average of the parameters.", EMA),
    "mesh": ("The devices.", MESH),
    "sampling": ("Samples (`--mode=sample`, and the pictures during training).", SAMPLING),
    "editing": ("Edits of images (`--mode=edit`).", EDITING),
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


def identity(config: Mapping[str, Any]) -> dict[str, Any]:
    """The leaves that must agree between the launches of one run, as {"group.leaf": value}."""
    return {name: value for name, value in flatten(config).items() if name in LEAVES and LEAVES[name].identity}


def nearest(name: str, names: Iterable[str], cutoff: float = 0.7) -> str | None:
    """The name that is most like `name`: like its last part and like the whole; None where their mean is below `cutoff`."""
    last = name.rpartition(".")[2]

    def likeness(known: str) -> float:
        part = difflib.SequenceMatcher(None, last, known.rpartition(".")[2]).ratio()
        return (part + difflib.SequenceMatcher(None, name, known).ratio()) / 2

    best = max(names, key=likeness)
    return best if likeness(best) >= cutoff else None


_INTRODUCTION = """# Configuration

A config is a nested mapping of leaves, `group.leaf`. An experiment of `configs/` differs from the defaults in some leaves,
and so may any mapping:

    from diffusion_jax import config, training

    cfg = config.experiment("digits")                                   # or config.default(), DDPM on CIFAR-10
    state, train_step = training.create({"data": {"dataset": "digits", "image_size": 8, "channels": 1}})

`config.resolve(mapping)` completes a mapping with the defaults and checks it: an unknown leaf, or a value that its leaf does
not allow, raises `ConfigError` with one line that gives the value, what is allowed and what to type. On the command line,
`--config.group.leaf=VALUE` overrides a leaf: whole numbers may be written as 1e4, tuples as `"(1, 2)"`, and `None` where it
is allowed.

A leaf with the identity "yes" decides the numbers of a run, so a relaunch in the same work directory must not change it. The
others may change between launches.

This document is the output of `config.reference()`:

    python -c "from diffusion_jax import config; print(config.reference(), end='')" > docs/reference/configuration.md
"""


def reference() -> str:
    """The reference of all leaves in Markdown: docs/reference/configuration.md."""
    return "\n".join([_INTRODUCTION, *_reference_lines()])


def _reference_lines() -> Iterator[str]:
    for group, (meaning, leaves) in GROUPS.items():
        yield from _group_lines(f"`{group}`" if group else "Leaves without a group", meaning, leaves)
        if group == "model":
            heading = "`model` of a classifier (`diffusion.loss=classify`)"
            text = f"The fields of `models.Classifier`: those of the U-Net, except {_left_out()}."
            yield from _group_lines(heading, text, CLASSIFIER_MODEL)


def _left_out() -> str:
    names = [f"`{name}`" for name in MODEL if name not in CLASSIFIER_MODEL]
    return f"{', '.join(names[:-1])} and {names[-1]}"


def _group_lines(heading: str, meaning: str, leaves: Mapping[str, Leaf]) -> Iterator[str]:
    yield f"## {heading}"
    yield ""
    yield meaning
    yield ""
    yield "| leaf | default | allowed | identity | meaning |"
    yield "|---|---|---|---|---|"
    for name, leaf in leaves.items():
        cells = (f"`{name}`", f"`{leaf.default!r}`", leaf.kind.allowed, "yes" if leaf.identity else "no", leaf.meaning)
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
    yield ""
