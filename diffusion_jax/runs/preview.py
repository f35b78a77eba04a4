"""Samples of a model while it trains: pictures, and their Frechet distance."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from diffusion_jax import data, models, pictures, training
from diffusion_jax.config import is_upsampler
from diffusion_jax.distributed import sharding
from diffusion_jax.distributed.processes import broadcast_from_process_0
from diffusion_jax.errors import UserError
from diffusion_jax.evaluation import metrics, named_metrics
from diffusion_jax.evaluation.features import CHUNK, FeaturePipeline
from diffusion_jax.runs.batch_sampler import BatchSampler
from diffusion_jax.runs.console import ProgressBar, log
from diffusion_jax.runs.metric_options import (
    HOW_TO_GET_INCEPTION,
    features_cache,
    has_array_metrics,
    lacks_inception,
    load_extractor,
    load_reference,
)
from diffusion_jax.runs.metrics_files import RunMetrics, read_metrics
from diffusion_jax.runs.sampling_conditions import class_captions, evenly_spaced_conditions
from diffusion_jax.runs.sampling_setup import SamplingSetup
from diffusion_jax.runs.workdir import to_dict

__all__ = ["PreviewPictures", "TrainingFid", "check_sampling", "make_preview_sampler", "set_data"]


def check_sampling(config: ConfigDict, program: training.TrainingProgram, class_names: Sequence[str]) -> None:
    """Raises the errors of --mode=sample, except those that depend on the weights of a guiding classifier."""
    if not isinstance(program.model, models.Conditional):
        return
    SamplingSetup(config, program.model, program.schedule, program.mesh, class_names, load_classifier=False)


def make_preview_sampler(config: ConfigDict, program: training.TrainingProgram, num_images: int) -> BatchSampler | None:
    """A sampler of about `num_images` images with a few DDIM steps; None for models that cannot sample from noise alone."""
    if num_images < 1 or not isinstance(program.model, models.Conditional) or is_upsampler(config):
        return None
    options = to_dict(config)
    options["sampling"] |= {
        "sampler": "ddim",
        "steps": min(config.sampling.preview_steps, program.schedule.num_timesteps),
        "spacing": None,
        "eta": 0.0,
        "guidance_scale": 1.0,
        "classifier": "",
        "label": None,
    }
    config, num_devices = ConfigDict(options), program.mesh.size
    sampling_setup = SamplingSetup(config, program.model, program.schedule, program.mesh)
    return BatchSampler(config, sampling_setup, program.mesh, max(1, num_images // num_devices) * num_devices)


def set_data(batch_sampler: BatchSampler, source: data.Source, normalizations: data.Normalizations) -> None:
    """Gives a sampler what depends on the data: the scale of its samples, and conditions of examples.

    source: normalized.
    """
    batch_sampler.normalization = normalizations.get("x")
    batch_sampler.setup.conditions = evenly_spaced_conditions(source, batch_sampler.batch_size)


class PreviewPictures:
    """Pictures of samples, as PNG in `workdir` and as TensorBoard images. class_names: for their captions."""

    def __init__(self, workdir: pathlib.Path, batch_sampler: BatchSampler, seed: int, class_names: Sequence[str]):
        self._directory, self._batch_sampler, self._seed = workdir / "samples", batch_sampler, seed
        self._class_names = class_names
        self._is_compiled = False

    def exists(self, step: int) -> bool:
        """Whether process 0 has the picture of a step."""
        return broadcast_from_process_0(self._path(step).exists)

    def _path(self, step: int) -> pathlib.Path:
        return self._directory / f"train_step{step:08d}.png"

    def draw(self, params: Any) -> np.ndarray:
        """Samples [N, *spatial, C], the same random numbers at every call; every process calls this."""
        if not self._is_compiled:
            log("Compiling the sampler of the pictures ...")
            self._is_compiled = True
        return self._batch_sampler(params, self._seed)

    def write(self, step: int, samples: np.ndarray, run_metrics: RunMetrics, kind: str = "ema") -> None:
        """Writes a picture. A PNG that cannot be written is only logged, because a picture is not worth the run.

        kind: of the weights, "ema" or "raw", which the title then names.
        """
        labels = self._batch_sampler.setup.labels(np.arange(len(samples)))
        captions = None if labels is None else class_captions(labels, self._class_names)
        sampling_steps = self._batch_sampler.setup.schedule.num_timesteps
        title = f"Samples after {step:,} training steps, by DDIM with {sampling_steps} steps"
        title += ", raw weights" if kind == "raw" else ""
        picture = pictures.to_array(pictures.draw_samples(samples, title, captions))
        try:
            self._directory.mkdir(exist_ok=True)
            pictures.save(self._path(step), picture)
        except OSError as error:
            log(f"Note: the picture of step {step} could not be written: {error}.")
        run_metrics.write_image(step, "samples", picture, title)


class TrainingFid:
    """`training_fid(params)`: the Frechet distance of `evaluation.every_samples` samples of a few DDIM steps.

    name: of the metric, with the number of samples and steps, on which the distance depends.
    """

    def __init__(
        self, config: ConfigDict, workdir: pathlib.Path, batch_sampler: BatchSampler, source: data.Source | None = None
    ):
        """Computes the features of the reference.

        source: the training data, if a caller gives them in place of `config.data`. Raises: UserError, DataError,
        PretrainedError.
        """
        options = config.evaluation
        if has_array_metrics(config) and not options.features:
            raise UserError(
                f"evaluation.every={options.every} logs a Frechet distance of features, which these data do not have: set "
                "evaluation.features=module:function, or evaluation.every=0"
            )
        if lacks_inception(config):
            raise UserError(f"evaluation.every needs {HOW_TO_GET_INCEPTION}")
        extractor, self._seed, self._num_samples = load_extractor(config), options.seed, options.every_samples
        self._batch_sampler = batch_sampler
        self._extraction = FeaturePipeline(extractor, sharding.make_mesh(config.mesh), options.batch_size, ProgressBar)
        reference = load_reference(config, None if options.reference_split else source)
        assert reference.examples is not None  # a data set, not a file of statistics
        try:
            found = self._extraction.extract_set(reference.name, reference.examples, features_cache(workdir))
        except ValueError as error:
            raise UserError(f"evaluation.every: cannot compare samples with the reference: {error}") from error
        self._reference = found.moments
        metric, num_steps = named_metrics.reported_name("fid", extractor), batch_sampler.setup.schedule.num_timesteps
        self.name, self._workdir = f"{metric}_{self._num_samples}_ddim{num_steps}", workdir

    def is_logged(self, step: int) -> bool:
        """Whether process 0 has logged the distance of a step."""
        lines = broadcast_from_process_0(
            lambda: [line["step"] for line in read_metrics(self._workdir) if self.name in line]
        )
        return step in lines

    def __call__(self, params: Any) -> float:
        """The distance for these parameters. Every call draws with the same random numbers."""
        num_batches = -(-self._num_samples // self._batch_sampler.batch_size)
        batches = [self._batch_sampler(params, self._seed, i) for i in range(num_batches)]
        samples = np.concatenate(batches)[: self._num_samples]
        chunks = (self._extraction(samples[i : i + CHUNK]).pool for i in range(0, self._num_samples, CHUNK))
        return metrics.frechet_distance(self._reference, metrics.moments_of_chunks(chunks))
