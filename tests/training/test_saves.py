"""Several processes save and restore checkpoints, bit-identical on any mesh; if one process fails, all report the error."""

import concurrent.futures
import json
import signal

import pytest

from diffusion_jax.distributed.processes import EXIT_PEER_LOST
from diffusion_jax.runs import train
from diffusion_jax.storage.downloads import MANIFEST
from helpers.configs import tiny_config
from helpers.launcher import launch
from helpers.program import changed_program, finish, flags_of, free_port, start

pytestmark = pytest.mark.whole


def together(scenario, count, num_devices, directory, *more):
    """Runs a scenario of helpers/saving.py in several processes; returns each process's result."""
    port = str(free_port())

    def run(index):
        arguments = (scenario, port, str(count), str(index), str(num_devices), str(directory), *map(str, more))
        return launch(*arguments, program="helpers.saving")

    with concurrent.futures.ThreadPoolExecutor(count) as pool:
        outputs = list(pool.map(run, range(count)))
    assert [output for output in outputs if output[0] != 0] == []
    return [json.loads(out.splitlines()[-1]) for _, out, _ in outputs]


def test_other_numbers_of_processes_restore_what_four_or_two_saved_on_any_mesh(tmp_path):
    together("exchange", 4, 1, tmp_path / "four", 4, 2, 1)
    together("exchange", 2, 2, tmp_path / "two", 4, 2, 1)
    for directory in (tmp_path / "four", tmp_path / "two"):
        for fsdp, is_split in ((4, True), (2, True), (1, False)):
            (step,) = (directory / str(fsdp)).iterdir()
            files = {path.relative_to(step).as_posix() for path in step.rglob("*") if path.is_file()}
            assert step.name == "2" and json.loads((step / MANIFEST).read_text()).keys() == files - {MANIFEST} | {
                "step"
            }
            assert ("params/manifest.ocdbt" in files) is not is_split
            assert ("params/conv/0.0.0.1" in files) is is_split  # a separate file for each chunk of a split array
        for count, num_devices in ((2, 2), (1, 4), (1, 1)):
            meshes = [fsdp for fsdp in (4, 1) if fsdp <= count * num_devices]
            found = together("restore", count, num_devices, directory, *meshes)
            assert found == [{"restored": ["1", "2", "4"]}] * count


def test_a_save_that_fails_on_one_process_fails_on_all(tmp_path):
    one, two = together("fail", 2, 1, tmp_path)
    assert one == two  # also the number of checks before the error
    assert one["left"] == ["1", "5"]
    part, commit, in_the_loop = one["errors"]
    for error in (part, in_the_loop):
        assert "process 1: [Errno 28] No space left on device" in error and "checkpoint of step 1 is kept" in error
    assert "process" not in commit and "No space left on device" in commit


KILLED = """
import os, signal, sys
from diffusion_jax.distributed import sharding
from diffusion_jax.training import checkpoints

write_part, write_manifest = checkpoints.write_part, checkpoints.write_manifest
victim, moment = "--process_id=1" in sys.argv, os.environ["MOMENT"]


def kill_if(condition):
    if condition:
        os.kill(os.getpid(), signal.SIGKILL)


def write(part, *arguments):
    is_last = victim and part.parent.name == "4.partial"
    kill_if(is_last and moment == "before its files are written")
    table = write_part(part, *arguments)
    kill_if(is_last and moment == "after its files are written")
    return table


def commit(directory, table):
    kill_if(directory.parent.name == "4.partial" and moment == "in the commit")
    write_manifest(directory, table)


checkpoints.write_part, checkpoints.write_manifest = write, commit
sharding.MIN_SPLIT_SIZE = 64  # splits the tiny network, too
"""


@pytest.mark.faults
@pytest.mark.parametrize(
    ("victim", "moment"),
    [(1, "before its files are written"), (1, "after its files are written"), (0, "in the commit")],
)
def test_run_resumes_from_the_step_before_the_save_in_which_a_process_was_killed(tmp_path, victim, moment, capsys):
    program = changed_program(tmp_path, KILLED)
    directory, overrides = tmp_path / "run", {"sampling.preview_samples": 0}
    flags = flags_of(tiny_config(**overrides, **{"mesh.fsdp": 2, "training.num_steps": 100}), directory)
    flags += [f"--coordinator_address=localhost:{free_port()}", "--num_processes=2"]
    pair = [start(*flags, f"--process_id={i}", program=program, MOMENT=moment) for i in range(2)]
    (code, *_), (peer_code, _, peer_err) = (finish(pair[i]) for i in (victim, 1 - victim))
    assert code == -signal.SIGKILL and peer_code in (EXIT_PEER_LOST, -signal.SIGABRT), peer_err
    if peer_code == EXIT_PEER_LOST:
        assert [line for line in peer_err.splitlines() if "another process of the run was lost" in line], peer_err
    assert "4.partial" in [path.name for path in (directory / "checkpoints").iterdir()]
    train.run(tiny_config(**overrides), directory)
    assert "Continuing from step 2." in capsys.readouterr().out
    assert sorted(path.name for path in (directory / "checkpoints").iterdir()) == ["2", "4"]
