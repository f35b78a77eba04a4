"""Several processes whose work directory is in a bucket: each has its own mirror and uploads its own files."""

import signal
import time

import jax
import numpy as np
import pytest

from diffusion_jax.distributed.processes import EXIT_PEER_LOST
from diffusion_jax.run_dir import BucketRunDir
from diffusion_jax.runs import train
from diffusion_jax.storage.objects import open_store
from helpers.configs import convolutions_config
from helpers.object_stores import assert_complete_checkpoints
from helpers.program import ALL_MODES, finish, flags_of, run_together, start_together
from helpers.work_directories import assert_close_losses, last_state, lines

# The services differ below ObjectStore only.
pytestmark = [pytest.mark.whole, pytest.mark.parametrize("scheme", ["gs"])]

OVERRIDES = {"sampling.preview_samples": 0, "training.log_every": 1, "evaluation.num_examples": 6}
OVERRIDES |= {"evaluation.batch_size": 4, "evaluation.strata": 4, "evaluation.num_samples": 10, "model.num_classes": 10}


def test_two_processes_do_everything_and_one_goes_on(bucket_url, tmp_path):
    url, program = f"{bucket_url}/run", tmp_path / "all_modes.py"
    program.write_text(ALL_MODES)
    run_together(2, *flags_of(convolutions_config(**OVERRIDES, **{"mesh.fsdp": 4}), url), program=program)
    assert_complete_checkpoints(url, [2, 4])
    written = open_store(url).list()
    assert {"likelihood.json", "metrics.json"} <= written.keys()
    assert any(name.startswith("samples/") and name.endswith(".npz") for name in written)
    assert not any("/." in name for name in written), written
    longer = convolutions_config(**OVERRIDES, **{"training.num_steps": 6})
    train.run(longer, tmp_path / "one")
    train.run(longer, BucketRunDir(url))  # one process, one device
    assert_close_losses(tmp_path / "one", BucketRunDir(url))


@pytest.mark.faults
@pytest.mark.parametrize("count", [2, 4])
def test_a_killed_process_loses_nothing(bucket_url, count):
    """One process is killed; the other processes end; after the next launch, the run is bit-identical to an undisturbed
    run."""
    overrides = OVERRIDES | {"mesh.fsdp": 4, "training.num_steps": 12, "training.checkpoint_every": 2}
    whole, url = f"{bucket_url}/whole", f"{bucket_url}/run"
    run_together(count, *flags_of(convolutions_config(**overrides), whole))
    processes = start_together(count, *flags_of(convolutions_config(**overrides), url))
    store = open_store(url)
    while "checkpoints/4/digests.json" not in store.list("checkpoints/4/digests.json"):
        assert all(process.poll() is None for process in processes), [finish(process) for process in processes]
        time.sleep(0.02)
    processes[-1].kill()
    codes = [finish(process)[0] for process in processes[:-1]]
    assert all(code in (EXIT_PEER_LOST, -signal.SIGABRT, 134) for code in codes), codes
    run_together(count, *flags_of(convolutions_config(**overrides), url))
    assert_complete_checkpoints(url, [8, 10, 12])
    mirrors = BucketRunDir(url), BucketRunDir(whole)
    assert lines(mirrors[0]) == lines(mirrors[1])
    config = convolutions_config(**overrides | {"mesh.fsdp": 1})
    jax.tree.map(np.testing.assert_array_equal, *(last_state(config, path) for path in mirrors))
