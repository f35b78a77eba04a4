"""Times functions alternately, to compare them."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np


def time_alternately(functions: Sequence[Callable[[], object]], rounds: int, warmup: int) -> np.ndarray:
    """Calls functions one after the other. Returns: seconds [functions, rounds], without the first `warmup` rounds.

    Each round calls every function once, so a drift in the machine's speed does not favor any function.
    """
    seconds = np.zeros((len(functions), warmup + rounds))
    for i in range(warmup + rounds):
        for row, function in enumerate(functions):
            start = time.perf_counter()
            function()
            seconds[row, i] = time.perf_counter() - start
    return seconds[:, warmup:]


class Process:
    """A new process with the functions of make(*arguments) -> ({name: function}, facts).

    facts: the second result of make.
    """

    def __init__(self, make: Callable[..., tuple[Mapping[str, Callable[[], object]], Any]], *arguments: Any):
        context = multiprocessing.get_context("spawn")
        self._connection, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other, make, arguments), daemon=True)
        self._process.start()
        other.close()  # otherwise `recv` would not fail when the process ends
        self.facts = self._connection.recv()

    def function(self, name: str) -> Callable[[], None]:
        """Returns a function () -> None that calls the function `name` in the process, and waits for the result."""

        def call() -> None:
            self._connection.send(name)
            self._connection.recv()

        return call

    def end(self) -> None:
        """Ends the process."""
        self._connection.send(None)
        self._process.join()


def _serve(connection: multiprocessing.connection.Connection, make: Callable[..., Any], arguments: tuple) -> None:
    """Calls the functions whose names the connection sends."""
    functions, facts = make(*arguments)
    connection.send(facts)
    for name in iter(connection.recv, None):
        functions[name]()
        connection.send(None)
