"""`--mode=sample`: draws samples from a trained model in batches, and reuses existing sample files."""

from __future__ import annotations

import dataclasses
import os

import jax
import numpy as np
from ml_collections import ConfigDict

import diffusion_jax
from diffusion_jax import pictures, schedules
from diffusion_jax.config import is_continuous, resolve
from diffusion_jax.console import log
from diffusion_jax.distributed import sharding
from diffusion_jax.distributed.processes import broadcast_from_process_0
from diffusion_jax.errors import as_user_error
from diffusion_jax.provenance import Provenance
from diffusion_jax.run_dir import ChunkStore, RunDir, open_run_dir
from diffusion_jax.runs.sampling import (
    FILES,
    check_finite,
    draw,
    draw_batch,
    resolve_sampling,
    to_examples,
    write_examples,
)
from diffusion_jax.runs.workdir import load_weights, open_model, write_config_if_untrained

__all__ = ["SampleFile", "picture_steps", "run"]

_TRAJECTORY_ROWS, _TRAJECTORY_POINTS = 4, 400  # samples in the denoising picture; vectors are points
_MAX_IMAGES_IN_GRID = 256
_MAX_PIXELS_AS_TEXT, _TEXT_COLUMNS = 12, 72  # wider images do not fit into a terminal


def run(config: ConfigDict, workdir: RunDir | str | os.PathLike) -> SampleFile:
    """Writes samples as an .npz and a PNG grid; with `sampling.trajectory`, also the first samples being denoised.

    After an interruption, the same command continues after the last finished batch.
    Raises: UserError, DataError, PretrainedError.
    """
    config, workdir = resolve(config), open_run_dir(workdir)
    file = SampleFile(config, workdir)
    write_config_if_untrained(config, workdir)
    file.draw()
    if config.sampling.trajectory and jax.process_index() == 0:
        _write_trajectory(file)
    return file


class SampleFile:
    """The samples of a config: PATH.npz with the samples, and PATH.png with a picture.

    The .npz has arr_0, uint8 [N, *spatial, C], or float32 in data units for continuous data; arr_1, the labels, and
    condition, the conditions in data units, if there are any; provenance.

    path: the .npz. net: the model. settings: from `config.sampling`. provenance: everything that decides the values.
    """

    def __init__(self, config: ConfigDict, workdir: RunDir | str | os.PathLike, conditions: np.ndarray | None = None):
        """Checks the config, then loads the weights.

        conditions: [N, ...] in data units, replaces `sampling.conditions`.
        Raises: UserError, DataError, PretrainedError.
        """
        self.workdir = open_run_dir(workdir)
        options, net = config.sampling, open_model(config, self.workdir)
        with as_user_error("config"):
            self.settings = resolve_sampling(config, net, conditions)
        for note in self.settings.notes:
            log(f"Note: {note}.")
        self.config, self.net = config, load_weights(net, config, self.workdir, options.use_ema)
        self.batch_size = -(-min(options.batch_size, options.num_samples) // net.num_devices) * net.num_devices
        self.provenance = Provenance(
            f"{self.net.provenance.name}_{self.settings.name}_seed{options.seed}_n{options.num_samples}",
            self.settings.provenance(self.net) | {"batch_size": self.batch_size},
            {
                "diffusion_jax": diffusion_jax.__version__,
                "jax": jax.__version__,
                "backend": jax.default_backend(),
                **self.net.provenance.details,
                **{setting: options[setting] for setting in FILES if options[setting]},
            },
        )
        self.path = self.workdir / "samples" / f"{self.provenance.name}.npz"

    def draw(self, reuse: bool = False) -> None:
        """Draws the samples and writes the files. Each batch is stored, so that a rerun continues after the last batch.

        reuse: if the file already holds samples with these settings, do nothing.
        """
        reason = broadcast_from_process_0(self._find_difference)
        if reuse and reason is None:
            return
        if reason:
            log(f"Sampling again: {self.path} {reason}.")
        options, noun = self.config.sampling, "examples" if is_continuous(self.config) else "images"
        name, kind = self.net.provenance.name, str(self.net.weights)
        weights = f"{name.removesuffix(f'_{kind}')} ({kind.replace('ema', 'EMA')} weights)"
        log(f"Sampling {options.num_samples} {noun} from {weights}.")
        name = f"samples/.{self.provenance.name}_{self.provenance.digest}"
        chunks = ChunkStore(self.workdir.subdirectory(name))

        def compute(i: int) -> dict[str, np.ndarray]:
            with as_user_error("config"):  # some errors occur only when the sampler is traced
                samples = draw_batch(self.net, self.settings, options.seed, i, self.batch_size)
            check_finite(samples)
            return {"images": samples}

        stall_timeout = self.config.training.stall_timeout
        num_batches = chunks.fill("Sampling", options.num_samples, self.batch_size, compute, stall_timeout)
        if jax.process_index() == 0:
            samples = np.concatenate([chunks.load(i)["images"] for i in range(num_batches)])[: options.num_samples]
            self._write(samples)
            chunks.delete()
            if pictures.is_of_images(samples) and samples.shape[2] <= _MAX_PIXELS_AS_TEXT:
                log(pictures.as_text(samples[: _TEXT_COLUMNS // samples.shape[2]]))
            log(f"{len(samples)} {noun}: {self.path}, a picture: {self.path.with_suffix('.png')}")

    def _find_difference(self) -> str | None:
        """Explains why the file must be drawn again; returns "" if there is no file, None if it has these settings."""
        if not self.workdir.fetch(self.path).exists():
            return ""
        stored = Provenance.read(self.path)
        if stored is None:
            return "does not store the settings of its samples"
        differences = self.provenance.differences(stored)
        return f"was drawn with other settings ({differences})" if differences else None

    def _write(self, samples: np.ndarray) -> None:
        rows = self.settings.arguments(np.arange(len(samples)))
        # The samples come first, for programs that read the first array.
        arrays = {"arr_0": samples, "arr_1": rows["y"], "condition": rows["condition"]}
        shown = samples[:_MAX_IMAGES_IN_GRID] if pictures.is_of_images(samples) else samples
        captions = self.settings.captions(len(shown))
        picture = pictures.draw_samples(shown, f"Samples: {self.provenance.name}", captions)
        write_examples(self.workdir, "samples", self.provenance, arrays, picture)


# ---- Samples being denoised


def _write_trajectory(file: SampleFile) -> None:
    """Writes the first samples being denoised: pictures of x_t and of the predicted x_0, and an .npz with both.

    The .npz has x_t and x_0 [steps, rows, *spatial, C], the noisiest first, where x_0 is the network's prediction at each
    step (DDPM figure 6); times, the network times; samples [rows, *spatial, C], equal to the file's samples up to rounding.
    """
    log("Compiling the sampler of the trajectory ...")
    options = file.config.sampling
    rows = _TRAJECTORY_POINTS if len(file.net.example_shape) == 1 else _TRAJECTORY_ROWS
    rows = min(rows, file.batch_size, options.num_samples)
    steps = picture_steps(file.settings.schedule, options.trajectory - 1)
    mesh = sharding.one_device_mesh()  # only process 0 draws the trajectory
    settings, net = file.settings, file.net.on_mesh(mesh)
    if settings.classifier is not None:
        settings = dataclasses.replace(settings, classifier=settings.classifier.on_mesh(mesh))
    key = jax.random.fold_in(jax.random.key(options.seed), 0)  # the key of the file's first batch
    samples, frames = draw(net, settings, key, np.arange(rows), trajectory=steps)
    arrays = {"x_t": to_examples(net, frames.x_t), "x_0": to_examples(net, frames.x_0)}
    arrays |= {"times": settings.schedule.timesteps[steps[::-1]], "samples": to_examples(net, samples)}

    def draw_picture(frames: str, what: str):
        x = np.concatenate([arrays[frames], arrays["samples"][None]])
        title = f"The first samples of {file.provenance.name}, {what}"
        return pictures.draw_trajectory(x, arrays["times"], title, settings.captions(rows))

    picture = draw_picture("x_t", "being denoised")
    path = write_examples(file.workdir, "samples/trajectories", file.provenance, arrays, picture)
    path_of_x_0 = path.with_name(f"{path.stem}_x_0.png")
    pictures.save(path_of_x_0, draw_picture("x_0", "as predicted while they are denoised"))
    file.workdir.upload(path_of_x_0)
    log(f"Samples being denoised: {path.with_suffix('.png')}")


def picture_steps(schedule: schedules.Schedule, count: int) -> np.ndarray:
    """Returns at most `count` increasing indices of a schedule, evenly spaced in alpha_bar, including the last index.

    The amount of signal changes equally between neighbors. Evenly spaced indices would mostly show noise, or the finished
    image, in schedules that take many steps there.
    """
    alpha_bar = np.asarray(schedule.alpha_bar, np.float64)
    wanted = alpha_bar[-1] + (1 - alpha_bar[-1]) * np.arange(count) / count
    return np.unique(np.abs(alpha_bar - wanted[:, None]).argmin(axis=1))
