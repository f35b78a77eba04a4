"""Errors whose message is all that a user needs: one line, no traceback."""

from __future__ import annotations

import contextlib


class UserError(Exception):
    """What is wrong, where, and what to do. `exit_code`: 2 for bad input, 1 for a run that failed."""

    def __init__(self, message: str, exit_code: int = 2):
        super().__init__(message)
        self.exit_code = exit_code


@contextlib.contextmanager
def as_user_error(where: str):
    """Turns what a wrong value raises while a config is built into a UserError that says where."""
    try:
        yield
    except (ValueError, TypeError, ArithmeticError, LookupError) as error:
        raise UserError(f"{where}: {error}") from error
