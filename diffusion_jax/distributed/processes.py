"""What process 0 finds out alone, told to all: the same file system may show itself to each process at another moment."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


def broadcast_from_process_0(function: Callable[[], Any]) -> Any:
    """The value of `function()`, called by process 0 alone and given to every process, as JSON; its exception likewise.

    Raises: on process 0 what `function` raised, elsewhere an OSError with the same words.
    """
    if jax.process_count() == 1:
        return function()
    raised, told = None, {}
    if jax.process_index() == 0:
        try:
            told = {"value": function()}
        except Exception as error:
            raised, told = error, {"error": str(error)}
    text = json.dumps(told).encode()
    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    padded = np.zeros(length, np.uint8)
    if jax.process_index() == 0:
        padded[:] = np.frombuffer(text, np.uint8)
    told = json.loads(np.asarray(multihost_utils.broadcast_one_to_all(padded)).tobytes())
    if raised:
        raise raised
    if "error" in told:
        raise OSError(told["error"])
    return told["value"]


def all_processes_agree(yes: bool) -> bool:
    """Whether every process says yes."""
    return bool(np.all(multihost_utils.process_allgather(np.array(yes))))
