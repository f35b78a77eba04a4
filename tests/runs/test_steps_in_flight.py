"""The train step calls in flight, and the time until a signal stops training."""

import os
import signal
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.distributed.signals import StoppedBySignal
from diffusion_jax.run_dir import committed_steps
from diffusion_jax.runs import train
from diffusion_jax.runs.train import StepsInFlight
from helpers.array_configs import array_config, write_arrays


class Device:
    """A simulated device that computes calls in order, and the host's clock."""

    def __init__(self):
        self.now = self.free = 0.0

    def dispatch(self, seconds):
        self.free = max(self.free, self.now) + seconds
        return Output(self, self.free)


class Output:
    """An array from a call that ends at a given time."""

    def __init__(self, device, end):
        self.device, self.end = device, end

    def is_ready(self):
        return self.device.now >= self.end

    def block_until_ready(self):
        self.device.now = max(self.device.now, self.end)


def train_simulated(durations, pauses=None):
    """Dispatches a call of each duration; the host pauses after each.

    Returns: (StepsInFlight, device, seconds of work in flight after each wait).
    """
    device = Device()
    in_flight, work = StepsInFlight(0, clock=lambda: device.now), []
    pauses = [0.0] * len(durations) if pauses is None else pauses
    for step, (seconds, pause) in enumerate(zip(durations, pauses, strict=True), 1):
        in_flight.add(step, device.dispatch(seconds))
        device.now += 0.001 + pause
        in_flight.wait()
        work.append(max(device.free - device.now, 0.0))
    return in_flight, device, work


@pytest.mark.parametrize("seconds", [60.0, 0.7, 0.2, 0.01])
def test_about_a_second_of_work_is_in_flight(seconds):
    in_flight, device, work = train_simulated([seconds] * 100)
    assert max(work) <= 1.0 + 1e-6
    assert in_flight.finished == 100 - round(work[-1] / seconds)  # counts finished steps, not dispatched ones
    in_flight.drain()
    assert in_flight.finished == 100 and device.now >= device.free
    # A slow step waits for the host for a millisecond; other steps never wait.
    assert device.now <= 100 * seconds + 0.1 + 1e-6 and (seconds > 1 or device.now <= 100 * seconds + 0.005)


def test_steps_that_become_slow_are_bounded_again():
    _, _, work = train_simulated([0.01] * 100 + [10.0] * 50)
    assert max(work[-17:]) == 0.0


@pytest.mark.parametrize("seconds", [0.3, 0.45, 0.02])
def test_irregular_pauses_do_not_let_work_pile_up(seconds):
    """Calls that finish during a pause are noticed together, so each call looks short."""
    draw, count = np.random.default_rng(0), 2000
    pauses = np.where(draw.random(count) < 0.05, draw.uniform(0, 3, count), 0.0)
    _, _, work = train_simulated(seconds * draw.uniform(0.95, 1.05, count), pauses)
    assert max(work) <= 2.0


def test_a_signal_saves_after_at_most_two_calls(tmp_path, monkeypatch):
    """Every call of the train step takes about 0.2 s."""
    outputs, finished, matrix, compile_step = [], [], jnp.eye(300), train._compile

    @jax.jit
    def delay(loss):
        return loss + 0 * jax.lax.fori_loop(0, 100, lambda _, x: x @ matrix, matrix * loss)[0, 0]

    delay(jnp.ones(())).block_until_ready()

    def compile_slow(*arguments):
        function = compile_step(*arguments)

        def call(state, batch):
            state, metrics = function(state, batch)
            outputs.append(delay(metrics["loss"]))
            return state, metrics | {"loss": outputs[-1]}

        return call

    monkeypatch.setattr(train, "_compile", compile_slow)
    monkeypatch.setattr(StepsInFlight, "_SECONDS", 0.1)  # in place of steps that take seconds

    def stop():
        while len(outputs) < 4:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)
        finished.append(sum(output.is_ready() for output in outputs))

    config = array_config("vectors", write_arrays("vectors", tmp_path / "data.npz"), **{"training.num_steps": 500})
    config.training.update(log_every=100, checkpoint_every=500)
    threading.Thread(target=stop, daemon=True).start()
    with pytest.raises(StoppedBySignal):
        train.run(config, tmp_path / "run")
    (step,) = committed_steps(tmp_path / "run" / "checkpoints")
    assert step <= finished[0] + 3  # a call may finish before the handler runs; jax itself would queue 32 calls


def test_a_signal_is_answered_by_a_save_before_the_next_picture(tmp_path, monkeypatch):
    """A picture may take longer than the time between a preemption notice and the end."""
    drawn = []

    def draw(self, params):
        drawn.append(self)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.3)  # for the thread that records the signal
        return np.zeros((2, 2), np.float32)

    settings = {"training.num_steps": 6, "training.sample_every": 1}
    config = array_config("vectors", write_arrays("vectors", tmp_path / "data.npz"), **settings)
    config.training.update(checkpoint_every=6)
    monkeypatch.setattr(train.SampleBatches, "__call__", draw)
    monkeypatch.setattr(train, "_write_picture", lambda *arguments: None)
    with pytest.raises(StoppedBySignal):
        train.run(config, tmp_path / "run")
    assert len(drawn) == 1 and committed_steps(tmp_path / "run" / "checkpoints") == [2]
