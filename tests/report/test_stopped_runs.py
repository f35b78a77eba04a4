"""The report of a run that fails or is stopped: it is written last, and hides neither the message nor the exit code."""

import html
import re
import threading

import pytest

from diffusion_jax.distributed.termination import EXIT_INTERRUPTED, EXIT_PREEMPTED
from diffusion_jax.report import write
from helpers.launcher import launch
from helpers.paths import ROOT
from helpers.program import finish, free_port, start, tiny_flags

OVERRIDES = {"training.num_steps": 100_000, "training.log_every": 1, "sampling.preview_samples": 0}
NAN = {"optimizer.learning_rate": 1e12, "optimizer.grad_clip": 0.0, "optimizer.warmup_steps": 0}

# main.py, in which reading the batch of step 50 fails or sends a signal to the process. Batches are read ahead; the first
# step has finished by then.
DISTURBED = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
from diffusion_jax import cli
from diffusion_jax.data import pipeline
from diffusion_jax.errors import DataError

read = pipeline.Batches.__getitem__

def disturbed(self, step):
    if step == 50:
        DISTURB
    return read(self, step)

pipeline.Batches.__getitem__ = disturbed
if __name__ == "__main__":
    cli.main()
"""


def disturbed(path, statement):
    path.write_text(DISTURBED.replace("DISTURB\n", f"{statement}\n"))
    return str(path)


@pytest.mark.whole
@pytest.mark.parametrize(
    ("statement", "overrides", "exit_code", "message"),
    [
        ("os.kill(os.getpid(), 15)", {}, EXIT_PREEMPTED, r"error: stopped by SIGTERM at step \d+, which is saved"),
        ("os.kill(os.getpid(), 2)", {}, EXIT_INTERRUPTED, r"error: interrupted by Ctrl-C at step \d+, which is saved"),
        ("pass", NAN, 1, r"error: the loss, .* were not finite at step \d+"),
        ("raise DataError('image 7 cannot be read')", {}, 2, r"error: .*image 7 cannot be read"),
        ("raise RuntimeError('unexpected')", {}, 1, r"RuntimeError: unexpected"),
    ],
)
def test_a_run_that_fails_or_is_stopped_has_a_report(tmp_path, statement, overrides, exit_code, message):
    program = disturbed(tmp_path / "program.py", statement)
    code, out, err = launch(*tiny_flags(tmp_path / "run", **OVERRIDES, **overrides), program=program)
    assert code == exit_code and re.search(message, err), err
    assert len(err.strip().splitlines()) == 1 or "unexpected" in err
    assert out.strip().splitlines()[-1].startswith("Report, with curves")  # after the checkpoint
    page = html.unescape((tmp_path / "run" / "report.html").read_text())
    assert "not running; rerun its command to resume" in page
    reason = message.removeprefix("error: ")
    assert re.search(f"last stop.*{reason}.*Reason: {reason}", page, re.DOTALL)


@pytest.mark.whole
def test_a_run_that_cannot_start_has_no_report(tmp_path):
    flags = tiny_flags(tmp_path, **{"training.batch_size": 7, "mesh.fsdp": 2})
    code, out, _ = launch(*flags)
    assert code == 2 and "Report" not in out and not list(tmp_path.glob("report*"))


@pytest.mark.whole
def test_of_two_processes_the_first_writes_the_report(tmp_path):
    flags = tiny_flags(tmp_path / "run", **OVERRIDES, **NAN)
    flags += [f"--coordinator_address=localhost:{free_port()}", "--num_processes=2"]
    outputs = [finish(process) for process in [start(*flags, f"--process_id={i}") for i in range(2)]]
    assert [code for code, _, _ in outputs] == [1, 1]
    assert all("were not finite at step" in err for _, _, err in outputs)
    assert ["Report, with curves" in out for _, out, _ in outputs] == [True, False]
    assert (tmp_path / "run" / "report.html").is_file()


def test_a_report_that_takes_long_is_given_up(tmp_path, monkeypatch):
    release = threading.Event()
    monkeypatch.setattr(write, "write_report", lambda *_: release.wait())
    logged = []
    write.write_report_after(tmp_path, None, logged.append, max_seconds=0.01)
    release.set()
    assert len(logged) == 1 and "was not finished; write it with --mode=report" in logged[0]
