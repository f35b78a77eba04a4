"""Joins processes to a run, and ends them even if they are stuck; shares values, and recognizes lost processes."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import multiprocessing
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from diffusion_jax.errors import UserError, print_text, visible, wrap
from diffusion_jax.files import with_urls

_T = TypeVar("_T")

# After these exit codes, the same command resumes the run, but not after 1 (the run failed) or 2 (bad input).
EXIT_PREEMPTED = 75  # SIGTERM stopped the run: EX_TEMPFAIL in sysexits.h
EXIT_INTERRUPTED = 130  # Ctrl-C stopped the run: the shell's code for SIGINT
EXIT_PEER_LOST = 69  # another process was lost, or no step finished in time: EX_UNAVAILABLE in sysexits.h
_EXIT_CLOSED_OUTPUT = 141  # the reader of standard output ended: the shell's code for SIGPIPE

_LAST_LINE = threading.Lock()  # the writer of the last line acquires this lock and never releases it

_ABORT_DELAY = 5.0  # seconds
_BARRIER_TIMEOUT = 3600  # seconds
_HEARTBEAT_TIMEOUT = 30  # seconds without a heartbeat after which a process counts as lost


def exit_now(message: str, exit_code: int, delay: float = 0.0) -> None:
    """Writes one line, then ends the process and its data workers, without cleanup, from any thread.

    If several threads call this, only the first call writes its line. delay: seconds between the line and the end.
    """
    if message and _LAST_LINE.acquire(blocking=False):
        if sys.stdout.isatty():
            os.write(1, b"\x1b[?25h\n")  # shows the cursor, which a progress bar hides
        # `print` could block, because another thread may hold its lock.
        os.write(2, visible(f"error: {with_urls(' '.join(message.split()))}").encode() + b"\n")
    time.sleep(delay)
    with contextlib.suppress(Exception):
        for child in multiprocessing.active_children():  # the children would wait for this process forever
            child.kill()
    os._exit(exit_code)


@contextlib.contextmanager
def exit_if_output_is_closed() -> Iterator[None]:
    """Ends the process without a message if the reader of standard output ends first, as in `... | head`."""
    try:
        try:
            yield
        except SystemExit:  # raised by --help
            sys.stdout.flush()
            raise
        sys.stdout.flush()
    except BrokenPipeError:
        try:
            print_text("")  # also fails, unless another pipe broke
        except BrokenPipeError:
            exit_now("", _EXIT_CLOSED_OUTPUT)  # devices may still compute, and other processes must notice
        raise


def join_processes(address: str | None, num_processes: int | None, process_id: int | None, timeout: int) -> None:
    """Joins the other processes of the run; must be called before anything uses a device.

    Without the first three arguments, JAX detects the processes of srun and TPU pods, or does nothing for a single process.
    address: HOST:PORT of process 0. timeout: seconds to wait for other processes before the program ends. Raises: UserError.
    """
    arguments = (address, num_processes, process_id)
    has_address = any(value is not None for value in arguments)
    if has_address and (None in arguments or ":" not in str(address)):
        raise UserError("--coordinator_address=HOST:PORT, --num_processes and --process_id must be given together")
    is_slurm = os.environ.get("SLURM_STEP_NUM_TASKS", "1") != "1"  # srun sets this variable in each task
    if not (has_address or is_slurm or importlib.util.find_spec("libtpu")):
        return
    name = f"process {process_id if has_address else os.environ.get('SLURM_PROCID', '')}"
    message = (
        f"{name}: the other processes did not connect within {timeout} s; raise --join_timeout, or start all processes"
    )
    timer = threading.Timer(timeout, exit_now, (message, EXIT_PEER_LOST))  # JAX's timeout prints a stack trace
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
        exit_now(f"{name} cannot connect to the other processes: {error}", EXIT_PEER_LOST)
    except (ValueError, RuntimeError) as error:
        if has_address or is_slurm:
            raise UserError(f"cannot connect to the other processes: {error}") from None
        # Otherwise libtpu is installed, but this machine is a single TPU host or has no TPU.
    finally:
        timer.cancel()


def is_multiprocess() -> bool:
    """Returns whether the run has several processes."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def gather(value: Any) -> list[Any]:
    """Returns the values of all processes, in process order, on every process. Values always pass through JSON."""
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    if jax.process_count() == 1:
        return [json.loads(text.tobytes())]
    lengths = multihost_utils.process_allgather(np.int32(len(text)))
    padded = np.zeros(lengths.max(), np.uint8)
    padded[: len(text)] = text
    rows = multihost_utils.process_allgather(padded)
    return [json.loads(row[:length].tobytes()) for row, length in zip(rows, lengths, strict=True)]


def broadcast_from_process_0(function: Callable[[], _T]) -> _T:
    """Calls `function` on process 0, and returns the value on every process.

    All processes then agree, even if a file system shows them different states. The value is passed
    as JSON. Raises: on process 0 the error of `function`; on other processes an OSError with the same message.
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
    """Prints one line, on process 0 only; a terminal wraps it at spaces."""
    if jax.process_index() == 0:
        text = visible(with_urls(text))
        print_text(wrap(text, shutil.get_terminal_size().columns) if sys.stdout.isatty() else text, lines=True)


def barrier(name: str) -> None:
    """Waits for all processes without using devices; `name` must be unique in a launch."""
    if is_multiprocess():
        from orbax.checkpoint import multihost  # slow to import

        multihost.get_barrier_sync_fn()(key=name, timeout_ms=1000 * _BARRIER_TIMEOUT)


def is_peer_failure(error: BaseException) -> bool:
    """Returns whether JAX raised an error, or the error's cause, because another process was lost.

    Status codes are not enough: for a killed peer, Gloo collectives report UNKNOWN or INTERNAL and the barrier in JAX 0.10
    reports INTERNAL, as for other errors. Messages contain the code, so the words below match codes and texts.
    """
    if not is_multiprocess():
        return False
    message = f"{error} {error.__cause__}"
    return any(word in message for word in ("Gloo", "UNAVAILABLE", "DEADLINE_EXCEEDED", "heartbeat", "Connection"))


def abort_process(message: str, exit_code: int) -> None:
    """Prints one line and ends this process without JAX's exit barrier, which other processes may never reach.

    The end of process 0 aborts all other processes, so process 0 first gives them time to write their own line.
    """
    exit_now(message, exit_code, delay=0 if jax.process_index() else _ABORT_DELAY)


class Watchdog:
    """A thread that ends the process with one line when no step has finished for too long.

    The limit is `seconds`, or five times the longest step if that is longer; 0 seconds mean no limit. The first step has no
    limit, because it may include compilation and connects the processes. The watchdog is a thread, because a process with a
    stuck peer waits inside a collective, where no Python code runs.
    """

    def __init__(self, seconds: float):
        self._seconds, self._longest = seconds, 0.0
        self._last, self._is_limited = 0.0, False
        self._finished = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="watchdog")

    def __enter__(self) -> Watchdog:
        self._last = time.monotonic()
        if self._seconds:
            self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._finished.set()
        if self._seconds:
            self._thread.join()

    def record_step(self) -> None:
        """Records that a step finished, or was dispatched to the devices."""
        now = time.monotonic()
        self._longest, self._last, self._is_limited = max(self._longest, now - self._last), now, True

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Removes the limit during work that may take long, such as pictures and checkpoints."""
        was_limited, self._is_limited = self._is_limited, False
        try:
            yield
        finally:
            self._last, self._is_limited = time.monotonic(), was_limited

    def _watch(self) -> None:
        while not self._finished.wait(min(1.0, self._seconds / 4)):
            last, limit = self._last, max(self._seconds, 5 * self._longest)
            if self._is_limited and time.monotonic() - last > limit:
                peer = " or another process" if is_multiprocess() else ""
                exit_now(
                    f"process {jax.process_index()}: no step has finished for {limit:.0f} s: reading data{peer} may be "
                    "stuck, or training.stall_timeout is too short; rerun the same command to resume from the last "
                    "checkpoint",
                    EXIT_PEER_LOST,
                )
