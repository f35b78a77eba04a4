"""Several processes whose work directory is in a bucket: each has its own mirror and uploads its own files."""

import json
import signal
import time

import jax
import numpy as np
import pytest

from diffusion_jax.distributed.processes import EXIT_PEER_LOST
from diffusion_jax.run_dir import BucketRunDir
from diffusion_jax.runs import train
from diffusion_jax.storage.objects import open_store
from helpers.configs import tiny_config
from helpers.paths import ROOT
from helpers.program import TWO_DEVICES, finish, free_port, start, tiny_flags
from helpers.work_directories import last_state, lines

pytestmark = pytest.mark.whole

OVERRIDES = {"sampling.preview_samples": 0, "training.log_every": 1, "evaluation.num_examples": 6}
OVERRIDES |= {"evaluation.batch_size": 4, "evaluation.strata": 4, "evaluation.num_samples": 10, "model.num_classes": 10}

ALL_MODES = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from diffusion_jax import cli
from diffusion_jax.runs import measure_likelihood, sample, sample_metrics

if __name__ == "__main__":
    cli.main()
    command = cli.parse(sys.argv[1:])
    for mode in (sample, measure_likelihood, sample_metrics):
        mode.run(command.config, command.workdir)
"""


@pytest.fixture
def scheme():
    """One service: they differ below ObjectStore only."""
    return "gs"


def launch(url, count, program="main.py", **overrides):
    """The processes of one launch, started. With two devices each if they are two, so that both split and share arrays."""
    joined = [f"--coordinator_address=localhost:{free_port()}", f"--num_processes={count}"]
    flags = tiny_flags(url, **OVERRIDES | overrides)
    environment = {"XLA_FLAGS": TWO_DEVICES} if count == 2 else {}
    return [start(*flags, *joined, f"--process_id={i}", program=program, **environment) for i in range(count)]


def to_the_end(*args, **kwargs):
    outputs = [finish(process) for process in launch(*args, **kwargs)]
    assert all(code == 0 for code, _, _ in outputs), outputs


def assert_complete(url, steps):
    """Each step has the files that its manifest lists, and the bucket holds nothing else of checkpoints."""
    store = open_store(url)
    found = {}
    for name in store.list("checkpoints/"):
        found.setdefault(name.split("/")[1], set()).add(name.split("/", 2)[2])
    assert sorted(found, key=int) == steps
    for step, names in found.items():
        manifest = json.loads(store.read(f"checkpoints/{step}/digests.json"))
        assert names == manifest.keys() | {"digests.json"}


def close(one, two):
    assert [row["step"] for row in one] == [row["step"] for row in two]
    np.testing.assert_allclose([row["loss"] for row in two], [row["loss"] for row in one], rtol=1e-4)


def test_two_processes_do_everything_and_one_goes_on(bucket_url, tmp_path):
    url, program = f"{bucket_url}/run", tmp_path / "all_modes.py"
    program.write_text(ALL_MODES)
    to_the_end(url, 2, str(program), **{"mesh.fsdp": 4})
    assert_complete(url, ["2", "4"])
    written = open_store(url).list()
    assert {"likelihood.json", "metrics.json"} <= written.keys()
    assert any(name.startswith("samples/") and name.endswith(".npz") for name in written)
    assert not any("/." in name for name in written), written
    train.run(tiny_config(**OVERRIDES, **{"training.num_steps": 6}), tmp_path / "one")
    train.run(tiny_config(**OVERRIDES, **{"training.num_steps": 6}), BucketRunDir(url))  # one process, one device
    close(lines(tmp_path / "one"), lines(BucketRunDir(url)))


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.faults)])
def test_a_killed_process_loses_nothing(bucket_url, count):
    """One is killed; the others end; the next launch resumes, to the bit, as a run that nothing disturbed."""
    overrides = {"mesh.fsdp": 4, "training.num_steps": 12, "training.checkpoint_every": 2}
    whole, url = f"{bucket_url}/whole", f"{bucket_url}/run"
    to_the_end(whole, count, **overrides)
    processes = launch(url, count, **overrides)
    store = open_store(url)
    while "checkpoints/4/digests.json" not in store.list("checkpoints/4/digests.json"):
        assert all(process.poll() is None for process in processes), [finish(process) for process in processes]
        time.sleep(0.02)
    processes[-1].kill()
    codes = [finish(process)[0] for process in processes[:-1]]
    assert all(code in (EXIT_PEER_LOST, -signal.SIGABRT, 134) for code in codes), codes
    to_the_end(url, count, **overrides)
    assert_complete(url, [str(step) for step in (8, 10, 12)])
    mirrors = BucketRunDir(url), BucketRunDir(whole)
    assert lines(mirrors[0]) == lines(mirrors[1])
    config = tiny_config(**OVERRIDES | overrides | {"mesh.fsdp": 1})
    jax.tree.map(np.testing.assert_array_equal, *(last_state(config, path) for path in mirrors))
