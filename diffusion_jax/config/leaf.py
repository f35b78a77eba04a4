"""One leaf of a config: its default, what it allows, and what it means."""

from __future__ import annotations

import dataclasses
from typing import Any

from diffusion_jax.config.values import ValueKind

__all__ = ["Leaf"]


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A leaf of a config.

    default: the value of DDPM's run on CIFAR-10.
    kind: the values that are allowed.
    meaning: what the leaf is; its first sentence is shown with an error.
    identity: whether the leaf decides the numbers of a run, so that a relaunch must not change it.
    """

    default: Any
    kind: ValueKind
    meaning: str
    identity: bool = False
