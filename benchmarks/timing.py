"""Timing of functions that are compared with each other."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

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
