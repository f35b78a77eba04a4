"""Timing of functions that are compared with each other."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np


def time_alternately(functions: Sequence[Callable[[], object]], rounds: int, warmup: int) -> np.ndarray:
    """Seconds [functions, rounds] of functions that are called one after the other, without the first `warmup` rounds.

    In each round every function is called once, so a machine whose speed drifts does not favor one of them.
    """
    seconds = np.zeros((len(functions), warmup + rounds))
    for i in range(warmup + rounds):
        for row, function in enumerate(functions):
            start = time.perf_counter()
            function()
            seconds[row, i] = time.perf_counter() - start
    return seconds[:, warmup:]


class Process:
    """The functions that make(*arguments) returns by name, in a new process, whose memory no other program shares.

    facts: what make returns beside them.
    """

    def __init__(self, make: Callable[..., tuple[Mapping[str, Callable[[], object]], Any]], *arguments: Any):
        context = multiprocessing.get_context("spawn")
        self._connection, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other, make, arguments), daemon=True)
        self._process.start()
        other.close()  # so that the end of the process is an error here
        self.facts = self._connection.recv()

    def function(self, name: str) -> Callable[[], None]:
        """() -> None: calls the function of this name and waits for its end."""

        def call() -> None:
            self._connection.send(name)
            self._connection.recv()

        return call

    def end(self) -> None:
        """Ends the process."""
        self._connection.send(None)
        self._process.join()


def _serve(connection: multiprocessing.connection.Connection, make: Callable[..., Any], arguments: tuple) -> None:
    """Calls functions by the names that the connection sends."""
    functions, facts = make(*arguments)
    connection.send(facts)
    for name in iter(connection.recv, None):
        functions[name]()
        connection.send(None)
