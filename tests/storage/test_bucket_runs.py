"""Runs whose work directory is in a bucket, beside the same runs in a local one."""

import json
import shutil

import jax
import numpy as np
import pytest

from diffusion_jax import pretrained
from diffusion_jax.run_dir import BucketRunDir, committed_steps
from diffusion_jax.runs import edit, sample, status, train
from diffusion_jax.runs.logging import read_metrics
from diffusion_jax.runs.workdir import load_config
from diffusion_jax.storage.objects import open_store
from diffusion_jax.training.checkpoints import Checkpoints
from helpers.configs import tiny_config
from helpers.program import evaluate
from helpers.work_directories import last_state, lines

pytestmark = pytest.mark.whole

SAMPLES = {
    "sampling.num_samples": 5,
    "sampling.batch_size": 2,
    "evaluation.num_examples": 8,
    "evaluation.batch_size": 4,
}


def names_of_steps(store):
    """{step: names of its objects}."""
    steps = {}
    for name in store.list("checkpoints/"):
        steps.setdefault(name.split("/")[1], set()).add(name.split("/", 2)[2])
    return steps


@pytest.fixture
def url(bucket_url):
    return f"{bucket_url}/run"


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    directory = tmp_path_factory.mktemp("local") / "run"
    train.run(tiny_config(), directory)
    return directory


def test_a_run_resumes_on_another_machine_and_equals_a_local_one(url, local):
    train.run(tiny_config(**{"training.num_steps": 2}), BucketRunDir(url))
    second = BucketRunDir(url)
    train.run(tiny_config(), second)
    assert lines(second) == lines(local) == lines(BucketRunDir(url))
    states = (last_state(tiny_config(), path) for path in (BucketRunDir(url), local))
    jax.tree.map(np.testing.assert_array_equal, *states)
    store = open_store(url)
    steps = names_of_steps(store)
    assert sorted(steps) == ["2", "4"]
    for step, names in steps.items():  # the manifest lists every object; nothing else is left
        manifest = json.loads(store.read(f"checkpoints/{step}/digests.json"))
        assert names - manifest.keys() == {"digests.json"}
    others = {name.split("/")[0].split(".")[0] for name in store.list()} - {"checkpoints", ""}
    assert others == {"config", "data", "events", "goodput", "metrics"}


@pytest.mark.parametrize("scheme", ["gs"])  # the services differ below ObjectStore only
def test_every_mode_writes_what_it_writes_locally(url, local, tmp_path, own_cache):
    local = shutil.copytree(local, tmp_path / "local")
    config = tiny_config(**SAMPLES)
    train.run(tiny_config(), BucketRunDir(url))
    picture = tmp_path / "picture.png"
    workdir = BucketRunDir(url)
    assert load_config(workdir).model.channels == 8
    for directory in (local, workdir):
        sample.run(config, directory)
        evaluate(config, directory)
        with np.load(next((directory / "samples").glob("*n5.npz"))) as arrays:
            from PIL import Image

            Image.fromarray(arrays["arr_0"][0, ..., 0]).save(picture)
        edit.run(tiny_config(**{"editing.task": "sdedit", "editing.image": str(picture)} | SAMPLES), directory)
    store = open_store(url)
    written = {name for name in store.list() if not name.startswith(("checkpoints", "metrics/", "events", ".lock"))}
    expected = {path.relative_to(local).as_posix() for path in local.rglob("*") if path.is_file()}
    expected = {name for name in expected if not name.startswith(("checkpoints", "metrics", "events", ".lock"))}
    assert written == expected
    for name in sorted(written):
        if name.endswith(".npz"):
            with np.load(local / name) as old, np.load(workdir / name) as new:
                assert old.files == new.files
                np.testing.assert_array_equal(
                    old["arr_0"] if "arr_0" in old else 0, new["arr_0"] if "arr_0" in new else 0
                )


def test_weights_status_and_metrics_are_read_by_url(url, local):
    train.run(tiny_config(), BucketRunDir(url))
    net, expected = pretrained.load(url), pretrained.load(local)
    jax.tree.map(np.testing.assert_array_equal, net.params, expected.params)
    assert [line["step"] for line in read_metrics(url)] == [2, 4]
    shown = status.report(tiny_config(), BucketRunDir(url, read_only=True))
    assert "step 4 of 4 (100%)" in shown and "checkpoint  step 4" in shown
    config = tiny_config(**{"training.num_steps": 2, "init_from": url})
    train.run(config, BucketRunDir(f"{url}-next"))
    assert "init_from" in json.loads(open_store(f"{url}-next").read("config.json"))


@pytest.mark.parametrize(
    ("scheme", "fault", "item"),
    [
        ("gs", "missing", "ema_params"),
        ("s3", "flipped", "rest"),
    ],
)
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_it_used(url, local, fault, item):
    train.run(tiny_config(), BucketRunDir(url))
    store = open_store(url)
    objects = {name: info for name, info in store.list(f"checkpoints/4/{item}/").items()}
    name = max(objects, key=lambda name: objects[name].size)
    content = bytearray(store.read(name))
    if fault == "missing":
        store.delete([name])
    else:
        content[len(content) // 2] ^= 1
        store.write(name, bytes(content))
    train.run(tiny_config(), BucketRunDir(url))
    assert set(names_of_steps(store)) == {"2", "4", "4.unreadable"}
    jax.tree.map(
        np.testing.assert_array_equal, *(last_state(tiny_config(), path) for path in (BucketRunDir(url), local))
    )
    assert lines(BucketRunDir(url)) == lines(local)


def test_a_step_without_a_manifest_does_not_exist_and_is_deleted(url, local):
    train.run(tiny_config(), BucketRunDir(url))
    store = open_store(url)
    store.delete(["checkpoints/4/digests.json"])
    reader = BucketRunDir(url)
    assert committed_steps(reader / "checkpoints") == [2]
    with Checkpoints(reader.subdirectory("checkpoints"), read_only=True):
        assert "4" in names_of_steps(store)  # a reader changes nothing
    train.run(tiny_config(**{"training.num_steps": 2}), BucketRunDir(url))  # finished: nothing to do
    train.run(tiny_config(**{"training.num_steps": 3}), BucketRunDir(url))
    assert set(names_of_steps(store)) == {"2", "3"}


def test_old_steps_are_deleted_from_the_bucket(url):
    config = tiny_config(
        **{"training.num_steps": 8, "training.checkpoints_kept": 2, "training.checkpoint_keep_every": 4}
    )
    train.run(config, BucketRunDir(url))
    assert sorted(names_of_steps(open_store(url))) == ["4", "6", "8"]
    config.training.num_steps = 10
    train.run(config, BucketRunDir(url))
    assert sorted(names_of_steps(open_store(url)), key=int) == ["4", "8", "10"]
