"""Goodput over launches, a directory's status, and profiles."""

import contextlib
import json
import os
import types

import jax
import pytest

from diffusion_jax import cli
from diffusion_jax.errors import LeaseLostError
from diffusion_jax.run_dir import RunDir
from diffusion_jax.runs import status, train
from diffusion_jax.runs.logging import LaunchTimes, compute_goodput, read_launches
from helpers.array_configs import array_config, write_arrays
from helpers.work_directories import lines


def launch(workdir, clock, first_step, train_seconds, last_step):
    """A launch that starts in 10 s, compiles for 20 s, trains, and saves for 5 s."""
    times = LaunchTimes(RunDir(workdir), lambda: clock.now)
    clock.now += 10
    with times.measure("compile"):
        clock.now += 20
    times.begin(first_step)
    clock.now += train_seconds
    with times.measure("save"):
        clock.now += 5
    times.record(last_step)
    return times.goodput()


def test_goodput_counts_steps_once_and_the_time_between_launches(tmp_path):
    clock = types.SimpleNamespace(now=1000.0)
    assert launch(tmp_path, clock, 0, 65, 65) == pytest.approx(65 / 100)
    clock.now += 50  # the machine was gone
    # The checkpoint has step 52, so 13 of the 65 steps, 13 s, are repeated.
    goodput = launch(tmp_path, clock, 52, 115, 167)
    assert goodput == pytest.approx((65 - 13 + 115) / 300)
    fractions, wall_seconds = compute_goodput(read_launches(tmp_path))
    assert len(read_launches(tmp_path)) == 2 and wall_seconds == pytest.approx(300)
    expected = {"train": 167, "repeated": 13, "idle": 50, "start": 20, "compile": 40, "save": 10}
    assert {part: 300 * share for part, share in fractions.items() if share > 1e-9} == pytest.approx(expected)
    assert sum(fractions.values()) == pytest.approx(1)
    assert read_launches(tmp_path / "none") == []


def test_the_status_names_the_newest_checkpoint(tmp_path, monkeypatch):
    for step, written in ((3, 86_400), (12, 7_200_000)):
        manifest = tmp_path / "checkpoints" / str(step) / status.MANIFEST
        manifest.parent.mkdir(parents=True)
        manifest.touch()
        os.utime(manifest, (written, written))
    monkeypatch.setattr(status, "committed_steps", lambda path: [3, 12])
    rows = status.describe(array_config("vectors", tmp_path / "data.npz"), status.open_run_dir(tmp_path), [])
    assert rows["checkpoint"] == f"step 12, {status.format_time(7_200_000)}"


@pytest.mark.thorough
def test_the_status_of_a_run(tmp_path, capsys):
    run = tmp_path / "run"
    config = array_config("vectors", write_arrays("vectors", tmp_path / "data.npz"), **{"training.num_steps": 2})
    train.run(config, run)
    entries = json.loads((run / "goodput.json").read_text())
    assert [(entry["first_step"], entry["last_step"]) for entry in entries] == [(0, 2)]
    assert entries[0]["environment"]["versions"]["jax"] == jax.__version__ and entries[0]["environment"]["devices"] >= 1
    assert 0 < lines(run, without=())[-1]["goodput"] < 1
    config.training.num_steps = 4
    report = status.report(config, run)
    for words in ("not running; rerun its command", "step 2 of 4 (50%)", "time left", "1 launch", " examples/s"):
        assert words in report, report
    train.run(config, run)
    assert "finished" in status.report(config, run)
    before = sorted(path.stat().st_mtime_ns for path in run.rglob("*"))
    cli.main([f"--workdir={run}", "--mode=status"])
    assert "step 4 of 4 (100%)" in capsys.readouterr().out
    assert sorted(path.stat().st_mtime_ns for path in run.rglob("*")) == before
    assert "nothing was trained yet" in status.report(config, tmp_path / "empty")


@pytest.mark.whole
def test_a_profile_is_of_the_sixth_to_the_tenth_call(tmp_path, monkeypatch):
    """Also for a launch that ends before the tenth step."""
    events = []
    monkeypatch.setattr("jax.profiler.start_trace", lambda directory: events.append("start"))
    monkeypatch.setattr("jax.profiler.stop_trace", lambda: events.append("stop"))
    step = lambda name, step_num: (events.append(step_num), contextlib.nullcontext())[1]  # noqa: E731
    monkeypatch.setattr("jax.profiler.StepTraceAnnotation", step)
    data_file = write_arrays("vectors", tmp_path / "data.npz")
    for num_steps in (11, 18):
        config = array_config("vectors", data_file, **{"training.num_steps": num_steps, "training.profile": True})
        train.run(config, tmp_path / "run")
    assert events == [*range(5), "start", *range(5, 10), "stop", *range(10, 16), "start", 16, 17, "stop"]


def test_the_error_of_a_launch_is_stored_and_never_raises(tmp_path):
    times = LaunchTimes(RunDir(tmp_path))
    times.begin(3)
    times.stop(ValueError("two\n lines"))
    assert read_launches(tmp_path)[0]["stopped_by"] == "ValueError: two lines"
    times.stop(LeaseLostError("another launch writes there"))
    assert read_launches(tmp_path)[0]["stopped_by"] == "ValueError: two lines"
    LaunchTimes(RunDir(tmp_path / "missing")).stop(KeyboardInterrupt())
    assert not (tmp_path / "missing").exists()
