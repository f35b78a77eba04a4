"""`--mode=evaluate`, first part: the likelihood of examples that the model was not trained on.

Writes likelihood.json (bits per dimension, their parts and standard errors), likelihood.npz (the terms at every timestep),
likelihood_terms.png and rate_distortion.png. Continuous data have a density, in the units of the data, of which nats per
dimension are reported, too.
"""

from __future__ import annotations

import functools
import json
import math
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from diffusion_jax import data, likelihood, pictures
from diffusion_jax.config import is_continuous, resolve, resolve_clip
from diffusion_jax.distributed import compiler, sharding
from diffusion_jax.distributed.watchdog import watch_batches
from diffusion_jax.errors import UserError, as_user_error
from diffusion_jax.files import save_npz, write_text
from diffusion_jax.images import to_model_range
from diffusion_jax.runs.chunk_store import ChunkStore, options_digest
from diffusion_jax.runs.console import ProgressBar, log, progress_over
from diffusion_jax.runs.data_source import check_source, normalize, rename_leaves_in_errors
from diffusion_jax.runs.metric_options import check_evaluation_options
from diffusion_jax.runs.trained_model import TrainedModel, params_digest
from diffusion_jax.runs.workdir import digest_of_some, to_dict, write_config_if_untrained
from diffusion_jax.training.from_config import condition_shape

__all__ = ["LikelihoodRun", "Terms", "noun_of", "rate_distortion", "run"]

_TABLES = ("vlb", "mse", "x_0_mse")
_EXAMPLE_TERMS = ("total", "prior", "decoder", "ode")


def run(config: ConfigDict, workdir: pathlib.Path, source: data.Source | None = None) -> None:
    """Measures the bits per dimension of `evaluation.split`; with `evaluation.likelihood=False` it only checks the config.

    source: examples that take the place of that split, in the units of the data.
    Raises: UserError, also for options of the sample metrics, which follow; DataError, PretrainedError.
    """
    config = resolve(config)
    check_evaluation_options(config)
    if not config.evaluation.likelihood:
        return
    likelihood_run = LikelihoodRun(config, workdir, source)
    options, trained = config.evaluation, likelihood_run.trained
    num_examples = min(options.num_examples or len(likelihood_run.source), len(likelihood_run.source))
    weights = f"the {trained.weights_kind} weights of step {trained.step}"
    log(f"Measuring the bound of {num_examples:,} {noun_of(config)} with {weights}.")
    terms, chunks = likelihood_run.measure(num_examples, options.ode)
    if jax.process_index() == 0:
        report = _report(likelihood_run, terms, num_examples)
        _write(likelihood_run, terms, report)
        chunks.delete()
        _log(report, workdir)
    write_config_if_untrained(config, workdir)


class Terms(NamedTuple):
    """Terms of the bound in bits per dimension; of continuous data, those of the density in the units of the data.

    examples: {"total", "prior", "decoder", and "ode" if it is measured: [N]}. counts [T]: examples at each timestep. means,
    standard_errors: {"vlb", "mse", "x_0_mse": [T]} over those, NaN for too few examples; mse and x_0_mse are of standardized
    data.
    """

    examples: dict[str, np.ndarray]
    counts: np.ndarray
    means: dict[str, np.ndarray]
    standard_errors: dict[str, np.ndarray]


class LikelihoodRun:
    """The newest weights of a run, and the examples of `evaluation.split` whose likelihood is measured.

    source: normalized. dataset, split: the origin of the examples; the split is None for examples without one: a source that
    a caller gives, or a folder or file that `evaluation.data_dir` names.
    standardization_bits: what the standardization adds to the bits per dimension of continuous data. dequantization: of the
    ODE, None without it.
    """

    def __init__(self, config: ConfigDict, workdir: pathlib.Path, source: data.Source | None = None):
        """source: takes the place of `evaluation.split`. Raises: UserError, DataError, PretrainedError."""
        options = config.evaluation
        self.config, self.workdir = config, workdir
        self.dequantization = _resolve_dequantization(config) if options.ode else None
        self.trained = TrainedModel.open(config, workdir, options.use_ema)
        self.step, self.params = self.trained.weights
        loaded, self.split = _load_source(config, source, self.trained.is_trained_here)
        check_source(config, loaded)
        given = source is not None
        self.dataset = type(source).__name__ if given else config.data.dataset
        self.source = normalize(config, loaded, self.trained.normalizations)
        self.standardization_bits = 0.0
        if is_continuous(config) and "x" in self.trained.normalizations:
            scale = self.trained.normalizations["x"].scale
            self.standardization_bits = float(np.log2(np.abs(scale)).mean())  # any float64, unlike the core's function
        self._given_digest = [len(self.source), digest_of_some(self.source)] if given else None

    def read(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """A batch: "image" or "x", "label", and "condition" if the network takes one.

        Raises: DataError for images with other gray levels than `data.levels`, or values that are not finite.
        """
        batch = dict(self.source.read(indices))
        if "image" in batch:
            data.check_levels(batch["image"], self.config.data.levels)
        batch.setdefault("label", np.zeros(len(indices), np.int32))
        return {name: batch[name] for name in self._batch_shapes()}

    def _batch_shapes(self) -> dict[str, Any]:
        """The shape and type of an example's arrays."""
        shape, condition = data.example_shape(self.config.data), condition_shape(self.config)
        name, dtype = ("x", jnp.float32) if is_continuous(self.config) else ("image", jnp.uint8)
        shapes = {name: jax.ShapeDtypeStruct(shape, dtype), "label": jax.ShapeDtypeStruct((), jnp.int32)}
        if condition is not None:
            shapes["condition"] = jax.ShapeDtypeStruct(condition, jnp.float32)
        return shapes

    def denoise_fn(self, params, batch) -> Callable:
        """The network for a batch, as a function of x_t and time."""
        model = self.trained.model
        y = batch["label"] if self.config.model.num_classes else None
        condition = {"condition": batch["condition"]} if "condition" in batch else {}
        return lambda x_t, time: model.apply({"params": params}, x_t, time, y, **condition)

    def measure(self, num_examples: int, ode: bool) -> tuple[Terms, ChunkStore]:
        """The terms of the first `num_examples` examples.

        Every batch is kept, so that a rerun continues after the last one; the caller deletes them when all files are written.
        Raises: UserError, also if the ODE solver fails.
        """
        options, mesh, num_timesteps = self.config.evaluation, self.trained.mesh, self.trained.schedule.num_timesteps
        batch_size = self.batch_size(num_examples)
        by_rows, own_rows = sharding.batch_sharding(mesh), sharding.process_rows(batch_size, mesh)
        compiled = self._compile(batch_size, ode)
        chunks = ChunkStore(self.workdir / f".likelihood_{self._digest(num_examples, batch_size, ode)}")
        num_batches = -(-num_examples // batch_size)
        done = min(len(chunks.finished) * batch_size, num_examples)
        with ProgressBar("Evaluating", num_examples, done) as bar:
            missing = [i for i in range(num_batches) if i not in chunks.finished]
            if missing:
                log("Compiling the bound and measuring the first batch ...")
            for i in watch_batches(missing, self.config.training.stall_timeout):
                # The last batch is padded with copies of its last example, which are dropped again.
                batch = self.read(np.minimum(i * batch_size + own_rows, num_examples - 1))
                placed = {name: jax.make_array_from_process_local_data(by_rows, array) for name, array in batch.items()}
                out = compiled(self.params, np.uint32(options.seed), np.int32(i), placed)
                out = multihost_utils.process_allgather(out, tiled=True)
                kept = {key: np.asarray(value)[: num_examples - i * batch_size] for key, value in out.items()}
                chunks.save(i, **_sum_over_examples(kept, num_timesteps))
                bar.update(min((i + 1) * batch_size, num_examples))
        multihost_utils.sync_global_devices("likelihood chunks written")
        terms = _add_to_density(_join([chunks.load(i) for i in range(num_batches)]), self.standardization_bits)
        multihost_utils.sync_global_devices("likelihood chunks read")
        if "ode" in terms.examples and not np.isfinite(terms.examples["ode"]).all():
            if jax.process_index() == 0:
                chunks.delete()  # a rerun would only read the same numbers again
            num_failed = (~np.isfinite(terms.examples["ode"])).sum()
            raise UserError(
                f"evaluation.ode_tolerance={options.ode_tolerance}: the solver of the probability-flow ODE did not converge "
                f"for {num_failed} of {num_examples} {noun_of(self.config)}; try a larger one"
            )
        return terms, chunks

    def batch_size(self, num_examples: int) -> int:
        """`evaluation.batch_size`, capped at the number of examples, rounded up to a multiple of the devices."""
        devices = self.trained.mesh.size
        return -(-min(self.config.evaluation.batch_size, num_examples) // devices) * devices

    def _compile(self, batch_size: int, ode: bool) -> Callable:
        by_rows, replicated = sharding.batch_sharding(self.trained.mesh), sharding.replicated(self.trained.mesh)
        bound = self._bound(ode)
        batch = {
            name: jax.ShapeDtypeStruct((batch_size, *row.shape), row.dtype)
            for name, row in self._batch_shapes().items()
        }
        with as_user_error("config.evaluation"):
            jax.eval_shape(bound, self.params, np.uint32(0), np.int32(0), batch)
        return jax.jit(
            bound,
            in_shardings=(replicated, replicated, replicated, by_rows),
            out_shardings=by_rows,
            compiler_options=compiler.options(),
        )

    def _bound(self, ode: bool) -> Callable:
        """(params, seed, batch index, batch) -> {"total", ..., "t", the tables, "ode"}, not yet compiled."""
        options, diffusion, schedule = self.config.evaluation, self.config.diffusion, self.trained.schedule
        parameterization = {
            "prediction": diffusion.prediction,
            "variance": diffusion.variance,
            "gray_levels": self.config.data.levels,
        }

        def bound(params, seed, index, batch):
            key_bound, key_ode = jax.random.split(jax.random.fold_in(jax.random.key(seed), index))
            x_0 = batch["x"] if "x" in batch else to_model_range(batch["image"])
            bits = likelihood.bits_per_dim(
                key_bound,
                schedule,
                self.denoise_fn(params, batch),
                x_0,
                clip=bool(resolve_clip(self.config, "evaluation")),
                cdf=options.cdf,
                strata=options.strata,
                **parameterization,
            )
            out = {name: getattr(bits, name) for name in ("total", "prior", "decoder", "t", *_TABLES)}
            if ode:
                out["ode"], _ = _import_ode_likelihood().bits_per_dim(
                    key_ode,
                    schedule,
                    self.denoise_fn(params, batch),
                    x_0,
                    dequantization=self.dequantization or "none",
                    trace=options.ode_trace,
                    tolerance=options.ode_tolerance,
                    **parameterization,
                )
            return out

        return bound

    def _digest(self, num_examples: int, batch_size: int, ode: bool) -> str:
        options = to_dict(self.config.evaluation) | {"clip": resolve_clip(self.config, "evaluation")}
        options["ode_dequantization"] = self.dequantization
        constants = {name: value.to_json() for name, value in self.trained.normalizations.items()}
        return options_digest(
            constants,
            self._given_digest,
            {key: value for key, value in options.items() if not key.startswith("progressive")},
            to_dict(self.config.data),
            ode,
            self.step,
            params_digest(self.params),
            num_examples,
            batch_size,
        )


def noun_of(config: ConfigDict) -> str:
    """What the examples of a config are called in messages."""
    return "examples" if is_continuous(config) else "images"


def _resolve_dequantization(config: ConfigDict) -> str:
    """`evaluation.ode_dequantization`; None follows the data. Raises: UserError if it contradicts the data."""
    dequantization = config.evaluation.ode_dequantization
    if not is_continuous(config):
        return dequantization or "uniform"
    if dequantization not in (None, "none"):
        raise UserError(
            f"evaluation.ode_dequantization={dequantization!r} is for data of gray levels; use None or 'none' for continuous "
            "data (data.levels=None)"
        )
    return "none"


def _load_source(
    config: ConfigDict, source: data.Source | None, is_trained_here: bool
) -> tuple[data.Source, str | None]:
    """(the examples of `evaluation.split` and `evaluation.data_dir`, or the given source, their split). Raises: DataError.

    is_trained_here: whether the model was trained on `config.data`. A note tells if these are the training examples.
    """
    progress = progress_over(f"Reading the {noun_of(config)}")
    if source is not None:
        return data.load(ConfigDict({**config.data, "holdout": 0.0}), progress, source=source), None
    options, dataset, renamed = config.evaluation, config.data.dataset, {"data.split": "evaluation.split"}
    location, split = ConfigDict({**config.data, "split": options.split}), options.split
    own, other = (
        path and os.path.realpath(os.path.expanduser(path)) for path in (config.data.data_dir, options.data_dir)
    )
    is_elsewhere = other and other != own
    if is_elsewhere:
        location.update(data_dir=options.data_dir, holdout=0.0)
        renamed["data.data_dir"] = "evaluation.data_dir"
        if dataset == "folder" or (dataset == "arrays" and not data.has_splits(options.data_dir, split)):
            location.split, split = "train", None  # all of them: they are not the training data
    elif dataset == "folder" and not config.data.holdout:
        location.split, split = "train", "train" if is_trained_here else None
    with rename_leaves_in_errors(renamed):
        loaded = data.load(location, progress)
    if is_trained_here and not is_elsewhere and split == config.data.split:
        log(
            f"Note: these are the {noun_of(config)} that the model was trained on (split {split!r}); to measure others, "
            "set evaluation.data_dir or evaluation.split, or train with data.holdout (a folder or file)."
        )
    return loaded, split


def _import_ode_likelihood():
    """The module of the ODE likelihood, which needs diffrax. Raises: UserError."""
    try:
        from diffusion_jax.evaluation import ode_likelihood
    except ImportError as error:
        raise UserError(f"evaluation.ode needs diffrax ({error}); pip install '.[ode]'") from error
    return ode_likelihood


def _sum_over_examples(out: dict[str, np.ndarray], num_timesteps: int) -> dict[str, np.ndarray]:
    """The numbers of a batch, with its tables summed over the examples, float64 [T]."""
    chunk = {key: out[key] for key in _EXAMPLE_TERMS if key in out}
    t = out["t"].ravel()
    chunk["count"] = np.bincount(t, minlength=num_timesteps)
    for table in _TABLES:
        values = out[table].ravel().astype(np.float64)
        chunk[f"{table}_sum"] = np.bincount(t, values, num_timesteps)
        chunk[f"{table}_squares"] = np.bincount(t, values**2, num_timesteps)
    return chunk


def _join(chunks: list[dict[str, np.ndarray]]) -> Terms:
    def add(key: str) -> np.ndarray:
        return functools.reduce(np.add, [chunk[key] for chunk in chunks])

    examples = {
        key: np.concatenate([chunk[key] for chunk in chunks]).astype(np.float64)
        for key in _EXAMPLE_TERMS
        if key in chunks[0]
    }
    counts, means, standard_errors = add("count"), {}, {}
    with np.errstate(divide="ignore", invalid="ignore"):
        for table in _TABLES:
            means[table] = add(f"{table}_sum") / counts
            squares = add(f"{table}_squares") / counts
            variance = np.maximum(squares - means[table] ** 2, 0) * counts / (counts - 1)
            standard_errors[table] = np.where(counts > 1, np.sqrt(variance / counts), np.nan)
    return Terms(examples, counts, means, standard_errors)


def _add_to_density(terms: Terms, bits: float) -> Terms:
    """The terms with bits per dimension added to those of a density of x_0, which are the decoder's and the ODE's."""
    if not bits:
        return terms
    densities = ("total", "decoder", "ode")
    examples = {name: values + bits if name in densities else values for name, values in terms.examples.items()}
    vlb = terms.means["vlb"].copy()
    vlb[0] += bits
    return terms._replace(examples=examples, means={**terms.means, "vlb": vlb})


def rate_distortion(terms: Terms, continuous: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Mean rate (bits per dimension) and distortion [T], interpolated at timesteps without examples.

    The distortion is a root mean squared error: on the scale 0-255, or of standardized data if they are continuous.
    """
    measured, all_steps = np.flatnonzero(terms.counts), np.arange(len(terms.counts))
    vlb, x_0_mse = (np.interp(all_steps, measured, terms.means[name][measured]) for name in ("vlb", "x_0_mse"))
    rate, distortion = likelihood.rate_distortion(terms.examples["prior"].mean(), vlb, x_0_mse)
    return np.asarray(rate), np.sqrt(x_0_mse) if continuous else np.asarray(distortion)


def _mean_and_error(values: np.ndarray) -> tuple[float, float | None]:
    """The standard error is None for a single value."""
    error = values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else None
    return float(values.mean()), None if error is None else float(error)


def _report(likelihood_run: LikelihoodRun, terms: Terms, num_examples: int) -> dict[str, Any]:
    """The contents of likelihood.json."""
    config, trained = likelihood_run.config, likelihood_run.trained
    options = config.evaluation
    transitions = terms.examples["total"] - terms.examples["prior"] - terms.examples["decoder"]
    report: dict[str, Any] = {}
    for name, values in {**terms.examples, "transitions": transitions}.items():
        key = {"total": "bits_per_dim", "ode": "ode_bits_per_dim"}.get(name, name)
        report[key], report[f"{key}_standard_error"] = _mean_and_error(values)
        if is_continuous(config) and "bits_per_dim" in key:
            nats_key = key.replace("bits", "nats")
            report[nats_key], report[f"{nats_key}_standard_error"] = _mean_and_error(values * math.log(2))
    if is_continuous(config):
        # Already part of bits_per_dim and decoder: the density of standardized data has as many bits less.
        report["standardization_bits"] = likelihood_run.standardization_bits
    report |= {
        "weights": trained.weights_kind,
        "step": trained.step,
        "dataset": likelihood_run.dataset,
        "split": likelihood_run.split,
        "data_dir": options.data_dir,
        "num_examples": num_examples,
        "levels": config.data.levels,
        "num_timesteps": trained.schedule.num_timesteps,
        "prediction": config.diffusion.prediction,
        "variance": config.diffusion.variance,
        **{key: options[key] for key in ("strata", "cdf", "seed")},
        "clip": resolve_clip(config, "evaluation"),
        "batch_size": likelihood_run.batch_size(num_examples),  # the noise depends on it
    }
    if options.ode:
        report["ode_dequantization"] = likelihood_run.dequantization
        report |= {key: options[key] for key in ("ode_trace", "ode_tolerance")}
    return report


def _write(likelihood_run: LikelihoodRun, terms: Terms, report: Mapping[str, Any]) -> None:
    config, workdir, trained = likelihood_run.config, likelihood_run.workdir, likelihood_run.trained
    continuous = is_continuous(config)
    rate, distortion = rate_distortion(terms, continuous)
    arrays = {"t": np.arange(len(rate)), "time": trained.schedule.timesteps, "count": terms.counts}
    arrays |= terms.means | {f"{name}_standard_error": error for name, error in terms.standard_errors.items()}
    arrays |= {"rate": rate, "distortion": distortion}
    arrays |= {f"example_{name}": values for name, values in terms.examples.items()}
    save_npz(workdir / "likelihood.npz", arrays)
    write_text(workdir / "likelihood.json", json.dumps(report, indent=2, allow_nan=False) + "\n")
    examples = f"{likelihood_run.dataset} {likelihood_run.split or ''}".strip()
    title = f"{examples}, step {trained.step}, {trained.weights_kind} weights"
    if continuous:  # which has no lossless code
        nats = math.log(2)
        terms_picture = pictures.draw_bound_terms(nats * terms.means["vlb"], title, "nats per dimension")
        units = ("nats per dimension", "standardized data")
        rate_picture = pictures.draw_rate_distortion(nats * rate, distortion, None, title, units)
    else:
        terms_picture = pictures.draw_bound_terms(terms.means["vlb"], title)
        rate_picture = pictures.draw_rate_distortion(rate, distortion, report["bits_per_dim"], title)
    pictures.save(workdir / "likelihood_terms.png", terms_picture)
    pictures.save(workdir / "rate_distortion.png", rate_picture)


def _log(report: Mapping[str, Any], workdir: pathlib.Path) -> None:
    unit, scale = ("nats", math.log(2)) if "nats_per_dim" in report else ("bits", 1.0)

    def with_error(key: str) -> str:
        error = report[f"{key}_standard_error"]
        return f"{report[key]:.4f}" + ("" if error is None else f" ± {error:.4f}")

    terms = ", ".join(f"{name} {scale * report[name]:.4f}" for name in ("prior", "transitions", "decoder"))
    key = f"{unit}_per_dim"
    of_data = " in the units of the data" if unit == "nats" else ""
    log(f"{with_error(key)} {unit} per dimension{of_data}: {terms}")
    if f"ode_{key}" in report:
        log(f"{with_error(f'ode_{key}')} {unit} per dimension by the probability-flow ODE")
    log(f"Written to {workdir}: likelihood.json, likelihood.npz, likelihood_terms.png, rate_distortion.png")
