"""`--mode=evaluate`: the likelihood of examples, and metrics of samples; and the comparison of two sets of examples.

`compare` measures samples against a reference, images or other arrays, and adds a record to a metrics.json, with pictures
beside it. `--mode=evaluate` calls it for the samples of a run, and `python -m diffusion_jax.evaluation` for any two sets.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

import diffusion_jax
from diffusion_jax import data, pictures
from diffusion_jax.config import resolve
from diffusion_jax.data.sources import read_in_order
from diffusion_jax.distributed import devices, sharding
from diffusion_jax.distributed.processes import broadcast_from_process_0
from diffusion_jax.errors import UserError, as_user_error
from diffusion_jax.evaluation import features
from diffusion_jax.evaluation.example_sets import ExampleSet, open_set, read_examples, standardize, value_digest
from diffusion_jax.evaluation.features import FeatureExtractor, FeaturePipeline
from diffusion_jax.files import save_npz, write_text
from diffusion_jax.metrics import MAX_EXAMPLES, METRICS, Options, Result, reported_name, suitable_metrics
from diffusion_jax.pretrained.inception import DOWNLOAD_SOURCES
from diffusion_jax.provenance import Provenance
from diffusion_jax.run_dir import RunDir, open_run_dir
from diffusion_jax.runs import measure_likelihood
from diffusion_jax.runs.console import ProgressBar, log, progress_over
from diffusion_jax.runs.sample import SampleFile
from diffusion_jax.runs.workdir import rename_leaves_in_errors, to_dict, write_config_if_untrained
from diffusion_jax.training import condition_shape

__all__ = [
    "add_record",
    "compare",
    "compare_sets",
    "features_cache",
    "load_pipeline",
    "load_reference",
    "measure_samples",
    "read_records",
    "run",
]

_HOW_TO_GET_INCEPTION = f"evaluation.inception=PATH, the weights of FID's Inception ({DOWNLOAD_SOURCES})"
_EXPECTED_CLOSE_SHARE = 0.01  # of examples that the model was not trained on
_WIDTH = 28  # of names in the log
# Two records with equal values of these keys are of the same comparison.
_COMPARISON = ("reference_sha256", "samples_sha256", "features_digest", "resize", "steps")


def run(config: ConfigDict, workdir: RunDir | str | os.PathLike) -> None:
    """Measures the likelihood of `evaluation.split`, then samples, as far as the config enables them.

    Raises: UserError, DataError, PretrainedError.
    """
    config, workdir = resolve(config), open_run_dir(workdir)
    options = config.evaluation
    if not (options.likelihood or options.num_samples):
        raise UserError(
            "evaluation.likelihood=False and evaluation.num_samples=0: nothing is enabled to measure; set either of them"
        )
    if options.num_samples:
        _metric_names(config)  # an error before the likelihood, which may take hours
    if options.likelihood:
        measure_likelihood.run(config, workdir)
    if options.num_samples:
        measure_samples(config, workdir)


def measure_samples(config: ConfigDict, workdir: RunDir | str | os.PathLike, source: data.Source | None = None) -> None:
    """Measures `evaluation.num_samples` samples against the reference; draws them unless they exist already.

    source: takes the place of the reference, in the units of the data.
    Raises: UserError, DataError, PretrainedError.
    """
    config, workdir = resolve(config), open_run_dir(workdir)
    options, names, of_images = config.evaluation, _metric_names(config), data.is_of_images(config.data)
    pipeline = None
    if any(METRICS[name].needs_features(of_images) for name in names):
        if _features_name(config) == "inception" and not options.inception:
            advice = f"set {_HOW_TO_GET_INCEPTION}; or evaluation.num_samples=0 to leave them out"
            if not options.likelihood:
                raise UserError(f"metrics of samples need features: {advice}")
            return log(f"No metrics of samples: {advice}.")
        pipeline = load_pipeline(config)
        with as_user_error("config.evaluation"):
            features.feature_dimension(pipeline.extractor, data.example_shape(config.data))
    reference = load_reference(config, source)
    minimum = max(METRICS[name].minimum for name in names)
    if len(reference.source) < minimum:
        raise UserError(
            f"{reference.name} has {len(reference.source)} examples: these metrics need at least {minimum} "
            "(evaluation.metrics)"
        )
    if options.num_samples < minimum:
        raise UserError(
            f"evaluation.num_samples={options.num_samples} is too few: these metrics need at least {minimum}"
        )
    if not of_images:
        reference = reference.limit(MAX_EXAMPLES)
    sampling_config = ConfigDict(to_dict(config))
    sampling_config.sampling.update(num_samples=options.num_samples, use_ema=options.use_ema, trajectory=0)
    file = SampleFile(sampling_config, workdir, _reference_conditions(config, reference))
    file.draw(reuse=True)
    multihost_utils.sync_global_devices("samples drawn")  # process 0 alone writes them
    samples = ExampleSet(str(file.path), data.ArrayFiles(str(workdir.fetch(file.path))))
    settings = _settings(config, file)
    if condition_shape(config) is not None:
        settings["conditions"] = config.sampling.conditions or f"those of the examples of {reference.name}"
    is_periodic = config.model.get("padding") == "periodic"
    metric_options = Options(options.seed, file.net.normalizations.get("x"), is_periodic)
    output, cache = workdir / "metrics.json", features_cache(workdir)
    try:
        written = compare(reference, samples, names, output, pipeline, cache, metric_options, settings)
        workdir.upload(*written)
    except ValueError as error:
        raise UserError(f"the samples cannot be measured: {error}") from error
    write_config_if_untrained(config, workdir)


def compare_sets(arguments: argparse.Namespace) -> None:
    """Measures the samples against the reference and adds a record to the output file.

    arguments: of `python -m diffusion_jax.evaluation`. Raises: DiffusionJaxError, ValueError, OSError: one line.
    """
    requested = [name.strip() for name in arguments.metrics.split(",")] if arguments.metrics else []
    unknown = sorted(set(requested) - METRICS.keys())
    if unknown:
        raise UserError(f"--metrics: {unknown[0]!r} is unknown; known: {', '.join(METRICS)}")
    if arguments.batch_size < 1:
        raise UserError(f"--batch_size={arguments.batch_size} must be at least 1")
    output = pathlib.Path(arguments.output).expanduser()
    output = output if output.suffix == ".json" else output / "metrics.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    reference, samples = (
        open_set(location, arguments.data_dir, arguments.image_size)
        for location in (arguments.reference, arguments.samples)
    )
    _check_comparable(reference, samples)
    of_images, normalization, name = samples.is_of_images, None, arguments.features
    if of_images:
        name = name or ("digits" if reference.name.startswith("digits:") else "inception")
    elif reference.examples is not None:
        normalization = data.find_normalizations({"normalization": "auto"}, reference.examples).get("x")
    spatial_axes = 2 if samples.examples is None else samples.first.ndim - 2
    names = requested or _default_metrics(suitable_metrics(spatial_axes, of_images, bool(name)), of_images)
    extractor = None
    if any(METRICS[metric].needs_features(of_images) for metric in names):
        if name == "inception" and not arguments.inception:
            raise UserError(
                f"--inception=PATH is needed: the weights of FID's network ({DOWNLOAD_SOURCES}); or --features=digits, or "
                "module:function"
            )
        extractor = features.from_name(name, arguments.inception, arguments.resize)
    devices.start()
    mesh = sharding.make_mesh({"data": -1, "fsdp": 1})
    pipeline = FeaturePipeline(extractor, mesh, arguments.batch_size, ProgressBar) if extractor else None
    cache = RunDir(features.cache_directory())
    compare(reference, samples, names, output, pipeline, cache, Options(normalization=normalization), {})


def compare(
    reference: ExampleSet,
    samples: ExampleSet,
    metric_names: Sequence[str],
    output: pathlib.Path,
    pipeline: FeaturePipeline | None,
    cache: RunDir,
    options: Options,
    settings: Mapping[str, Any],
) -> list[pathlib.Path]:
    """Measures the samples against the reference and adds a record to `output`, with the settings.

    Pictures, and an .npz of the statistics of arrays, are written beside it. pipeline: None for metrics without features.
    cache: of features, a directory that every process sees. Every process calls this, and process 0 writes.
    Returns: the files that this process has written.
    Raises: ValueError, before anything is computed, for sets that cannot be compared.
    """
    read_records(output)
    extractor = pipeline.extractor if pipeline else None
    names = _possible_metrics(reference, samples, extractor, metric_names)
    of_images = samples.is_of_images
    if not of_images:
        reference, samples = reference.limit(MAX_EXAMPLES), samples.limit(MAX_EXAMPLES)
    sets = []
    if pipeline and any(METRICS[name].needs_features(of_images) for name in names):
        # Samples are rarely measured again: their features are kept only until the record is written.
        folders = ((reference, "references"), (samples, "samples"))
        sets = [pipeline.extract_set(each, cache.subdirectory(folder)) for each, folder in folders]
    if jax.process_index() != 0:
        return []
    log("Comparing ...")

    @functools.cache
    def inputs(needs: str) -> tuple[Any, Any]:
        """What the metrics need of the reference and of the samples."""
        if needs == "examples":
            normalization = options.normalization
            return standardize(reference.source, normalization), standardize(samples.source, normalization)
        if needs == "vectors":
            return inputs("pool" if of_images else "examples")
        if needs == "logits":
            assert extractor is not None and extractor.head is not None and sets[1].pool is not None
            return None, sets[1].pool @ extractor.head
        return getattr(sets[0], needs), getattr(sets[1], needs)

    results, values = {}, {}
    for name in names:
        result = results[name] = METRICS[name].compute(*inputs(METRICS[name].needs), options)
        prefix = ""
        if METRICS[name].names:
            assert extractor is not None
            prefix = reported_name(name, extractor.published, extractor.resize)
        values |= {f"{prefix}{key}": value for key, value in result.values.items()}
        if result.note:
            log(f"Note: {result.note}.")
    digests = [each.digest for each in sets] or [value_digest(each.source) for each in (reference, samples)]
    used = {
        "features": extractor.name if extractor else None,
        "features_digest": extractor.digest if extractor else None,
        "resize": extractor.resize if extractor else None,
    }
    suffix = hashlib.sha256(json.dumps([*digests, *used.values()]).encode()).hexdigest()[:6]
    suffix = f"{pathlib.Path(samples.name).stem}_{suffix}"
    files = _write_files(output.parent, suffix, reference, samples, results, extractor)
    record = {
        **values,
        "files": files,
        "num_reference": None if reference.statistics else len(reference.source),
        "num_samples": None if samples.statistics else len(samples.source),
        "reference": reference.name,
        "reference_sha256": digests[0],
        "samples": samples.name,
        "samples_sha256": digests[1],
        **used,
        **settings,
        "versions": {"diffusion_jax": diffusion_jax.__version__, "jax": jax.__version__, "numpy": np.__version__},
        "backend": jax.default_backend(),
    }
    add_record(output, record)
    for each in sets[1:]:
        each.delete_cache()
    _log_values(values)
    log(f"Written to {output}" + (f", and beside it: {', '.join(files.values())}" if files else ""))
    return [output, *(output.with_name(name) for name in files.values())]


def _possible_metrics(
    reference: ExampleSet, samples: ExampleSet, extractor: FeatureExtractor | None, metric_names: Sequence[str]
) -> list[str]:
    """The metrics that these sets allow; the others are logged. Raises: ValueError for sets that allow none."""
    if samples.examples is None:
        raise ValueError(f"{samples.name} holds only statistics, but samples must be images; swap the two arguments?")
    _check_comparable(reference, samples)
    reasons = {name: _why_not(METRICS[name].needs, reference, extractor) for name in metric_names}
    missing = [f"{name} ({reason})" for name, reason in reasons.items() if reason]
    if missing:
        log(f"Not measured: {'; '.join(missing)}.")
    names = [name for name, reason in reasons.items() if not reason]
    if not names:
        raise ValueError("nothing is left to measure; name other metrics")
    if extractor and extractor.name == "inception" and not extractor.published:
        log("Note: these are not the published weights of FID's Inception, so none of these metrics is called FID.")
    for each in (reference, samples):
        for name in names:
            minimum = METRICS[name].minimum
            if each.examples is not None and len(each.examples) < minimum:
                noun = "images" if each.is_of_images else "examples"
                raise ValueError(
                    f"{each.name}: {len(each.examples)} {noun} are too few for {name}, which needs {minimum}"
                )
    statistics = reference.statistics
    if statistics and extractor:
        dimensions = features.feature_dimension(extractor, samples.first.shape[1:])
        if dimensions and len(statistics.moments.mean) != dimensions:
            raise ValueError(
                f"{reference.name} has statistics of {len(statistics.moments.mean)} dimensions, and features of "
                f"{extractor.name} have {dimensions}; use the features of the statistics"
            )
    return names


def _why_not(needs: str, reference: ExampleSet, extractor: FeatureExtractor | None) -> str:
    """Why a metric with these needs cannot be measured, or ""."""
    if needs == "spatial" and extractor and extractor.name != "inception":
        return "only Inception has spatial features"
    if needs == "spatial" and reference.statistics and reference.statistics.spatial is None:
        return "the reference has no spatial statistics (mu_s, sigma_s)"
    if needs == "logits" and extractor and not extractor.published:
        return "it needs the classes of the published Inception"
    if needs in ("pool", "vectors", "examples") and reference.examples is None:
        return "the reference has statistics only"
    return ""


def _check_comparable(reference: ExampleSet, samples: ExampleSet) -> None:
    """Raises: ValueError if the examples of the two sets differ in shape; gray and color images are comparable."""
    if reference.examples is None or samples.examples is None:
        return
    if reference.is_of_images != samples.is_of_images:
        images, others = (reference, samples) if reference.is_of_images else (samples, reference)
        raise ValueError(
            f"{others.name} holds {others.first.dtype} {[len(others.source), *others.first.shape[1:]]}, not uint8 "
            f"[N, H, W, 1 or 3] as {images.name}; save floats x in [-1, 1] as round((x + 1) * 127.5)"
        )
    of_images = reference.is_of_images
    one, other = (each.first.shape[1:3] if of_images else each.first.shape[1:] for each in (reference, samples))
    if one != other:
        noun, advice = ("images", "; --image_size=N resizes folders and data sets") if of_images else ("examples", "")
        one, other = ("x".join(map(str, shape)) for shape in (one, other))
        raise ValueError(
            f"{reference.name} holds {one} {noun} and {samples.name} holds {other} {noun}, which are not comparable{advice}"
        )


# ---- Outputs


def _write_files(
    folder: pathlib.Path,
    suffix: str,
    reference: ExampleSet,
    samples: ExampleSet,
    results: Mapping[str, Result],
    extractor: FeatureExtractor | None,
) -> dict[str, str]:
    """Writes the pictures, and the statistics as an .npz. Returns: their names by what they show."""
    files: dict[str, str] = {}
    one, other = (pathlib.Path(each.name) for each in (reference, samples))
    arrays = {name: array for result in results.values() for name, array in result.arrays.items()}
    for name, result in results.items():
        picture, curves = None, result.curves
        if curves is not None:
            name = curves.name
            picture = pictures.draw_curves(curves, f"Samples of {other.stem} and {one.name}")
        elif result.neighbors is not None and samples.first.ndim > 2:  # a vector has no picture
            limit = result.values[name]["close_distance"]
            space = (
                f"of {extractor.name} features" if extractor and samples.is_of_images else "of standardized examples"
            )
            title = f"Samples of {other.name} and their nearest examples in {one.name}; "
            title += f"Euclidean distances {space}; at most {limit:.3g} is close"
            picture = _draw_neighbors(reference, samples, result, title)
        if picture is not None:
            files[name] = f"{name}_{suffix}.png"
            pictures.save(folder / files[name], picture)
    if arrays:
        files["statistics"] = f"statistics_{suffix}.npz"
        path = folder / files["statistics"]
        if path.exists():  # other statistics of the same two sets
            with np.load(path) as stored:
                arrays = dict(stored) | arrays
        save_npz(path, arrays)
    return files


def _draw_neighbors(reference: ExampleSet, samples: ExampleSet, result: Result, title: str) -> pictures.Picture:
    """A row for each of the samples nearest to examples of the reference: the sample, and these examples."""
    assert result.neighbors is not None and result.rows is not None
    rows, (indices, distances) = result.rows, result.neighbors
    count, nearest = (10, indices.shape[1]) if samples.is_of_images else (4, 1)
    suspects = np.argsort(distances[:, 0], kind="stable")[:count]
    examples = np.stack([read_examples(reference.source, indices[i, :nearest]) for i in suspects])
    shown = read_examples(samples.source, rows[suspects])
    if shown.shape[-1] != examples.shape[-1]:  # gray and color images
        channels = max(shown.shape[-1], examples.shape[-1])
        shown, examples = (np.broadcast_to(x, (*x.shape[:-1], channels)) for x in (shown, examples))
    return pictures.draw_neighbors(shown, rows[suspects].tolist(), examples, distances[suspects, :nearest], title)


def _log_values(values: Mapping[str, Any]) -> None:
    """Logs a line for each metric, with its standard error, and its value for equal laws if that is not 0 or 1."""
    for name, value in values.items():
        if isinstance(value, float) and not name.endswith(("_std", "_standard_error", "_same_law")):
            error, same_law = (values.get(f"{name}_{of}") for of in ("standard_error", "same_law"))
            line = f"{name:{_WIDTH}} {value:.6g}" + (f" ± {error:.2g}" if error is not None else "")
            log(line + (f" (equal laws: {same_law:.4g})" if same_law is not None else ""))
    if "memorization" in values:
        share = values["memorization"]["close_share"]
        log(f"{'closer than the reference':{_WIDTH}} {share:.4f} ({_EXPECTED_CLOSE_SHARE} of fresh examples)")


def add_record(path: pathlib.Path, record: Mapping[str, Any]) -> None:
    """Appends a record to a JSON list, or merges it into the record of the same comparison: new metrics replace old ones."""
    records, earlier = [], {}
    for old in read_records(path):
        if all(old.get(key) == record.get(key) for key in _COMPARISON):
            earlier |= old
        else:
            records.append(old)
    merged = earlier | dict(record)
    merged["files"] = earlier.get("files", {}) | record["files"]
    write_text(path, json.dumps([*records, merged], indent=2, allow_nan=False) + "\n")


def read_records(path: pathlib.Path) -> list[dict[str, Any]]:
    """The records of a metrics.json, [] if there is no file. Raises: ValueError for another file."""
    if not path.exists():
        return []
    problem = "not a list of records"
    try:
        records = json.loads(path.read_text())
        if isinstance(records, list) and all(isinstance(record, dict) for record in records):
            return records
    except (ValueError, OSError) as error:
        problem = str(error)
    raise ValueError(f"{path} is not a valid metrics.json ({problem}); name another file, or move this one away")


# ---- Settings of a config


def _default_metrics(suitable: Sequence[str], of_images: bool) -> tuple[str, ...]:
    """All that are suitable, of images those that compare features."""
    return tuple(name for name in suitable if not of_images or METRICS[name].needs_features(of_images))


def _metric_names(config: ConfigDict) -> tuple[str, ...]:
    """`evaluation.metrics`, or the default. Raises: UserError for metrics that do not suit the data."""
    requested, spatial_axes = config.evaluation.metrics, len(data.example_shape(config.data)) - 1
    of_images, has_features = data.is_of_images(config.data), bool(_features_name(config))
    suitable = suitable_metrics(spatial_axes, of_images, has_features)
    for name in requested or ():
        if name not in suitable:
            what = f"data with {spatial_axes} spatial axes"
            if METRICS[name].needs_features(of_images):
                what += " and without evaluation.features=module:function"
            raise UserError(
                f"evaluation.metrics: {name} is not for {what}; use None, or names from {', '.join(suitable)}"
            )
    return requested or _default_metrics(suitable, of_images)


def _features_name(config: ConfigDict) -> str:
    """`evaluation.features`, or the default of the data set: "" for metrics without features.

    Raises: UserError for features of images with other data.
    """
    name = config.evaluation.features
    if data.is_of_images(config.data):
        return name or ("digits" if config.data.dataset == "digits" else "inception")
    if name and ":" not in name:
        shape = ", ".join(map(str, ("N", *data.example_shape(config.data))))
        raise UserError(
            f"evaluation.features={name!r} are features of images; use module:function, a function of arrays [{shape}], "
            'or "" for the metrics that need none'
        )
    return name


def load_pipeline(config: ConfigDict) -> FeaturePipeline:
    """The features of `config.evaluation`. Raises: UserError, also if the data have none; PretrainedError."""
    options, name = config.evaluation, _features_name(config)
    if not name:
        raise UserError("these data have no features: set evaluation.features=module:function")
    if name == "inception" and not options.inception:
        raise UserError(f"metrics of features need {_HOW_TO_GET_INCEPTION}")
    with as_user_error("config.evaluation"):
        extractor = features.from_name(name, options.inception)
    return FeaturePipeline(extractor, sharding.make_mesh(config.mesh), options.batch_size, ProgressBar)


def load_reference(config: ConfigDict, source: data.Source | None = None) -> ExampleSet:
    """The examples of `evaluation.reference_split`, those of the training split by default, in the units of the data.

    source: takes their place. Raises: DataError.
    """
    progress = progress_over("Reading the reference")
    if source is not None:
        loaded = data.load(ConfigDict({**config.data, "holdout": 0.0}), progress, source=source)
        return ExampleSet(type(source).__name__, loaded)
    own_split = config.evaluation.reference_split
    location = ConfigDict({**config.data, "split": own_split or config.data.split})
    with rename_leaves_in_errors({"data.split": "evaluation.reference_split"} if own_split else {}):
        return ExampleSet(data.origin(location), data.load(location, progress))


def features_cache(workdir: RunDir) -> RunDir:
    """Where features are kept. Every process must see it, so several processes use the work directory."""
    return RunDir(features.cache_directory()) if jax.process_count() == 1 else workdir.subdirectory(".features")


def _reference_conditions(config: ConfigDict, reference: ExampleSet) -> np.ndarray | None:
    """The conditions of samples without `sampling.conditions`: those of the reference, in the units of the data.

    Sample i gets the condition of example i; fewer samples than examples get the conditions of evenly spread examples.
    """
    if condition_shape(config) is None or config.sampling.conditions:
        return None
    rows = reference.limit(config.evaluation.num_samples).source
    return np.concatenate([batch["condition"] for batch in read_in_order(rows, 1024)])


def _settings(config: ConfigDict, file: SampleFile) -> dict[str, Any]:
    """The settings that the metrics depend on besides the two sets and the features, as the record stores them."""
    settings = file.provenance.settings
    sampling = {key: value for key, value in settings["sampling"].items() if key != "steps"}
    sampling |= {"classifier": config.sampling.classifier, "use_ema": config.evaluation.use_ema}

    def read_details() -> Mapping[str, Any]:
        stored = Provenance.read(file.path)
        assert stored is not None  # the file has just been written or found to hold these settings
        return stored.details

    return {
        "dataset": config.data.dataset,
        "init_from": config.init_from or None,
        "weights": settings["weights"],
        "step": settings["step"],
        "steps": settings["num_steps"],
        "sampling": sampling | {"batch_size": settings["batch_size"]},
        "weights_digest": settings["weights_digest"],
        "classifier_digest": settings["classifier_digest"],
        "drawn_with": broadcast_from_process_0(read_details),
    }
