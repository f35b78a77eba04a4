"""The outputs of a training run at their intervals: metrics, pictures, distances and checkpoints."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import jax
from ml_collections import ConfigDict

from diffusion_jax import training
from diffusion_jax.distributed.watchdog import Watchdog
from diffusion_jax.errors import UserError
from diffusion_jax.runs.console import log
from diffusion_jax.runs.goodput import LaunchTimes
from diffusion_jax.runs.metrics_writer import RunMetrics
from diffusion_jax.runs.preview import PreviewPictures
from diffusion_jax.runs.step_timing import LoopTimer, StepTimes
from diffusion_jax.runs.training_fid import TrainingFid
from diffusion_jax.training.checkpoints import Checkpoints
from diffusion_jax.training.ema import weights_kind

__all__ = ["TrainingOutputs"]


@dataclasses.dataclass
class TrainingOutputs:
    """Writes the outputs of a training run; every process calls it after each call of the train step.

    logged_step: the step of the last metrics, at first the step that the launch starts from. metrics: None on all processes
    but 0. preview, training_fid: None if the config requests none. launch: of the whole launch.
    timer: measures how the time between metrics is spent.
    """

    config: ConfigDict
    logged_step: int
    metrics: RunMetrics | None
    checkpoints: Checkpoints
    watchdog: Watchdog
    preview: PreviewPictures | None
    training_fid: TrainingFid | None
    launch: LaunchTimes
    timer: LoopTimer = dataclasses.field(default_factory=LoopTimer)

    def log_metrics(self, step: int, state: training.TrainState) -> str:
        """Writes the mean metrics of the steps since the last call that wrote them, if they are due.

        Returns: a note for the progress bar, or "". Raises: UserError if a loss or gradient was not finite.
        """
        if not self._is_due(step, self.config.training.log_every):
            return ""
        means = training.window_means(self._finite_window(state))
        self.watchdog.record_step()
        times = self.timer.restart()
        for part, share in (("train", times.compute), ("input", times.data_wait), ("output", times.logging)):
            self.launch.add(part, share * times.seconds)
        with self.timer.measure("logging"):
            speed = self._speed(step, times)
            if self.metrics:
                speed["goodput"] = self.launch.write(step)
                self.metrics.write_scalars(step, means | speed)
        self.logged_step = step
        return f"loss {means['loss']:.4f}  {speed['images_per_second']:,.0f} images/s"

    def write(self, step: int, state: training.TrainState, must_save: bool) -> None:
        """Writes the picture, the Frechet distance and the checkpoint that are due. must_save: saves at any step.

        Raises: UserError if a loss or gradient was not finite, SaveError.
        """
        # The picture comes before the checkpoint: a run that is killed in between draws it when it resumes.
        if self.preview and self._is_due(step, self.config.training.sample_every):
            self._draw_preview(self.preview, step, state)
        if self.training_fid and self._is_due(step, self.config.evaluation.every):
            self._log_fid(self.training_fid, step, state)
        if must_save or self._is_due(step, self.config.training.checkpoint_every):
            self._save(step, state)

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

    def _speed(self, step: int, times: StepTimes) -> dict[str, float]:
        """The speed of the steps since the last metrics."""
        options, num_steps = self.config.training, step - self.logged_step
        training_seconds = times.seconds * (1 - times.logging)  # the speed is that of training alone
        return {
            "images_per_second": num_steps * options.batch_size / training_seconds,
            "seconds_left": (options.num_steps - step) * times.seconds / num_steps,
            "step_seconds": times.seconds / num_steps,
            "compute": times.compute,
            "data_wait": times.data_wait,
            "logging": times.logging,
        }

    def _sampling_weights(self, step: int, state: training.TrainState) -> tuple[str, Any]:
        kind = weights_kind(self.config, step)
        return kind, state.ema_params if kind == "ema" else state.params

    def _draw_preview(self, preview: PreviewPictures, step: int, state: training.TrainState) -> None:
        """Writes a grid of samples of the EMA, or of the raw weights as long as these replace it."""
        kind, params = self._sampling_weights(step, state)
        with self.watchdog.paused():
            images = preview.draw(params)
        if self.metrics:
            preview.write(step, images, self.metrics, kind)

    def _log_fid(self, training_fid: TrainingFid, step: int, state: training.TrainState) -> None:
        """Logs the Frechet distance of samples of the EMA, or of the raw weights as long as these replace it."""
        kind, params = self._sampling_weights(step, state)
        with self.watchdog.paused():
            distance = training_fid(params)
        log(f"{training_fid.name} {distance:.4g} at step {step}" + (" (raw weights)" if kind == "raw" else ""))
        if self.metrics:
            self.metrics.write_scalars(step, {training_fid.name: distance})

    def _save(self, step: int, state: training.TrainState) -> None:
        """Saves a checkpoint of a finite state."""
        self._finite_window(state)
        if self.metrics:
            self.metrics.flush()  # a run that resumes from this checkpoint does not write the earlier lines again
        start = time.perf_counter()
        with self.watchdog.paused():
            self.checkpoints.save(step, state)
        seconds = time.perf_counter() - start
        self.launch.add("save", seconds)
        self.launch.add("output", -seconds)  # the timer counts it as logging
