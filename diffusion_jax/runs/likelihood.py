"""Measures the likelihood of held-out examples, for `--mode=evaluate`.

likelihood.json has the bits per dimension, their terms and standard errors; likelihood.npz has the terms at every timestep,
which likelihood_terms.png and rate_distortion.png show. For continuous data, the likelihood is a density in data units, and
likelihood.json also has the nats per dimension.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from diffusion_jax import data, likelihood, pictures
from diffusion_jax.config import check, is_continuous, resolve, resolve_clip
from diffusion_jax.console import log
from diffusion_jax.distributed import sharding
from diffusion_jax.errors import UserError, as_user_error, needs_extra
from diffusion_jax.evaluation.compare import log_values
from diffusion_jax.files import save_npz, write_text
from diffusion_jax.images import to_model_range
from diffusion_jax.metrics import find_meaning, reported_values
from diffusion_jax.models import mark_missing
from diffusion_jax.pretrained import load_weights
from diffusion_jax.pretrained.model import format_schedule
from diffusion_jax.provenance import params_digest, settings_digest
from diffusion_jax.run_dir import ChunkStore, RunDir, open_run_dir
from diffusion_jax.runs.logging import write_evaluation
from diffusion_jax.runs.workdir import (
    check_source,
    digest_of_some,
    load_examples,
    normalize,
    open_model,
    to_dict,
    write_config_if_untrained,
)
from diffusion_jax.schedules import Schedule, respace

_TABLES = ("vlb", "mse", "x_0_mse")
_EXAMPLE_TERMS = ("total", "prior", "decoder", "ode")
_REPORTED = {"total": "bits_per_dim", "ode": "ode_bits_per_dim"}  # terms with another name in likelihood.json


def measure_likelihood(
    config: ConfigDict, workdir: RunDir | str | os.PathLike, source: data.Source | None = None
) -> None:
    """Measures the bits per dimension of `evaluation.split`.

    The results of each batch are stored until all files are written, so that a rerun continues after the last batch.
    source: examples in data units that replace the split.
    Raises: UserError, also if the ODE solver fails; DataError, PretrainedError.
    """
    config, workdir = resolve(config), open_run_dir(workdir)
    measured, options = LikelihoodRun(config, workdir, source), config.evaluation
    net, count, size = measured.net, measured.num_examples, measured.batch_size
    log(f"Measuring the bound of {count:,} {data.noun(config.data)} with the {net.weights} weights of step {net.step}.")
    with as_user_error("config.evaluation"):
        jax.eval_shape(measured.bound, net.params, np.uint32(0), np.int32(0), measured.read(np.zeros(size, int)))
    assert net.mesh is not None
    compute = sharding.BatchFunction(measured.bound, net.params, net.mesh, size)
    chunks = ChunkStore(workdir.subdirectory(f".likelihood_{measured.digest}"))

    def measure_batch(i: int) -> dict[str, np.ndarray]:
        out = compute(measured.read, i * size, count, np.uint32(options.seed), np.int32(i))
        return _sum_over_examples(out, net.schedule.num_timesteps)

    num_batches = chunks.fill("Evaluating", count, size, measure_batch, config.training.stall_timeout)
    arrays = _join([chunks.load(i) for i in range(num_batches)], measured.standardization_bits)
    multihost_utils.sync_global_devices("likelihood chunks read")
    num_failed = (~np.isfinite(arrays.get("example_ode", np.zeros(1)))).sum()
    if jax.process_index() == 0:
        if not num_failed:
            _write(measured, arrays)
        chunks.delete()  # after a failure, a rerun would only read the same numbers again
    if num_failed:
        raise UserError(
            f"evaluation.ode_tolerance={options.ode_tolerance}: the solver of the probability-flow ODE did not converge "
            f"for {num_failed} of {count} {data.noun(config.data)}; try a larger tolerance"
        )
    write_config_if_untrained(config, workdir)


def bound_schedule(diffusion: Mapping[str, Any], schedule: Schedule) -> Schedule:
    """Returns the schedule for the bound: for a path with fixed_small, steps evenly spaced in log SNR; otherwise `schedule`.

    With steps evenly spaced in network time, the cleanest steps divide sigma by large factors, so fixed_small makes the bound
    too large: by 77 bits for 1,000 steps of vp_linear and N(0, 1), compared with 0.1 bits for steps evenly spaced in log SNR.
    """
    if diffusion["path"] and diffusion["variance"] == "fixed_small":
        return respace(schedule, schedule.num_timesteps, "log_snr")
    return schedule


class LikelihoodRun:
    """A run's newest weights and the examples of `evaluation.split`, to measure the likelihood.

    source: the examples, normalized. dataset, split: the origin of the examples; split is None for a caller's source; for a
    folder or file without splits, split is "train" if the model was trained on the data, otherwise None.
    standardization_bits: bits per dimension that standardization adds for continuous data. dequantization: the method for
    the ODE likelihood, or None without the ODE. digest: a hash over everything that the numbers depend on.
    """

    def __init__(self, config: ConfigDict, workdir: RunDir | os.PathLike, source: data.Source | None = None):
        """source: examples that replace `evaluation.split`. Raises: UserError, DataError, PretrainedError."""
        options = config.evaluation
        check(config, "evaluation")
        self.config, self.workdir = config, open_run_dir(workdir)
        self.dequantization = self._ode_likelihood = None
        if options.ode:
            with needs_extra("evaluation.ode needs diffrax", "ode"):
                from diffusion_jax.evaluation import ode_likelihood
            self._ode_likelihood = ode_likelihood
            self.dequantization = options.ode_dequantization or ("none" if is_continuous(config) else "uniform")
        net = open_model(config, self.workdir)
        self.net = load_weights(net, config, self.workdir, options.use_ema)
        self.schedule = bound_schedule(config.diffusion, self.net.schedule)
        is_trained_here = "init_from" not in self.net.provenance.details
        loaded, self.split = load_held_out(config, source, is_trained_here)
        check_source(config, loaded)
        self.dataset = config.data.dataset if source is None else type(source).__name__
        self.source = normalize(config, loaded, self.net.normalizations)
        self.num_examples = min(options.num_examples or len(self.source), len(self.source))
        devices = self.net.num_devices
        self.batch_size = -(-min(options.batch_size, self.num_examples) // devices) * devices
        self.standardization_bits = 0.0
        if is_continuous(config) and "x" in self.net.normalizations:
            scale = self.net.normalizations["x"].scale
            self.standardization_bits = float(np.log2(np.abs(scale)).mean())  # float64, unlike in `likelihood`
        self.clip = bool(resolve_clip(config, "evaluation"))
        options = to_dict(options) | {"clip": self.clip, "ode_dequantization": self.dequantization}
        constants = {name: value.to_json() for name, value in self.net.normalizations.items()}
        given = None if source is None else [len(self.source), digest_of_some(self.source)]
        sizes = (self.net.step, self.num_examples, self.batch_size)
        self.digest = settings_digest(
            constants, given, options, to_dict(config.data), params_digest(self.net.params), *sizes
        )

    def read(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Reads a batch: "image" or "x", "label", and "condition" for a conditional network.

        Raises: DataError for gray levels that `data.levels` excludes, or values that are not finite.
        """
        batch = dict(self.source.read(indices))
        if "image" in batch:
            data.check_levels(batch["image"], self.config.data.levels)
        batch.setdefault("label", np.zeros(len(indices), np.int32))
        missing = batch.pop("condition_missing", None)
        if self.net.condition_shape is None:
            batch.pop("condition", None)
        elif missing is not None:
            batch["condition"] = np.asarray(mark_missing(batch["condition"], missing))
        return batch

    def bound(self, params, seed, index, batch) -> dict[str, jax.Array]:
        """Returns the arrays "total", "prior", "decoder", "t", `_TABLES` and possibly "ode" for batch number `index`."""
        options, gray_levels = self.config.evaluation, self.config.data.levels
        key_bound, key_ode = jax.random.split(jax.random.fold_in(jax.random.key(seed), index))
        x_0 = batch["x"] if "x" in batch else to_model_range(batch["image"])
        denoiser = self.net.with_params(params).denoiser(y=batch["label"], condition=batch.get("condition"))
        denoiser = dataclasses.replace(denoiser, clip=self.clip)
        bits = likelihood.bits_per_dim(
            key_bound, self.schedule, denoiser, x_0, gray_levels=gray_levels, cdf=options.cdf, strata=options.strata
        )
        out = {name: getattr(bits, name) for name in ("total", "prior", "decoder", "t", *_TABLES)}
        if self._ode_likelihood is not None:
            out["ode"], _ = self._ode_likelihood.bits_per_dim(
                key_ode,
                self.schedule,
                denoiser,
                x_0,
                dequantization=self.dequantization or "none",
                gray_levels=gray_levels,
                trace=options.ode_trace,
                tolerance=options.ode_tolerance,
            )
        return out


def load_held_out(
    config: ConfigDict, source: data.Source | None, is_trained_here: bool
) -> tuple[data.Source, str | None]:
    """Loads the examples of `evaluation.split` in `evaluation.data_dir`, or uses `source`. Raises: DataError.

    is_trained_here: whether the model was trained on `config.data`. If the examples are the training examples, a note is
    logged. Returns: (examples, split).
    """
    options, noun, renamed = config.evaluation, data.noun(config.data), {"data.split": "evaluation.split"}
    title = f"Reading the {noun}"
    if source is not None:
        return load_examples(title, dict(config.data), {}, source), None
    location, split = {**config.data, "split": options.split}, options.split
    paths = (config.data.data_dir, options.data_dir)
    own, other = (path and os.path.realpath(os.path.expanduser(path)) for path in paths)
    if other and other != own:
        is_trained_here = False
        location |= {"data_dir": options.data_dir, "holdout": 0.0}
        renamed["data.data_dir"] = "evaluation.data_dir"
    if not data.has_splits(location):  # all examples are measured
        location["split"], split = "train", "train" if is_trained_here else None
    loaded = load_examples(title, location, renamed, None)
    if is_trained_here and split == config.data.split:
        log(
            f"Note: the model was trained on these {noun} (split {split!r}); to measure other {noun}, "
            "set evaluation.data_dir or evaluation.split, or train with data.holdout (a folder or file)."
        )
    return loaded, split


def _sum_over_examples(out: dict[str, np.ndarray], num_timesteps: int) -> dict[str, np.ndarray]:
    """Returns the results of a batch; each table is summed over the examples at each timestep, float64 [T]."""
    chunk = {f"example_{name}": out[name] for name in _EXAMPLE_TERMS if name in out}
    t = out["t"].ravel()
    chunk["count"] = np.bincount(t, minlength=num_timesteps)
    for table in _TABLES:
        values = out[table].ravel().astype(np.float64)
        chunk[table] = np.bincount(t, values, num_timesteps)
        chunk[f"{table}_squares"] = np.bincount(t, values**2, num_timesteps)
    return chunk


def _join(chunks: list[dict[str, np.ndarray]], density_bits: float) -> dict[str, np.ndarray]:
    """Returns the arrays of likelihood.npz except t, time, rate and distortion.

    Likelihood terms are in bits per dimension; for continuous data, they describe the density in data units, while mse and
    x_0_mse refer to standardized data. Means and standard errors are NaN at timesteps with too few examples.
    density_bits: added to the total, the decoder and the ODE, which contain a density of x_0.
    """
    arrays: dict[str, Any] = {}
    for key in chunks[0]:
        batches = [chunk[key] for chunk in chunks]
        arrays[key] = np.concatenate(batches).astype(np.float64) if key.startswith("example_") else sum(batches)
    for key in arrays.keys() & {"example_total", "example_decoder", "example_ode"}:
        arrays[key] += density_bits
    count = arrays["count"]
    with np.errstate(divide="ignore", invalid="ignore"):
        for table in _TABLES:
            mean = arrays[table] = arrays[table] / count
            variance = np.maximum(arrays.pop(f"{table}_squares") / count - mean**2, 0) * count / (count - 1)
            arrays[f"{table}_standard_error"] = np.where(count > 1, np.sqrt(variance / count), np.nan)
    arrays["vlb"][0] += density_bits
    return arrays


def _write(measured: LikelihoodRun, arrays: dict[str, np.ndarray]) -> None:
    """Writes all files and logs the result."""
    config, workdir, net, options = measured.config, measured.workdir, measured.net, measured.config.evaluation
    continuous = is_continuous(config)
    numbers = {name: arrays[f"example_{name}"] for name in _EXAMPLE_TERMS if f"example_{name}" in arrays}
    numbers["transitions"] = numbers["total"] - numbers["prior"] - numbers["decoder"]
    numbers = {_REPORTED.get(name, name): values for name, values in numbers.items()}
    if continuous:
        bits = {key: values for key, values in numbers.items() if key in _REPORTED.values()}
        numbers |= {key.replace("bits", "nats"): values * math.log(2) for key, values in bits.items()}
    report: dict[str, Any] = {}
    for key, values in numbers.items():
        error = float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None
        report |= {key: float(values.mean()), f"{key}_standard_error": error}
    if continuous:
        # bits_per_dim and decoder already include these bits; the density of standardized data does not.
        report["standardization_bits"] = measured.standardization_bits
    report |= {
        "weights": net.weights,
        "step": net.step,
        "dataset": measured.dataset,
        "split": measured.split,
        "num_examples": measured.num_examples,
        "levels": config.data.levels,
        "schedule": format_schedule(config.diffusion),
        "num_timesteps": net.schedule.num_timesteps,
        "prediction": config.diffusion.prediction,
        "variance": config.diffusion.variance,
        "clip": measured.clip,
        "batch_size": measured.batch_size,  # the noise depends on it
        **{key: options[key] for key in ("data_dir", "strata", "cdf", "seed")},
    }
    if options.ode:
        report |= {key: options[key] for key in ("ode_trace", "ode_tolerance")}
        report["ode_dequantization"] = measured.dequantization
    # Timesteps without examples are interpolated. The distortion is the root mean squared error of x_0.
    filled, all_steps = np.flatnonzero(arrays["count"]), np.arange(len(arrays["count"]))
    vlb, x_0_mse = (np.interp(all_steps, filled, arrays[name][filled]) for name in ("vlb", "x_0_mse"))
    rate, distortion = map(np.asarray, likelihood.rate_distortion(arrays["example_prior"].mean(), vlb, x_0_mse))
    if continuous:  # in standardized units; otherwise on the scale 0-255
        distortion = np.sqrt(x_0_mse)
    arrays = {"t": all_steps, "time": measured.schedule.timesteps, **arrays, "rate": rate, "distortion": distortion}
    save_npz(workdir / "likelihood.npz", arrays)
    write_text(workdir / "likelihood.json", json.dumps(report, indent=2, allow_nan=False) + "\n")
    # Continuous data have no lossless code; their density is shown in nats.
    unit, scale, lossless = ("nats", math.log(2), None) if continuous else ("bits", 1.0, report["bits_per_dim"])
    units = f"{unit} per dimension", "standardized data" if continuous else "pixel values of 0 to 255"
    title = f"{measured.dataset} {measured.split or ''}".strip() + f", step {net.step}, {net.weights} weights"
    drawn = {
        "likelihood_terms.png": pictures.draw_bound_terms(scale * arrays["vlb"], title, units[0]),
        "rate_distortion.png": pictures.draw_rate_distortion(scale * rate, distortion, lossless, title, units),
    }
    for name, picture in drawn.items():
        pictures.save(workdir / name, picture)
    files = ("likelihood.json", "likelihood.npz", *drawn)
    workdir.upload(*(workdir / name for name in files))
    where = f"{data.noun(config.data)}{' in data units' if continuous else ''}"
    log(f"Likelihood of {measured.num_examples:,} {where}, bounded with the variance {report['variance']}:")
    log_values({key: value for key, value in report.items() if find_meaning(key.removesuffix("_standard_error"))})
    log(f"Written to {workdir}: {', '.join(files)}")
    write_evaluation(config, workdir, net.step, reported_values(report))
