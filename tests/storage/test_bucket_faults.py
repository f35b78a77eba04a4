"""Program and network faults while a run's work directory is in a bucket: `make faults`.

Every disturbed run must end with a log and a last state that are bit-identical to an undisturbed run's, and leave no object
that readers ignore. The services are emulators behind a proxy that injects the faults.
"""

import collections
import random
import signal
import time

import jax
import numpy as np
import pytest

from diffusion_jax.distributed.processes import EXIT_PREEMPTED
from diffusion_jax.run_dir import BucketRunDir
from diffusion_jax.storage.objects import open_store
from helpers.configs import tiny_config
from helpers.fault_proxy import MUTATING, FaultProxy
from helpers.object_stores import assert_complete_checkpoints, variables
from helpers.program import changed_program, figure, finish, flags_of, start
from helpers.work_directories import last_state, lines

pytestmark = pytest.mark.faults

STEPS, PATIENCE = 100, 300
OVERRIDES = {"training.num_steps": STEPS, "training.checkpoint_every": 4, "training.sample_every": 20}
OVERRIDES |= {"training.checkpoints_kept": 2}


def config(**overrides):
    return tiny_config(**OVERRIDES | overrides)


QUICK_LEASES = """
from diffusion_jax.storage import locks

locks._RENEW_SECONDS, locks._WAIT_SECONDS = 1.0, 3.0  # instead of tens
"""


class Runs:
    """Launches in one work directory, whose requests pass a proxy."""

    def __init__(self, url, proxy, log):
        self.url, self.proxy, self._log = url, proxy, log
        self._program = changed_program(log.parent, QUICK_LEASES)
        self._variables = variables(url.partition(":")[0], proxy.address)

    def launch(self, **overrides):
        flags = flags_of(tiny_config(**OVERRIDES | overrides), self.url)
        return start(*flags, program=self._program, log=self._log, **self._variables)

    def to_the_end(self, **overrides):
        assert self.launch(**overrides).wait(PATIENCE) == 0, self.text()

    def text(self):
        return self._log.read_text()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    directory = tmp_path_factory.mktemp("faults") / "whole"
    code, _, err = finish(start(*flags_of(tiny_config(**OVERRIDES), directory)))
    assert code == 0, err
    return directory


@pytest.fixture
def runs(bucket_url, emulators, tmp_path):
    with FaultProxy(emulators[bucket_url[:2]]) as proxy:
        yield Runs(f"{bucket_url}/run", proxy, tmp_path / "log")


def assert_same(url, whole):
    workdir = BucketRunDir(url, read_only=True)
    assert lines(workdir) == lines(whole)
    jax.tree.map(np.testing.assert_array_equal, *(last_state(config(), path) for path in (workdir, whole)))


def assert_nothing_leaked(url):
    """Checks that the bucket has two steps with the files in their manifests, and a free lease."""
    store = open_store(url)
    assert_complete_checkpoints(url, [STEPS - 4, STEPS])
    others = [name for name in store.list() if not name.startswith(("checkpoints/", "metrics/", "events", "samples/"))]
    assert sorted(others) == [".lock", "config.json", "data.json", "examples.npz", "goodput.json", "report.html"]
    assert store.read(".lock") == b"{}"


def test_run_resumes_bit_identically_after_kills_at_object_boundaries(runs, whole):
    """Fifteen kills for each service, each right after a random object change was carried out."""
    rng, kinds = random.Random(runs.url[:2]), collections.Counter()
    for _ in range(15):
        process = runs.launch()
        runs.proxy.call_after(rng.randint(3, 140), process.kill)
        process.wait(PATIENCE)
        if process.returncode == 0:
            pytest.fail("the run ended before it was killed")
        kinds[[kind for kind, _ in runs.proxy.requests if kind in MUTATING][-1]] += 1
    runs.to_the_end()
    assert_same(runs.url, whole)
    assert_nothing_leaked(runs.url)
    figure(
        f"15 SIGKILLs at object boundaries of {runs.url[:2]}://: {dict(kinds)}; equal to the bit, no object left over"
    )


def test_network_faults_change_nothing(runs, whole):
    """Every kind of fault occurs at least three times in one run, and no fault ends the run."""
    proxy = runs.proxy
    proxy.inject("stale", "list", skip=3, every=7, times=3)
    for skip in (5, 60, 200, 420):
        proxy.inject("refuse", "write", status=503, skip=skip, times=1)
        proxy.inject("refuse", "write", status=429, skip=skip, times=1)
        proxy.inject("cut", "write", skip=skip, times=1)
        proxy.inject("lose", "write", skip=skip, times=1)
        proxy.inject("delay", "write", skip=skip, times=1, seconds=3)
    proxy.inject("refuse", "list", status=503, skip=2, every=3, times=4)
    proxy.inject("refuse", "delete", status=503, skip=1, every=2, times=4)
    proxy.inject("lose", "delete", skip=1, every=2, times=3)
    proxy.inject("silence", "write", skip=100, times=1, seconds=5)
    runs.to_the_end(**{"training.num_steps": STEPS // 2})
    proxy.inject("truncate", "read", skip=1, every=3, times=4)
    proxy.inject("refuse", "read", status=503, skip=2, every=4, times=4)
    runs.to_the_end()
    assert_same(runs.url, whole)
    assert_nothing_leaked(runs.url)
    assert sum(proxy.injected.values()) >= 30, proxy.injected
    figure(f"network faults of {runs.url[:2]}://: {dict(proxy.injected)}; equal to the bit, no object left over")


def test_sigterm_saves_and_the_next_launch_resumes(runs, whole):
    process = runs.launch()
    while "Training" not in runs.text() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE) == EXIT_PREEMPTED, runs.text()
    assert "rerun the same command" in runs.text()
    runs.to_the_end()
    assert_same(runs.url, whole)
    assert_nothing_leaked(runs.url)


def test_a_suspended_launch_that_was_replaced_writes_no_more_checkpoints(runs, whole):
    first = runs.launch()
    while "checkpoints" not in str(open_store(runs.url).list("checkpoints/").keys()) and first.poll() is None:
        time.sleep(0.02)
    first.send_signal(signal.SIGSTOP)
    runs.to_the_end()
    assert "waiting 3 s" in runs.text()
    first.send_signal(signal.SIGCONT)
    assert first.wait(PATIENCE) == 2, runs.text()
    assert "has taken over" in runs.text()
    store = open_store(runs.url)
    for name in store.list("checkpoints/"):  # objects without a manifest, until the next launch that trains
        if not store.find(f"checkpoints/{name.split('/')[1]}/digests.json"):
            store.delete([name])
    assert_same(runs.url, whole)
    assert_nothing_leaked(runs.url)


def test_a_store_that_takes_no_more_ends_the_run_with_one_line(runs, whole):
    runs.to_the_end(**{"training.num_steps": 8})
    process = runs.launch()
    while "Continuing from step 8" not in runs.text() and process.poll() is None:
        time.sleep(0.02)
    runs.proxy.inject("refuse", "write", status=403, times=10**9)
    assert process.wait(PATIENCE) == 1, runs.text()
    last = runs.text().splitlines()[-1]
    assert last.startswith("error: ") and runs.url in last and "Traceback" not in runs.text(), last
    runs.proxy.clear()
    runs.to_the_end()
    assert_same(runs.url, whole)
    assert_nothing_leaked(runs.url)
