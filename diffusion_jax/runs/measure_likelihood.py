"""`--mode=evaluate` and `--mode=progressive`: the variational bound of a trained model on images it was not trained on; the
first also judges its samples (judge.py).

evaluate writes likelihood.json (bits per dimension, their parts and standard errors), likelihood.npz (the terms of every
timestep), likelihood_terms.png and rate_distortion.png. progressive writes progressive.csv (the table of rate and distortion,
DDPM section 4.3), progressive.png (x_0 as predicted on the way of samples, figure 6) and progressive_coding.png (the same for
real images of which more and more is known).
"""

from __future__ import annotations

import csv
import io
import json
import math
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from diffusion_jax import data, likelihood, process
from diffusion_jax.distributed import compiler, sharding
from diffusion_jax.distributed.watchdog import watch_batches
from diffusion_jax.errors import UserError, as_user_error
from diffusion_jax.runs import pictures, trained_model
from diffusion_jax.runs import workdir as work
from diffusion_jax.runs.artifacts import Parts, digest
from diffusion_jax.runs.console import Bar, bar_over, say
from diffusion_jax.runs.sample import trajectory_picture
from diffusion_jax.runs.sample_metrics import check_sample_metrics, judge, naming_leaves
from diffusion_jax.runs.sampling_setup import SamplingSetup
from diffusion_jax.runs.train import check_source
from diffusion_jax.training import model_from_config, schedule_from_config

_TABLES = ("vlb", "mse", "x_0_mse")


class Terms(NamedTuple):
    """What was measured, in bits per dimension.

    examples: {"total", "prior", "decoder", and "ode" where asked for: [N]}. count [T]: images seen at each timestep. means,
    errors: {"vlb", "mse", "x_0_mse": [T]}, averages over those and their standard errors, NaN where too few were seen.
    """

    examples: dict[str, np.ndarray]
    count: np.ndarray
    means: dict[str, np.ndarray]
    errors: dict[str, np.ndarray]


class _Trained:
    """A run's newest weights, and the images to judge them by."""

    def __init__(self, config: ConfigDict, directory: pathlib.Path):
        work.check_identity(config, directory)
        options = config.evaluation
        for leaf, least in (("num_examples", 0), ("batch_size", 1), ("progressive_examples", 1)):
            if options[leaf] < least:
                raise UserError(f"evaluation.{leaf}={options[leaf]} must be at least {least}")
        work.check_seed("evaluation.seed", options.seed)
        if type(options.strata) not in (int, type(None)):
            raise UserError(f"evaluation.strata={options.strata!r} must be a whole number, or None for all steps")
        self.config, self.directory = config, directory
        self.image_shape = data.image_shape(config.data)
        with as_user_error("config"):
            self.mesh = sharding.make_mesh(config.mesh)
            self.model, self.schedule = model_from_config(config), schedule_from_config(config.diffusion)
        self.step, self.params = trained_model.load(config, directory, self.model, self.mesh, options.use_ema)
        self.kind = "ema" if options.use_ema else "raw"
        where = ConfigDict({**config.data, "split": options.split})
        if options.data_dir:
            where.data_dir = options.data_dir
        elif config.data.dataset == "folder":
            say(
                "A folder has no splits: these are the images the model was trained on; evaluation.data_dir names others."
            )
        given = {"data.split": "evaluation.split"} | (
            {"data.data_dir": "evaluation.data_dir"} if options.data_dir else {}
        )
        with naming_leaves(given):
            self.source = data.load(where, bar_over("Reading the images"))
        check_source(config, self.source)

    def read(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Images and labels. Raises: UserError for images that have other gray levels than the likelihood is of."""
        images, labels = self.source.read(indices)
        data.check_levels(images, self.config.data.levels)
        return images, labels

    def denoise_fn(self, params, y, convolution=None):
        """The network as the core takes it. convolution: instead of the model's own."""
        model = self.model.clone(convolution=convolution or self.model.convolution)
        return lambda x_t, time: model.apply({"params": params}, x_t, time, y)

    def labels(self, labels):
        """What the network takes as y."""
        return labels if self.config.model.num_classes else None

    def bound(self, ode: bool):
        """(params, seed, batch index, images uint8, labels) -> {"total", ..., "t", the tables, "ode"}, not yet compiled."""
        options, diffusion, levels = self.config.evaluation, self.config.diffusion, self.config.data.levels
        model_says = {"prediction": diffusion.prediction, "variance": diffusion.variance, "levels": levels}

        def run(params, seed, batch, images, labels):
            key_bound, key_ode = jax.random.split(jax.random.fold_in(jax.random.key(seed), batch))
            x_0 = images.astype(jnp.float32) / 127.5 - 1.0
            denoise_fn = self.denoise_fn(params, self.labels(labels))
            bits = likelihood.bits_per_dim(
                key_bound,
                self.schedule,
                denoise_fn,
                x_0,
                clip=options.clip,
                cdf=options.cdf,
                strata=options.strata,
                **model_says,
            )
            out = {name: getattr(bits, name) for name in ("total", "prior", "decoder", "t", *_TABLES)}
            if ode:
                out["ode"], _ = _ode_likelihood().bits_per_dim(
                    key_ode,
                    self.schedule,
                    # The trace takes forward-mode derivatives, which products do not have.
                    self.denoise_fn(params, self.labels(labels), convolution="xla"),
                    x_0,
                    dequantization=options.ode_dequantization,
                    trace=options.ode_trace,
                    tolerance=options.ode_tolerance,
                    **model_says,
                )
            return out

        return run


def _ode_likelihood():
    """The module, which needs diffrax."""
    try:
        from diffusion_jax.evaluation import ode_likelihood
    except ImportError as error:
        raise UserError(f"evaluation.ode needs diffrax ({error}); pip install '.[ode]'") from error
    return ode_likelihood


def _batch_size(trained: _Trained, count: int) -> int:
    """What is asked for, but no more than there is, rounded up to the devices."""
    devices = trained.mesh.size
    return -(-min(trained.config.evaluation.batch_size, count) // devices) * devices


def _measure(trained: _Trained, count: int, ode: bool) -> tuple[Terms, Parts]:
    """The bound of the first `count` images, in batches over the devices.

    Every batch is kept, so that a relaunch goes on; the caller removes them when all is written.
    """
    options, mesh = trained.config.evaluation, trained.mesh
    batch_size = _batch_size(trained, count)
    whole, rows = sharding.replicated(mesh), sharding.batch_sharding(mesh)
    held = sharding.process_rows(batch_size, mesh)
    run = trained.bound(ode)
    shapes = (
        jax.ShapeDtypeStruct((batch_size, *trained.image_shape), jnp.uint8),
        jax.ShapeDtypeStruct((batch_size,), jnp.int32),
    )
    with as_user_error("config.evaluation"):
        jax.eval_shape(run, trained.params, np.uint32(0), np.int32(0), *shapes)
    compiled = jax.jit(
        run, in_shardings=(whole, whole, whole, rows, rows), out_shardings=rows, compiler_options=compiler.options()
    )
    chosen = {key: value for key, value in work.to_dict(options).items() if not key.startswith("progressive")}
    name = digest(
        chosen,
        work.to_dict(trained.config.data),
        ode,
        trained.step,
        trained_model.digest(trained.params),
        count,
        batch_size,
    )
    parts = Parts(trained.directory / f".likelihood_{name}")
    batches = -(-count // batch_size)
    done = min(len(parts.done) * batch_size, count)
    with Bar("Evaluating", count, done) as bar:
        left = [i for i in range(batches) if i not in parts.done]
        if left:
            say("Compiling the bound, and the first batch ...")
        for i in watch_batches(left, trained.config.training.stall_timeout):
            # The last batch is filled up with its last image, whose copies are cut off again.
            images, labels = trained.read(np.minimum(i * batch_size + held, count - 1))
            placed = [jax.make_array_from_process_local_data(rows, leaf) for leaf in (images, labels)]
            out = compiled(trained.params, np.uint32(options.seed), np.int32(i), *placed)
            out = multihost_utils.process_allgather(out, tiled=True)
            kept = {key: np.asarray(value)[: count - i * batch_size] for key, value in out.items()}
            parts.save(i, **_summed(kept, trained.schedule.num_timesteps))
            bar.update(min((i + 1) * batch_size, count))
    multihost_utils.sync_global_devices("likelihood parts written")
    terms = _joined([parts.load(i) for i in range(batches)])
    multihost_utils.sync_global_devices("likelihood parts read")
    if "ode" in terms.examples and not np.isfinite(terms.examples["ode"]).all():
        if jax.process_index() == 0:
            parts.remove()  # the same command would only read the same numbers again
        raise UserError(
            f"evaluation.ode_tolerance={options.ode_tolerance}: the solver of the probability-flow ODE gave up on "
            f"{(~np.isfinite(terms.examples['ode'])).sum()} of {count} images; try a larger one"
        )
    return terms, parts


def _summed(out: dict[str, np.ndarray], num_timesteps: int) -> dict[str, np.ndarray]:
    """A batch's numbers with its tables summed over the images, float64 [T]."""
    part = {key: out[key] for key in ("total", "prior", "decoder", "ode") if key in out}
    at = out["t"].ravel()
    part["count"] = np.bincount(at, minlength=num_timesteps)
    for table in _TABLES:
        values = out[table].ravel().astype(np.float64)
        part[f"{table}_sum"] = np.bincount(at, values, num_timesteps)
        part[f"{table}_squares"] = np.bincount(at, values**2, num_timesteps)
    return part


def _joined(parts: list[dict[str, np.ndarray]]) -> Terms:
    examples = {
        key: np.concatenate([part[key] for part in parts]).astype(np.float64)
        for key in ("total", "prior", "decoder", "ode")
        if key in parts[0]
    }
    count = sum(part["count"] for part in parts)
    means, errors = {}, {}
    with np.errstate(divide="ignore", invalid="ignore"):
        for table in _TABLES:
            means[table] = sum(part[f"{table}_sum"] for part in parts) / count
            squares = sum(part[f"{table}_squares"] for part in parts) / count
            variance = np.maximum(squares - means[table] ** 2, 0) * count / (count - 1)
            errors[table] = np.where(count > 1, np.sqrt(variance / count), np.nan)
    return Terms(examples, count, means, errors)


def _rate_distortion(terms: Terms) -> tuple[np.ndarray, np.ndarray]:
    """Mean rate and distortion at every t; timesteps that no image visited are read off their neighbors."""
    seen, every = np.flatnonzero(terms.count), np.arange(len(terms.count))
    vlb, x_0_mse = (np.interp(every, seen, terms.means[name][seen]) for name in ("vlb", "x_0_mse"))
    rate, distortion = likelihood.rate_distortion(terms.examples["prior"].mean(), vlb, x_0_mse)
    return np.asarray(rate), np.asarray(distortion)


def _mean_and_error(values: np.ndarray) -> tuple[float, float | None]:
    error = values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else None
    return float(values.mean()), None if error is None else float(error)


def evaluate(config: ConfigDict, directory: pathlib.Path) -> None:
    """`--mode=evaluate`: bits per dimension of a split, and the metrics of samples."""
    check_sample_metrics(config)
    if not (config.evaluation.likelihood or config.evaluation.num_samples):
        raise UserError(
            "evaluation.likelihood=False and evaluation.num_samples=0 leave nothing to measure; set either of them"
        )
    if config.evaluation.likelihood:
        _bound(config, directory)
    judge(config, directory)
    work.keep_config(config, directory)


def _bound(config: ConfigDict, directory: pathlib.Path) -> None:
    """Bits per dimension of a split, with their parts, and where along the chain they are spent."""
    trained = _Trained(config, directory)
    options = config.evaluation
    count = min(options.num_examples or len(trained.source), len(trained.source))
    say(f"The bound of {count:,} images, with the {trained.kind} weights of step {trained.step}.")
    terms, parts = _measure(trained, count, options.ode)
    if jax.process_index() != 0:
        return
    transitions = terms.examples["total"] - terms.examples["prior"] - terms.examples["decoder"]
    report: dict[str, Any] = {}
    for name, values in {**terms.examples, "transitions": transitions}.items():
        key = {"total": "bits_per_dim", "ode": "ode_bits_per_dim"}.get(name, name)
        report[key], report[f"{key}_standard_error"] = _mean_and_error(values)
    report |= {
        "weights": trained.kind,
        "step": trained.step,
        "dataset": config.data.dataset,
        "split": options.split,
        "num_examples": count,
        "levels": config.data.levels,
        "num_timesteps": trained.schedule.num_timesteps,
        "prediction": config.diffusion.prediction,
        "variance": config.diffusion.variance,
        **{key: options[key] for key in ("strata", "cdf", "clip", "seed")},
        "batch_size": _batch_size(trained, count),  # the noise depends on it
    }
    if options.ode:
        report |= {key: options[key] for key in ("ode_dequantization", "ode_trace", "ode_tolerance")}
    rate, distortion = _rate_distortion(terms)
    arrays = {"t": np.arange(len(rate)), "time": trained.schedule.timesteps, "count": terms.count}
    arrays |= terms.means | {f"{name}_standard_error": error for name, error in terms.errors.items()}
    arrays |= {"rate": rate, "distortion": distortion}
    arrays |= {f"example_{name}": values for name, values in terms.examples.items()}
    temporary = directory / "likelihood.partial.npz"
    np.savez(temporary, **arrays)
    temporary.replace(directory / "likelihood.npz")
    work.write_text(directory / "likelihood.json", json.dumps(report, indent=2, allow_nan=False) + "\n")
    lossless = report["bits_per_dim"]
    title = f"{config.data.dataset} {options.split}, step {trained.step}, {trained.kind} weights"
    pictures.plot_terms(directory / "likelihood_terms.png", terms.means["vlb"], title)
    pictures.plot_rate_distortion(directory / "rate_distortion.png", rate, distortion, lossless, title)
    parts.remove()
    say(
        f"{_figure(report, 'bits_per_dim')} bits per dimension: prior {report['prior']:.4f}, transitions "
        f"{report['transitions']:.4f}, decoder {report['decoder']:.4f}"
    )
    if options.ode:
        say(f"{_figure(report, 'ode_bits_per_dim')} bits per dimension by the probability-flow ODE")
    say(f"Written to {directory}: likelihood.json, likelihood.npz, likelihood_terms.png, rate_distortion.png")


def _figure(report: dict, key: str) -> str:
    error = report[f"{key}_standard_error"]
    return f"{report[key]:.4f}" + ("" if error is None else f" ± {error:.4f}")


def progressive(config: ConfigDict, directory: pathlib.Path) -> None:
    """`--mode=progressive`: what each further step of the chain costs and tells (DDPM section 4.3)."""
    trained = _Trained(config, directory)
    options = config.evaluation
    if options.progressive_columns < 2:
        raise UserError(f"evaluation.progressive_columns={options.progressive_columns} must be at least 2")
    with as_user_error("config.sampling"):
        recipe = SamplingSetup(
            config, trained.model, trained.schedule, trained.mesh, work.class_names(config, directory)
        )
    count = min(options.progressive_examples, len(trained.source))
    say(f"Rate and distortion of {count} images, with the {trained.kind} weights of step {trained.step}.")
    terms, parts = _measure(trained, count, ode=False)
    if jax.process_index() != 0:
        return
    rate, distortion = _rate_distortion(terms)
    table = [(t + 1, trained.schedule.timesteps[t], rate[t], distortion[t]) for t in reversed(range(len(rate)))]
    table.append((0, 0.0, terms.examples["total"].mean(), 0.0))  # x_0 itself: the decoder makes the code lossless
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("known_x_t", "network_time", "rate_bits_per_dim", "rmse_0_255"))
    writer.writerows((t, f"{time:g}", f"{r:.6f}", f"{d:.4f}") for t, time, r, d in table)
    work.write_text(directory / "progressive.csv", text.getvalue())
    say("     known   bits/dim   RMSE (0-255)")
    for t, _, r, d in (table[i] for i in np.unique(np.linspace(0, len(table) - 1, 11).round().astype(int))):
        say(f"{'x_' + str(t):>10}   {r:8.4f}   {d:8.2f}")
    say("Compiling the pictures' programs ...")
    picture = trajectory_picture(
        jax.random.key(options.seed),
        config,
        recipe,
        trained.params,
        options.progressive_columns,
        show="x_0",
    )
    pictures.save_png(directory / "progressive.png", picture)
    pictures.save_png(directory / "progressive_coding.png", _coding_picture(trained, options.progressive_columns))
    parts.remove()
    say(f"Written to {directory}: progressive.csv, progressive.png, progressive_coding.png")


def _coding_picture(trained: _Trained, columns: int, rows: int = 4) -> np.ndarray:
    """Real images as predicted from less and less noisy x_t, and at the right themselves. uint8 [H, W, C]."""
    config, schedule = trained.config, trained.schedule
    images, labels = trained.read(np.arange(min(rows, len(trained.source))))
    params = jax.device_get(trained.params)  # one process draws this, on one device
    steps = np.unique(np.linspace(schedule.num_timesteps - 1, 0, columns - 1).round().astype(int))[::-1]

    def predict(params, x_0, y):
        def at_step(t):
            index = jnp.full(x_0.shape[:1], t)
            eps = jax.random.normal(jax.random.fold_in(jax.random.key(config.evaluation.seed), t), x_0.shape)
            x_t = process.q_sample(schedule, x_0, index, eps)
            output = trained.denoise_fn(params, y)(x_t, process.lookup(schedule.timesteps, index, index))
            diffusion = config.diffusion
            return process.p_mean_variance(schedule, output, x_t, index, diffusion.prediction, diffusion.variance).x_0

        return jax.lax.map(at_step, jnp.asarray(steps, jnp.int32))

    x_0 = images.astype(np.float32) / 127.5 - 1.0
    predicted = jax.jit(predict, compiler_options=compiler.options())(params, x_0, trained.labels(labels))
    through = np.concatenate([np.asarray(pictures.to_uint8(predicted)), images[None]]).swapaxes(0, 1)
    headers = pictures.time_headers(np.asarray(schedule.timesteps)[steps])
    return pictures.grid(through.reshape(-1, *images.shape[1:]), columns=len(steps) + 1, headers=headers)
