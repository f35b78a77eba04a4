"""Runs whose work directory is in a bucket, compared with the same runs in a local directory."""

import json

import jax
import numpy as np
import pytest

from diffusion_jax import pretrained
from diffusion_jax.run_dir import BucketRunDir, committed_steps
from diffusion_jax.runs import status, train
from diffusion_jax.runs.logging import read_metrics
from diffusion_jax.storage.objects import open_store
from diffusion_jax.training.checkpoints import Checkpoints
from helpers.configs import convolutions_config
from helpers.object_stores import assert_complete_checkpoints
from helpers.work_directories import last_state, lines

pytestmark = pytest.mark.whole
GS = pytest.mark.parametrize("scheme", ["gs"])


def names_of_steps(store):
    return {name.split("/")[1] for name in store.list("checkpoints/")}


@pytest.fixture
def url(bucket_url):
    return f"{bucket_url}/run"


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    directory = tmp_path_factory.mktemp("local") / "run"
    train.run(convolutions_config(), directory)
    return directory


def test_a_run_resumes_on_another_machine_and_equals_a_local_one(url, local):
    train.run(convolutions_config(**{"training.num_steps": 2}), BucketRunDir(url))
    second = BucketRunDir(url)
    train.run(convolutions_config(), second)
    assert lines(second) == lines(local) == lines(BucketRunDir(url))
    states = (last_state(convolutions_config(), path) for path in (BucketRunDir(url), local))
    jax.tree.map(np.testing.assert_array_equal, *states)
    assert_complete_checkpoints(url, [2, 4])
    others = {name.split("/")[0].split(".")[0] for name in open_store(url).list()} - {"checkpoints", ""}
    assert others == {"config", "data", "events", "examples", "goodput", "metrics", "network"}


@GS  # the services differ below ObjectStore only
def test_weights_status_and_metrics_are_read_by_url(url, local):
    train.run(convolutions_config(), BucketRunDir(url))
    net, expected = (pretrained.load(place, network=True) for place in (url, local))
    jax.tree.map(np.testing.assert_array_equal, net.params, expected.params)
    assert [line["step"] for line in read_metrics(url)] == [2, 4]
    shown = status.report(convolutions_config(), BucketRunDir(url, read_only=True))
    assert "step 4 of 4 (100%)" in shown and "checkpoint  step 4" in shown
    config = convolutions_config(**{"training.num_steps": 2, "init_from": url})
    train.run(config, BucketRunDir(f"{url}-next"))
    assert "init_from" in json.loads(open_store(f"{url}-next").read("config.json"))


@pytest.mark.parametrize(
    ("scheme", "fault", "item"),
    [("gs", "missing", "ema_params"), ("s3", "flipped", "rest")],
)
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_it_used(url, local, fault, item):
    train.run(convolutions_config(), BucketRunDir(url))
    store = open_store(url)
    objects = {name: info for name, info in store.list(f"checkpoints/4/{item}/").items()}
    name = max(objects, key=lambda name: objects[name].size)
    content = bytearray(store.read(name))
    if fault == "missing":
        store.delete([name])
    else:
        content[len(content) // 2] ^= 1
        store.write(name, bytes(content))
    train.run(convolutions_config(), BucketRunDir(url))
    assert names_of_steps(store) == {"2", "4", "4.unreadable"}
    jax.tree.map(
        np.testing.assert_array_equal, *(last_state(convolutions_config(), path) for path in (BucketRunDir(url), local))
    )
    assert lines(BucketRunDir(url)) == lines(local)


@GS
def test_a_step_without_a_manifest_does_not_exist_and_is_deleted(url, local):
    train.run(convolutions_config(), BucketRunDir(url))
    store = open_store(url)
    store.delete(["checkpoints/4/digests.json"])
    reader = BucketRunDir(url)
    assert committed_steps(reader / "checkpoints") == [2]
    with Checkpoints(reader.subdirectory("checkpoints"), read_only=True):
        assert "4" in names_of_steps(store)  # a reader changes nothing
    train.run(convolutions_config(**{"training.num_steps": 2}), BucketRunDir(url))  # finished: nothing to do
    train.run(convolutions_config(**{"training.num_steps": 3}), BucketRunDir(url))
    assert names_of_steps(store) == {"2", "3"}
