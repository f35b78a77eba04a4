"""Runs as a person starts them: train, relaunch, sample, and what goes wrong in one line."""

import json
import os
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from PIL import Image

from diffusion_jax import data, errors, training
from diffusion_jax.config import flatten
from diffusion_jax.distributed.file_lock import HeldError
from diffusion_jax.distributed.termination import EXIT_INTERRUPTED
from diffusion_jax.images import to_uint8
from diffusion_jax.runs import metrics_writer, pictures, sample, train, workdir
from diffusion_jax.runs.image_generator import Generator
from diffusion_jax.runs.stored_config import from_weights
from helpers.configs import tiny_config
from helpers.launcher import launch
from helpers.paths import ROOT
from helpers.program import finish, start, tiny_flags
from helpers.work_directories import last_state, lines


def event_scalars(directory):
    """{step: {tag: value}} of every event file, read by TensorBoard."""
    from tensorboard.backend.event_processing import event_accumulator
    from tensorboard.util import tensor_util

    accumulator = event_accumulator.EventAccumulator(str(directory), size_guidance={"tensors": 0})
    accumulator.Reload()
    found = {}
    for tag in accumulator.Tags()["tensors"]:
        if tag != "samples":
            for event in accumulator.Tensors(tag):
                points = found.setdefault(event.step, {})
                assert tag not in points, f"{tag} twice at step {event.step}"
                points[tag] = float(tensor_util.make_ndarray(event.tensor_proto))
    return found


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of 4 steps, which no test may change."""
    directory = tmp_path_factory.mktemp("run")
    train.run(tiny_config(), directory)
    return directory


def test_a_run_leaves_what_the_contract_says(trained):
    assert json.loads((trained / "config.json").read_text()) == workdir.to_dict(tiny_config())
    assert sorted(p.name for p in (trained / "checkpoints").iterdir()) == ["2", "4"]
    rows = lines(trained)
    assert [row["step"] for row in rows] == [2, 4]
    assert all(np.isfinite(row["loss"]) and row["grad_norm"] > 0 and row["param_norm"] > 0 for row in rows)
    assert {"loss_q1", "loss_q2", "loss_q3", "loss_q4", "learning_rate"} <= set(rows[0])
    assert not (trained / "samples").exists()  # training.sample_every is 0: never


def test_pictures_are_drawn_at_their_interval_and_at_the_end(tmp_path):
    train.run(tiny_config(**{"training.sample_every": 3, "training.checkpoint_every": 4}), tmp_path)
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == [
        f"train_step0000000{step}.png" for step in (3, 4)
    ]
    with Image.open(tmp_path / "samples" / "train_step00000004.png") as picture:
        assert picture.size == (2 * 68 + 4, 68 + 4) and picture.mode == "L"


def test_a_finished_run_says_so(trained, capsys):
    before = lines(trained, without=())
    train.run(tiny_config(), trained)
    assert "This run is finished" in capsys.readouterr().out
    assert lines(trained, without=()) == before


@pytest.mark.whole
def test_a_longer_relaunch_equals_an_unbroken_run(tmp_path, capsys):
    """4 steps, then to 7 (a checkpoint in mid-window), then to 10; against 10 in one go, to the bit."""
    for steps in (4, 7, 10):
        train.run(tiny_config(**{"training.num_steps": steps, "training.log_every": 5}), tmp_path / "broken")
    assert "Continuing from step 7" in capsys.readouterr().out
    train.run(tiny_config(**{"training.num_steps": 10, "training.log_every": 5}), tmp_path / "whole")
    by_step = {row["step"]: row for row in lines(tmp_path / "broken")}
    assert [by_step[5], by_step[10]] == lines(tmp_path / "whole")
    scalars = event_scalars(tmp_path / "broken")
    assert {step: scalars[step]["loss"] for step in scalars} == pytest.approx({s: by_step[s]["loss"] for s in by_step})


def test_logs_are_cut_back_to_the_checkpoint(tmp_path):
    """Lines and events after the last checkpoint, and a torn last line, are written anew and only once."""
    train.run(tiny_config(), tmp_path)
    metrics = metrics_writer.MetricsWriter(tmp_path, step=4)
    metrics.write_scalars(5, {"loss": 9.0})
    metrics.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    train.run(tiny_config(**{"training.num_steps": 6}), tmp_path)
    rows = lines(tmp_path)
    assert [row["step"] for row in rows] == [2, 4, 6] and rows[-1]["loss"] < 9
    scalars = event_scalars(tmp_path)
    assert sorted(scalars) == [2, 4, 6]
    for row in rows:
        assert scalars[row["step"]]["loss"] == pytest.approx(row["loss"])


def test_another_identity_is_refused_and_the_rest_may_change(trained):
    other = tiny_config(**{"optimizer.learning_rate": 0.5, "model.dropout": 0.5, "training.num_steps": 5})
    with pytest.raises(errors.UserError, match=r"model.dropout: .* optimizer.learning_rate: .*0.5 here"):
        train.run(other, trained)
    free = {"training.num_steps": 9, "training.log_every": 3, "sampling.seed": 7, "data.data_dir": "x", "mesh.data": 1}
    workdir.check_identity(tiny_config(**free), trained)
    with pytest.raises(errors.UserError, match="training.batch_size"):
        workdir.check_identity(tiny_config(**{"training.batch_size": 16}), trained)


@pytest.mark.whole
def test_another_learning_rate_is_refused_with_the_command_that_fine_tunes(trained, tmp_path):
    """The command's config is that of the run, but for the rate; it begins with the run's weights."""
    with pytest.raises(errors.UserError, match="holds another run") as caught:
        workdir.check_identity(tiny_config(**{"optimizer.learning_rate": 0.5, "data.random_flip": True}), trained)
    command = str(caught.value).split("to start a new run from its weights: ")[1].split()
    changed = ["--config.optimizer.learning_rate=0.5", "--config.data.random_flip=True"]
    assert command[:2] == [f"--pretrained={trained}", "--workdir=NEW"] and sorted(command[2:]) == sorted(changed)
    config = from_weights(str(trained))
    expected = {**flatten(workdir.to_dict(tiny_config())), "init_from": str(trained)}
    assert flatten(workdir.to_dict(config)) == expected
    config.update_from_flattened_dict({"optimizer.learning_rate": 0.5, "training.num_steps": 1})
    train.run(config, tmp_path / "new")
    assert json.loads((tmp_path / "new" / "config.json").read_text())["data"]["levels"] == 17


def test_a_launch_without_a_checkpoint_leaves_the_directory_to_another_config(tmp_path, monkeypatch):
    """The first fails in its first step; the second, of another network and other images, runs as in a new directory."""
    with monkeypatch.context() as broken:
        broken.setattr("diffusion_jax.runs.train._train", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train.run(tiny_config(**{"optimizer.learning_rate": 0.5}), tmp_path)
    assert {"config.json", "data.json"} <= {path.name for path in tmp_path.iterdir()}
    other = tiny_config(**{"data.split": "test", "training.num_steps": 2})
    train.run(other, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()) == workdir.to_dict(other)
    assert [row["step"] for row in lines(tmp_path)] == [2]
    with pytest.raises(errors.UserError, match="holds another run"):
        workdir.check_identity(tiny_config(), tmp_path)


def test_a_damaged_checkpoint_is_set_aside(tmp_path, capsys):
    train.run(tiny_config(**{"training.num_steps": 2}), tmp_path)
    train.run(tiny_config(), tmp_path)
    (
        tmp_path / "checkpoints" / "6"
    ).mkdir()  # an empty directory is no checkpoint, and must not keep step 6 from being saved
    (tmp_path / "checkpoints" / "5.orbax-checkpoint-tmp").mkdir()  # of a save that was killed
    for file in (tmp_path / "checkpoints" / "4" / "params").rglob("*"):
        if file.is_file() and "ocdbt.process" in str(file):
            file.unlink()
    train.run(tiny_config(**{"training.num_steps": 6}), tmp_path)
    out = capsys.readouterr().out
    assert "The checkpoint of step 4 is damaged: params/" in out and "Continuing from step 2" in out
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"2", "4", "4.unreadable", "6"}
    assert [row["step"] for row in lines(tmp_path)] == [2, 4, 6]


def test_a_finished_run_whose_last_checkpoint_is_damaged_does_its_end_again(tmp_path):
    train.run(tiny_config(), tmp_path)
    before = lines(tmp_path)
    (tmp_path / "checkpoints" / "4" / "rest" / "manifest.ocdbt").unlink()
    train.run(tiny_config(), tmp_path)
    assert lines(tmp_path) == before and (tmp_path / "checkpoints" / "4" / "rest" / "manifest.ocdbt").exists()


HOLDER = """
import fcntl, sys, time
file = open(sys.argv[1], "a+")
fcntl.lockf(file, fcntl.LOCK_EX)
file.write("process 1 of there")
file.flush()
print("held", flush=True)
time.sleep(60)
"""


def test_a_second_launch_is_refused_until_the_first_is_gone(tmp_path):
    """Another process holds the lock; killed, it holds it no longer."""
    train.run(tiny_config(**{"training.num_steps": 2}), tmp_path)
    before = sorted(tmp_path.rglob("*"))
    (tmp_path / ".lock").write_text("")
    command = [sys.executable, "-c", HOLDER, str(tmp_path / ".lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(HeldError, match="process 1 of there is training in .*second launch"):
            train.run(tiny_config(), tmp_path)
        assert sorted(tmp_path.rglob("*")) == before
        holder.kill()
    train.run(tiny_config(), tmp_path)


@pytest.mark.whole
def test_a_profile_holds_the_steps(tmp_path):
    from tensorflow.tsl.profiler.protobuf import xplane_pb2

    train.run(tiny_config(**{"training.num_steps": 12, "training.profile": True}), tmp_path)
    (path,) = (tmp_path / "plugins" / "profile").glob("*/*.xplane.pb")  # where TensorBoard's profiler looks
    space = xplane_pb2.XSpace.FromString(path.read_bytes())
    names = [metadata.name for plane in space.planes for metadata in plane.event_metadata.values()]
    assert "train" in names


def test_the_time_of_a_step_is_split(trained):
    for row in lines(trained, without=()):
        assert row["compute"] + row["data_wait"] + row["logging"] == pytest.approx(1) and row["step_seconds"] > 0
        assert all(0 <= row[name] <= 1 for name in ("compute", "data_wait", "logging"))


def test_a_picture_that_cannot_be_written_is_not_worth_the_run(tmp_path, capsys):
    (tmp_path / "samples").write_text("a file where the directory should be")
    train.run(tiny_config(**{"training.sample_every": 4}), tmp_path)
    assert "the picture of step 4 could not be written" in capsys.readouterr().out
    assert [row["step"] for row in lines(tmp_path)] == [2, 4]


@pytest.mark.whole
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    config = tiny_config(**{"training.num_steps": 40, "training.checkpoint_every": 1})
    config.optimizer.update(learning_rate=1e12, grad_clip=0.0)
    with pytest.raises(errors.UserError, match=r"not finite at step \d+ .*a lower optimizer.learning_rate") as caught:
        train.run(config, tmp_path)
    assert caught.value.exit_code == 1
    step = int(str(caught.value).split("at step ")[1].split()[0])
    assert [int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdecimal()] == list(range(1, step))[
        -3:
    ]


def test_sampling_writes_a_grid_and_an_npz(trained):
    sample.run(tiny_config(), trained)
    path = trained / "samples" / "step4_ema_ddpm2_seed0_n3"
    with np.load(f"{path}.npz") as arrays:
        assert arrays.files == ["arr_0", "settings"]
        images = arrays["arr_0"]
    assert images.dtype == np.uint8 and images.shape == (3, 8, 8, 1)
    with Image.open(f"{path}.png") as picture:
        np.testing.assert_array_equal(np.asarray(picture)[4:68:8, 4:68:8], images[0, :, :, 0])
    raw = tiny_config(
        **{"sampling.use_ema": False, "sampling.sampler": "ddim", "sampling.trajectory": 2, "sampling.steps": 2}
    )
    sample.run(raw, trained)
    (path,) = (trained / "samples").glob("step4_raw_ddim2_seed0_n3.npz")
    with np.load(path) as arrays:
        assert (arrays["arr_0"] != images).any()
    with Image.open(path.with_name(f"{path.stem}_trajectory.png")) as picture:
        assert picture.size == (2 * 68 + 4, 14 + 4 * 68 + 4)


def test_sampling_goes_on_where_it_stopped(trained, monkeypatch):
    config = tiny_config(**{"sampling.num_samples": 7, "sampling.seed": 3})
    whole = trained / "samples" / "step4_ema_ddpm2_seed3_n7.npz"
    sample.run(config, trained)
    with np.load(whole) as arrays:
        expected = arrays["arr_0"]
    whole.unlink()
    made = []
    draw = Generator.__call__

    def third_breaks(self, *args):
        made.append(1)
        if len(made) == 3:
            raise KeyboardInterrupt
        return draw(self, *args)

    monkeypatch.setattr(Generator, "__call__", third_breaks)
    with pytest.raises(KeyboardInterrupt):
        sample.run(config, trained)
    monkeypatch.undo()
    (torn,) = (p for p in (trained / "samples").iterdir() if p.name.startswith("."))
    (torn / "2.partial.npz").write_bytes(b"killed while writing")
    monkeypatch.setattr(Generator, "__call__", lambda self, *args: made.append(1) or draw(self, *args))
    sample.run(config, trained)
    assert len(made) == 5  # two before, the broken one, and the two that were left
    with np.load(whole) as arrays:
        np.testing.assert_array_equal(arrays["arr_0"], expected)
    assert not [p for p in (trained / "samples").iterdir() if p.name.startswith(".")]


@pytest.mark.whole
def test_a_conditional_run_samples_its_classes_in_turn(tmp_path):
    config = tiny_config(**{"model.num_classes": 10, "training.num_steps": 2})
    train.run(config, tmp_path)
    sample.run(config, tmp_path)
    with np.load(tmp_path / "samples" / "step2_ema_ddpm2_seed0_n3.npz") as arrays:
        assert arrays["arr_1"].tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"training.num_steps": 0}, "training.num_steps=0"),
        ({"training.steps_per_call": 3}, "multiple of training.steps_per_call=3"),
        ({"model.num_classes": 3}, "the data has 10 classes"),
        ({"seed": -1}, "at least 0"),
        ({"model.dtype": "bf16"}, "model.dtype='bf16' is not supported; use float32 or bfloat16"),
        (
            {"model.dtype": "float16"},
            "model.dtype='float16' is not supported: .* loss scaling.*; use float32 or bfloat16",
        ),
        ({"model.dtype": "float64"}, "model.dtype='float64' is not supported"),
        ({"model.num_groups": 0}, "model.num_groups=0 must be at least 1"),
        ({"model.channel_multipliers": ()}, "config: "),
        ({"model.dropout": 1.5}, "dropout must lie in"),
        ({"optimizer.learning_rate": -1.0}, "must be above 0"),
        ({"ema.decay": 1.5}, "ema.decay=1.5"),
        ({"sampling.sampler": "eulr"}, "known: ddpm, ddim, euler"),
        ({"sampling.preview_steps": 0}, "whole number in 1"),
    ],
)
def test_training_that_cannot_start(overrides, words, tmp_path):
    overrides = dict(overrides)
    if "sampling.sampler" in overrides:
        with pytest.raises(errors.UserError, match=words):
            sample.run(tiny_config(**overrides), tmp_path)
        return
    with pytest.raises(errors.UserError, match=words):
        train.run(tiny_config(**overrides), tmp_path)
    assert not list(tmp_path.iterdir())


def test_other_images_are_refused(tmp_path):
    """Of a folder that was changed, say, whose name and size are the same."""

    def source(count, seed=0):
        path = tmp_path / f"{count}_{seed}"
        path.mkdir(exist_ok=True)
        for i in range(count):
            pixels = np.random.default_rng([seed, i]).integers(0, 256, (8, 8), dtype=np.uint8)
            Image.fromarray(pixels).save(path / f"{i:03}.png")
        return data.Folder(str(path), (8, 8), 1)

    run = tmp_path / "run"
    run.mkdir()
    workdir.check_data(source(7), run)  # of a launch that saved nothing
    (run / "checkpoints" / "1").mkdir(parents=True)
    workdir.check_data(source(5), run)
    (run / "checkpoints" / "1" / "_CHECKPOINT_METADATA").write_text("{}")
    for same in (source(5), source(5)):
        workdir.check_data(same, run)
    for other in (source(6), source(5, seed=1)):
        with pytest.raises(errors.UserError, match="images are not those that .* remove .*data.json"):
            workdir.check_data(other, run)


def test_sampling_without_a_run(tmp_path):
    with pytest.raises(errors.UserError, match="train first"):
        sample.run(tiny_config(), tmp_path)
    with pytest.raises(errors.UserError, match="num_samples=0"):
        sample.run(tiny_config(**{"sampling.num_samples": 0}), tmp_path)


def test_grids_and_text():
    images = np.zeros((5, 2, 3, 1), np.uint8)
    images[4] = 255
    picture = pictures.grid(images, columns=3)
    assert picture.shape == (2 * (2 * 21 + 4) + 4, 3 * (3 * 21 + 4) + 4, 1)
    assert (picture[50:92, 71:134] == 255).all() and (picture == 255).sum() == 42 * 63
    assert pictures.grid(np.zeros((2, 70, 70, 3), np.uint8)).shape == (78, 152, 3)
    np.testing.assert_array_equal(to_uint8([-1.0, 0.0, 1.0, 3.0, -0.999]), [0, 128, 255, 255, 0])
    text = pictures.as_text(np.array([[[[0], [255]]], [[[255], [0]]]], np.uint8))
    assert text == "  @@    @@"


# ------------------------------------------------------------------------------------ as processes


IMPORTANCE_SAMPLED = {
    "diffusion.loss": "vlb",
    "diffusion.variance": "learned_range",
    "diffusion.timestep_sampler": "loss_second_moment",
    "diffusion.num_timesteps": 5,
    "diffusion.schedule": "linear",
    "diffusion.beta_end": 0.5,
}


STOPPING = {signal.SIGTERM: ("stopped by SIGTERM", 75), signal.SIGINT: ("interrupted by Ctrl-C", 130)}


@pytest.mark.whole
@pytest.mark.parametrize(
    ("loss", "num_steps", "ends"),
    [
        ({}, 150, {10: signal.SIGKILL, 40: signal.SIGTERM, 80: signal.SIGINT}),
        (IMPORTANCE_SAMPLED, 60, {30: signal.SIGKILL}),
    ],
)
def test_killed_and_relaunched_logs_the_same_losses(tmp_path, loss, num_steps, ends):
    """SIGKILL, SIGTERM or Ctrl-C in mid-run; then to the end. Every logged number but the speed equals an unbroken run's,
    to the bit."""
    overrides = {
        "training.num_steps": num_steps,
        "training.log_every": 1,
        "training.checkpoint_every": 7,
        "training.sample_every": num_steps // 3,
        **loss,
    }
    flags = tiny_flags(tmp_path / "killed", **overrides)
    for after, end in ends.items():
        process = start(*flags)
        path, deadline = tmp_path / "killed" / "metrics.jsonl", time.time() + 300
        while time.time() < deadline and process.poll() is None:
            if path.exists() and path.read_text().count("\n") > after:
                break
            time.sleep(0.05)
        process.send_signal(end)
        _, err = process.communicate(timeout=120)
        if end != signal.SIGKILL:
            why, exit_code = STOPPING[end]
            step = int(err.split(f"error: {why} at step ")[1].split(", which is saved; rerun")[0])
            assert process.returncode == exit_code and (tmp_path / "killed" / "checkpoints" / str(step)).is_dir()
            assert len(err.strip().splitlines()) == 1
    code, out, err = finish(start(*flags))
    assert code == 0, err
    assert "Continuing from step" in out
    code, _, err = finish(start(*tiny_flags(tmp_path / "whole", **overrides)))
    assert code == 0 and not err.strip(), err
    assert lines(tmp_path / "killed") == lines(tmp_path / "whole")
    assert len(lines(tmp_path / "whole")) == num_steps
    for directory in ("killed", "whole"):
        assert len(list((tmp_path / directory / "samples").glob("train_step*.png"))) == 3
    killed, whole = (last_state(tiny_config(**overrides), tmp_path / name) for name in ("killed", "whole"))
    jax.tree.map(np.testing.assert_array_equal, killed, whole)
    if loss:  # long past its warm-up
        assert whole.loss_history.counts.min() > 10 and float(whole.loss_history.losses.std()) > 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--config=configs/digits.py", "--config.training.num_step=3"], "did you mean config.training.num_steps?"),
        (["--config=configs/digits.py", "--config.trainin.num_steps=3"], "did you mean config.training.num_steps?"),
        (["--config=configs/digits.py", "--config.training.num_steps=many"], "must be a whole number"),
        (["--config=configs/digit.py"], "no such file"),
        (["--config=configs/digits.py", "--mode=dream"], "train|sample|edit|evaluate|progressive"),
        (["--config=configs/digits.py", "leftover"], "unexpected argument"),
        (["--config", "configs/digits.py", "--config.training.num_step=3"], "did you mean config.training.num_steps?"),
        (["--config=configs/digits.py", "--workdir=gs://bucket/run"], "mounted file system"),
        (["--config=configs/digits.py", "--workdir=README.md"], "README.md"),
        (["--config=configs/digits.py", "--config.data.image_size=wide"], "data.image_size=wide"),
        ([], "--config=configs/NAME.py is needed"),
    ],
)
def test_wrong_flags_are_one_line_and_exit_code_2(arguments, words, tmp_path):
    code, _, err = launch(f"--workdir={tmp_path}", *arguments)
    assert code == 2 and words in err and len(err.strip().splitlines()) == 1, err


@pytest.mark.parametrize("text", ["[1]", '{"seed": 0', ""])
def test_a_damaged_config_json_is_one_line(text, tmp_path):
    (tmp_path / "config.json").write_text(text)
    for named in ([], ["--config=configs/digits.py"]):
        code, _, err = launch(f"--workdir={tmp_path}", *named)
        assert code == 2 and "config.json is not a valid config" in err and len(err.strip().splitlines()) == 1, err


def test_a_run_s_own_config_is_used_where_none_is_named(trained):
    (trained / "checkpoints" / "6.orbax-checkpoint-tmp").mkdir()  # of a run in progress: sampling must leave it alone
    flags = ["--mode=sample", "--config.sampling.seed=5", "--config.sampling.steps=1,2"]
    code, out, err = finish(start("--workdir", str(trained), *flags))
    assert code == 0, err
    assert len(list((trained / "samples").glob("step4_ema_ddpm3_*_seed5_n3.npz"))) == 1 and "a grid:" in out
    assert not err.strip()
    (trained / "checkpoints" / "6.orbax-checkpoint-tmp").rmdir()


@pytest.mark.parametrize("number", STOPPING)
def test_a_signal_stops_sampling_at_once_and_its_parts_are_kept(tmp_path, number):
    train.run(tiny_config(), tmp_path)
    process = start(f"--workdir={tmp_path}", "--mode=sample", "--config.sampling.num_samples=100000")
    deadline = time.time() + 120
    while not (parts := list(tmp_path.glob("samples/.*/*.npz"))) and time.time() < deadline:
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    why, exit_code = STOPPING[number]
    assert process.returncode == exit_code and err.startswith(f"error: {why}; rerun the same command to continue"), err
    assert len(err.strip().splitlines()) == 1 and all(path.exists() for path in parts)


def until(condition, process):
    deadline = time.time() + 300
    while not condition():
        assert time.time() < deadline and process.poll() is None, process.communicate()
        time.sleep(0.05)


STUCK = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
from diffusion_jax import cli
from diffusion_jax.data import pipeline

read = pipeline.Batches.__getitem__


def stuck(self, step):
    while step >= 5:
        time.sleep(1)
    return read(self, step)


pipeline.Batches.__getitem__ = stuck
cli.main()
"""


def test_a_second_ctrl_c_stops_at_once(tmp_path):
    """The data of step 6 never come: the first Ctrl-C waits for the step, the second does not."""
    program, run = tmp_path / "stuck.py", tmp_path / "run"
    program.write_text(STUCK)
    flags = tiny_flags(run, **{"training.num_steps": 9, "training.log_every": 1})
    process = start(*flags, program=str(program))
    until(lambda: (run / "metrics.jsonl").exists() and (run / "metrics.jsonl").read_text().count("\n") == 4, process)
    until((run / "checkpoints" / "4").is_dir, process)
    process.send_signal(signal.SIGINT)
    for line in process.stdout:
        if "Press it again to stop at once" in line:
            break
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    code, _, err = finish(process)
    assert code == EXIT_INTERRUPTED and len(err.strip().splitlines()) == 1, err
    assert err.startswith(
        "error: stopped at once by a second Ctrl-C; step 4 is saved; rerun the same command to resume"
    )
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["2", "4"]


def test_ctrl_c_leaves_the_processes_that_read_data_alone(tmp_path):
    """A terminal sends it to all processes of the command; the step must still be saved, in one line."""
    streamed = {"data.memory_mb": 0, "data.workers": 1, "training.num_steps": 100_000, "training.log_every": 1}
    flags = tiny_flags(tmp_path, **streamed, **{"training.checkpoint_every": 100_000})
    process = start(*flags, start_new_session=True)
    until(
        lambda: (tmp_path / "metrics.jsonl").exists() and (tmp_path / "metrics.jsonl").read_text().count("\n"), process
    )
    os.killpg(process.pid, signal.SIGINT)
    code, _, err = finish(process)
    assert code == EXIT_INTERRUPTED and len(err.strip().splitlines()) == 1, err
    (path,) = (tmp_path / "checkpoints").iterdir()
    assert f"interrupted by Ctrl-C at step {path.name}, which is saved" in err


def test_steps_per_call_may_change_on_relaunch(tmp_path, monkeypatch):
    """Several steps in one program (as on accelerators), from a step that is no multiple, to an end that is none."""
    setup = training.setup

    def on_an_accelerator(config):
        built = setup(config)
        raw = built.train_step.__wrapped__
        return built._replace(train_steps=jax.jit(training.scan_steps(raw)))

    train.run(tiny_config(**{"training.num_steps": 10}), tmp_path / "single")
    train.run(tiny_config(**{"training.num_steps": 3}), tmp_path / "several")
    monkeypatch.setattr(training, "setup", on_an_accelerator)
    train.run(
        tiny_config(
            **{
                "training.num_steps": 10,
                "training.steps_per_call": 4,
                "training.log_every": 4,
                "training.checkpoint_every": 4,
            }
        ),
        tmp_path / "several",
    )
    rows = lines(tmp_path / "several")
    assert [row["step"] for row in rows] == [2, 3, 4, 8, 10]
    np.testing.assert_allclose(rows[-1]["loss"], lines(tmp_path / "single")[-1]["loss"], rtol=1e-3)
    assert sorted(int(p.name) for p in (tmp_path / "several" / "checkpoints").iterdir()) == [4, 8, 10]
