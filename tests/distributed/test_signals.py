"""Signals and the watchdog, without a run."""

import signal
import threading
import time

import pytest

from diffusion_jax import run_dir
from diffusion_jax.distributed import processes
from diffusion_jax.distributed.processes import EXIT_INTERRUPTED, EXIT_PEER_LOST, EXIT_PREEMPTED
from diffusion_jax.errors import SaveError
from helpers.paths import ROOT
from helpers.program import finish, start

ENDINGS = {
    signal.SIGTERM: ("stopped by SIGTERM", EXIT_PREEMPTED),
    signal.SIGINT: ("interrupted by Ctrl-C", EXIT_INTERRUPTED),
}


def test_watchdog_ends_the_program_when_no_step_finishes(monkeypatch):
    ended = threading.Event()
    calls = []
    monkeypatch.setattr(processes, "exit_now", lambda message, code: (calls.append((message, code)), ended.set()))
    with processes.Watchdog(0.2) as dog:
        with dog.paused():  # a compilation
            assert not ended.wait(0.6)
        dog.record_step()
        assert ended.wait(20)
    assert calls[0][1] == EXIT_PEER_LOST
    assert "reading data may be stuck, or training.stall_timeout is too short" in calls[0][0]


@pytest.mark.thorough
def test_computed_chunks_have_a_time_limit_except_the_first(monkeypatch, tmp_path):
    ended, seen = threading.Event(), []
    monkeypatch.setattr(processes, "exit_now", lambda *_: ended.set())

    def fill(name, seconds, *waits):
        def compute(i):
            seen.append(ended.wait(waits[i]))
            return {}

        run_dir.ChunkStore(run_dir.RunDir(tmp_path / name)).fill("Computing", len(waits), 1, compute, seconds)

    fill("one", 0.1, 0.2, 0.2, 0.2)  # a single process waits for no other process
    monkeypatch.setattr(run_dir, "is_multiprocess", lambda: True)
    fill("several", 0.2, 0.5, 20)
    assert seen == [False, False, False, False, True]  # five times the duration of the first: 2.5 s


IN_A_CALL = f"""
import contextlib, functools, hashlib, sys
sys.path.insert(0, {str(ROOT)!r})
from diffusion_jax.distributed.signals import HANDLER
from diffusion_jax.run_dir import RunDir
from diffusion_jax.training.checkpoints import resume_hint

HANDLER.resume_hint = functools.partial(resume_hint, RunDir(sys.argv[2]))
HANDLER.install()
with HANDLER.saving() if sys.argv[1] == "2" else contextlib.nullcontext():
    print("compiling", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"a call that no signal handler interrupts", b"", 10**9)
"""


@pytest.mark.whole
@pytest.mark.parametrize("numbers", [[signal.SIGINT], [signal.SIGTERM], [signal.SIGINT] * 2])
def test_signal_ends_a_call_that_python_cannot_interrupt(tmp_path, numbers):
    """For example a compilation before the first step; during training, a second Ctrl-C ends the call."""
    process = start("-c", IN_A_CALL, str(len(numbers)), str(tmp_path), program="-u")
    assert process.stdout.readline() == "compiling\n"
    for number in numbers:
        process.send_signal(number)
        time.sleep(0.3)  # signals that arrive together count as one signal
    code, out, err = finish(process)
    reason, exit_code = ENDINGS[numbers[0]]
    reason = reason if len(numbers) == 1 else "stopped at once by a second Ctrl-C"
    assert code == exit_code and err == f"error: {reason}; nothing was saved yet\n"
    assert out.count("Press it again") == len(numbers) - 1


@pytest.mark.parametrize(
    ("message", "is_peer"),
    [  # what jax 0.10.2 raised after a process was killed
        ("UNKNOWN: Gloo AllGather failed: [external/gloo/gloo/transport/tcp/pair.cc:538] Read error", True),
        ("INTERNAL: Barrier failed because: task is set to ERROR: UNAVAILABLE: Task 1 heartbeat timeout.", True),
        ("UNAVAILABLE: Failed to send RPC to coordination service.", True),
        ("DEADLINE_EXCEEDED: Barrier timed out. Id: b245::0.", True),
        ("RESOURCE_EXHAUSTED: Out of memory allocating 1024 bytes", False),
    ],
)
def test_is_peer_failure_reads_the_error_and_its_cause(message, is_peer, monkeypatch):
    error, wrapped = RuntimeError(message), SaveError("a checkpoint could not be written")
    wrapped.__cause__ = error
    assert not processes.is_peer_failure(error)  # a single process has no peer
    monkeypatch.setattr(processes, "is_multiprocess", lambda: True)
    assert processes.is_peer_failure(error) is processes.is_peer_failure(wrapped) is is_peer
