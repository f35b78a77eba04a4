"""Compiled sampling: batches of samples on all devices, and trajectories on one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from diffusion_jax import data, schedules
from diffusion_jax.config import is_continuous
from diffusion_jax.distributed import compiler, sharding
from diffusion_jax.errors import UserError
from diffusion_jax.images import to_uint8
from diffusion_jax.runs.sampling_setup import SamplingSetup

__all__ = ["BatchSampler", "SampleTrajectory", "check_finite", "picture_steps", "sample_trajectory"]


class BatchSampler:
    """Compiled sampling of a config, distributed over the devices: `batch_sampler(params, seed, batch)`.

    Batch i holds samples i B ... (i + 1) B - 1. normalization: of continuous data; samples are in the units of the data.
    """

    def __init__(
        self,
        config: Mapping,
        setup: SamplingSetup,
        mesh: Mesh,
        batch_size: int,
        normalization: data.Normalization | None = None,
    ):
        self.setup, self.batch_size = setup, batch_size
        self.normalization, continuous = normalization, is_continuous(config)
        shape, by_rows = (batch_size, *data.example_shape(config["data"])), sharding.batch_sharding(mesh)
        replicated = sharding.replicated(mesh)

        def constrain(x):
            return jax.lax.with_sharding_constraint(x, by_rows)

        def sample_batch(params, classifier_params, seed, batch, y, condition):
            # Sharded parameters of a run in progress are gathered once: every step needs all of them, and there are no
            # gradients or activations that would compete for the memory.
            params = jax.lax.with_sharding_constraint(params, replicated)
            y, condition = jax.tree.map(constrain, (y, condition))
            key = jax.random.fold_in(jax.random.key(seed), batch)
            x = setup.draw(params, classifier_params, key, shape, y, condition, constrain=constrain)
            return x if continuous else to_uint8(x)

        self._sample_batch = jax.jit(
            sample_batch,
            # None: parameters keep their own sharding.
            in_shardings=(None, *[replicated] * 5),
            out_shardings=by_rows,
            compiler_options=compiler.options(),
        )

    def __call__(self, params, seed: int, batch: int = 0) -> np.ndarray:
        """One batch, uint8 [B, *spatial, C], gathered on every process; float32 in the units of continuous data."""
        indices = batch * self.batch_size + np.arange(self.batch_size)
        y = self.setup.labels(indices)
        condition = self.setup.condition(indices)
        numbers = np.uint32(seed), np.int32(batch)
        samples = self._sample_batch(params, self.setup.classifier_params, *numbers, y, condition)
        samples = np.asarray(multihost_utils.process_allgather(samples, tiled=True))
        return data.to_data_units(samples, self.normalization)


def check_finite(samples: np.ndarray) -> None:
    """Raises: UserError for samples that are not finite; those of images are rounded to gray levels before."""
    if samples.dtype != np.uint8 and not np.isfinite(samples).all():
        raise UserError(
            "the samples have values that are not finite: use more sampling.steps, another sampling.sampler, or "
            "sampling.clip=True",
            exit_code=1,
        )


class SampleTrajectory(NamedTuple):
    """Samples being denoised. x: [columns, rows, *spatial, C], the noisiest first, uint8 or in the units of continuous data.

    times: the network times of the columns but the last, which holds the samples. x_0: the x_0 that the network predicts
    there [columns - 1, rows, *spatial, C], None if it is not known.
    """

    x: np.ndarray
    times: np.ndarray
    x_0: np.ndarray | None = None


def picture_steps(schedule: schedules.Schedule, count: int) -> np.ndarray:
    """At most `count` increasing indices of a schedule: its last one, and indices evenly spaced in alpha_bar.

    The share of the signal changes alike between neighbors. Even distances of the index would mostly show noise, or the
    finished image, in schedules that take many steps there.
    """
    alpha_bar = np.asarray(schedule.alpha_bar, np.float64)
    wanted = alpha_bar[-1] + (1 - alpha_bar[-1]) * np.arange(count) / count
    return np.unique(np.abs(alpha_bar - wanted[:, None]).argmin(axis=1))


def sample_trajectory(
    key,
    config: Mapping,
    setup: SamplingSetup,
    params,
    columns: int,
    rows: int | None = None,
    show: Literal["x_t", "x_0"] = "x_t",
    normalization: data.Normalization | None = None,
) -> SampleTrajectory:
    """Samples being denoised: x_t at up to `columns - 1` steps of `picture_steps`, from noise on, and x_0.

    key: that of a batch gives the first rows of this batch, up to rounding. rows: the number of samples; by default 4, or 400
    vectors, which are points of a picture. show: "x_0" for the x_0 predicted at those steps (DDPM figure 6). normalization:
    as in `BatchSampler`.
    """
    steps = picture_steps(setup.schedule, columns - 1)
    # One process draws this, on one device.
    params, classifier_params = jax.device_get((params, setup.classifier_params))
    shape = data.example_shape(config["data"])
    rows = rows or (400 if len(shape) == 1 else 4)
    shape, indices = (rows, *shape), np.arange(rows)

    def draw(params, classifier_params, key, y, condition):
        return setup.draw(params, classifier_params, key, shape, y, condition, trajectory=steps)

    draw = jax.jit(draw, compiler_options=compiler.options())
    x_0, trajectory = draw(params, classifier_params, key, setup.labels(indices), setup.condition(indices))

    def to_data(x):
        return data.to_data_units(x, normalization) if is_continuous(config) else np.asarray(to_uint8(x))

    x = np.concatenate([np.asarray(getattr(trajectory, show)), np.asarray(x_0)[None]])
    return SampleTrajectory(
        to_data(x), np.asarray(setup.schedule.timesteps)[steps[::-1]], to_data(np.asarray(trajectory.x_0))
    )
