"""`--mode=sample`: samples drawn from a trained model."""

from __future__ import annotations

import pathlib

import jax
from ml_collections import ConfigDict

from diffusion_jax import data, pictures
from diffusion_jax.config import resolve
from diffusion_jax.files import save_npz
from diffusion_jax.runs.batch_sampler import sample_trajectory
from diffusion_jax.runs.console import log
from diffusion_jax.runs.sample_files import SampleFile
from diffusion_jax.runs.workdir import write_config_if_untrained

__all__ = ["run"]

_ROWS, _POINTS = 4, 400  # of the picture of denoising; vectors are points


def run(config: ConfigDict, workdir: pathlib.Path) -> SampleFile:
    """Writes an .npz of samples and a PNG grid; with `sampling.trajectory` the first of them, being denoised, as both.

    A rerun of an interrupted command continues after the last finished batch. Raises: UserError, DataError, PretrainedError.
    """
    config = resolve(config)
    file = SampleFile(config, workdir)
    write_config_if_untrained(config, workdir)
    file.draw()
    if config.sampling.trajectory and jax.process_index() == 0:
        log("Compiling the sampler of the trajectory ...")
        is_of_vectors = len(data.example_shape(config.data)) == 1
        trajectory = sample_trajectory(
            jax.random.fold_in(jax.random.key(config.sampling.seed), 0),  # of the first batch of the file
            config,
            file.setup,
            file.trained.params,
            config.sampling.trajectory,
            rows=min(_POINTS if is_of_vectors else _ROWS, file.batch_size, config.sampling.num_samples),
            normalization=file.trained.normalizations.get("x"),
        )
        path = file.path.with_name(f"{file.name}_trajectory.png")
        captions = file.captions(trajectory.x.shape[1])
        title = f"The first samples of {file.name}, being denoised"
        pictures.save(path, pictures.draw_trajectory(trajectory.x, trajectory.times, title, captions))
        frames = {
            "x_t": trajectory.x[:-1],
            "x_0": trajectory.x_0,
            "times": trajectory.times,
            "samples": trajectory.x[-1],
        }
        save_npz(path.with_suffix(".npz"), frames)
        log(f"Samples being denoised: {path}")
    return file
