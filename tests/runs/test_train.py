"""--mode=train: files, resuming, damaged checkpoints, and options that cannot be trained."""

import fcntl
import json
import re
import types

import jax
import numpy as np
import pytest

from diffusion_jax import data, errors, training
from diffusion_jax.distributed import sharding
from diffusion_jax.run_dir import RunDir
from diffusion_jax.runs import train, workdir
from diffusion_jax.runs.train import BatchLoader
from diffusion_jax.storage import locks
from helpers.array_configs import array_config, examples
from helpers.configs import convolutions_config, tiny_config
from helpers.work_directories import lines


@pytest.mark.whole
def test_a_run_writes_the_documented_files(trained):
    assert json.loads((trained / "config.json").read_text()) == workdir.to_dict(convolutions_config())
    assert sorted(p.name for p in (trained / "checkpoints").iterdir()) == ["2", "4"]
    rows = lines(trained)
    assert [row["step"] for row in rows] == [2, 4]
    assert all(np.isfinite(row["loss"]) and row["grad_norm"] > 0 and row["param_norm"] > 0 for row in rows)
    assert {"loss_q1", "loss_q2", "loss_q3", "loss_q4", "learning_rate"} <= set(rows[0])
    for row in lines(trained, without=()):
        shares = [row[name] for name in ("compute", "data_wait", "logging")]
        assert sum(shares) == pytest.approx(1) and min(shares) >= 0 and row["step_seconds"] > 0
    assert not (trained / "samples").exists()  # training.sample_every is 0: never


@pytest.mark.whole
def test_pictures_are_written_at_their_interval_and_at_the_end(tmp_path):
    train.run(convolutions_config(**{"training.sample_every": 3, "training.checkpoint_every": 4}), tmp_path)
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == [
        f"train_step0000000{step}.png" for step in (3, 4)
    ]


@pytest.mark.parametrize("start, counts", [(0, [3, 3, 1, 1]), (1, [1, 1, 3, 1, 1]), (6, [1, 1])])
def test_calls_of_several_steps_end_at_their_multiples(start, counts):
    """Eight steps, at most three in a call, on devices that scan steps; a resumed run starts at any step."""
    config = convolutions_config(**{"training.num_steps": 8, "training.steps_per_call": 3, "training.log_every": 3})
    program = types.SimpleNamespace(mesh=sharding.make_mesh(config.mesh), train_steps=lambda *_: None)
    step, found, loader = start, [], BatchLoader(config, program, data.load(config.data), start)
    while step < 8:
        batch, count = loader.next(step)
        assert batch["label"].shape == (8,) if count == 1 else (3, 8)
        step, found = step + count, [*found, count]
    assert found == counts and loader.next(step) == (None, 0)


@pytest.mark.whole
def test_rerunning_a_finished_run_does_nothing(trained, capsys):
    before = lines(trained, without=())
    train.run(convolutions_config(), trained)
    assert "This run is finished" in capsys.readouterr().out
    assert lines(trained, without=()) == before


@pytest.fixture(scope="module")
def ten_steps(tmp_path_factory):
    """The logged lines of 10 steps of a U-Net without a break, every second step."""
    directory = tmp_path_factory.mktemp("ten_steps")
    train.run(tiny_config(**{"training.num_steps": 10}), directory)
    return lines(directory)


@pytest.mark.whole
def test_a_resumed_run_equals_an_uninterrupted_run(ten_steps, tmp_path, capsys):
    """7 steps (a checkpoint between two logged lines), then to 10: bit-identical to 10 steps without a break."""
    for steps in (7, 10):
        train.run(tiny_config(**{"training.num_steps": steps}), tmp_path)
    assert "Continuing from step 7" in capsys.readouterr().out
    assert [row for row in lines(tmp_path) if row["step"] % 2 == 0] == ten_steps


def test_settings_that_identify_a_run_must_not_change(tmp_path):
    """The advice names --pretrained if the weights fit."""
    (tmp_path / "checkpoints" / "1").mkdir(parents=True)
    (tmp_path / "checkpoints" / "1" / "digests.json").write_text("{}")
    workdir.write_config(convolutions_config(), tmp_path)
    new = f"--pretrained={tmp_path} --workdir=NEW"
    for changes, advice in (
        ({"optimizer.learning_rate": 0.5}, f"{new} --config.optimizer.learning_rate=0.5"),
        ({"diffusion.schedule": "linear"}, f"{new} --config.diffusion.schedule=linear"),
        ({"diffusion.loss": "hybrid", "diffusion.variance": "learned_range"}, "the config of that run"),
        ({"model.channels": 16}, "the config of that run"),
    ):
        with pytest.raises(errors.UserError, match=f"{re.escape(advice)}$"):
            workdir.check_identity(convolutions_config(**changes), RunDir(tmp_path))
    free = {"training.num_steps": 9, "training.log_every": 3, "sampling.seed": 7, "data.data_dir": "x", "mesh.data": 1}
    workdir.check_identity(convolutions_config(**free), RunDir(tmp_path))
    for train_or_check in (train.run, workdir.check_identity):
        with pytest.raises(errors.UserError, match=r"model.dropout: .* optimizer.learning_rate: .*0.5 here"):
            train_or_check(
                convolutions_config(**{"optimizer.learning_rate": 0.5, "model.dropout": 0.5}), RunDir(tmp_path)
            )


@pytest.mark.whole
def test_a_directory_without_a_checkpoint_accepts_another_config(tmp_path, monkeypatch):
    """The first launch fails in its first step; the second launch, with another network and other images, runs as in a new
    directory."""
    with monkeypatch.context() as broken:
        broken.setattr(BatchLoader, "next", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train.run(convolutions_config(**{"optimizer.learning_rate": 0.5}), tmp_path)
    assert {"config.json", "data.json"} <= {path.name for path in tmp_path.iterdir()}
    other = convolutions_config(**{"data.split": "test", "training.num_steps": 2})
    train.run(other, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()) == workdir.to_dict(other)
    assert [row["step"] for row in lines(tmp_path)] == [2]
    with pytest.raises(errors.UserError, match="holds another run"):
        workdir.check_identity(convolutions_config(), tmp_path)


def test_a_second_launch_is_refused_and_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "_WAIT_SECONDS", 1.0)
    with (tmp_path / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # as if another process held the lock
        with pytest.raises(locks.LockHeldError, match="another process is training in .*second launch"):
            train.run(convolutions_config(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


@pytest.mark.whole
def test_a_picture_that_cannot_be_written_does_not_stop_the_run(tmp_path, capsys):
    (tmp_path / "samples").write_text("a file where the directory should be")
    train.run(convolutions_config(**{"training.sample_every": 4}), tmp_path)
    assert "the picture of step 4 could not be written" in capsys.readouterr().out
    assert [row["step"] for row in lines(tmp_path)] == [2, 4]


@pytest.mark.whole
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    config = convolutions_config(**{"training.num_steps": 40, "training.checkpoint_every": 1})
    config.optimizer.update(learning_rate=1e12, grad_clip=0.0)
    with pytest.raises(errors.UserError, match=r"not finite at step \d+ .*a lower optimizer.learning_rate") as caught:
        train.run(config, tmp_path)
    assert caught.value.exit_code == 1
    step = int(str(caught.value).split("at step ")[1].split()[0])
    assert [int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdecimal()] == list(range(1, step))[
        -3:
    ]


def test_other_data_are_refused(tmp_path):
    """Other numbers or another number of examples; the location of the data does not matter."""

    def source(count, seed=0):
        path = tmp_path / f"{count}_{seed}.npz"
        np.savez(path, x=examples("vectors", count, seed))
        return data.load(array_config("vectors", path).data)

    run = tmp_path / "run"
    run.mkdir()
    workdir.check_data(source(7), RunDir(run))  # from a launch that saved nothing
    (run / "checkpoints" / "1").mkdir(parents=True)
    workdir.check_data(source(5), RunDir(run))
    (run / "checkpoints" / "1" / "digests.json").write_text("{}")
    workdir.check_data(source(5), RunDir(run))
    workdir.check_data(source(5), RunDir(run))  # compared with the first data
    for other in (source(6), source(5, seed=1)):
        with pytest.raises(errors.UserError, match="the data differ from the training data of .* remove .*data.json"):
            workdir.check_data(other, RunDir(run))
    in_files = source(5)
    in_files.block_lengths = [3, 2]
    with pytest.raises(errors.UserError, match="shuffled as a whole then, shuffled in 2 files now, by data.data_dir"):
        workdir.check_data(in_files, RunDir(run))


@pytest.mark.whole
def test_steps_per_call_can_change_between_launches(ten_steps, tmp_path, monkeypatch):
    """Several steps in one program (as on accelerators), where neither the first step nor the end is a multiple of the
    count."""
    build = training.build_program

    def on_an_accelerator(config):
        built = build(config)
        raw = built.train_step.__wrapped__
        return built._replace(train_steps=jax.jit(training.scan_steps(raw)))

    train.run(tiny_config(**{"training.num_steps": 3}), tmp_path)
    monkeypatch.setattr(training, "build_program", on_an_accelerator)
    fours = dict.fromkeys(("training.steps_per_call", "training.log_every", "training.checkpoint_every"), 4)
    train.run(tiny_config(**{"training.num_steps": 10}, **fours), tmp_path)
    rows = lines(tmp_path)
    assert [row["step"] for row in rows] == [2, 3, 4, 8, 10]
    np.testing.assert_allclose(rows[-1]["loss"], ten_steps[-1]["loss"], rtol=1e-3)
    assert sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir()) == [4, 8, 10]
