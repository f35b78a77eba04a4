"""Damaged checkpoints are detected by digests, named and renamed, and the previous checkpoint is restored."""

import json
import pathlib
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import training
from diffusion_jax.errors import CheckpointError, SaveError
from diffusion_jax.training import checkpoints
from helpers.configs import tiny_config
from helpers.paths import ROOT


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    """(directory with steps 1 and 2, abstract state, {step: state})."""
    directory = tmp_path_factory.mktemp("run")
    config = tiny_config(**{"diffusion.num_timesteps": 8, "diffusion.timestep_sampler": "loss_second_moment"})
    built = training.build_program(config)
    state = built.init()
    states = {}
    with checkpoints.Checkpoints(directory) as saved:
        for step in (1, 2):
            state = state.replace(
                step=jnp.int32(step),
                params=jax.tree.map(lambda x, n=step: x + jnp.float32(n), state.params),
                loss_history=jax.tree.map(lambda x, n=step: x + jnp.asarray(n, x.dtype), state.loss_history),
            )
            saved.save(step, state)
            states[step] = jax.device_get(state)
        saved.finish()
    return directory, built.abstract_state, states


@pytest.fixture
def copied(two_steps, tmp_path):
    """`two_steps` with a directory of the test's own."""
    source, *others = two_steps
    return pathlib.Path(shutil.copytree(source, tmp_path / "checkpoints")), *others


def restore(directory, abstract):
    with checkpoints.Checkpoints(directory) as saved:
        return saved.restore(abstract)


def files(directory):
    return sorted(path for path in directory.rglob("*") if path.is_file())


def flip(path: pathlib.Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


DATA = "params/ocdbt.process_0/d"


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("part", "damage", "words"),
    [
        (DATA, lambda path: flip(path, 801), "was changed"),
        (DATA, truncate, "bytes, not"),
        (DATA, pathlib.Path.unlink, "is missing"),
        ("rest/_METADATA", lambda path: flip(path, 0), "rest/_METADATA was changed"),
        ("ema_params", shutil.rmtree, "is missing"),
        ("digests.json", pathlib.Path.unlink, "digests.json is missing"),
        ("digests.json", lambda path: flip(path, 5), "digests.json cannot be read"),
        ("_CHECKPOINT_METADATA", pathlib.Path.unlink, "_CHECKPOINT_METADATA is missing"),
    ],
)
def test_damage_is_named_and_the_step_before_restored(copied, capsys, part, damage, words):
    directory, abstract, states = copied
    target = directory / "2" / part
    damage(max(files(target), key=lambda path: path.stat().st_size) if part == DATA else target)
    state = restore(directory, abstract)
    out = capsys.readouterr().out
    assert "The checkpoint of step 2 is damaged" in out and words in out, out
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), states[1])
    assert sorted(path.name for path in directory.iterdir()) == ["1", "2.unreadable"]
    with checkpoints.Checkpoints(directory) as saved:
        saved.save(2, state)  # the step's name is free
        saved.finish()


def test_a_renamed_step_is_damage(copied, capsys):
    directory, abstract, states = copied
    (directory / "1").rename(directory / "100")
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(restore(directory, abstract)), states[2])
    assert "step 100 is damaged: its digests.json belongs to step 1." in capsys.readouterr().out
    assert sorted(path.name for path in directory.iterdir()) == ["100.unreadable", "2"]
    (directory / "2").rename(directory / "1")
    with checkpoints.Checkpoints(directory, read_only=True) as saved:
        assert saved.newest_intact_step() is None


@pytest.mark.parametrize(
    ("step", "is_intact"), [(2, True), (None, False), ([2], False), (10**400, False), ("missing", True)]
)
def test_the_step_in_the_digests(copied, step, is_intact):
    """Version 0.3 stored no step."""
    directory = copied[0] / "2"
    table = json.loads((directory / "digests.json").read_text())
    assert table["step"] == 2
    table["step"] = step
    if step == "missing":
        del table["step"]
    (directory / "digests.json").write_text(json.dumps(table))
    problem = checkpoints.find_corruption(directory, ("params", "ema_params", "rest"))
    assert problem is None if is_intact else "belongs to step" in problem and len(problem) < 60


@pytest.mark.thorough
def test_weights_fall_back_as_well_and_change_nothing(copied, capsys):
    directory, abstract, states = copied
    flip(max(files(directory / "2" / "ema_params"), key=lambda path: path.stat().st_size), 99)
    before = {path: path.read_bytes() for path in files(directory)}
    # The raw weights' files are intact; in the last cases the EMA is used from step 2 on.
    wanted = [(lambda step: "ema", 1, "ema_params"), (lambda step: "raw", 2, "params")]
    wanted.append((lambda step: "ema" if step >= 2 else "raw", 1, "params"))
    for kind_of, step, name in wanted:
        with checkpoints.Checkpoints(directory, read_only=True) as saved:
            found, params = saved.restore_weights(abstract.params, kind_of)
        assert found == step
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(params), getattr(states[step], name))
    assert "step 2 is damaged: ema_params/" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in files(directory)} == before


def test_no_whole_checkpoint_is_an_error_not_a_start_from_zero(copied):
    directory, abstract, _ = copied
    for step in "12":
        (directory / step / "rest" / "manifest.ocdbt").unlink()
    with pytest.raises(CheckpointError, match=r"none of the checkpoints \[2, 1\]"):
        restore(directory, abstract)
    assert checkpoints.committed_steps(directory) == [1, 2]  # nothing was renamed


def test_another_state_is_refused_and_nothing_set_aside(two_steps):
    directory, abstract, _ = two_steps
    as_integers = abstract.replace(
        params=jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, jnp.int32, sharding=s.sharding), abstract.params)
    )
    with pytest.raises(CheckpointError, match=r"step 2 .* another state: params/\S+ is float32.*, expected int32"):
        restore(directory, as_integers)
    wider = training.build_program(tiny_config(**{"model.channels": 16})).abstract_state
    with pytest.raises(CheckpointError, match="another state"):
        restore(directory, wider)
    assert checkpoints.committed_steps(directory) == [1, 2]


def test_a_flipped_bit_of_any_file_is_found(copied):
    directory, _, _ = copied
    rng = np.random.default_rng(0)
    items = ("params", "ema_params", "rest")
    for path in files(directory / "2"):
        content = path.read_bytes()
        if content:
            flip(path, int(rng.integers(8 * len(content))))
            assert checkpoints.find_corruption(directory / "2", items), path
            path.write_bytes(content)
    assert checkpoints.find_corruption(directory / "2", items) is None


def test_a_save_that_fails_in_the_commit_leaves_no_step(copied, monkeypatch):
    """Nor does a file of the failed save remain, which would take the space for the next save."""
    directory, abstract, states = copied
    state = restore(directory, abstract)

    def full(*_):
        raise OSError(28, "No space left on device")

    with checkpoints.Checkpoints(directory) as saved:
        with monkeypatch.context() as patch:
            patch.setattr(checkpoints, "write_manifest", full)
            saved.save(3, state)
            with pytest.raises(SaveError, match="No space left.*checkpoint of step 2 is kept"):
                saved.finish()
            assert sorted(path.name for path in directory.iterdir()) == ["1", "2"]
            saved.save(3, state)
            saved._saving[1].exception()
            with pytest.raises(SaveError, match="No space left"):
                saved.check()
        saved.check()
        with monkeypatch.context() as patch:
            patch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
            saved.save(3, state)
            with pytest.raises(SaveError, match="No space left"):
                saved.finish()
        saved.save(4, state)
        saved.finish()
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(restore(directory, abstract)), states[2])


def test_what_a_killed_save_or_removal_left_is_removed(copied):
    directory, _, _ = copied
    for name in ("3.partial/0/params/file", "1.removed/params/file"):
        (directory / name).parent.mkdir(parents=True)
        (directory / name).write_text("")
    (directory / "2.unreadable").mkdir()
    with checkpoints.Checkpoints(directory, read_only=True) as saved:
        assert saved.newest_intact_step() == 2
    assert len(list(directory.iterdir())) == 5
    with checkpoints.Checkpoints(directory):
        assert sorted(path.name for path in directory.iterdir()) == ["1", "2", "2.unreadable"]


def small_state(step):
    params = {"kernel": jnp.full((300, 500), step, jnp.float32)}
    return training.TrainState(jnp.int32(step), params, params, {"count": jnp.int32(step)}, {"total": jnp.float32(0)})


def test_the_newest_steps_and_those_at_the_interval_are_kept(tmp_path):
    with checkpoints.Checkpoints(tmp_path, kept=2, keep_every=2) as saved:
        for step in range(1, 6):
            saved.save(step, small_state(step))
        saved.finish()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "4", "5"]


def test_a_save_holds_the_state_at_its_call(tmp_path):
    """The next step overwrites the state, because its buffers are donated."""
    overwrite = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf + 1, tree), donate_argnums=0)
    with checkpoints.Checkpoints(tmp_path) as saved:
        for step in (1, 2):
            state = small_state(step)
            state = state.replace(ema_params=jax.tree.map(jnp.copy, state.params))  # not the same arrays twice
            saved.save(step, state)
            jax.block_until_ready(overwrite(state))
        saved.finish()
        restored = saved.restore(small_state(0))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(restored), jax.device_get(small_state(2)))


KILLED = f"""
import os, pathlib, signal, sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import jax
from diffusion_jax.training import checkpoints
from diffusion_jax.training.checkpoints import Checkpoints
from helpers import saving

number_of_calls = int(sys.argv[2])


def killing(function):
    def call(*arguments):
        global number_of_calls
        number_of_calls -= 1
        if number_of_calls < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments)

    return call


abstract = saving.abstract_state(1)
with Checkpoints(pathlib.Path(sys.argv[1]), kept=2) as saved:
    state = saved.restore(abstract)
    step = 0 if state is None else int(saved.steps()[-1])
    if step:
        saving.assert_holds(state, abstract, step)
    print(step, flush=True)
    checkpoints.digest = killing(checkpoints.digest)
    checkpoints.write_manifest = killing(checkpoints.write_manifest)
    while True:
        step += 1
        saved.save(step, saving.random_state(abstract, step))
        saved.finish()
"""


@pytest.mark.faults
def test_kills_between_orbax_s_commit_and_the_digests_lose_one_step_at_most(tmp_path):
    """Twenty programs, each killed before it hashes a file that Orbax has committed, or before it writes the digests."""
    program, directory, rng = tmp_path / "killed.py", tmp_path / "checkpoints", np.random.default_rng(0)
    program.write_text(KILLED)
    before = 0
    for _ in range(20):
        num_calls = int(rng.integers(1, 100))
        command = [sys.executable, str(program), str(directory), str(num_calls)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == -signal.SIGKILL and int(done.stdout) == before, done
        assert any(directory.glob("*.partial/0/_CHECKPOINT_METADATA"))  # Orbax has committed its step
        before = max(checkpoints.committed_steps(directory), default=0)
    assert before >= 10
