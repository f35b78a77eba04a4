"""Goodput over launches, the status of a directory, and profiles."""

import json
import types

import jax
import pytest

from diffusion_jax import cli
from diffusion_jax.errors import LeaseLostError
from diffusion_jax.run_dir import RunDir
from diffusion_jax.runs import status, train
from diffusion_jax.runs.logging import LaunchTimes, read_goodput, read_launches
from diffusion_jax.runs.step_timing import TraceProfile
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
    # The checkpoint was of step 52, so 13 of the 65 steps, 13 s, are done again.
    goodput = launch(tmp_path, clock, 52, 115, 167)
    assert goodput == pytest.approx((65 - 13 + 115) / 300)
    found = read_goodput(tmp_path)
    assert found.num_launches == 2 and found.wall_seconds == pytest.approx(300)
    expected = {"train": 167, "repeated": 13, "idle": 50, "start": 20, "compile": 40, "save": 10}
    assert {part: 300 * share for part, share in found.fractions.items() if share > 1e-9} == pytest.approx(expected)
    assert sum(found.fractions.values()) == pytest.approx(1)
    assert read_goodput(tmp_path / "none") is None


def test_sparkline():
    assert status.sparkline([0.0, 1.0, 3.0, 7.0]) == "▁▂▄█"
    assert status.sparkline([2.0, 2.0]) == "▁▁"
    assert len(status.sparkline(range(1000))) == 40


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
    for words in ("not running; rerun its command", "step 2 of 4 (50%)", "time left", "1 launch"):
        assert words in report, report
    train.run(config, run)
    assert "finished" in status.report(config, run)
    before = sorted(path.stat().st_mtime_ns for path in run.rglob("*"))
    cli.main([f"--workdir={run}", "--mode=status"])
    assert "step 4 of 4 (100%)" in capsys.readouterr().out
    assert sorted(path.stat().st_mtime_ns for path in run.rglob("*")) == before
    assert "nothing was trained yet" in status.report(config, tmp_path / "empty")


def test_a_profile_is_of_the_sixth_to_the_tenth_call(tmp_path, monkeypatch):
    traces, profile = [], TraceProfile(RunDir(tmp_path))
    monkeypatch.setattr("jax.profiler.start_trace", lambda directory: traces.append("start"))
    monkeypatch.setattr("jax.profiler.stop_trace", lambda: traces.append("stop"))
    for step, found in enumerate([[]] * 5 + [["start"]] * 4 + [["start", "stop"]] * 3):
        assert profile.call(step, lambda x: 2 * x, 3.0) == 6.0 and traces == found
    profile = TraceProfile(RunDir(tmp_path))
    for step in range(7):
        profile.call(step, lambda x: x, 0)
    profile.stop()  # the run ends before the last call
    assert traces == ["start", "stop"] * 2


def test_the_error_of_a_launch_is_stored_and_never_raises(tmp_path):
    times = LaunchTimes(RunDir(tmp_path))
    times.begin(3)
    times.stop(ValueError("two\n lines"))
    assert read_launches(tmp_path)[0]["stopped_by"] == "ValueError: two lines"
    times.stop(LeaseLostError("another launch writes there"))
    assert read_launches(tmp_path)[0]["stopped_by"] == "ValueError: two lines"
    LaunchTimes(RunDir(tmp_path / "missing")).stop(KeyboardInterrupt())
    assert not (tmp_path / "missing").exists()
