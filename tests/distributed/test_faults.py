"""Faults, injected into runs of configs/digits.py: `make faults`; docs/results/reliability.md has the results.

Every disturbed run must end with a log and a last state that are bit-identical to an undisturbed run's.
"""

import pathlib
import random
import shutil
import signal
import subprocess
import time

import jax
import numpy as np
import pytest

from configs import digits
from diffusion_jax.distributed.processes import EXIT_INTERRUPTED, EXIT_PEER_LOST, EXIT_PREEMPTED
from diffusion_jax.training import checkpoints
from helpers.program import changed_program, figure, free_port, start, until
from helpers.work_directories import last_state, lines

pytestmark = pytest.mark.faults

STEPS, PATIENCE = 600, 120  # seconds after which a program counts as hanging
OVERRIDES = {"training.log_every": 1, "training.checkpoint_every": 10, "training.num_steps": STEPS}
OVERRIDES |= {"training.sample_every": 300}


def config(**overrides):
    chosen = digits.get_config()
    chosen.update_from_flattened_dict(OVERRIDES | overrides)
    return chosen


def launch(directory, *more, program="main.py", log=None, **variables):
    """Starts the run's command; the output goes to a file beside the directory."""
    flags = ["--config=configs/digits.py", f"--workdir={directory}"]
    flags += [f"--config.{key}={value}" for key, value in OVERRIDES.items()]
    return start(*flags, *more, program=program, log=log or directory.with_suffix(".log"), **variables)


def to_the_end(directory, *more, **variables):
    process = launch(directory, *more, **variables)
    assert process.wait(timeout=1200) == 0, directory.with_suffix(".log").read_text()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An undisturbed run."""
    directory = tmp_path_factory.mktemp("faults") / "whole"
    to_the_end(directory)
    return directory


def assert_same(directory, whole):
    assert lines(directory) == lines(whole)
    jax.tree.map(np.testing.assert_array_equal, *(last_state(config(), path) for path in (directory, whole)))


def is_saving(directory):
    return any((directory / "checkpoints").glob("*.partial"))


def wait_for_a_save(directory, process):
    before, limit = checkpoints.committed_steps(directory / "checkpoints"), time.monotonic() + PATIENCE
    while checkpoints.committed_steps(directory / "checkpoints") == before and process.poll() is None:
        assert time.monotonic() < limit, "no checkpoint in two minutes"
        time.sleep(0.05)


def disturbed(tmp_path, whole, count, disturb):
    """Disturbs each launch with `disturb(directory, process)`, over as many runs as needed; each run must equal `whole`."""
    runs, directory = 0, None
    for _ in range(count):
        if directory is None:
            directory = tmp_path / f"run{runs}"
        process = launch(directory)
        disturb(directory, process)
        if process.returncode == 0:  # the run was complete before
            assert_same(directory, whole)
            runs, directory = runs + 1, None
    if directory is not None:
        to_the_end(directory)
        assert_same(directory, whole)
        runs += 1
    return runs


def test_run_resumes_bit_identically_after_sigkill(tmp_path, whole):
    """Fifty kills: twenty after the program's start (reading, compiling), thirty after a save, of which ten during a
    save."""
    rng, during_save, kinds = random.Random(0), [], ["start"] * 20 + ["step"] * 20 + ["save"] * 10
    rng.shuffle(kinds)

    def kill(directory, process):
        kind = kinds.pop()
        if kind == "start":
            time.sleep(rng.uniform(0.5, 8))
        else:
            wait_for_a_save(directory, process)
            while kind == "save" and not is_saving(directory) and process.poll() is None:
                time.sleep(0.002)
            time.sleep(rng.uniform(0, 0.1 if kind == "save" else 2.5))
        process.kill()
        process.wait()
        if kind == "save":
            during_save.append(is_saving(directory))

    began = time.monotonic()
    runs = disturbed(tmp_path, whole, 50, kill)
    assert sum(during_save) >= 5, "the saves were missed"
    figure(
        f"50 SIGKILLs over {runs} runs of {STEPS} steps in {time.monotonic() - began:.0f} s, {sum(during_save)} of the "
        f"{len(during_save)} aimed at a save left it unfinished: logs and last states equal to the bit"
    )


def test_run_resumes_bit_identically_after_sigterm(tmp_path, whole):
    rng, codes, seconds = random.Random(1), [], []

    def terminate(directory, process):
        at_start = len(codes) < 3
        if not at_start:
            wait_for_a_save(directory, process)
        time.sleep(rng.uniform(2, 8) if at_start else rng.uniform(0, 2))
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        codes.append(process.wait(timeout=PATIENCE))
        seconds.append(time.monotonic() - began)

    runs = disturbed(tmp_path, whole, 10, terminate)
    # Before Python has read main.py, a signal ends the process with the system's default action.
    assert all(code in (0, EXIT_PREEMPTED, -signal.SIGTERM) for code in codes)
    figure(
        f"10 SIGTERMs over {runs} runs: exit codes {codes}, at most {max(seconds):.1f} s to save and stop; equal to the bit"
    )


def test_run_reports_a_full_disk_and_resumes(tmp_path, whole):
    """A small tmpfs, which needs the right to mount one."""
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=48m", "tmpfs", small], capture_output=True).returncode:
        pytest.skip("no right to mount a tmpfs")
    try:
        run, log = small / "run", tmp_path / "small.log"
        keep_all = "--config.training.checkpoints_kept=1000"
        process = launch(run, keep_all, log=log)
        code = process.wait(timeout=600)
        kept = checkpoints.committed_steps(run / "checkpoints")
        errors = [line for line in log.read_text().splitlines() if line.startswith("error:")]
        assert code == 1 and kept and len(errors) == 1 and "disk full" in errors[0], log.read_text()
        for step in kept[:-3]:
            shutil.rmtree(run / "checkpoints" / str(step))
        process = launch(run, log=log)
        assert process.wait(timeout=1200) == 0, log.read_text()
        assert_same(run, whole)
    finally:
        subprocess.run(["umount", "-l", small], check=True)
    figure(f"a full disk after step {kept[-1]}: {errors[0][:100]!r}; after making room, the same to the bit")


def joined(directory, *more, **variables):
    address = f"--coordinator_address=localhost:{free_port()}"
    return [
        launch(
            directory,
            *more,
            address,
            "--num_processes=2",
            f"--process_id={i}",
            log=directory.with_suffix(f".{i}.log"),
            JAX_NUM_CPU_DEVICES="2",
            **variables,
        )
        for i in range(2)
    ]


def close_to(directory, whole):
    one, two = lines(whole), lines(directory)
    assert [row["step"] for row in two] == [row["step"] for row in one]
    # The first steps agree up to the order of sums; later steps drift, as for any two orders.
    np.testing.assert_allclose([row["loss"] for row in two[:20]], [row["loss"] for row in one[:20]], rtol=1e-3)


@pytest.mark.parametrize("victim", [0, 1])
def test_killed_process_ends_its_peer(tmp_path, victim):
    directory = tmp_path / "two"
    pair = joined(directory)
    until(lambda: checkpoints.committed_steps(directory / "checkpoints"), *pair)
    pair[victim].kill()
    began = time.monotonic()
    code = pair[1 - victim].wait(timeout=PATIENCE)
    seconds = time.monotonic() - began
    text = directory.with_suffix(f".{1 - victim}.log").read_text()
    assert code in (EXIT_PEER_LOST, -signal.SIGABRT), text  # JAX's own service aborts if the service notices first
    pair[victim].wait()
    figure(f"process {victim} of two killed: the other ended after {seconds:.1f} s with exit code {code}")


def test_stuck_process_ends_both(tmp_path):
    """One process waits for data forever, but still sends heartbeats."""
    directory = tmp_path / "two"
    pair = joined(directory, "--config.training.stall_timeout=20", program=changed_program(tmp_path, STUCK))
    began = time.monotonic()
    codes = [process.wait(timeout=300) for process in pair]
    texts = [directory.with_suffix(f".{i}.log").read_text() for i in range(2)]
    assert all(code in (EXIT_PEER_LOST, -signal.SIGABRT) for code in codes) and EXIT_PEER_LOST in codes, texts
    assert any("no step has finished for 20 s" in text for text in texts), texts
    figure(
        f"process 1 of two stuck: both ended, exit codes {codes}, {time.monotonic() - began:.0f} s after their launch"
    )


STUCK = """
import sys, time
from diffusion_jax import data

read = data.Batches.read_rows


def stuck(self, step, rows):
    while step >= 25 and "--process_id=1" in sys.argv:
        time.sleep(1)
    return read(self, step, rows)


data.Batches.read_rows = stuck
"""


def test_processes_wait_for_the_slowest_compilation(tmp_path):
    """The wait is longer than 30 s, after which Gloo gives up a process that is late for the first step."""
    directory = tmp_path / "two"
    pair = joined(directory, "--config.training.num_steps=3", program=changed_program(tmp_path, LATE))
    codes = [process.wait(timeout=300) for process in pair]
    assert codes == [0, 0], [directory.with_suffix(f".{i}.log").read_text() for i in range(2)]
    figure("process 1 of two compiles 45 s longer than process 0: both train")


LATE = """
import sys, time
from diffusion_jax.runs import train

compile_step = train._compile


def late(*arguments):
    if "--process_id=1" in sys.argv:
        time.sleep(45)
    return compile_step(*arguments)


train._compile = late
"""


@pytest.mark.parametrize("process", [0, 1])
def test_full_disk_of_one_process_ends_both(tmp_path, process):
    """Process 1's disk is full in a write, or process 0's in the commit: both processes report the error in the same
    step."""
    directory = tmp_path / "two"
    pair = joined(directory, "--config.mesh.fsdp=4", program=changed_program(tmp_path, FULL), FULL=str(process))
    until(lambda: checkpoints.committed_steps(directory / "checkpoints"), *pair)
    began = time.monotonic()
    codes = [process.wait(timeout=PATIENCE) for process in pair]
    texts = [directory.with_suffix(f".{i}.log").read_text() for i in range(2)]
    assert codes == [1, 1] and all("is the disk full?" in text for text in texts), texts
    errors = [[line for line in text.splitlines() if line.startswith("error:")] for text in texts]
    # In process 0, the error comes from a function of this test, which the program takes for one of its user.
    errors = [[line.removesuffix("; --debug prints the traceback") for line in lines] for lines in errors]
    assert errors[0] == errors[1] and len(errors[0]) == 1, texts
    kept = checkpoints.committed_steps(directory / "checkpoints")
    assert kept and kept[-1] < 30
    seconds = time.monotonic() - began
    figure(f"two processes, no room for process {process} at step 30: exit codes {codes} after {seconds:.0f} s")


FULL = """
import errno, os, sys
from diffusion_jax.training import checkpoints

write_part, write_manifest = checkpoints.write_part, checkpoints.write_manifest


def check_room(directory, process):
    if os.environ["FULL"] == str(process) and directory.parent.name == "30.partial":
        raise OSError(errno.ENOSPC, "No space left on device")


def write(part, *arguments):
    if "--process_id=1" in sys.argv:
        check_room(part, 1)
    return write_part(part, *arguments)


def commit(directory, table):
    check_room(directory, 0)
    write_manifest(directory, table)


checkpoints.write_part, checkpoints.write_manifest = write, commit
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, EXIT_PREEMPTED), (signal.SIGINT, EXIT_INTERRUPTED)])
def test_signal_to_one_of_two_processes_saves_and_a_single_process_resumes(tmp_path, whole, number, code):
    directory = tmp_path / "two"
    pair = joined(directory)
    until(lambda: checkpoints.committed_steps(directory / "checkpoints"), *pair)
    pair[1].send_signal(number)
    codes = [process.wait(timeout=PATIENCE) for process in pair]
    texts = [directory.with_suffix(f".{i}.log").read_text() for i in range(2)]
    step = checkpoints.committed_steps(directory / "checkpoints")[-1]
    assert codes == [code] * 2 and all(f"at step {step}, which is saved" in text for text in texts), texts
    to_the_end(directory)
    close_to(directory, whole)
    figure(f"{number.name} to one of two: both saved step {step} and ended with {codes}; one process went on")


def test_join_ends_after_its_timeout(tmp_path):
    directory = tmp_path / "alone"
    began = time.monotonic()
    more = [f"--coordinator_address=localhost:{free_port()}", "--num_processes=2", "--join_timeout=10"]
    process = launch(directory, *more, "--process_id=0")
    code = process.wait(timeout=PATIENCE)
    text = pathlib.Path(directory.with_suffix(".log")).read_text()
    figure(f"a peer that never joins: exit code {code} after {time.monotonic() - began:.0f} s")
    assert code == EXIT_PEER_LOST and "the other processes did not connect within 10 s" in text, text
