"""`Problem`: the measurement that `config.editing` describes, and samples of x_0 given its values.

`--mode=edit` draws samples for one measurement, and `evaluation.metrics=calibration` for many simulated measurements.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import math
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from diffusion_jax import covariances, data, editing, posterior, pretrained
from diffusion_jax.arrays import broadcasts_to
from diffusion_jax.config.rules import edit_method
from diffusion_jax.console import log
from diffusion_jax.data.sources import batch_examples, read_conditions
from diffusion_jax.denoiser import Denoiser
from diffusion_jax.errors import DataError, UserError, as_user_error
from diffusion_jax.functions import find_function
from diffusion_jax.images import to_model_range
from diffusion_jax.measurements import LinearOperator, Measurement, compose
from diffusion_jax.metrics.of_arrays import subset_indices
from diffusion_jax.runs.sampling_setup import SamplingSetup, load_arrays
from diffusion_jax.runs.workdir import check_source, load_examples

_GRAY_LEVEL = 127.5  # network units are levels / 127.5 - 1
_RESIDUAL = 0.05  # a larger residual is noted
_MATRIX = 2**22  # most numbers of a stored matrix
_EXAMPLES, _NUMBERS = 4096, 2**26  # most examples for a covariance, and numbers in them, 512 MB in float64


@dataclasses.dataclass(frozen=True)
class Problem:
    """The measurement that `config.editing` describes, in network units and in data units.

    operator: of x_0 in network units; with a noise covariance, it is followed by `whitening`. noise: the standard deviation
    of its noise, a number or an array that broadcasts to y. scale, shift: without `whitening`, y in data units is
    scale * y + shift. whitening: W [M, M] for the M numbers of y, with which the noise has the covariance I where it is
    measured, and 0 in other rows. covariance: of x_0 in network units, or None for the network's Jacobian. given_y: the
    covariance of x_0 given y, or None.
    """

    options: ConfigDict
    method: str
    net: pretrained.Model
    operator: LinearOperator
    noise: Any
    scale: np.ndarray
    shift: np.ndarray
    whitening: np.ndarray | None = None
    covariance: covariances.Covariance | None = None
    given_y: covariances.Covariance | None = None

    @classmethod
    def from_config(cls, config: ConfigDict, net: pretrained.Model, mask: np.ndarray | None = None) -> Problem:
        """Builds the measurement of a config. mask: from `runs.edit.EditFiles.read_mask`. Raises: UserError."""
        options, shape, task = config.editing, net.example_shape, config.editing.task
        array = None
        if task == "linear":
            with as_user_error("config"):
                array = find_function(options.operator, "editing.operator")
        elif options.operator:
            array = load_arrays("editing.operator", options.operator)
        arguments = {**options.to_dict(), "mask": mask, "array": array}
        make = editing.MEASUREMENTS[task]
        found = net.normalizations.get("x")
        offset, scale = (0.0, 1.0) if found is None else (found.offset, found.scale)
        if net.levels is not None:
            offset = scale = _GRAY_LEVEL
        offset, scale = (np.broadcast_to(np.asarray(each, np.float64), shape[-1:]) for each in (offset, scale))
        setting = f"editing.operator={options.operator!r}" if options.operator else "config.editing"
        with as_user_error(setting), _warnings_as_notes():
            needed = [name for name in inspect.signature(make).parameters if name != "shape"]
            operator = make(shape, **{name: arguments[name] for name in needed})
            operator.check(shape)
            if task == "linear":  # of data units, and y is not converted
                shift = np.asarray(operator.measure(jnp.asarray(np.broadcast_to(offset, (1, *shape)), jnp.float32)))[0]
                operator = LinearOperator(_InDataUnits(operator, scale.astype(np.float32)))
                if not shift.ndim:
                    raise ValueError(
                        "the function must return [N, ...], at least one number for each example; add an axis"
                    )
                shift, scale = shift.astype(np.float64), np.ones(1)
            else:
                of_ones = np.asarray(operator.measure(jnp.ones((1, *shape))), np.float64)[0]
                if task == "fourier":  # real and imaginary parts
                    offset, scale = offset[:, None], scale[:, None]
                elif task == "colorize":
                    offset, scale = offset[:1], scale[:1]
                shift = of_ones * offset
        noise, method = _read_noise(options, shift.shape) if options.noise else 0.0, edit_method(options) or ""
        if not _is_covariance(np.shape(noise), shift.shape):
            return cls(options, method, net, operator, (noise / scale).astype(np.float32), scale, shift)
        is_hidden = False if operator.diagonal is None else np.asarray(operator.diagonal) == 0
        variances = np.diag(noise).reshape(shift.shape)
        std = np.where(np.isfinite(variances) & ~np.broadcast_to(is_hidden, shift.shape), 1.0, np.inf)
        units = np.broadcast_to(scale, shift.shape).ravel()
        whitening = _whiten(noise / np.outer(units, units), std.ravel() == 1)
        operator = compose(LinearOperator(jax.tree_util.Partial(_times, whitening)), operator)
        return cls(options, method, net, operator, std.astype(np.float32), scale, shift, whitening)

    def with_covariance(self, covariance: covariances.Covariance | None) -> Problem:
        """Adds the covariance of x_0, and that of x_0 given y. Raises: UserError."""
        if covariance is None:
            return self
        with as_user_error("config.editing"):
            zeros = self._repeat(np.zeros((1, *self.y_shape), np.float32), 1)
            return dataclasses.replace(
                self, covariance=covariance, given_y=covariance.given(zeros, self.net.example_shape)
            )

    @property
    def wants_data(self) -> bool:
        """Whether the settings ask for the covariance of the data, if there are data."""
        return self.method == "mmps" and self.options.covariance != "jacobian"

    @property
    def uses_data(self) -> bool:
        """Whether mmps uses `covariance`, and not the Jacobian."""
        return self.wants_data and self.covariance is not None

    @property
    def _plain(self) -> LinearOperator:
        """The operator without `whitening`."""
        if self.whitening is None:
            return self.operator
        return cast(jax.tree_util.Partial, self.operator.measure).args[1]

    @property
    def y_shape(self) -> tuple[int, ...]:
        """The shape of y for one example."""
        return self.shift.shape

    @property
    def num_measured(self) -> int:
        """The number of measured numbers in y."""
        measured = (self.operator.squared_norms(jnp.zeros((1, *self.net.example_shape))) > 0) & np.isfinite(self.noise)
        return int(np.broadcast_to(measured, self.y_shape).sum())

    def arrays(self) -> dict[str, np.ndarray]:
        """Returns what the .npz needs to repeat the measurement: the noise in data units, and the operator's array.

        The array is the mask, the kernel, the points, the frequencies or the angles in radians. For the task linear, it is
        the matrix [*y_shape, *shape] in data units, unless this matrix is large.
        """
        if self.whitening is None:
            found = {"noise": np.broadcast_to(self.noise * self.scale, self.y_shape).astype(np.float32)}
        else:
            found = {"noise": _read_noise(self.options, self.y_shape)}
        measure, shape = self._plain.measure, self.net.example_shape
        leaves = jax.tree.leaves(measure)
        if not isinstance(measure, _InDataUnits):
            return found | dict(zip(["operator"], map(np.asarray, leaves), strict=False))
        rows = math.prod(self.y_shape)
        if max(rows, math.prod(shape)) * rows > _MATRIX:
            return found
        adjoint = measure.operator.adjoint(jnp.zeros((rows, *shape)))
        matrix = np.asarray(adjoint(jnp.eye(rows).reshape(rows, *self.y_shape)))
        return found | {"operator": matrix.reshape(*self.y_shape, *shape)}

    def to_network(self, y: np.ndarray) -> np.ndarray:
        """Converts y [N, ...] from data units to float32 network units."""
        y = (y - self.shift) / self.scale
        return np.asarray(y if self.whitening is None else _times(self.whitening, y), np.float32)

    def to_data(self, y: np.ndarray) -> np.ndarray:
        """Converts y [N, ...] from network units to data units."""
        y = np.asarray(y, np.float64)
        y = y if self.whitening is None else _times(np.linalg.pinv(self.whitening), y)
        return y * self.scale + self.shift

    def simulate(self, x_0: np.ndarray, indices: np.ndarray) -> np.ndarray:
        """Measures examples [N, ...] in network units, with noise that depends on the index of an example alone."""
        y = np.asarray(self.operator.measure(jnp.asarray(x_0)))
        draws = [np.random.default_rng([int(i), 45]).standard_normal(self.y_shape) for i in indices]
        known = np.isfinite(self.noise)
        return np.where(known, y + np.where(known, self.noise, 0) * np.stack(draws), 0).astype(np.float32)

    def show(self, y: np.ndarray) -> np.ndarray:
        """Converts y, in data units, for pictures: if possible to [*spatial, C], with NaN where nothing is measured."""
        if self.options.task == "linear" and (y.ndim, y.shape[-1]) != (len(self.net.example_shape), self.net.channels):
            return np.full(self.net.example_shape, np.nan)  # it has no place in the picture
        if self.options.task in ("deblur", "tomography", "linear"):
            return y
        adjoint = self._plain.adjoint(jnp.zeros((1, *self.net.example_shape)))
        if self.options.task == "fourier":  # a coefficient counts twice if y leaves out its conjugate
            column, size = np.arange(y.shape[-3]), self.net.image_size[-1]
            is_known = np.asarray(self._plain.diagonal)[..., 0, 0] > 0
            axes = tuple(range(is_known.ndim - 1))
            conjugate = np.roll(np.flip(is_known, axes), 1, axes)  # of a coefficient in the first or last column
            y = np.where((column > 0) & (2 * column < size), 2, 2 - conjugate)[..., None, None] * y
        known = np.broadcast_to(np.isfinite(self.noise), y.shape)
        pair = (np.where(known, y, 0), known)
        spread, weight = (np.asarray(adjoint(jnp.asarray(each, jnp.float32)[None]))[0] for each in pair)
        if self.options.task == "fourier":
            return spread
        return np.where(weight > 0, spread / np.where(weight > 0, weight, 1), np.nan)

    def chi_squared(self, samples: Any, y: np.ndarray) -> np.ndarray:
        """Returns chi-squared divided by the number of measured numbers, [L, N], for samples from `draw`."""
        x = data.to_model_units(np.asarray(samples), self.net.normalizations.get("x"))
        found = self._repeat(y, len(x)).chi_squared(x.reshape(-1, *x.shape[2:]))
        return np.asarray(found).reshape(x.shape[:2])

    def _repeat(self, y: np.ndarray, count: int) -> Measurement:
        return Measurement(self.operator, jnp.tile(y, (count, *[1] * (y.ndim - 1))), self.noise)

    def draw(self, setup: SamplingSetup, y: np.ndarray, count: int, key: jax.Array) -> np.ndarray:
        """Draws `count` samples for each row of y [N, ...], in network units; row i uses row i of the setup's conditions.

        key: one key, or a key for each sample, flattened from [count, N].
        Returns: [count, N, ...], images in [-1, 1], continuous data in data units. Raises: UserError.
        """
        rows, repeated = len(y), self._repeat(y, count)
        wrap = editing.project if self.method == "project" else self._mmps
        with as_user_error("config.editing"):
            x = setup.generate(key, np.arange(count * rows), wrap=lambda denoiser: wrap(denoiser, repeated))
        return np.asarray(x).reshape(count, rows, *self.net.example_shape)

    def _mmps(self, denoiser: Denoiser, measurement: Measurement) -> Denoiser:
        covariance, given_y = (self.covariance, self.given_y) if self.uses_data else (None, None)
        iterations = self.options.iterations
        return posterior.mmps(denoiser, measurement, covariance, given_y=given_y, iterations=iterations)

    def residual(self, setup: SamplingSetup, samples: np.ndarray, y: np.ndarray) -> float:
        """Returns the residual of the linear system in mmps: the largest of five noise levels, the median of the samples.

        samples: [N, ...] as from `draw`, given one row y [1, ...]. Returns 0 where no system is solved.
        """
        if self.method != "mmps" or (self.uses_data and self.given_y is not None):
            return 0.0
        covariance = self.covariance if self.uses_data else None
        x_0 = jnp.asarray(data.to_model_units(np.asarray(samples), self.net.normalizations.get("x")), jnp.float32)
        noise, schedule, found = jax.random.normal(jax.random.key(0), x_0.shape), setup.schedule, []
        for t in np.linspace(0, schedule.num_timesteps - 1, 6).astype(int)[:-1]:  # pure noise is not corrected
            level = schedule.at(np.full(len(x_0), t), x_0)
            x_t = level.alpha * x_0 + level.sigma * noise
            arguments = setup.denoiser(np.arange(len(x_0))), self._repeat(y, len(x_0)), x_t, level, covariance
            residuals = _relative_residual(*arguments, iterations=self.options.iterations)
            found.append(float(np.median(residuals)))
        return max(found)


_relative_residual = jax.jit(posterior.relative_residual, static_argnames="iterations")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _InDataUnits:
    """A linear function of x_0 in network units, from an operator of x_0 in data units."""

    operator: LinearOperator
    scale: np.ndarray

    def __call__(self, x):
        return self.operator.linear(self.scale * x)


def _is_covariance(noise_shape: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """Whether an array with `noise_shape` is a covariance [M, M] of the M numbers of y [*shape]."""
    return noise_shape == (math.prod(shape),) * 2 and not broadcasts_to(noise_shape, shape)


def _whiten(covariance: np.ndarray, is_measured: np.ndarray) -> np.ndarray:
    """Returns `Problem.whitening`. Raises: UserError for a matrix that is no covariance."""
    kept = np.ix_(is_measured, is_measured)
    try:
        if not np.allclose(covariance[kept], covariance[kept].T, rtol=1e-5):
            raise np.linalg.LinAlgError
        root = np.linalg.cholesky(covariance[kept])
    except np.linalg.LinAlgError as error:
        raise UserError(
            "editing.noise is a matrix, and must be a covariance: symmetric, with eigenvalues above 0"
        ) from error
    found = np.zeros_like(covariance)
    found[kept] = np.linalg.inv(root)
    return found


def _times(matrix, y):
    """Returns the matrix [M, M] times the M numbers of each row of y."""
    with jax.default_matmul_precision("highest"):
        return (y.reshape(len(y), -1) @ matrix.T.astype(y.dtype)).reshape(y.shape)


def _read_noise(options: ConfigDict, shape: tuple[int, ...]) -> np.ndarray:
    """Returns `editing.noise` in data units: standard deviations that broadcast to y [*shape], or its covariance.

    Raises: UserError.
    """
    noise, is_fourier = options.noise, options.task == "fourier"
    noise = load_arrays("editing.noise", noise) if isinstance(noise, str) else noise
    noise = np.zeros(0) if isinstance(noise, dict) else np.asarray(noise, np.float64)
    noise = noise[:, None] if isinstance(options.noise, tuple) and is_fourier else noise  # real and imaginary parts
    size, is_matrix = math.prod(shape), _is_covariance(noise.shape, shape)
    values = np.diag(noise) if is_matrix else noise
    fits = is_matrix or broadcasts_to(noise.shape, shape)
    if not fits or not (values > 0).all() or not np.isfinite(values).any():
        raise UserError(
            f"editing.noise={options.noise!r} must be standard deviations above 0, not all infinite, that broadcast to the "
            f"measurement, {list(shape)}, or a covariance [{size}, {size}]; an .npy holds {list(noise.shape)}"
        )
    return noise


def covariance_of_data(config: ConfigDict, net: pretrained.Model) -> covariances.Covariance | None:
    """Estimates the covariance of training examples, given their classes and conditions, in network units; logs how.

    Returns None for published weights, unless `editing.covariance` is data, and for upsamplers. Raises: UserError, DataError.
    """
    if net.low_resolution and config.editing.covariance == "data":
        raise UserError("editing.covariance=data is not for models that enlarge images; use jacobian")
    if net.low_resolution or (config.init_from and config.editing.covariance != "data"):
        return None
    try:
        source = load_examples("Reading the training data", dict(config.data), {}, None)
    except DataError as error:
        raise DataError(f"{error}; without the training data, use --config.editing.covariance=jacobian") from error
    check_source(config, source)
    count = min(_EXAMPLES, max(16, _NUMBERS // math.prod(net.example_shape)))
    batch = source.read(subset_indices(len(source), count))
    x, inputs = np.asarray(to_network_units(net, batch_examples(batch)), np.float64), read_inputs(net, batch)
    known = ~batch.get("condition_missing", np.zeros(len(x), bool))
    x, inputs = x[known], inputs[known]
    if inputs.shape[1] > (most := len(x) // 4):  # a regression on more inputs would leave too few degrees of freedom
        log(
            f"Note: the conditions have {inputs.shape[1]:,} numbers, so the regression is on {most:,} principal components."
        )
        inputs = inputs - inputs.mean(axis=0)
        inputs = np.linalg.eigh(inputs @ inputs.T)[1][:, -most:]
    if config.data.random_flip and net.is_images:
        x, inputs = np.concatenate([x, x[:, :, ::-1]]), np.tile(inputs, (2, 1))
    is_periodic = config.model.kind == "unet" and config.model.padding == "periodic"
    estimate = covariances.fourier if is_periodic else covariances.principal
    basis = "Fourier coefficients" if is_periodic else "principal components"
    given = ", given their classes and conditions" * bool(inputs.shape[1])
    log(f"Covariance of x_0: from {len(x):,} training examples{given}, by {basis}.")
    with as_user_error("editing.covariance=data"), _warnings_as_notes():
        return estimate(x, inputs)


def to_network_units(net: pretrained.Model, x: np.ndarray) -> np.ndarray:
    """Converts examples [N, ...] of a source, gray levels or numbers in data units."""
    return to_model_range(x) if net.levels is not None else data.to_model_units(x, net.normalizations.get("x"))


def read_inputs(net: pretrained.Model, batch: Mapping[str, np.ndarray]) -> np.ndarray:
    """Returns what the network gets beside x_t, [N, K]: the classes as one-hot vectors, and the conditions in data units."""
    count = len(batch_examples(batch))
    labels = np.eye(net.num_classes)[batch["label"]] if net.num_classes else np.zeros((count, 0))
    conditions = read_conditions(batch)["condition"] if net.condition_shape is not None else np.zeros((count, 0))
    return np.concatenate([labels, conditions.reshape(count, -1)], axis=1)


@contextlib.contextmanager
def _warnings_as_notes() -> Iterator[None]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        yield
    for warning in caught:
        log(f"Note: {warning.message}.")


def log_fit(values: np.ndarray, residual: float, problem: Problem) -> None:
    """Logs chi-squared per measured number and the solver's residual, with notes if one is too large."""
    found, count = float(np.mean(values)), problem.num_measured
    log(
        f"Chi-squared per measured number ({count:,} numbers): {found:.3g}, about 1 if the samples explain the measurement."
    )
    if found > max(2.0, 1 + 5 * (2 / count) ** 0.5):
        log(
            f"Note: chi-squared is far above 1, so this model cannot explain the measurement with editing.noise="
            f"{problem.options.noise}, or the sampler has not converged; use a larger noise or more sampling.steps."
        )
    log_residual(residual)


def log_residual(residual: float) -> None:
    """Logs the residual of the solver in mmps, with a note if it is large; nothing without a solver."""
    if residual:
        log(
            f"Residual of the linear system, relative to the measurement's misfit in units of the noise: {residual:.2g}."
        )
    if residual > _RESIDUAL:
        log(
            "Note: the solver has not converged, so the samples are not those of the posterior; use more editing.iterations "
            "or editing.covariance=data."
        )
