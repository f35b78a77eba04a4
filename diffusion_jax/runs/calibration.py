"""The metric calibration: tests whether held-out examples look like samples given the same measurement or condition.

calibration/NAME.json has the result as a sentence, the rank tests, coverage and chi-squared with standard errors, and the
sizes of the errors that the test can detect. NAME.npz has the quantities, and NAME.png shows the distributions of the ranks.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from diffusion_jax import covariances, pictures, pretrained
from diffusion_jax.config import check, resolve
from diffusion_jax.console import log
from diffusion_jax.data.sources import batch_examples, read_conditions
from diffusion_jax.errors import DataError, UserError, as_user_error, list_names
from diffusion_jax.files import save_npz
from diffusion_jax.functions import import_function
from diffusion_jax.images import to_gray_levels
from diffusion_jax.metrics import calibration
from diffusion_jax.metrics.classifier import components
from diffusion_jax.provenance import array_digest
from diffusion_jax.run_dir import ChunkStore, RunDir, open_run_dir
from diffusion_jax.runs.edit import EditFiles
from diffusion_jax.runs.likelihood import load_held_out
from diffusion_jax.runs.posterior import Problem, covariance_of_data, log_residual, read_inputs, to_network_units
from diffusion_jax.runs.sample import make_provenance
from diffusion_jax.runs.sampling_setup import check_finite, check_sampling, keys_of_samples, resolve_sampling
from diffusion_jax.runs.workdir import check_source, open_model, to_dict

_ENTRIES = 4  # number of positions for the quantity "entries"
_BINS = 10


def measure_calibration(config: ConfigDict, workdir: RunDir | str | os.PathLike) -> None:
    """Tests samples, from the posterior in `config.editing` or from a conditional model, against held-out examples.

    Raises: UserError, DataError, PretrainedError.
    """
    config, workdir = resolve(config), open_run_dir(workdir)
    options, count = config.evaluation, config.evaluation.calibration_samples
    net, is_posterior = open_model(config, workdir), bool(config.editing.noise)
    check_sampling(config, net)
    if net.low_resolution:
        raise UserError("evaluation.metrics=calibration is not for models that enlarge images")
    problem = None
    if is_posterior:
        check(config, "edit")
        mask = EditFiles(config, net).read_mask() if config.editing.task == "inpaint" else None
        problem = Problem.from_config(config, net, mask)
    source, _ = load_held_out(config, None, is_trained_here=not config.init_from)
    check_source(config, source)
    total = min(options.calibration_examples, len(source))
    batch = source.read(np.arange(total))
    x, conditions = batch_examples(batch), read_conditions(batch) if net.condition_shape is not None else {}
    setup = resolve_sampling(config, net, conditions or None)
    if net.num_classes:
        setup = dataclasses.replace(setup, labels=np.asarray(batch["label"], np.int32))
    x_0 = to_network_units(net, x)
    y = np.zeros((total, 0), np.float32) if problem is None else problem.simulate(x_0, np.arange(total))
    covariance, is_used = None, problem is not None and problem.wants_data
    if is_used or "components" in options.quantities:
        try:
            covariance = covariance_of_data(config, net)
        except DataError:
            if is_used:
                raise
    problem = problem and problem.with_covariance(covariance)
    basis = (problem and problem.given_y) or covariance
    if basis is None and "components" in options.quantities:
        log("Note: the principal components are not tested, because they need the training data of the model.")

    def quantities(in_data_units: np.ndarray, x_0: np.ndarray) -> tuple[np.ndarray, list[str]]:
        x = in_data_units if net.levels is None else in_data_units.astype(np.float64)
        return find_quantities(options.quantities, x, x_0, basis)

    with as_user_error("config.evaluation.quantities"):
        _, names = quantities(x[None], x_0[None])
    setup = dataclasses.replace(setup, net=pretrained.load_weights(net, config, workdir, options.use_ema))
    settings = {"editing": to_dict(config.editing)} if is_posterior else {}
    given = array_digest(x, y, *([] if covariance is None else [np.asarray(covariance.variances)]))
    provenance = make_provenance(setup, **settings, given_digest=given, calibration=[count, *names])
    what = f"{config.editing.task}_{problem.method}" if problem else "conditional"
    name = f"{what}_{provenance.name}_n{total}x{count}_{provenance.digest[:6]}"
    devices = setup.net.num_devices
    size = -(-max(1, options.batch_size // count) // devices) * devices
    chunks = ChunkStore(workdir.subdirectory(f"calibration/.{name}_{size}"))

    def compute(i: int) -> dict[str, np.ndarray]:
        rows = np.minimum(i * size + np.arange(size), total - 1)
        samples = _draw(setup, problem, y, rows, count, options.seed)
        check_finite(samples)
        drawn = samples
        if net.levels is not None:  # with the gray levels of the data, as the truth has
            step = 255 / (net.levels - 1)
            drawn = np.round(np.round(to_gray_levels(samples) / step) * step).astype(np.uint8)
        pairs = (x[rows], drawn), (x_0[rows], to_network_units(net, drawn))
        both = (np.concatenate([truth[None], others]) for truth, others in pairs)
        found, _ = quantities(*both)
        arrays = {"truth": found[0], "samples": found[1:].swapaxes(0, 1)}
        if problem is None:
            return arrays
        residual = problem.residual(_select(setup, rows[:1]), samples[:, 0], y[rows[:1]])
        arrays["residual"] = np.full(size, residual)  # of the first example
        return arrays | {"chi_squared": problem.chi_squared(samples, y[rows]).mean(axis=0)}

    num_batches = chunks.fill("Testing the calibration", total, size, compute, config.training.stall_timeout)
    loaded = [chunks.load(i) for i in range(num_batches)]
    arrays = {name: np.concatenate([each[name] for each in loaded])[:total] for name in loaded[0]}
    multihost_utils.sync_global_devices("calibration chunks read")
    if jax.process_index() == 0:
        inputs = np.concatenate([y.reshape(total, -1), read_inputs(net, batch)], axis=1)
        _write(workdir, name, what, names, arrays, inputs, {"provenance": provenance.settings, **settings})
        chunks.delete()


def _draw(setup: Any, problem: Problem | None, y: np.ndarray, rows: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Draws samples [count, N, ...] for the examples `rows`; samples do not depend on the batch that they are drawn in."""
    keys = keys_of_samples(seed, (np.arange(count)[:, None] * len(y) + rows).ravel())
    some = _select(setup, rows)
    if problem is None:
        x = some.generate(keys, np.arange(count * len(rows)))
        return np.asarray(x).reshape(count, len(rows), *setup.net.example_shape)
    return problem.draw(some, y[rows], count, keys)


def _select(setup: Any, rows: np.ndarray) -> Any:
    """Returns the setup with the classes and conditions of the examples `rows`."""
    return dataclasses.replace(
        setup,
        labels=None if setup.labels is None else setup.labels[rows],
        conditions={name: values[rows] for name, values in setup.conditions.items()},
    )


def find_quantities(
    wanted: Sequence[str], x: np.ndarray, x_0: np.ndarray, basis: covariances.Covariance | None = None
) -> tuple[np.ndarray, list[str]]:
    """Returns (numbers [K, N, Q] of K examples with the same measurement [K, N, *spatial, C], the names of the numbers).

    wanted: `evaluation.quantities`. x: in data units. x_0: in network units. basis: for the components, None for none.
    Raises: ValueError for a user's function that does not return a dict of arrays [N].
    """
    found: dict[str, np.ndarray] = {}
    spatial, flat = x.shape[2:-1], x.reshape(-1, *x.shape[2:])
    for name in wanted:
        if name == "means":
            means = flat.reshape(len(flat), -1, x.shape[-1]).mean(axis=1)
            found |= {f"mean of channel {c}": means[:, c] for c in range(x.shape[-1])} if spatial else {}
        elif name == "entries":
            size = int(np.prod(spatial))
            chosen = np.unique((np.arange(_ENTRIES) * size + size // 2) // _ENTRIES) if spatial else [0]
            for place in chosen:
                index = tuple(map(int, np.unravel_index(place, spatial))) if spatial else ()
                at = f" at {', '.join(map(str, index))}" if spatial else ""
                values = flat[(slice(None), *index)]
                found |= {f"channel {c}{at}": values[:, c] for c in range(x.shape[-1])}
        elif name == "components":
            if basis is not None:  # energies of differences from the mean, in which truth and samples count alike
                residual = np.asarray(x_0, np.float64) - np.mean(x_0, axis=0, dtype=np.float64)
                found |= components(x_0.reshape(flat.shape), residual.reshape(flat.shape), basis)
        else:
            own = import_function(name)(flat)
            if not isinstance(own, dict) or any(np.shape(values) != (len(flat),) for values in own.values()):
                raise ValueError(f"{name} must return a dict of arrays [{len(flat)}], a number for each example")
            found |= {str(key): np.asarray(values) for key, values in own.items()}
    if not found:
        raise ValueError(f"no quantity of {list_names(list(wanted))} can be tested here; name another one")
    values = np.stack([np.asarray(values, np.float64) for values in found.values()], axis=1)
    return values.reshape(*x.shape[:2], -1), list(found)


def _write(
    workdir: RunDir,
    name: str,
    what: str,
    names: list[str],
    arrays: dict[str, np.ndarray],
    inputs: np.ndarray,
    settings: dict[str, Any],
) -> None:
    """Tests the ranks; writes and logs the results."""
    truth, samples = arrays["truth"], arrays["samples"].swapaxes(0, 1)
    total = len(truth)
    count = len(samples)
    # Distances add quantities in different units. The scale treats truths and samples alike.
    scale = np.maximum(np.concatenate([truth[None], samples]).std(axis=(0, 1)), 1e-12)
    references = calibration.cross_predict(inputs, truth / scale)
    found = calibration.find_calibration(truth / scale, samples / scale, references, names)
    shift, narrow, wide = calibration.detectable_errors(total, count, len(names))
    power = (
        f"finds these errors in one quantity with at least 95% probability: a shift of {shift:.2f} deviations, or a "
        f"deviation below {narrow:.2f} or above {wide:.2f} times the exact deviation"
    )
    record: dict[str, Any] = {"sentence": found.sentence, "num_examples": total, "num_samples": count, "power": power}
    log(f"Calibration of {what.replace('_', ' ')}: {found.sentence}. This test {power}.")
    if "chi_squared" in arrays:
        chi = arrays["chi_squared"]
        record |= {"chi_squared": float(chi.mean()), "chi_squared_standard_error": float(chi.std() / total**0.5)}
        log(f"Chi-squared for each measured number: {chi.mean():.3f} +- {chi.std() / total**0.5:.3f}.")
        record["residual"] = float(arrays["residual"].max())
        log_residual(record["residual"])
    if found.coverage:
        # The quantities of an example are correlated, so the standard error is computed from one share per example.
        inside = np.mean([calibration.is_covered(found.ranks[name], count) for name in names], axis=0)
        record |= {"coverage": float(inside.mean()), "coverage_standard_error": float(inside.std() / total**0.5)}
        log(f"90% intervals hold {inside.mean():.3f} +- {inside.std() / total**0.5:.3f} of the true values.")
    record["quantities"] = {key: test._asdict() for key, test in found.tests.items()}
    for key, (share, error) in found.coverage.items():
        record["quantities"][key] |= {"coverage": share, "coverage_standard_error": error}
    record["settings"] = settings
    folder = workdir / "calibration"
    workdir.write_json(f"calibration/{name}.json", record, indent=2)
    save_npz(folder / f"{name}.npz", {"references": references * scale, **arrays})
    bins = max(each for each in range(1, _BINS + 1) if (count + 1) % each == 0)
    shares = {key: calibration.histogram(each, count, bins) for key, each in found.ranks.items()}
    texts = {
        key: key + (f"\n{found.coverage[key][0]:.0%} in 90% intervals" if key in found.coverage else "")
        for key in found.ranks
    }
    picture = pictures.draw_calibration(
        {key: share for key, (share, _) in shares.items()},
        shares["distance"][1],
        f"Calibration of {what.replace('_', ' ')}, {total} examples of {count} samples: {found.sentence}",
        texts,
    )
    pictures.save(folder / f"{name}.png", picture)
    workdir.upload(folder / f"{name}.npz", folder / f"{name}.png")
    log(f"Distributions of the ranks: {folder / f'{name}.png'}")
