"""Ends the process at once with one line on standard error and an exit code.

Its exit codes mean that rerunning the same command resumes the run, unlike 1 (the run failed) and 2 (bad input).
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator

from diffusion_jax.storage.locations import with_urls

__all__ = [
    "EXIT_INTERRUPTED",
    "EXIT_PEER_LOST",
    "EXIT_PREEMPTED",
    "exit_at_signals",
    "exit_if_output_is_closed",
    "exit_now",
]

EXIT_PREEMPTED = 75  # SIGTERM stopped the run: EX_TEMPFAIL of sysexits.h
EXIT_INTERRUPTED = 130  # Ctrl-C stopped the run: what shells report for SIGINT
EXIT_PEER_LOST = 69  # another process was lost, or no step finished in time: EX_UNAVAILABLE of sysexits.h
_EXIT_CLOSED_OUTPUT = 141  # the reader of standard output ended: what shells report for SIGPIPE

_LAST_LINE = threading.Lock()  # acquired by the writer of the last line and never released


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


def exit_at_signals(detail: str) -> None:
    """Makes SIGTERM and Ctrl-C end the process outside of `preemption.exit_on_signals`; detail: the end of the message."""

    def handler(number: int, _) -> None:
        interrupted = number == signal.SIGINT
        name = "interrupted by Ctrl-C" if interrupted else "stopped by SIGTERM"
        os.write(2, f"error: {name}; {detail}\n".encode())
        os._exit(EXIT_INTERRUPTED if interrupted else EXIT_PREEMPTED)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handler)


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
