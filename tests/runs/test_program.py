"""The program in separate processes: signals, kills, flags and stored configs."""

import os
import signal

import jax
import numpy as np
import pytest

from diffusion_jax.distributed.processes import EXIT_INTERRUPTED
from diffusion_jax.runs import train
from helpers.configs import convolutions_config, tiny_config
from helpers.program import finish, flags_of, start, until
from helpers.work_directories import last_state, lines

IMPORTANCE_SAMPLED = {
    "diffusion.loss": "vlb",
    "diffusion.variance": "learned_range",
    "diffusion.timestep_sampler": "loss_second_moment",
    "diffusion.num_timesteps": 5,
    "diffusion.schedule": "linear",
    "diffusion.beta_end": 0.5,
}


STOPPING = {signal.SIGTERM: ("stopped by SIGTERM", 75), signal.SIGINT: ("interrupted by Ctrl-C", 130)}


def num_lines(directory):
    path = directory / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


@pytest.mark.whole
@pytest.mark.parametrize(
    ("loss", "num_steps", "ends"),
    [
        ({}, 150, {10: signal.SIGKILL, 40: signal.SIGTERM, 80: signal.SIGINT}),
        pytest.param(IMPORTANCE_SAMPLED, 60, {30: signal.SIGKILL}, marks=pytest.mark.slow),
    ],
)
def test_a_killed_and_resumed_run_logs_the_same_losses(tmp_path, loss, num_steps, ends):
    """SIGKILL, SIGTERM or Ctrl-C in mid-run; then to the end. Every logged number except the speed is bit-identical to an
    uninterrupted run's."""
    overrides = {
        "training.num_steps": num_steps,
        "training.log_every": 1,
        "training.checkpoint_every": 7,
        "training.sample_every": num_steps // 3,
        **loss,
    }
    flags = flags_of(tiny_config(**overrides), tmp_path / "killed")
    for after, end in ends.items():
        process = start(*flags)
        until(lambda after=after: num_lines(tmp_path / "killed") > after, process)
        process.send_signal(end)
        _, err = process.communicate(timeout=120)
        if end != signal.SIGKILL:
            why, exit_code = STOPPING[end]
            step = int(err.split(f"error: {why} at step ")[1].split(", which is saved; rerun")[0])
            assert process.returncode == exit_code and (tmp_path / "killed" / "checkpoints" / str(step)).is_dir()
            assert len(err.strip().splitlines()) == 1
    code, out, err = finish(start(*flags))
    assert code == 0 and not err.strip(), err
    assert "Continuing from step" in out
    train.run(tiny_config(**overrides), tmp_path / "whole")
    assert lines(tmp_path / "killed") == lines(tmp_path / "whole")
    assert len(lines(tmp_path / "whole")) == num_steps
    for directory in ("killed", "whole"):
        assert len(list((tmp_path / directory / "samples").glob("train_step*.png"))) == 3
    killed, whole = (last_state(tiny_config(**overrides), tmp_path / name) for name in ("killed", "whole"))
    jax.tree.map(np.testing.assert_array_equal, killed, whole)
    if loss:  # long after the warm-up
        assert whole.loss_history.counts.min() > 10 and float(whole.loss_history.losses.std()) > 0


@pytest.mark.whole
def test_the_stored_config_is_used_if_none_is_given(trained):
    (trained / "checkpoints" / "6.orbax-checkpoint-tmp").mkdir()  # from a run in progress: sampling must keep it
    flags = ["--trust_network", "--mode=sample", "--config.sampling.seed=5", "--config.sampling.steps=1,2"]
    code, out, err = finish(start("--workdir", str(trained), *flags))
    assert code == 0, err
    assert len(list((trained / "samples").glob("step4_ema_ddpm3_*_seed5_n3.npz"))) == 1 and "a picture:" in out
    assert not err.strip()
    (trained / "checkpoints" / "6.orbax-checkpoint-tmp").rmdir()


@pytest.mark.whole
def test_a_signal_stops_sampling_at_once_and_finished_batches_are_kept(tmp_path):
    train.run(convolutions_config(), tmp_path)
    process = start(f"--workdir={tmp_path}", "--mode=sample", "--trust_network", "--config.sampling.num_samples=100000")
    until(lambda: list(tmp_path.glob("samples/.*/[0-9].npz")), process)
    parts = list(tmp_path.glob("samples/.*/[0-9].npz"))
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75 and err.startswith("error: stopped by SIGTERM; rerun the same command to continue")
    assert len(err.strip().splitlines()) == 1 and all(path.exists() for path in parts)


@pytest.mark.whole
def test_ctrl_c_does_not_stop_the_processes_that_read_data(tmp_path):
    """A terminal sends Ctrl-C to all processes of the command; the step must still be saved, and one line printed."""
    streamed = {"data.memory_mb": 0, "data.workers": 1, "training.num_steps": 100_000, "training.log_every": 1}
    flags = flags_of(convolutions_config(**streamed, **{"training.checkpoint_every": 100_000}), tmp_path)
    process = start(*flags, start_new_session=True)
    until(lambda: num_lines(tmp_path), process)
    os.killpg(process.pid, signal.SIGINT)
    code, _, err = finish(process)
    assert code == EXIT_INTERRUPTED and len(err.strip().splitlines()) == 1, err
    (path,) = (tmp_path / "checkpoints").iterdir()
    assert f"interrupted by Ctrl-C at step {path.name}, which is saved" in err
