"""Part of `--mode=evaluate`: the likelihood of examples that the model was not trained on.

Writes likelihood.json (bits per dimension, their parts and standard errors), likelihood.npz (the terms at every timestep),
likelihood_terms.png and rate_distortion.png. Continuous data have a density, in the units of the data, of which nats per
dimension are reported, too.
"""

from __future__ import annotations

import functools
import json
import math
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from diffusion_jax import data, likelihood, pictures
from diffusion_jax.config import is_continuous, resolve, resolve_clip
from diffusion_jax.distributed import devices, sharding
from diffusion_jax.errors import UserError, as_user_error
from diffusion_jax.files import save_npz, write_text
from diffusion_jax.images import to_model_range
from diffusion_jax.provenance import params_digest, settings_digest
from diffusion_jax.run_dir import RunDir, open_run_dir
from diffusion_jax.runs.chunk_store import ChunkStore
from diffusion_jax.runs.console import log, progress_over
from diffusion_jax.runs.workdir import (
    check_source,
    digest_of_some,
    load_weights,
    normalize,
    open_model,
    rename_leaves_in_errors,
    to_dict,
    write_config_if_untrained,
)
from diffusion_jax.training import condition_shape

__all__ = ["LikelihoodRun", "Terms", "run"]

_TABLES = ("vlb", "mse", "x_0_mse")
_FILES = ("likelihood.json", "likelihood.npz", "likelihood_terms.png", "rate_distortion.png")
_EXAMPLE_TERMS = ("total", "prior", "decoder", "ode")


def run(config: ConfigDict, workdir: RunDir | str | os.PathLike, source: data.Source | None = None) -> None:
    """Measures the bits per dimension of `evaluation.split`.

    source: examples that take the place of that split, in the units of the data.
    Raises: UserError, DataError, PretrainedError.
    """
    config, workdir = resolve(config), open_run_dir(workdir)
    likelihood_run = LikelihoodRun(config, workdir, source)
    net = likelihood_run.net
    log(
        f"Measuring the bound of {likelihood_run.num_examples:,} {_noun(config)} with the {net.weights} weights of "
        f"step {net.step}."
    )
    terms, chunks = likelihood_run.measure()
    if jax.process_index() == 0:
        report = _report(likelihood_run, terms)
        _write(likelihood_run, terms, report)
        chunks.delete()
        _log(report, config, workdir)
    write_config_if_untrained(config, workdir)


def _unit(config: ConfigDict) -> tuple[str, float]:
    """(the unit of the numbers that are shown, how many a bit has): continuous data have nats, as a density has."""
    return ("nats", math.log(2)) if is_continuous(config) else ("bits", 1.0)


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

    def __init__(self, config: ConfigDict, workdir: RunDir | os.PathLike, source: data.Source | None = None):
        """source: takes the place of `evaluation.split`. Raises: UserError, DataError, PretrainedError."""
        options = config.evaluation
        self.config, self.workdir = config, open_run_dir(workdir)
        self.dequantization = None
        if options.ode:
            self.dequantization = options.ode_dequantization or ("none" if is_continuous(config) else "uniform")
            if is_continuous(config) and self.dequantization != "none":
                raise UserError(
                    f"evaluation.ode_dequantization={self.dequantization!r} is for data of gray levels; use None or 'none' "
                    "for continuous data (data.levels=None)"
                )
        self.net = load_weights(open_model(config, self.workdir), config, self.workdir, options.use_ema)
        assert self.net.mesh is not None
        self.mesh = self.net.mesh
        is_trained_here = "init_from" not in self.net.provenance.details
        loaded, self.split = _load_source(config, source, is_trained_here)
        check_source(config, loaded)
        self.dataset = config.data.dataset if source is None else type(source).__name__
        self.source = normalize(config, loaded, self.net.normalizations)
        self.num_examples = min(options.num_examples or len(self.source), len(self.source))
        devices = self.mesh.size
        self.batch_size = -(-min(options.batch_size, self.num_examples) // devices) * devices
        self.standardization_bits = 0.0
        if is_continuous(config) and "x" in self.net.normalizations:
            scale = self.net.normalizations["x"].scale
            self.standardization_bits = float(np.log2(np.abs(scale)).mean())  # any float64, unlike the core's function
        options = to_dict(options) | {
            "clip": resolve_clip(config, "evaluation"),
            "ode_dequantization": self.dequantization,
        }
        constants = {name: value.to_json() for name, value in self.net.normalizations.items()}
        given = None if source is None else [len(self.source), digest_of_some(self.source)]
        sizes = (self.net.step, self.num_examples, self.batch_size)
        self._digest = settings_digest(
            constants, given, options, to_dict(config.data), params_digest(self.net.params), *sizes
        )

    def read(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """A batch: "image" or "x", "label", and "condition" if the network takes one.

        Raises: DataError for images with other gray levels than `data.levels`, or values that are not finite.
        """
        batch = dict(self.source.read(indices))
        if "image" in batch:
            data.check_levels(batch["image"], self.config.data.levels)
        batch.setdefault("label", np.zeros(len(indices), np.int32))
        names = (
            ("image", "x", "label") if condition_shape(self.config) is None else ("image", "x", "label", "condition")
        )
        return {name: batch[name] for name in names if name in batch}

    def denoise_fn(self, params, batch) -> Callable:
        """The network for a batch, as a function of x_t and time."""
        net, y = self.net.with_params(params), batch["label"] if self.net.num_classes else None
        return lambda x_t, time: net.denoise_fn(x_t, time, y, condition=batch.get("condition"))

    def measure(self) -> tuple[Terms, ChunkStore]:
        """The terms of the first `num_examples` examples.

        Every batch is kept, so that a rerun continues after the last one; the caller deletes them when all files are written.
        Raises: UserError, also if the ODE solver fails.
        """
        options, mesh, num_timesteps = self.config.evaluation, self.mesh, self.net.schedule.num_timesteps
        num_examples, batch_size = self.num_examples, self.batch_size
        by_rows, own_rows = sharding.batch_sharding(mesh), sharding.process_rows(batch_size, mesh)
        with as_user_error("config.evaluation"):
            jax.eval_shape(
                self._bound, self.net.params, np.uint32(0), np.int32(0), self.read(np.zeros(batch_size, int))
            )
        replicated = sharding.replicated(mesh)
        compiled = jax.jit(
            self._bound,
            in_shardings=(replicated, replicated, replicated, by_rows),
            out_shardings=by_rows,
            compiler_options=devices.compiler_options(),
        )
        chunks = ChunkStore(self.workdir.subdirectory(f".likelihood_{self._digest}"))

        def measure_batch(i: int) -> dict[str, np.ndarray]:
            # The last batch is padded with copies of its last example, which are dropped again.
            batch = self.read(np.minimum(i * batch_size + own_rows, num_examples - 1))
            placed = {name: jax.make_array_from_process_local_data(by_rows, array) for name, array in batch.items()}
            out = compiled(self.net.params, np.uint32(options.seed), np.int32(i), placed)
            out = multihost_utils.process_allgather(out, tiled=True)
            kept = {key: np.asarray(value)[: num_examples - i * batch_size] for key, value in out.items()}
            return _sum_over_examples(kept, num_timesteps)

        stall_timeout = self.config.training.stall_timeout
        num_batches = chunks.fill("Evaluating", num_examples, batch_size, measure_batch, stall_timeout)
        multihost_utils.sync_global_devices("likelihood chunks written")
        terms = _join([chunks.load(i) for i in range(num_batches)], self.standardization_bits)
        multihost_utils.sync_global_devices("likelihood chunks read")
        num_failed = (~np.isfinite(terms.examples.get("ode", np.zeros(1)))).sum()
        if num_failed:
            if jax.process_index() == 0:
                chunks.delete()  # a rerun would only read the same numbers again
            raise UserError(
                f"evaluation.ode_tolerance={options.ode_tolerance}: the solver of the probability-flow ODE did not converge "
                f"for {num_failed} of {num_examples} {_noun(self.config)}; try a larger one"
            )
        return terms, chunks

    def _bound(self, params, seed, index, batch) -> dict[str, jax.Array]:
        """{"total", ..., "t", the tables, "ode"} of a batch; pure. index: of the batch."""
        options, diffusion, schedule = self.config.evaluation, self.config.diffusion, self.net.schedule
        parameterization = {
            "prediction": diffusion.prediction,
            "variance": diffusion.variance,
            "gray_levels": self.config.data.levels,
        }
        key_bound, key_ode = jax.random.split(jax.random.fold_in(jax.random.key(seed), index))
        x_0 = batch["x"] if "x" in batch else to_model_range(batch["image"])
        denoise_fn = self.denoise_fn(params, batch)
        bits = likelihood.bits_per_dim(
            key_bound,
            schedule,
            denoise_fn,
            x_0,
            clip=bool(resolve_clip(self.config, "evaluation")),
            cdf=options.cdf,
            strata=options.strata,
            **parameterization,
        )
        out = {name: getattr(bits, name) for name in ("total", "prior", "decoder", "t", *_TABLES)}
        if options.ode:
            out["ode"], _ = _import_ode_likelihood().bits_per_dim(
                key_ode,
                schedule,
                denoise_fn,
                x_0,
                dequantization=self.dequantization or "none",
                trace=options.ode_trace,
                tolerance=options.ode_tolerance,
                **parameterization,
            )
        return out


def _noun(config: ConfigDict) -> str:
    return "examples" if is_continuous(config) else "images"


def _load_source(
    config: ConfigDict, source: data.Source | None, is_trained_here: bool
) -> tuple[data.Source, str | None]:
    """(the examples of `evaluation.split` and `evaluation.data_dir`, or the given source, their split). Raises: DataError.

    is_trained_here: whether the model was trained on `config.data`. A note tells if these are the training examples.
    """
    progress = progress_over(f"Reading the {_noun(config)}")
    if source is not None:
        return data.load(ConfigDict({**config.data, "holdout": 0.0}), progress, source=source), None
    options, renamed = config.evaluation, {"data.split": "evaluation.split"}
    location, split = ConfigDict({**config.data, "split": options.split}), options.split
    own, other = (
        path and os.path.realpath(os.path.expanduser(path)) for path in (config.data.data_dir, options.data_dir)
    )
    is_elsewhere = other and other != own
    if is_elsewhere:
        location.update(data_dir=options.data_dir, holdout=0.0)
        renamed["data.data_dir"] = "evaluation.data_dir"
    if not data.has_splits(location):  # all examples are measured
        location.split, split = "train", "train" if is_trained_here and not is_elsewhere else None
    with rename_leaves_in_errors(renamed):
        loaded = data.load(location, progress)
    if is_trained_here and not is_elsewhere and split == config.data.split:
        log(
            f"Note: these are the {_noun(config)} that the model was trained on (split {split!r}); to measure others, "
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


def _join(chunks: list[dict[str, np.ndarray]], density_bits: float) -> Terms:
    """The terms of all batches. density_bits: added to the terms with a density of x_0, which are the decoder and the ODE."""
    joined = {
        key: np.concatenate([chunk[key] for chunk in chunks]).astype(np.float64)
        if key in _EXAMPLE_TERMS
        else functools.reduce(np.add, [chunk[key] for chunk in chunks])
        for key in chunks[0]
    }
    examples = {key: joined[key] for key in _EXAMPLE_TERMS if key in joined}
    for key in examples.keys() & {"total", "decoder", "ode"}:
        examples[key] = examples[key] + density_bits
    counts, means, standard_errors = joined["count"], {}, {}
    with np.errstate(divide="ignore", invalid="ignore"):
        for table in _TABLES:
            means[table] = joined[f"{table}_sum"] / counts
            squares = joined[f"{table}_squares"] / counts
            variance = np.maximum(squares - means[table] ** 2, 0) * counts / (counts - 1)
            standard_errors[table] = np.where(counts > 1, np.sqrt(variance / counts), np.nan)
    means["vlb"][0] += density_bits
    return Terms(examples, counts, means, standard_errors)


def _report(likelihood_run: LikelihoodRun, terms: Terms) -> dict[str, Any]:
    """The contents of likelihood.json."""
    config, net = likelihood_run.config, likelihood_run.net
    options = config.evaluation
    transitions = terms.examples["total"] - terms.examples["prior"] - terms.examples["decoder"]
    report: dict[str, Any] = {}

    def add(key: str, values: np.ndarray) -> None:
        error = values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else None
        report[key], report[f"{key}_standard_error"] = float(values.mean()), None if error is None else float(error)

    for name, values in {**terms.examples, "transitions": transitions}.items():
        key = {"total": "bits_per_dim", "ode": "ode_bits_per_dim"}.get(name, name)
        add(key, values)
        if is_continuous(config) and "bits_per_dim" in key:
            add(key.replace("bits", "nats"), values * math.log(2))
    if is_continuous(config):
        # Already part of bits_per_dim and decoder: the density of standardized data has as many bits less.
        report["standardization_bits"] = likelihood_run.standardization_bits
    report |= {
        "weights": net.weights,
        "step": net.step,
        "dataset": likelihood_run.dataset,
        "split": likelihood_run.split,
        "data_dir": options.data_dir,
        "num_examples": likelihood_run.num_examples,
        "levels": config.data.levels,
        "num_timesteps": net.schedule.num_timesteps,
        "prediction": config.diffusion.prediction,
        "variance": config.diffusion.variance,
        **{key: options[key] for key in ("strata", "cdf", "seed")},
        "clip": resolve_clip(config, "evaluation"),
        "batch_size": likelihood_run.batch_size,  # the noise depends on it
    }
    if options.ode:
        report["ode_dequantization"] = likelihood_run.dequantization
        report |= {key: options[key] for key in ("ode_trace", "ode_tolerance")}
    return report


def _write(likelihood_run: LikelihoodRun, terms: Terms, report: Mapping[str, Any]) -> None:
    config, workdir, net = likelihood_run.config, likelihood_run.workdir, likelihood_run.net
    continuous = is_continuous(config)
    # Timesteps without examples are interpolated. The distortion is the root of the mean squared error of x_0.
    measured, all_steps = np.flatnonzero(terms.counts), np.arange(len(terms.counts))
    vlb, x_0_mse = (np.interp(all_steps, measured, terms.means[name][measured]) for name in ("vlb", "x_0_mse"))
    rate, distortion = map(np.asarray, likelihood.rate_distortion(terms.examples["prior"].mean(), vlb, x_0_mse))
    if continuous:  # of standardized data; otherwise on the scale 0-255
        distortion = np.sqrt(x_0_mse)
    arrays = {"t": all_steps, "time": net.schedule.timesteps, "count": terms.counts}
    arrays |= terms.means | {f"{name}_standard_error": error for name, error in terms.standard_errors.items()}
    arrays |= {"rate": rate, "distortion": distortion}
    arrays |= {f"example_{name}": values for name, values in terms.examples.items()}
    save_npz(workdir / "likelihood.npz", arrays)
    write_text(workdir / "likelihood.json", json.dumps(report, indent=2, allow_nan=False) + "\n")
    examples = f"{likelihood_run.dataset} {likelihood_run.split or ''}".strip()
    title = f"{examples}, step {net.step}, {net.weights} weights"
    unit, scale = _unit(config)
    # Continuous data have no lossless code.
    lossless, space = (
        (None, "standardized data") if continuous else (report["bits_per_dim"], "pixel values of 0 to 255")
    )
    units = f"{unit} per dimension", space
    pictures.save(
        workdir / "likelihood_terms.png", pictures.draw_bound_terms(scale * terms.means["vlb"], title, units[0])
    )
    picture = pictures.draw_rate_distortion(scale * rate, distortion, lossless, title, units)
    pictures.save(workdir / "rate_distortion.png", picture)
    workdir.upload(*(workdir / name for name in _FILES))


def _log(report: Mapping[str, Any], config: ConfigDict, workdir: RunDir) -> None:
    unit, scale = _unit(config)

    def with_error(key: str) -> str:
        error = report[f"{key}_standard_error"]
        return f"{report[key]:.4f}" + ("" if error is None else f" ± {error:.4f}")

    terms = ", ".join(f"{name} {scale * report[name]:.4f}" for name in ("prior", "transitions", "decoder"))
    where = " in the units of the data" if is_continuous(config) else ""
    log(f"{with_error(f'{unit}_per_dim')} {unit} per dimension{where}: {terms}")
    if f"ode_{unit}_per_dim" in report:
        log(f"{with_error(f'ode_{unit}_per_dim')} {unit} per dimension by the probability-flow ODE")
    log(f"Written to {workdir}: {', '.join(_FILES)}")
