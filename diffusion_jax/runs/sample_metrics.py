"""Samples of a run, judged: FID and its kin by `--mode=evaluate`, and FID of a few samples while it trains."""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Mapping

import jax
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from diffusion_jax import data
from diffusion_jax.distributed import sharding
from diffusion_jax.distributed.processes import broadcast_from_process_0
from diffusion_jax.errors import UserError, as_user_error
from diffusion_jax.evaluation import metric_suite, image_sets, metrics
from diffusion_jax.evaluation import feature_extractors
from diffusion_jax.evaluation.feature_extraction import CHUNK, FeaturePipeline, cache_directory
from diffusion_jax.pretrained.inception import DOWNLOAD_SOURCES
from diffusion_jax.runs import pictures
from diffusion_jax.runs import workdir as work
from diffusion_jax.runs.console import Bar, bar_over, say
from diffusion_jax.runs.metric_records import differing, measure, read_records, settings_of
from diffusion_jax.runs.sample import Generator, read_settings, sample
from diffusion_jax.training import is_upsampler


@contextlib.contextmanager
def naming_leaves(leaves: Mapping[str, str]):
    """Replaces names of leaves in the message of a DataError, such as {"data.split": "evaluation.split"}."""
    try:
        yield
    except data.DataError as error:
        message = str(error)
        for there, here in leaves.items():
            message = message.replace(f"{there}=", f"{here}=")
        raise data.DataError(message) from error


def check_sample_metrics(config: ConfigDict) -> None:
    """Raises: UserError for leaves that nothing could be judged by, before anything is drawn."""
    options = config.evaluation
    for leaf in ("num_samples", "every", "every_samples"):
        if options[leaf] < 0:
            raise UserError(f"evaluation.{leaf}={options[leaf]} must be at least 0")
    if options.batch_size < 1:
        raise UserError(f"evaluation.batch_size={options.batch_size} must be at least 1")
    unknown = sorted(set(options.metrics) - set(metric_suite.METRICS))
    if unknown:
        raise UserError(f"evaluation.metrics: {unknown[0]!r} is unknown; known: {', '.join(metric_suite.METRICS)}")
    if not options.metrics:
        raise UserError(
            f"evaluation.metrics={tuple(options.metrics)} asks for nothing; name some of {', '.join(metric_suite.METRICS)}, or "
            "use evaluation.num_samples=0"
        )
    if options.resize not in feature_extractors.RESIZES:
        raise UserError(f"evaluation.resize={options.resize!r} is unknown; known: {', '.join(feature_extractors.RESIZES)}")


def judge(config: ConfigDict, directory: pathlib.Path) -> None:
    """Metrics of `evaluation.num_samples` samples against the training images, into metrics.json; drawn if not there yet."""
    options = config.evaluation
    if not options.num_samples:
        return
    if _features_of(config) == "inception" and not options.inception:
        how = (
            f"evaluation.inception=PATH names the weights of FID's Inception ({DOWNLOAD_SOURCES}), evaluation.num_samples=0 leaves "
            "this out"
        )
        if not options.likelihood:
            raise UserError(f"nothing can judge the samples: {how}")
        say(f"No samples are judged: {how}.")
        return
    if is_upsampler(config):
        say("No samples are judged: this model enlarges images that it is given.")
        return
    extractor = _extractor(config)
    with as_user_error("config.evaluation"):
        feature_extractors.feature_dimension(extractor, data.image_shape(config.data))
    reference = _reference(config)
    few = max(metric_suite.MIN_IMAGES[metric] for metric in options.metrics)
    if options.num_samples < few:
        raise UserError(f"evaluation.num_samples={options.num_samples} is too few: the metrics asked for need {few}")
    config = ConfigDict(work.to_dict(config))
    config.sampling.update(num_samples=options.num_samples, use_ema=options.use_ema, trajectory=0)
    drawn = sample(config, directory, again=False)
    multihost_utils.sync_global_devices("samples drawn")  # process 0 alone writes them
    stored = broadcast_from_process_0(lambda: read_settings(drawn.path))
    settings, drawn_with = stored["settings"], stored["drawn_with"]
    files = {"classifier": config.sampling.classifier, "use_ema": options.use_ema}
    sampling = {key: value for key, value in settings["sampling"].items() if key != "steps"} | files
    about = {
        "dataset": config.data.dataset,
        "init_from": config.init_from or None,
        "weights": "ema" if options.use_ema else "raw",
        "step": drawn.step,
        "steps": drawn.num_steps,
        "sampling": sampling | {"batch_size": settings["batch_size"], "devices": settings["devices"]},
        "weights_digest": settings["weights_digest"],
        "classifier_digest": settings["classifier_digest"],
        "drawn_with": drawn_with,
    }
    mesh, output = sharding.make_mesh(config.mesh), directory / "metrics.json"
    try:
        samples = image_sets.ImageSet(str(drawn.path), image_sets.NpzImages(drawn.path))
        measure(
            reference, samples, extractor, options.metrics, mesh, options.batch_size, output, about, _cache(directory)
        )
    except ValueError as error:
        raise UserError(f"the samples cannot be judged: {error}") from error
    if jax.process_index() == 0:
        _plot(directory, metric_suite.reported_name("fid", extractor))


def _features_of(config: ConfigDict) -> str:
    """`evaluation.features`, or what is usual for the data."""
    return config.evaluation.features or ("digits" if config.data.dataset == "digits" else "inception")


def _extractor(config: ConfigDict) -> feature_extractors.FeatureExtractor:
    options = config.evaluation
    with as_user_error("config.evaluation"):
        return feature_extractors.from_name(_features_of(config), options.inception, options.resize)


def _reference(config: ConfigDict) -> image_sets.ImageSet:
    split = config.evaluation.reference_split or config.data.split
    with naming_leaves({"data.split": "evaluation.reference_split"} if config.evaluation.reference_split else {}):
        source = data.load(ConfigDict({**config.data, "split": split}), bar_over("Reading the images"))
    name = config.data.data_dir if config.data.dataset == "folder" else f"{config.data.dataset}:{split}"
    return image_sets.ImageSet(name, source)


def _cache(directory: pathlib.Path) -> pathlib.Path:
    """Of many processes, each must see it: the work directory, not a home of each machine's own."""
    return cache_directory() if jax.process_count() == 1 else directory / ".features"


def _plot(directory: pathlib.Path, name: str) -> None:
    """The distance against the number of sampling steps, once there are figures of two numbers of steps. A line is of records
    that differ in nothing else; its label says in what it differs from other lines.
    """
    records = [record for record in read_records(directory / "metrics.json") if name in record and "steps" in record]
    besides = [key for key in differing(records) if key not in ("steps", "samples", "timesteps")]
    curves: dict[str, dict[int, float]] = {}
    for record in records:
        settings = settings_of(record)
        told = [f"{key} {settings.get(key)}" for key in besides if key not in ("sampler", "features_digest")]
        label = ", ".join([settings["sampler"], *told, f"{record['num_samples']:,} samples"])
        curves.setdefault(label, {})[record["steps"]] = record[name]
    if len({record["steps"] for record in records}) > 1:
        path = directory / f"{name}_against_steps.png"
        pictures.plot_against_steps(path, curves, name.replace("_", " "))
        say(f"Against the number of sampling steps: {path}")


class TrainingFid:
    """The Frechet distance of a run's samples while it trains: of few samples, by few steps of DDIM, and named so."""

    def __init__(self, config: ConfigDict, directory: pathlib.Path, generator: Generator):
        """generator: of the pictures during training, with a batch size of its own."""
        check_sample_metrics(config)
        options = config.evaluation
        if options.every_samples < 2:
            raise UserError(f"evaluation.every_samples={options.every_samples} must be at least 2")
        if _features_of(config) == "inception" and not options.inception:
            raise UserError(
                f"evaluation.every needs evaluation.inception=PATH, the weights of FID's Inception ({DOWNLOAD_SOURCES})"
            )
        extractor, self._seed, self._count = _extractor(config), options.seed, options.every_samples
        self._generator = generator
        self._extraction = FeaturePipeline(extractor, sharding.make_mesh(config.mesh), options.batch_size, Bar)
        reference = _reference(config)
        try:
            self._reference = self._extraction.of(reference.name, reference.images, _cache(directory)).moments
        except ValueError as error:
            raise UserError(f"evaluation.every: samples could not be judged: {error}") from error
        kind, steps = metric_suite.reported_name("fid", extractor), generator.recipe.schedule.num_timesteps
        self.name = f"{kind}_{self._count}_ddim{steps}"

    def __call__(self, params) -> float:
        """Of these weights. The draws are the same at every call."""
        batches = -(-self._count // self._generator.batch_size)
        drawn = [self._generator(params, self._seed, i) for i in range(batches)]
        drawn = np.concatenate(drawn)[: self._count]
        chunks = (self._extraction(drawn[i : i + CHUNK]).pool for i in range(0, self._count, CHUNK))
        return metrics.frechet_distance(self._reference, metrics.moments_of_chunks(chunks))
