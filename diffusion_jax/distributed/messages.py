"""Messages between the processes of a run that any thread may send: JAX's collectives belong to the main thread.

They go through the key-value store of JAX's coordination service, which process 0 hosts. Where a process is killed, the
service ends the others.
"""

from __future__ import annotations

import collections
import json
from collections.abc import Callable
from typing import TypeVar

import jax
from jax._src import distributed  # JAX has no public name for the client of its coordination service

__all__ = ["call_on_process_0"]

T = TypeVar("T")

_TIMEOUT = 1800  # seconds; every process writes its part of a checkpoint before it sends its message
_TIMEOUT_OF_RESULT = 2 * _TIMEOUT  # process 0 answers after it has all messages, or has waited in vain

_num_calls: collections.Counter[str] = collections.Counter()


def call_on_process_0(name: str, function: Callable[[list[str]], T], message: str) -> T:
    """`function(messages)`, which process 0 calls with the messages of all processes, in their order; all get the result.

    The result is passed as JSON. All processes must make the same calls of one name in the same order.
    Raises: on process 0 the error of `function`, on the others an OSError with the same message; also if a process does not
    send its message in time.
    """
    if jax.process_count() == 1:
        return function([message])
    _num_calls[name] += 1
    key = f"diffusion_jax/{name}/{_num_calls[name]}"
    client = distributed.global_state.client
    assert client is not None
    if jax.process_index() > 0:
        client.key_value_set(f"{key}/{jax.process_index()}", message)
        result = json.loads(client.blocking_key_value_get(f"{key}/result", _TIMEOUT_OF_RESULT * 1000))
        if "error" in result:
            raise OSError(result["error"])
        return result["value"]
    try:
        result = {
            "value": function([message] + [_receive(client, f"{key}/{i}", i) for i in range(1, jax.process_count())])
        }
    except Exception as error:
        client.key_value_set(f"{key}/result", json.dumps({"error": str(error)}))
        raise
    client.key_value_set(f"{key}/result", json.dumps(result))
    return result["value"]


def _receive(client, key: str, process: int) -> str:
    """The message of a process, which is deleted from the store. Raises: OSError if it does not come in time."""
    try:
        message = client.blocking_key_value_get(key, _TIMEOUT * 1000)
    except jax.errors.JaxRuntimeError as error:
        if "DEADLINE_EXCEEDED" not in str(error):
            raise
        raise OSError(f"process {process} has not answered for {_TIMEOUT} s") from error
    client.key_value_delete(key)
    return message
