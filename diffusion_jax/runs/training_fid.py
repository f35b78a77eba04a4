"""The Frechet distance of samples while a model trains."""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from diffusion_jax import data
from diffusion_jax.distributed import sharding
from diffusion_jax.distributed.processes import broadcast_from_process_0
from diffusion_jax.errors import UserError
from diffusion_jax.evaluation import metrics, named_metrics
from diffusion_jax.evaluation.features import CHUNK, FeaturePipeline
from diffusion_jax.runs.batch_sampler import BatchSampler
from diffusion_jax.runs.console import ProgressBar
from diffusion_jax.runs.metric_options import (
    HOW_TO_GET_INCEPTION,
    features_cache,
    has_array_metrics,
    lacks_inception,
    load_extractor,
    load_reference,
)
from diffusion_jax.runs.metrics_files import read_metrics

__all__ = ["TrainingFid"]


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
