"""The end of a process, and several that work together by `jax.distributed`: start, agreement, and the loss of one."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from diffusion_jax.errors import UserError
from diffusion_jax.files import with_urls

__all__ = [
    "EXIT_INTERRUPTED",
    "EXIT_PEER_LOST",
    "EXIT_PREEMPTED",
    "abort_process",
    "barrier",
    "broadcast_from_process_0",
    "exit_if_output_is_closed",
    "exit_now",
    "gather",
    "is_multiprocess",
    "is_peer_failure",
    "join_processes",
    "log",
]

T = TypeVar("T")

# After these exit codes the same command resumes the run, unlike after 1 (the run failed) and 2 (bad input).
EXIT_PREEMPTED = 75  # SIGTERM stopped the run: EX_TEMPFAIL of sysexits.h
EXIT_INTERRUPTED = 130  # Ctrl-C stopped the run: what shells report for SIGINT
EXIT_PEER_LOST = 69  # another process was lost, or no step finished in time: EX_UNAVAILABLE of sysexits.h
_EXIT_CLOSED_OUTPUT = 141  # the reader of standard output ended: what shells report for SIGPIPE

_LAST_LINE = threading.Lock()  # acquired by the writer of the last line and never released

_ABORT_DELAY = 5.0  # seconds
_BARRIER_TIMEOUT = 3600  # seconds
_HEARTBEAT_TIMEOUT = 30  # seconds without a heartbeat after which a process counts as lost


def exit_now(message: str, exit_code: int, delay: float = 0.0) -> None:
    """Ends the process and its data workers from any thread with one line; nothing is cleaned up, as after SIGKILL.

    If several threads call this, only the first writes its line. delay: seconds between the line and the end.
    """
    if message and _LAST_LINE.acquire(blocking=False):
        if sys.stdout.isatty():
            os.write(1, b"\x1b[?25h\n")  # shows the cursor, which a progress bar hides
        # Not `print`, which another thread may be in.
        os.write(2, f"error: {with_urls(' '.join(message.split()))}\n".encode())
    time.sleep(delay)
    with contextlib.suppress(Exception):
        for child in multiprocessing.active_children():  # they would wait for this process
            child.kill()
    os._exit(exit_code)


@contextlib.contextmanager
def exit_if_output_is_closed() -> Iterator[None]:
    """Ends the process without a message if the reader of its standard output ends first, as in `... | head`."""
    try:
        try:
            yield
        except SystemExit:  # of --help
            sys.stdout.flush()
            raise
        sys.stdout.flush()
    except BrokenPipeError:
        try:
            print(flush=True)  # fails, too, unless another pipe broke
        except BrokenPipeError:
            exit_now("", _EXIT_CLOSED_OUTPUT)  # devices may still compute, and other processes must notice
        raise


def join_processes(address: str | None, num_processes: int | None, process_id: int | None, timeout: int) -> None:
    """Joins the other processes of the run; must be called before anything uses a device.

    Without the first three arguments, JAX itself detects the processes of srun and of TPU pods; anything else is a single
    process, and nothing is done.

    address: HOST:PORT of process 0. timeout: seconds to wait for the others, after which the program ends. Raises: UserError.
    """
    arguments = (address, num_processes, process_id)
    has_address = any(value is not None for value in arguments)
    if has_address and (None in arguments or ":" not in str(address)):
        raise UserError("--coordinator_address=HOST:PORT, --num_processes and --process_id must be given together")
    is_slurm = os.environ.get("SLURM_STEP_NUM_TASKS", "1") != "1"  # srun sets it in each of its tasks
    if not (has_address or is_slurm or importlib.util.find_spec("libtpu")):
        return
    name = f"process {process_id if has_address else os.environ.get('SLURM_PROCID', '')}"
    message = f"{name}: the other processes did not connect within {timeout} s; raise --join_timeout, or start them"
    timer = threading.Timer(timeout, exit_now, (message, EXIT_PEER_LOST))  # JAX's own timeout aborts with a stack trace
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(
            *arguments,
            cluster_detection_method="deactivate" if has_address else None,
            initialization_timeout=timeout + 60,
            heartbeat_timeout_seconds=_HEARTBEAT_TIMEOUT,
            shutdown_timeout_seconds=2 * _HEARTBEAT_TIMEOUT,
        )
    except jax.errors.JaxRuntimeError as error:
        exit_now(f"{name} cannot connect to the others: {error}", EXIT_PEER_LOST)
    except (ValueError, RuntimeError) as error:
        if has_address or is_slurm:
            raise UserError(f"cannot connect to the other processes: {error}") from None
        # Otherwise libtpu is installed, but this machine is a single TPU host or has no TPU.
    finally:
        timer.cancel()


def is_multiprocess() -> bool:
    """Whether this process works together with others."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def gather(value: Any) -> list[Any]:
    """The values of all processes, in their order, on every process. They are passed as JSON, by a single process, too."""
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    if jax.process_count() == 1:
        return [json.loads(text.tobytes())]
    lengths = multihost_utils.process_allgather(np.int32(len(text)))
    padded = np.zeros(lengths.max(), np.uint8)
    padded[: len(text)] = text
    rows = multihost_utils.process_allgather(padded)
    return [json.loads(row[:length].tobytes()) for row, length in zip(rows, lengths, strict=True)]


def broadcast_from_process_0(function: Callable[[], T]) -> T:
    """The value of `function()`, which process 0 alone calls: file systems may show each process another state.

    The value is passed as JSON. Raises: on process 0 the error of `function`, on the others an OSError with the same message.
    """
    error, result = None, {}
    if jax.process_index() == 0:
        try:
            result = {"value": function()}
        except Exception as raised:
            error, result = raised, {"error": str(raised)}
    result = gather(result)[0]
    if error:
        raise error
    if "error" in result:
        raise OSError(result["error"])
    return result["value"]


def log(text: str) -> None:
    """Prints one line, on process 0 only."""
    if jax.process_index() == 0:
        print(with_urls(text), flush=True)


def barrier(name: str) -> None:
    """Waits for all processes, without their devices; `name` must be unique in a launch."""
    if is_multiprocess():
        from orbax.checkpoint import multihost  # slow to import

        multihost.get_barrier_sync_fn()(key=name, timeout_ms=1000 * _BARRIER_TIMEOUT)


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
    exit_now(message, exit_code, delay=0 if jax.process_index() else _ABORT_DELAY)
