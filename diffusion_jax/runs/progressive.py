"""`--mode=progressive`: rate and distortion of progressive coding (DDPM section 4.3).

Writes progressive.csv (rate and distortion at every step), progressive.png (x_0 as predicted while samples are denoised,
figure 6) and progressive_coding.png (x_0 as predicted from examples of the data with less and less noise).
"""

from __future__ import annotations

import csv
import io
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from diffusion_jax import data, pictures, process
from diffusion_jax.config import is_continuous, resolve, resolve_clip
from diffusion_jax.distributed import compiler
from diffusion_jax.errors import as_user_error
from diffusion_jax.files import write_text
from diffusion_jax.images import to_model_range, to_uint8
from diffusion_jax.runs.batch_sampler import SampleTrajectory, picture_steps, sample_trajectory
from diffusion_jax.runs.console import log
from diffusion_jax.runs.measure_likelihood import LikelihoodRun, Terms, noun_of, rate_distortion
from diffusion_jax.runs.sampling_setup import SamplingSetup

__all__ = ["run"]

_EXAMPLES, _COLUMNS = 64, 12  # of the table, and of the pictures
_LOGGED_ROWS, _PICTURED_ROWS = 11, 4


def run(config: ConfigDict, workdir: pathlib.Path, source: data.Source | None = None) -> None:
    """Writes the table and the pictures.

    source: examples that take the place of `evaluation.split`, in the units of the data.
    Raises: UserError, DataError, PretrainedError.
    """
    config = resolve(config)
    likelihood_run = LikelihoodRun(config, workdir, source)
    options, trained = config.evaluation, likelihood_run.trained
    with as_user_error("config.sampling"):
        setup = SamplingSetup(config, trained.model, trained.schedule, trained.mesh, trained.class_names)
        # Samples have the conditions of the examples of the other picture.
        setup.conditions = _first_examples(likelihood_run).get("condition")
    num_examples = min(_EXAMPLES, len(likelihood_run.source))
    weights = f"the {trained.weights_kind} weights of step {trained.step}"
    log(f"Measuring rate and distortion of {num_examples} {noun_of(config)} with {weights}.")
    terms, chunks = likelihood_run.measure(num_examples, ode=False)
    if jax.process_index() != 0:
        return
    _write_table(workdir / "progressive.csv", terms, trained.schedule.timesteps, is_continuous(config))
    log("Compiling the programs of the pictures ...")
    trajectory = sample_trajectory(
        jax.random.key(options.seed),
        config,
        setup,
        trained.params,
        _COLUMNS,
        _PICTURED_ROWS,
        show="x_0",
        normalization=trained.normalizations.get("x"),
    )
    picture = pictures.draw_trajectory(trajectory.x, trajectory.times, "x_0 predicted from samples at x_t")
    pictures.save(workdir / "progressive.png", picture)
    trajectory = _code_examples(likelihood_run)
    title = "x_0 predicted from noised examples of the data"
    picture = pictures.draw_trajectory(trajectory.x, trajectory.times, title, last="example")
    pictures.save(workdir / "progressive_coding.png", picture)
    chunks.delete()
    log(f"Written to {workdir}: progressive.csv, progressive.png, progressive_coding.png")


def _write_table(path: pathlib.Path, terms: Terms, times: np.ndarray, continuous: bool) -> None:
    """A row for each x_t that is transmitted, from the noisiest to x_0; a few rows are logged.

    Continuous data are measured in nats, and x_0 itself is left out: no finite code transmits it.
    """
    unit, scale, space = ("nats", math.log(2), "standardized") if continuous else ("bits", 1.0, "0_255")
    rate, distortion = rate_distortion(terms, continuous)
    table = [(t + 1, times[t], scale * rate[t], distortion[t]) for t in reversed(range(len(rate)))]
    if not continuous:
        table.append((0, 0.0, terms.examples["total"].mean(), 0.0))  # the decoder makes the code lossless
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("known_x_t", "network_time", f"rate_{unit}_per_dim", f"rmse_{space}"))
    writer.writerows((t, f"{time:g}", f"{rate:.6f}", f"{rmse:.6g}") for t, time, rate, rmse in table)
    write_text(path, text.getvalue())
    log(f"     known   {unit}/dim   RMSE ({space.replace('_', '-')})")
    for i in np.unique(np.linspace(0, len(table) - 1, _LOGGED_ROWS).round().astype(int)):
        t, _, rate, rmse = table[i]
        log(f"{'x_' + str(t):>10}   {rate:8.4f}   {rmse:8.4g}")


def _first_examples(likelihood_run: LikelihoodRun) -> dict[str, np.ndarray]:
    return likelihood_run.read(np.arange(min(_PICTURED_ROWS, len(likelihood_run.source))))


def _code_examples(likelihood_run: LikelihoodRun) -> SampleTrajectory:
    """x_0 as predicted from examples of the data with less and less noise, and at last these examples."""
    config, schedule = likelihood_run.config, likelihood_run.trained.schedule
    batch = _first_examples(likelihood_run)
    # The clip of images is that of DDPM's figure.
    continuous, clip = is_continuous(config), not is_continuous(config) or bool(resolve_clip(config, "evaluation"))
    params = jax.device_get(likelihood_run.params)  # one process draws this, on one device
    steps = picture_steps(schedule, _COLUMNS - 1)[::-1]

    def predict(params, x_0, batch):
        def at_step(t):
            index = jnp.full(x_0.shape[:1], t)
            eps = jax.random.normal(jax.random.fold_in(jax.random.key(config.evaluation.seed), t), x_0.shape)
            x_t = process.q_sample(schedule, x_0, index, eps)
            output = likelihood_run.denoise_fn(params, batch)(x_t, process.lookup(schedule.timesteps, index, index))
            diffusion = config.diffusion
            arguments = (schedule, output, x_t, index, diffusion.prediction, diffusion.variance)
            return process.p_mean_variance(*arguments, clip=clip).x_0

        return jax.lax.map(at_step, jnp.asarray(steps, jnp.int32))

    x_0 = batch["x"] if continuous else to_model_range(batch["image"])
    predicted = jax.jit(predict, compiler_options=compiler.options())(params, x_0, batch)
    if continuous:
        x = np.concatenate([predicted, x_0[None]])
        x = data.to_data_units(x, likelihood_run.trained.normalizations.get("x"))
    else:
        x = np.concatenate([np.asarray(to_uint8(predicted)), batch["image"][None]])
    return SampleTrajectory(x, np.asarray(schedule.timesteps)[steps])
