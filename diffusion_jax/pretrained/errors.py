"""What is wrong with weights that were to be loaded."""

from __future__ import annotations

from collections.abc import Iterable


class PretrainedError(Exception):
    """Weights that cannot be loaded or saved: one line that says what, where, and what to do."""


def some(names: Iterable[str], limit: int = 5) -> str:
    """The first names of many, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
