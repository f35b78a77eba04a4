"""The outputs of a training run at their intervals: metrics, pictures, distances and checkpoints."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
from ml_collections import ConfigDict

from diffusion_jax import training
from diffusion_jax.distributed.preemption import Preemption
from diffusion_jax.distributed.watchdog import Watchdog
from diffusion_jax.errors import UserError
from diffusion_jax.runs.console import log
from diffusion_jax.runs.goodput import LaunchTimes
from diffusion_jax.runs.metrics_files import RunMetrics
from diffusion_jax.runs.preview import PreviewPictures, TrainingFid
from diffusion_jax.runs.step_timing import StepsInFlight
from diffusion_jax.training.checkpoints import Checkpoints
from diffusion_jax.training.ema import weights_kind

__all__ = ["TrainingOutputs"]


@dataclasses.dataclass
class TrainingOutputs:
    """Writes the outputs of a training run; every process calls it after each call of the train step.

    logged_step: the step of the last metrics, at first the step that the launch starts from. metrics: None on all processes
    but 0. preview, training_fid: None if the config requests none. launch: the times of the whole launch.
    """

    config: ConfigDict
    logged_step: int
    metrics: RunMetrics | None
    checkpoints: Checkpoints
    watchdog: Watchdog
    preview: PreviewPictures | None
    training_fid: TrainingFid | None
    launch: LaunchTimes
    in_flight: StepsInFlight
    preemption: Preemption

    def __post_init__(self):
        self._logged_seconds = self.launch.seconds()

    def log_metrics(self, step: int, state: training.TrainState) -> str:
        """Writes the mean metrics of the steps since the last call that wrote them, if they are due.

        Returns: a note for the progress bar, or "". Raises: UserError if a loss or gradient was not finite.
        """
        if not self._is_due(step, self.config.training.log_every):
            return ""
        self.in_flight.drain()
        means = training.window_means(self._finite_window(state))
        self.watchdog.record_step()
        speed = self._speed(step)
        with self.launch.measure("output"):
            if self.metrics:
                self.launch.record(step)
                speed["goodput"] = self.launch.goodput()
                self.metrics.write_scalars(step, means | speed)
        self.logged_step = step
        return f"loss {means['loss']:.4f}  {speed['images_per_second']:,.3g} images/s"

    def write(self, step: int, state: training.TrainState, must_stop: bool) -> bool:
        """Writes the picture, the Frechet distance and the checkpoint that are due. must_stop: saves at any step.

        Returns: whether the run must stop: `must_stop`, or a signal that arrived in the meantime. The next launch writes the
        picture or distance that is then missing. Raises: UserError if a loss or gradient was not finite, SaveError.
        """
        draws = self.preview and self._is_due(step, self.config.training.sample_every)
        compares = self.training_fid and self._is_due(step, self.config.evaluation.every)
        saves = must_stop or self._is_due(step, self.config.training.checkpoint_every)
        if not (draws or compares or saves):
            return False
        self.in_flight.drain()
        with self.launch.measure("output"):
            # The picture comes before the checkpoint: a run that is killed in between draws it when it resumes.
            if draws and not must_stop:
                must_stop = not self._draw_preview(step, state)
            if compares and not must_stop:
                must_stop = not self._log_fid(step, state)
            if saves or must_stop:
                self._save(step, state)
        if must_stop and (draws or compares) and step == self.config.training.num_steps:
            log("Note: the picture or distance of the last step is missing; use --mode=sample or --mode=evaluate.")
        return must_stop

    def write_missing(self, step: int, state: training.TrainState) -> None:
        """Writes the picture and the distance of the step that a launch starts from, if a signal stopped them before."""
        if not 0 < step < self.config.training.num_steps:
            return
        with self.launch.measure("output"):
            preview, training_fid = self.preview, self.training_fid
            if preview and self._is_due(step, self.config.training.sample_every) and not preview.exists(step):
                self._draw_preview(step, state)
            if training_fid and self._is_due(step, self.config.evaluation.every) and not training_fid.is_logged(step):
                self._log_fid(step, state)

    def _is_due(self, step: int, interval: int) -> bool:
        """Whether an output is due: at its interval and at the last step; an interval of 0 is never."""
        return interval > 0 and (step == self.config.training.num_steps or step % interval == 0)

    def _finite_window(self, state: training.TrainState) -> dict[str, Any]:
        """The sums of the steps since the last metrics. Raises: UserError if a loss or gradient was not finite."""
        window = jax.device_get(state.window)
        if window["nonfinite_step"] >= 0:
            steps = self.checkpoints.steps()
            kept = f"the checkpoint of step {steps[-1]} is kept" if steps else "there was no checkpoint yet"
            raise UserError(
                f"the loss, its gradient or the parameters were not finite at step {window['nonfinite_step']} ({kept}); "
                "try, in a new --workdir, a lower optimizer.learning_rate, a longer optimizer.warmup_steps, "
                "optimizer.grad_clip=1.0, or model.dtype=float32",
                exit_code=1,
            )
        return window

    def _speed(self, step: int) -> dict[str, float]:
        """The speed of the steps since the last metrics, and the fractions of their time."""
        options, num_steps = self.config.training, step - self.logged_step
        now = self.launch.seconds()
        spent = {part: now[part] - self._logged_seconds[part] for part in now}
        self._logged_seconds = now
        seconds, logging = sum(spent.values()), spent["output"] + spent["save"]
        training_seconds = seconds - logging  # the speed is that of training alone
        return {
            "images_per_second": num_steps * options.batch_size / training_seconds,
            "seconds_left": (options.num_steps - step) * seconds / num_steps,
            "step_seconds": seconds / num_steps,
            "compute": spent["train"] / seconds,
            "data_wait": spent["input"] / seconds,
            "logging": logging / seconds,
        }

    def _draw_preview(self, step: int, state: training.TrainState) -> bool:
        """Writes a grid of samples. Returns: False if a signal arrived before it was drawn."""
        assert self.preview
        is_drawn, images, kind = self._call(self.preview.draw, step, state)
        if is_drawn and self.metrics:
            self.preview.write(step, images, self.metrics, kind)
        return is_drawn

    def _log_fid(self, step: int, state: training.TrainState) -> bool:
        """Logs the Frechet distance of samples. Returns: False if a signal arrived before it was known."""
        assert self.training_fid
        is_known, distance, kind = self._call(self.training_fid, step, state)
        if is_known:
            log(f"{self.training_fid.name} {distance:.4g} at step {step}" + (" (raw weights)" if kind == "raw" else ""))
            if self.metrics:
                self.metrics.write_scalars(step, {self.training_fid.name: distance})
        return is_known

    def _call(self, function: Callable[[Any], Any], step: int, state: training.TrainState) -> tuple[bool, Any, str]:
        """Calls a function of the EMA, or of the raw weights as long as these replace it, until a signal arrives.

        Returns: (False if a signal arrived, the result, "ema" or "raw").
        """
        kind = weights_kind(self.config, step)
        params = state.ema_params if kind == "ema" else state.params
        with self.watchdog.paused():
            return *self.preemption.call(functools.partial(function, params)), kind

    def _save(self, step: int, state: training.TrainState) -> None:
        """Saves a checkpoint of a finite state."""
        self._finite_window(state)
        if self.metrics:
            self.metrics.flush()  # a run that resumes from this checkpoint does not write the earlier lines again
        with self.watchdog.paused(), self.launch.measure("save"):
            self.checkpoints.save(step, state)
