"""The outputs of a training run at their intervals: metrics, pictures of samples, their Frechet distance and checkpoints."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from diffusion_jax import data, pictures, pretrained, training
from diffusion_jax.console import log
from diffusion_jax.distributed.signals import SignalHandler
from diffusion_jax.distributed.watchdog import Watchdog
from diffusion_jax.errors import UserError
from diffusion_jax.evaluation.features import CHUNK
from diffusion_jax.metrics import of_features, reported_name
from diffusion_jax.run_dir import RunDir
from diffusion_jax.runs.evaluate import features_cache, load_pipeline, load_reference
from diffusion_jax.runs.logging import LaunchTimes, RunMetrics
from diffusion_jax.runs.sampling import draw_batch, resolve_sampling
from diffusion_jax.runs.step_timing import StepsInFlight
from diffusion_jax.runs.workdir import to_dict
from diffusion_jax.training.checkpoints import Checkpoints
from diffusion_jax.training.ema import weights_kind

__all__ = ["PreviewPictures", "PreviewSampler", "TrainingFid", "TrainingOutputs"]


class PreviewSampler:
    """Batches of samples by a few DDIM steps: `preview_sampler(params, batch)`; the second call compiles nothing."""

    def __init__(self, config: ConfigDict, net: pretrained.Model, source: data.Source, num_images: int, seed: int):
        """net: without parameters. source: in the units of the data; samples get the conditions of evenly spread examples.

        num_images: the batch size, rounded down to a multiple of the number of devices.
        Raises: UserError or ValueError for settings that are not allowed.
        """
        options, num_devices = to_dict(config), net.num_devices
        options["sampling"] |= {
            "sampler": "ddim",
            "steps": min(config.sampling.preview_steps, net.schedule.num_timesteps),
            "spacing": None,
            "eta": 0.0,
            "guidance_scale": 1.0,
            "classifier": "",
            "label": None,
        }
        self.net, self._seed = net, seed
        self.batch_size, conditions = max(1, num_images // num_devices) * num_devices, None
        if net.condition_shape is not None:
            rows = np.linspace(0, len(source) - 1, self.batch_size).round().astype(int)
            conditions = source.read(rows)["condition"]
        self.settings = resolve_sampling(ConfigDict(options), net, conditions, read_files=False)

    def __call__(self, params: Any, batch: int = 0) -> np.ndarray:
        """Samples [N, *spatial, C], with the same random numbers at every call; every process calls this."""
        return draw_batch(self.net.with_params(params), self.settings, self._seed, batch, self.batch_size)


class PreviewPictures:
    """Pictures of samples, as PNG in `workdir` and as TensorBoard images."""

    def __init__(self, workdir: RunDir, sampler: PreviewSampler):
        self._workdir, self._sampler, self._is_compiled = workdir, sampler, False

    def draw(self, params: Any) -> np.ndarray:
        """Samples [N, *spatial, C]; every process calls this."""
        if not self._is_compiled:
            log("Compiling the sampler of the pictures ...")
            self._is_compiled = True
        return self._sampler(params)

    def write(self, step: int, samples: np.ndarray, run_metrics: RunMetrics, kind: str = "ema") -> None:
        """Writes a picture. A PNG that cannot be written is only logged, because a picture is not worth the run.

        kind: of the weights, "ema" or "raw", which the title then names.
        """
        settings = self._sampler.settings
        captions = None if settings.labels is None else settings.captions(len(samples))
        title = f"Samples after {step:,} training steps, by DDIM with {settings.schedule.num_timesteps} steps"
        title += ", raw weights" if kind == "raw" else ""
        picture = pictures.to_array(pictures.draw_samples(samples, title, captions))
        try:
            path = self._workdir / "samples" / f"train_step{step:08d}.png"
            path.parent.mkdir(exist_ok=True)
            pictures.save(path, picture)
            self._workdir.upload(path)
        except OSError as error:
            log(f"Note: the picture of step {step} could not be written: {error}.")
        run_metrics.write_image(step, "samples", picture, title)


class TrainingFid:
    """`training_fid(params)`: the Frechet distance of `evaluation.every_samples` samples of a few DDIM steps.

    name: of the metric, with the number of samples and steps, on which the distance depends.
    """

    def __init__(self, config: ConfigDict, workdir: RunDir, sampler: PreviewSampler, source: data.Source | None = None):
        """Computes the features of the reference.

        source: the training data, if a caller gives them in place of `config.data`. Raises: UserError, DataError,
        PretrainedError.
        """
        options, self._sampler = config.evaluation, sampler
        self._num_samples = options.every_samples
        try:
            self._pipeline = load_pipeline(config)
        except UserError as error:
            raise UserError(f"evaluation.every={options.every} logs a Frechet distance: {error}") from error
        reference = load_reference(config, None if options.reference_split else source)
        try:
            found = self._pipeline.extract_set(reference, features_cache(workdir))
        except ValueError as error:
            raise UserError(f"evaluation.every: cannot compare samples with the reference: {error}") from error
        self._reference = found.moments
        extractor = self._pipeline.extractor
        metric = reported_name("fid", extractor.published, extractor.resize)
        self.name = f"{metric}_{self._num_samples}_ddim{sampler.settings.schedule.num_timesteps}"

    def __call__(self, params: Any) -> float:
        """The distance for these parameters. Every call draws with the same random numbers."""
        num_batches = -(-self._num_samples // self._sampler.batch_size)
        batches = [self._sampler(params, i) for i in range(num_batches)]
        samples = np.concatenate(batches)[: self._num_samples]
        chunks = (self._pipeline(samples[i : i + CHUNK]).pool for i in range(0, self._num_samples, CHUNK))
        return of_features.frechet_distance(self._reference, of_features.moments_of_chunks(chunks))


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
    signals: SignalHandler

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

        Returns: whether the run must stop: `must_stop`, or a signal that arrived in the meantime, after which the picture
        or distance is left out. Raises: UserError if a loss or gradient was not finite, SaveError.
        """
        draws = self.preview and self._is_due(step, self.config.training.sample_every)
        compares = self.training_fid and self._is_due(step, self.config.evaluation.every)
        saves = must_stop or self._is_due(step, self.config.training.checkpoint_every)
        if not (draws or compares or saves):
            return False
        self.in_flight.drain()
        with self.launch.measure("output"):
            # The picture comes before the checkpoint: a run that is killed in between draws it when it resumes.
            kind = weights_kind(self.config, step)
            params = state.ema_params if kind == "ema" else state.params
            if self.preview and draws and not must_stop:
                with self.watchdog.paused():
                    is_drawn, samples = self.signals.call(functools.partial(self.preview.draw, params))
                if is_drawn and self.metrics:
                    self.preview.write(step, samples, self.metrics, kind)
                must_stop = not is_drawn
            if self.training_fid and compares and not must_stop:
                with self.watchdog.paused():
                    is_known, distance = self.signals.call(functools.partial(self.training_fid, params))
                if is_known:
                    name = self.training_fid.name
                    log(f"{name} {distance:.4g} at step {step}" + (" (raw weights)" if kind == "raw" else ""))
                    if self.metrics:
                        self.metrics.write_scalars(step, {name: distance})
                must_stop = not is_known
            if saves or must_stop:
                self._finite_window(state)
                if self.metrics:
                    self.metrics.flush()  # a run that resumes from this checkpoint does not write the earlier lines again
                with self.watchdog.paused(), self.launch.measure("save"):
                    self.checkpoints.save(step, state)
        return must_stop

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
