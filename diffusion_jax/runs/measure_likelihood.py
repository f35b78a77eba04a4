"""`--mode=evaluate`, first part: the likelihood of examples that the model was not trained on.

Writes likelihood.json (bits per dimension, their parts and standard errors), likelihood.npz (the terms at every timestep),
likelihood_terms.png and rate_distortion.png. Continuous data have a density, in the units of the data, of which nats per
dimension are reported, too.
"""

from __future__ import annotations

import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from diffusion_jax import data, pictures
from diffusion_jax.config import is_continuous, resolve, resolve_clip
from diffusion_jax.files import save_npz, write_text
from diffusion_jax.runs.console import log
from diffusion_jax.runs.likelihood_terms import (
    LikelihoodRun,
    Terms,
    mean_and_standard_error,
    noun_of,
    rate_distortion,
)
from diffusion_jax.runs.metric_options import check_evaluation_options
from diffusion_jax.runs.workdir import write_config_if_untrained

__all__ = ["run"]


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


def _report(likelihood_run: LikelihoodRun, terms: Terms, num_examples: int) -> dict[str, Any]:
    """The contents of likelihood.json."""
    config, trained = likelihood_run.config, likelihood_run.trained
    options = config.evaluation
    transitions = terms.examples["total"] - terms.examples["prior"] - terms.examples["decoder"]
    report: dict[str, Any] = {}
    for name, values in {**terms.examples, "transitions": transitions}.items():
        key = {"total": "bits_per_dim", "ode": "ode_bits_per_dim"}.get(name, name)
        report[key], report[f"{key}_standard_error"] = mean_and_standard_error(values)
        if is_continuous(config) and "bits_per_dim" in key:
            nats_key = key.replace("bits", "nats")
            report[nats_key], report[f"{nats_key}_standard_error"] = mean_and_standard_error(values * math.log(2))
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

    parts = ", ".join(f"{name} {scale * report[name]:.4f}" for name in ("prior", "transitions", "decoder"))
    key = f"{unit}_per_dim"
    of_data = " in the units of the data" if unit == "nats" else ""
    log(f"{with_error(key)} {unit} per dimension{of_data}: {parts}")
    if f"ode_{key}" in report:
        log(f"{with_error(f'ode_{key}')} {unit} per dimension by the probability-flow ODE")
    log(f"Written to {workdir}: likelihood.json, likelihood.npz, likelihood_terms.png, rate_distortion.png")
