"""The terms of the variational bound on images of a split, measured in batches over all devices."""

from __future__ import annotations

import functools
import math
import pathlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from diffusion_jax import data, likelihood
from diffusion_jax.distributed import compiler, sharding
from diffusion_jax.distributed.watchdog import watch_batches
from diffusion_jax.errors import UserError, as_user_error
from diffusion_jax.images import to_model_range
from diffusion_jax.runs.chunk_store import ChunkStore, options_digest
from diffusion_jax.runs.console import ProgressBar, log, progress_over
from diffusion_jax.runs.data_source import check_source, rename_leaves_in_errors
from diffusion_jax.runs.sampler_config import resolve_clip
from diffusion_jax.runs.trained_model import TrainedModel, params_digest
from diffusion_jax.runs.workdir import to_dict

__all__ = ["LikelihoodRun", "Terms", "mean_and_standard_error", "rate_distortion"]

_TABLES = ("vlb", "mse", "x_0_mse")
_EXAMPLE_TERMS = ("total", "prior", "decoder", "ode")


class Terms(NamedTuple):
    """Terms of the bound in bits per dimension.

    examples: {"total", "prior", "decoder", and "ode" if it is measured: [N]}. counts [T]: images at each timestep. means,
    standard_errors: {"vlb", "mse", "x_0_mse": [T]} over those, NaN for too few images.
    """

    examples: dict[str, np.ndarray]
    counts: np.ndarray
    means: dict[str, np.ndarray]
    standard_errors: dict[str, np.ndarray]


class LikelihoodRun:
    """The newest weights of a run, and the images of `evaluation.split` whose likelihood is measured."""

    def __init__(self, config: ConfigDict, workdir: pathlib.Path):
        """Raises: UserError, DataError, PretrainedError."""
        options = config.evaluation
        self.config, self.workdir = config, workdir
        self.trained = TrainedModel.open(config, workdir, options.use_ema)
        self.step, self.params = self.trained.weights
        self.source = _load_source(config)
        check_source(config, self.source)

    def read(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Images and labels. Raises: DataError for images with other gray levels than `data.levels`."""
        batch = self.source.read(indices)
        data.check_levels(batch["image"], self.config.data.levels)
        return batch["image"], batch.get("label", np.zeros(len(indices), np.int32))

    def denoise_fn(self, params, labels, convolution: str | None = None) -> Callable:
        """The network as a function of x_t and time. convolution: replaces that of the model."""
        model = self.trained.model.clone(convolution=convolution or self.trained.model.convolution)
        y = labels if self.config.model.num_classes else None
        return lambda x_t, time: model.apply({"params": params}, x_t, time, y)

    def measure(self, num_examples: int, ode: bool) -> tuple[Terms, ChunkStore]:
        """The terms of the first `num_examples` images.

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
                # The last batch is padded with copies of its last image, which are dropped again.
                images, labels = self.read(np.minimum(i * batch_size + own_rows, num_examples - 1))
                placed = [jax.make_array_from_process_local_data(by_rows, array) for array in (images, labels)]
                out = compiled(self.params, np.uint32(options.seed), np.int32(i), *placed)
                out = multihost_utils.process_allgather(out, tiled=True)
                kept = {key: np.asarray(value)[: num_examples - i * batch_size] for key, value in out.items()}
                chunks.save(i, **_sum_over_images(kept, num_timesteps))
                bar.update(min((i + 1) * batch_size, num_examples))
        multihost_utils.sync_global_devices("likelihood chunks written")
        terms = _join([chunks.load(i) for i in range(num_batches)])
        multihost_utils.sync_global_devices("likelihood chunks read")
        if "ode" in terms.examples and not np.isfinite(terms.examples["ode"]).all():
            if jax.process_index() == 0:
                chunks.delete()  # a rerun would only read the same numbers again
            num_failed = (~np.isfinite(terms.examples["ode"])).sum()
            raise UserError(
                f"evaluation.ode_tolerance={options.ode_tolerance}: the solver of the probability-flow ODE did not converge "
                f"for {num_failed} of {num_examples} images; try a larger one"
            )
        return terms, chunks

    def batch_size(self, num_examples: int) -> int:
        """`evaluation.batch_size`, capped at the number of images, rounded up to a multiple of the devices."""
        devices = self.trained.mesh.size
        return -(-min(self.config.evaluation.batch_size, num_examples) // devices) * devices

    def _compile(self, batch_size: int, ode: bool) -> Callable:
        by_rows, replicated = sharding.batch_sharding(self.trained.mesh), sharding.replicated(self.trained.mesh)
        bound = self._bound(ode)
        batch = (
            jax.ShapeDtypeStruct((batch_size, *data.example_shape(self.config.data)), jnp.uint8),
            jax.ShapeDtypeStruct((batch_size,), jnp.int32),
        )
        with as_user_error("config.evaluation"):
            jax.eval_shape(bound, self.params, np.uint32(0), np.int32(0), *batch)
        return jax.jit(
            bound,
            in_shardings=(replicated, replicated, replicated, by_rows, by_rows),
            out_shardings=by_rows,
            compiler_options=compiler.options(),
        )

    def _bound(self, ode: bool) -> Callable:
        """(params, seed, batch index, images uint8, labels) -> {"total", ..., "t", the tables, "ode"}, not yet compiled."""
        options, diffusion, schedule = self.config.evaluation, self.config.diffusion, self.trained.schedule
        parameterization = {
            "prediction": diffusion.prediction,
            "variance": diffusion.variance,
            "gray_levels": self.config.data.levels,
        }

        def bound(params, seed, batch, images, labels):
            key_bound, key_ode = jax.random.split(jax.random.fold_in(jax.random.key(seed), batch))
            x_0 = to_model_range(images)
            bits = likelihood.bits_per_dim(
                key_bound,
                schedule,
                self.denoise_fn(params, labels),
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
                    # The trace takes forward-mode derivatives, which the convolution as products does not have.
                    self.denoise_fn(params, labels, convolution="xla"),
                    x_0,
                    dequantization=options.ode_dequantization,
                    trace=options.ode_trace,
                    tolerance=options.ode_tolerance,
                    **parameterization,
                )
            return out

        return bound

    def _digest(self, num_examples: int, batch_size: int, ode: bool) -> str:
        options = to_dict(self.config.evaluation) | {"clip": resolve_clip(self.config, "evaluation")}
        return options_digest(
            {key: value for key, value in options.items() if not key.startswith("progressive")},
            to_dict(self.config.data),
            ode,
            self.step,
            params_digest(self.params),
            num_examples,
            batch_size,
        )


def _load_source(config: ConfigDict):
    """The images of `evaluation.split` and `evaluation.data_dir`. Raises: DataError."""
    options, renamed = config.evaluation, {"data.split": "evaluation.split"}
    location = ConfigDict({**config.data, "split": options.split})
    if options.data_dir:
        location.data_dir = options.data_dir
        renamed["data.data_dir"] = "evaluation.data_dir"
    elif config.data.dataset == "folder":
        log(
            "Note: a folder has no splits, so these are the images that the model was trained on; set evaluation.data_dir "
            "to use others."
        )
    with rename_leaves_in_errors(renamed):
        return data.load(location, progress_over("Reading the images"))


def _import_ode_likelihood():
    """The module of the ODE likelihood, which needs diffrax. Raises: UserError."""
    try:
        from diffusion_jax.evaluation import ode_likelihood
    except ImportError as error:
        raise UserError(f"evaluation.ode needs diffrax ({error}); pip install '.[ode]'") from error
    return ode_likelihood


def _sum_over_images(out: dict[str, np.ndarray], num_timesteps: int) -> dict[str, np.ndarray]:
    """The numbers of a batch, with its tables summed over the images, float64 [T]."""
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


def rate_distortion(terms: Terms) -> tuple[np.ndarray, np.ndarray]:
    """Mean rate (bits per dimension) and distortion (RMSE, 0-255) [T], interpolated at timesteps without images."""
    measured, all_steps = np.flatnonzero(terms.counts), np.arange(len(terms.counts))
    vlb, x_0_mse = (np.interp(all_steps, measured, terms.means[name][measured]) for name in ("vlb", "x_0_mse"))
    rate, distortion = likelihood.rate_distortion(terms.examples["prior"].mean(), vlb, x_0_mse)
    return np.asarray(rate), np.asarray(distortion)


def mean_and_standard_error(values: np.ndarray) -> tuple[float, float | None]:
    """The standard error is None for a single value."""
    error = values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else None
    return float(values.mean()), None if error is None else float(error)
