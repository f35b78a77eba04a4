"""One leaf of a config: its default, allowed values and description."""

from __future__ import annotations

import dataclasses
from typing import Any

from diffusion_jax.config.values import ValueKind

__all__ = ["Leaf"]


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A leaf of a config.

    default: the value of DDPM's run on CIFAR-10.
    kind: the allowed values.
    description: a text for the reference; errors show its first sentence.
    identity: whether the leaf decides the numbers of a run, so that a relaunch must not change it.
    """

    default: Any
    kind: ValueKind
    description: str
    identity: bool = False
