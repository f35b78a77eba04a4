"""Several processes that work together: agreement between them, and the loss of one of them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from diffusion_jax.distributed import termination
from diffusion_jax.storage.locations import with_urls

__all__ = [
    "abort_process",
    "all_processes_agree",
    "barrier",
    "broadcast_from_process_0",
    "is_multiprocess",
    "is_peer_failure",
    "log",
]

T = TypeVar("T")

_ABORT_DELAY = 5.0  # seconds


def is_multiprocess() -> bool:
    """Whether this process works together with others."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def broadcast_from_process_0(function: Callable[[], T]) -> T:
    """The value of `function()`, which process 0 alone calls: file systems may show each process another state.

    The value is passed as JSON. Raises: on process 0 the error of `function`, on the others an OSError with the same message.
    """
    if jax.process_count() == 1:
        return function()
    error, result = None, {}
    if jax.process_index() == 0:
        try:
            result = {"value": function()}
        except Exception as raised:
            error, result = raised, {"error": str(raised)}
    text = json.dumps(result).encode()
    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    padded = np.zeros(length, np.uint8)
    if jax.process_index() == 0:
        padded[:] = np.frombuffer(text, np.uint8)
    result = json.loads(np.asarray(multihost_utils.broadcast_one_to_all(padded)).tobytes())
    if error:
        raise error
    if "error" in result:
        raise OSError(result["error"])
    return result["value"]


def log(text: str) -> None:
    """Prints one line, on process 0 only."""
    if jax.process_index() == 0:
        print(with_urls(text), flush=True)


def all_processes_agree(value: bool) -> bool:
    """Whether `value` is true on every process."""
    return bool(np.all(multihost_utils.process_allgather(np.array(value))))


def barrier() -> None:
    """Waits for all processes: the last files of process 0 may take longer than JAX's own barrier at exit allows."""
    if is_multiprocess():
        multihost_utils.sync_global_devices("the end")


def is_peer_failure(error: BaseException) -> bool:
    """Whether an error, or its cause, is one that JAX raises when another process is lost.

    Status codes are not enough: of a killed peer, collectives of Gloo report UNKNOWN or INTERNAL and the barrier of jax 0.10
    reports INTERNAL, as other errors do. The message contains the code, so the words below cover both.
    """
    if not is_multiprocess():
        return False
    message = f"{error} {error.__cause__}"
    return any(word in message for word in ("Gloo", "UNAVAILABLE", "DEADLINE_EXCEEDED", "heartbeat", "Connection"))


def abort_process(message: str, exit_code: int) -> None:
    """Ends one process of several with one line, without JAX's barrier at exit, which the others may never reach.

    The end of process 0 aborts the others, so it first gives them time to write their own line.
    """
    termination.write_last_line(message)
    if jax.process_index() == 0:
        time.sleep(_ABORT_DELAY)
    termination.exit_without_cleanup(exit_code)
