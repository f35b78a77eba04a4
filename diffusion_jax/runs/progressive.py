"""`--mode=progressive`: rate and distortion of progressive coding (DDPM section 4.3).

Writes progressive.csv (rate and distortion at every step), progressive.png (x_0 as predicted while samples are denoised,
figure 6) and progressive_coding.png (x_0 as predicted from real images with less and less noise).
"""

from __future__ import annotations

import csv
import io
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from diffusion_jax import process
from diffusion_jax.config import resolve
from diffusion_jax.distributed import compiler
from diffusion_jax.errors import as_user_error
from diffusion_jax.files import write_text
from diffusion_jax.images import to_model_range, to_uint8
from diffusion_jax.runs import pictures
from diffusion_jax.runs.batch_sampler import sample_trajectory
from diffusion_jax.runs.console import log
from diffusion_jax.runs.likelihood_terms import LikelihoodRun, Terms, rate_distortion
from diffusion_jax.runs.sample_pictures import draw_trajectory
from diffusion_jax.runs.sampling_setup import SamplingSetup

__all__ = ["run"]

_LOGGED_ROWS = 11


def run(config: ConfigDict, workdir: pathlib.Path) -> None:
    """Writes the table and the pictures. Raises: UserError, DataError, PretrainedError."""
    config = resolve(config)
    likelihood_run = LikelihoodRun(config, workdir)
    options, trained = config.evaluation, likelihood_run.trained
    with as_user_error("config.sampling"):
        setup = SamplingSetup(config, trained.model, trained.schedule, trained.mesh, trained.class_names)
    num_examples = min(options.progressive_examples, len(likelihood_run.source))
    weights = f"the {trained.weights_kind} weights of step {trained.step}"
    log(f"Measuring rate and distortion of {num_examples} images with {weights}.")
    terms, chunks = likelihood_run.measure(num_examples, ode=False)
    if jax.process_index() != 0:
        return
    _write_table(workdir / "progressive.csv", terms, trained.schedule.timesteps)
    log("Compiling the programs of the pictures ...")
    trajectory = sample_trajectory(
        jax.random.key(options.seed),
        config,
        setup,
        trained.params,
        options.progressive_columns,
        show="x_0",
    )
    pictures.save_png(workdir / "progressive.png", draw_trajectory(trajectory, "x_0 as predicted"))
    picture = _coding_picture(likelihood_run, options.progressive_columns)
    pictures.save_png(workdir / "progressive_coding.png", picture)
    chunks.delete()
    log(f"Written to {workdir}: progressive.csv, progressive.png, progressive_coding.png")


def _write_table(path: pathlib.Path, terms: Terms, times: np.ndarray) -> None:
    """A row for each x_t that is transmitted, from the noisiest to x_0; a few rows are logged."""
    rate, distortion = rate_distortion(terms)
    table = [(t + 1, times[t], rate[t], distortion[t]) for t in reversed(range(len(rate)))]
    table.append((0, 0.0, terms.examples["total"].mean(), 0.0))  # x_0 itself: the decoder makes the code lossless
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("known_x_t", "network_time", "rate_bits_per_dim", "rmse_0_255"))
    writer.writerows((t, f"{time:g}", f"{rate:.6f}", f"{rmse:.4f}") for t, time, rate, rmse in table)
    write_text(path, text.getvalue())
    log("     known   bits/dim   RMSE (0-255)")
    for row in np.unique(np.linspace(0, len(table) - 1, _LOGGED_ROWS).round().astype(int)):
        t, _, rate, rmse = table[row]
        log(f"{'x_' + str(t):>10}   {rate:8.4f}   {rmse:8.2f}")


def _coding_picture(likelihood_run: LikelihoodRun, columns: int, rows: int = 4) -> np.ndarray:
    """x_0 as predicted from real images with less and less noise, and the images at the right. uint8 [H, W, C]."""
    config, schedule = likelihood_run.config, likelihood_run.trained.schedule
    images, labels = likelihood_run.read(np.arange(min(rows, len(likelihood_run.source))))
    params = jax.device_get(likelihood_run.params)  # one process draws this, on one device
    steps = np.unique(np.linspace(schedule.num_timesteps - 1, 0, columns - 1).round().astype(int))[::-1]

    def predict(params, x_0, labels):
        def at_step(t):
            index = jnp.full(x_0.shape[:1], t)
            eps = jax.random.normal(jax.random.fold_in(jax.random.key(config.evaluation.seed), t), x_0.shape)
            x_t = process.q_sample(schedule, x_0, index, eps)
            output = likelihood_run.denoise_fn(params, labels)(x_t, process.lookup(schedule.timesteps, index, index))
            diffusion = config.diffusion
            return process.p_mean_variance(schedule, output, x_t, index, diffusion.prediction, diffusion.variance).x_0

        return jax.lax.map(at_step, jnp.asarray(steps, jnp.int32))

    predicted = jax.jit(predict, compiler_options=compiler.options())(params, to_model_range(images), labels)
    x_0 = np.concatenate([np.asarray(to_uint8(predicted)), images[None]]).swapaxes(0, 1)
    headers = pictures.time_headers(np.asarray(schedule.timesteps)[steps])
    return pictures.grid(x_0.reshape(-1, *images.shape[1:]), columns=len(steps) + 1, headers=headers)
