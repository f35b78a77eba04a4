"""Errors of data, whose message is all that a user needs."""

from __future__ import annotations

from collections.abc import Iterable


class DataError(Exception):
    """Data that is missing, unreadable or of the wrong kind: one line that says what, where, and what to do."""


class UnreadableError(DataError):
    """Files that cannot be read. failures: (path, reason) of each."""

    _SHOWN = 5

    def __init__(self, failures: Iterable[tuple[str, str]]):
        self.failures = sorted(failures)
        shown = "; ".join(f"{path}: {reason}" for path, reason in self.failures[: self._SHOWN])
        more = len(self.failures) - self._SHOWN
        what = "the image" if len(self.failures) == 1 else f"{len(self.failures):,} images:"
        line = f"cannot read {what} {shown}{f'; and {more:,} more' if more > 0 else ''}; repair or remove "
        super().__init__(line + ("it" if len(self.failures) == 1 else "them"))

    def __reduce__(self):
        return UnreadableError, (self.failures,)  # it comes from worker processes, too
