"""`Problem`: the measurement that `config.editing` describes, and samples of x_0 given its values.

`--mode=edit` draws samples for one measurement, and `evaluation.metrics=calibration` for many simulated measurements.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from diffusion_jax import data, editing, posterior, pretrained
from diffusion_jax.config.rules import edit_method
from diffusion_jax.console import log
from diffusion_jax.errors import as_user_error
from diffusion_jax.measurements import LinearOperator, Measurement
from diffusion_jax.runs.sampling_setup import SamplingSetup, load_arrays
from diffusion_jax.sampling.driver import is_batch_of_keys, split

_GRAY_LEVEL = 127.5  # network units are levels / 127.5 - 1


@dataclasses.dataclass(frozen=True)
class Problem:
    """The measurement that `config.editing` describes, in network units and in data units.

    noise: the standard deviation in network units, a number or an array that broadcasts to y: [C], but [C, 1] for fourier and
    [1] for colorize. scale, shift: y in data units is scale * y + shift.
    """

    options: ConfigDict
    method: str
    net: pretrained.Model
    operator: LinearOperator
    noise: Any
    scale: np.ndarray
    shift: np.ndarray

    @classmethod
    def from_config(cls, config: ConfigDict, net: pretrained.Model, mask: np.ndarray | None = None) -> Problem:
        """Builds the measurement of a config. mask: from `runs.edit.EditFiles.read_mask`. Raises: UserError."""
        options, shape, task = config.editing, net.example_shape, config.editing.task
        array = load_arrays("editing.operator", options.operator) if options.operator else None
        arguments = {**options.to_dict(), "mask": mask, "array": array}
        make = editing.MEASUREMENTS[task]
        with as_user_error(f"editing.operator={options.operator!r}" if options.operator else "config.editing"):
            needed = [name for name in inspect.signature(make).parameters if name != "shape"]
            operator = make(shape, **{name: arguments[name] for name in needed})
            operator.check(shape)
            of_ones = np.asarray(operator.measure(jnp.ones((1, *shape))), np.float64)[0]
        found = net.normalizations.get("x")
        offset, scale = (0.0, 1.0) if found is None else (found.offset, found.scale)
        if net.levels is not None:
            offset = scale = _GRAY_LEVEL
        offset, scale = (np.broadcast_to(np.asarray(each, np.float64), shape[-1:]) for each in (offset, scale))
        if task == "fourier":  # real and imaginary parts
            offset, scale = offset[:, None], scale[:, None]
        elif task == "colorize":
            offset, scale = offset[:1], scale[:1]
        noise = (options.noise / scale).astype(np.float32) if options.noise else 0.0
        return cls(options, edit_method(options) or "", net, operator, noise, scale, of_ones * offset)

    @property
    def y_shape(self) -> tuple[int, ...]:
        """The shape of y for one example."""
        return self.shift.shape

    @property
    def num_measured(self) -> int:
        """The number of measured numbers in y."""
        measured = self.operator.squared_norms(jnp.zeros((1, *self.net.example_shape))) > 0
        return int(np.broadcast_to(measured, self.y_shape).sum())

    def to_network(self, y: np.ndarray) -> np.ndarray:
        """Converts y [N, ...] from data units to float32 network units."""
        return ((y - self.shift) / self.scale).astype(np.float32)

    def to_data(self, y: np.ndarray) -> np.ndarray:
        """Converts y [N, ...] from network units to data units."""
        return np.asarray(y, np.float64) * self.scale + self.shift

    def simulate(self, x_0: np.ndarray, indices: np.ndarray) -> np.ndarray:
        """Measures examples [N, ...] in network units, with noise that depends on the index of an example alone."""
        y = np.asarray(self.operator.measure(jnp.asarray(x_0)))
        draws = [np.random.default_rng([int(i), 45]).standard_normal(self.y_shape) for i in indices]
        return (y + self.noise * np.stack(draws)).astype(np.float32)

    def show(self, y: np.ndarray) -> np.ndarray:
        """Converts y, in data units, for pictures: if possible to [*spatial, C], with NaN where nothing is measured."""
        if self.options.task in ("deblur", "tomography"):
            return y
        adjoint = self.operator.adjoint(jnp.zeros((1, *self.net.example_shape)))
        if self.options.task == "fourier":  # a coefficient counts twice if y leaves out its conjugate
            column, size = np.arange(y.shape[-3]), self.net.image_size[-1]
            is_known = np.asarray(self.operator.diagonal)[..., 0, 0] > 0
            axes = tuple(range(is_known.ndim - 1))
            conjugate = np.roll(np.flip(is_known, axes), 1, axes)  # of a coefficient in the first or last column
            y = np.where((column > 0) & (2 * column < size), 2, 2 - conjugate)[..., None, None] * y
        spread, weight = (np.asarray(adjoint(jnp.asarray(each, jnp.float32)[None]))[0] for each in (y, np.ones_like(y)))
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

    def num_drawn(self, count: int) -> int:
        """Returns how many samples are drawn to get `count` samples for a row of y; smc chooses among its particles."""
        return max(self.options.particles, count) if self.method == "smc" else count

    def draw(self, setup: SamplingSetup, y: np.ndarray, count: int, key: jax.Array) -> np.ndarray:
        """Draws `count` samples for each row of y [N, ...], in network units; row i uses row i of the setup's conditions.

        key: one key, or a key for each drawn sample: num_drawn * N keys, flattened from [num_drawn, N].
        Returns: [count, N, ...], images in [-1, 1], continuous data in data units. Raises: UserError.
        """
        options, rows = self.options, len(y)
        indices = np.arange(self.num_drawn(count) * rows)
        repeated = self._repeat(y, count)
        scale = self.net.sigma_data or 1.0
        iterations = {} if options.iterations is None else {"iterations": options.iterations}
        with as_user_error("config.editing"):
            if self.method == "smc":
                repeated.check()  # here, because traced values in the compiled program cannot be checked
                x = setup.generate(key, indices, algorithm=_Smc(self._repeat(y, 1), count, scale))
            elif self.method == "dps":
                sampler = posterior.dps(setup.sampler, repeated, options.zeta)
                x = dataclasses.replace(setup, sampler=sampler).generate(key, indices)
            else:
                wrap = {
                    "mmps": functools.partial(posterior.mmps, **iterations),
                    "pigdm": functools.partial(posterior.pigdm, data_std=scale, **iterations),
                    "project": editing.project,
                }[self.method]
                x = setup.generate(key, indices, wrap=lambda denoiser: wrap(denoiser, repeated))
        return np.asarray(x).reshape(count, rows, *self.net.example_shape)


def log_chi_squared(values: np.ndarray, problem: Problem) -> None:
    """Logs chi-squared per measured number, and a note if the samples do not explain the measurement."""
    found, count = float(np.mean(values)), problem.num_measured
    log(
        f"Chi-squared per measured number ({count:,} numbers): {found:.3g}, about 1 if the samples explain the measurement."
    )
    if found > max(2.0, 1 + 5 * (2 / count) ** 0.5):
        log(
            f"Note: chi-squared is far above 1, so this model cannot explain the measurement with editing.noise="
            f"{problem.options.noise:g}, or {problem.method} has not converged; use a larger noise, more sampling.steps, or "
            "more editing.iterations."
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Smc:
    """An algorithm for `pretrained.Model.draw`: draws `count` samples for each row of y from the particles of `smc`."""

    measurement: Measurement
    count: int = dataclasses.field(metadata={"static": True})
    data_std: float = dataclasses.field(metadata={"static": True})

    def __call__(self, key, schedule, denoiser, x_T, sampler) -> Any:
        rows = len(self.measurement.y)
        keys = key[:rows] if is_batch_of_keys(key) else jax.random.split(key, rows)
        x_T, (keys_run, keys_draw) = x_T.reshape(-1, rows, *x_T.shape[1:]), split(keys)
        found = posterior.smc(keys_run, schedule, denoiser, self.measurement, x_T, data_std=self.data_std)
        resample = functools.partial(posterior.systematic_resample, count=self.count)
        chosen = jax.vmap(resample, (0, 1), 1)(keys_draw, found.weights)
        x = jnp.take_along_axis(found.x_0, chosen.reshape(*chosen.shape, *[1] * (x_T.ndim - 2)), axis=0)
        return x.reshape(-1, *x.shape[2:])
