"""`--mode=sample`: samples drawn from a trained model in batches, and files of samples that are reused."""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import zipfile
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

import diffusion_jax
from diffusion_jax import data, pictures
from diffusion_jax.config import flatten, is_continuous, resolve, resolve_clip
from diffusion_jax.distributed.processes import broadcast_from_process_0
from diffusion_jax.errors import as_user_error, shorten
from diffusion_jax.files import save_npz
from diffusion_jax.run_dir import RunDir, open_run_dir
from diffusion_jax.runs.chunk_store import ChunkStore, options_digest
from diffusion_jax.runs.console import log
from diffusion_jax.runs.sampling_conditions import condition_captions, read_conditions, read_small_images
from diffusion_jax.runs.sampling_setup import LEAVES_WITHOUT_EFFECT, BatchSampler, check_finite, sample_trajectory
from diffusion_jax.runs.trained_model import TrainedModel, params_digest
from diffusion_jax.runs.workdir import to_dict, write_config_if_untrained

__all__ = ["SampleFile", "read_settings", "run"]

_FILES = ("classifier", "low_resolution", "conditions")  # leaves of `config.sampling`, compared by their contents
_TRAJECTORY_ROWS, _TRAJECTORY_POINTS = 4, 400  # of the picture of denoising; vectors are points
_MAX_IMAGES_IN_GRID = 256
_MAX_PIXELS_AS_TEXT, _TEXT_COLUMNS = 12, 72  # wider images do not fit into a terminal


def run(config: ConfigDict, workdir: RunDir | str | os.PathLike) -> SampleFile:
    """Writes an .npz of samples and a PNG grid; with `sampling.trajectory` the first of them, being denoised, as both.

    A rerun of an interrupted command continues after the last finished batch. Raises: UserError, DataError, PretrainedError.
    """
    config, workdir = resolve(config), open_run_dir(workdir)
    file = SampleFile(config, workdir)
    write_config_if_untrained(config, workdir)
    file.draw()
    if config.sampling.trajectory and jax.process_index() == 0:
        _write_trajectory(file)
    return file


def _write_trajectory(file: SampleFile) -> None:
    """Writes the first samples being denoised: pictures of x_t and of the predicted x_0, and an .npz of both."""
    log("Compiling the sampler of the trajectory ...")
    options = file.config.sampling
    rows = _TRAJECTORY_POINTS if len(data.example_shape(file.config.data)) == 1 else _TRAJECTORY_ROWS
    rows = min(rows, file.batch_size, options.num_samples)
    key = jax.random.fold_in(jax.random.key(options.seed), 0)  # of the first batch of the file
    arrays = sample_trajectory(key, file.setup, file.trained.params, options.trajectory, rows)
    path = file.path.with_name(f"{file.name}_trajectory.png")
    for frames, name, what in (
        ("x_t", path.name, "being denoised"),
        ("x_0", f"{path.stem}_x_0.png", "as predicted while they are denoised"),
    ):
        x, title = (
            np.concatenate([arrays[frames], arrays["samples"][None]]),
            f"The first samples of {file.name}, {what}",
        )
        picture = pictures.draw_trajectory(x, arrays["times"], title, file.captions(rows))
        pictures.save(path.with_name(name), picture)
        file.workdir.upload(path.with_name(name))
    save_npz(path.with_suffix(".npz"), arrays)
    file.workdir.upload(path.with_suffix(".npz"))
    log(f"Samples being denoised: {path}")


class SampleFile:
    """The samples of a config: PATH.npz and PATH.png, a picture of them.

    The .npz has arr_0, uint8 [N, *spatial, C], or float32 in the units of continuous data; arr_1, the labels, and condition,
    the conditions in the units of the data, if there are any; settings.

    path: the .npz. settings: everything that decides the values. setup: the options of sampling.
    """

    def __init__(self, config: ConfigDict, workdir: RunDir | str | os.PathLike, conditions: np.ndarray | None = None):
        """Loads the weights, after all checks of the config.

        conditions: [N, ...] in the units of the data, in place of `sampling.conditions`.
        Raises: UserError, DataError, PretrainedError.
        """
        options, self.workdir = config.sampling, open_run_dir(workdir)
        self.config, self.trained = config, TrainedModel.open(config, self.workdir, options.use_ema)
        trained = self.trained
        with as_user_error("config"):
            devices = trained.mesh.size
            self.batch_size = -(-min(options.batch_size, options.num_samples) // devices) * devices
            self.conditions = read_conditions(config) if conditions is None else conditions
            self.setup = trained.sampling_setup(self.conditions)
            images, labels = read_small_images(config)
            if images is not None:
                self.setup.set_small_images(images, labels)
        for note in self.setup.notes:
            log(f"Note: {note}.")
        self.name = (
            f"{trained.weights_name}_{trained.weights_kind}_{self.setup.name}_seed{options.seed}_n{options.num_samples}"
        )
        self.path = self.workdir / "samples" / f"{self.name}.npz"
        self.settings = self._settings({"images": images, "labels": labels})

    def draw(self, reuse: bool = False) -> None:
        """Draws the samples and writes the files. Every batch is kept, so that a rerun continues after the last one.

        reuse: does nothing if the file already holds samples of these settings.
        """
        reason = broadcast_from_process_0(lambda: _why_not_reused(self.workdir.fetch(self.path), self.settings))
        if reuse and reason is None:
            return
        if reason:
            log(f"Sampling again: {self.path} {reason}.")
        options, batch_size = self.config.sampling, self.batch_size
        kind, noun = self.trained.weights_kind, "examples" if is_continuous(self.config) else "images"
        weights = f"{self.trained.weights_name} ({kind.replace('ema', 'EMA')} weights)"
        log(f"Sampling {options.num_samples} {noun} from {weights}.")
        chunks = ChunkStore(self.workdir.subdirectory(f"samples/.{self.name}_{options_digest(self.settings)}"))
        batch_sampler = BatchSampler(self.setup, batch_size)

        def draw_batch(i: int) -> dict[str, np.ndarray]:
            with as_user_error("config"):  # for errors that occur only when the sampler is traced
                samples = batch_sampler(self.trained.params, options.seed, i)
            check_finite(samples)
            return {"images": samples}

        stall_timeout = self.config.training.stall_timeout
        num_batches = chunks.fill("Sampling", options.num_samples, batch_size, draw_batch, stall_timeout)
        if jax.process_index() == 0:
            samples = np.concatenate([chunks.load(i)["images"] for i in range(num_batches)])[: options.num_samples]
            self._write(samples)
            chunks.delete()
            if pictures.is_of_images(samples) and samples.shape[2] <= _MAX_PIXELS_AS_TEXT:
                log(pictures.as_text(samples[: _TEXT_COLUMNS // samples.shape[2]]))
            log(f"{len(samples)} {noun}: {self.path}, a picture: {self.path.with_suffix('.png')}")

    def captions(self, count: int) -> list[str] | None:
        """The classes or short conditions of the first samples; None if they have neither."""
        indices = np.arange(count)
        conditions = None if self.conditions is None else self.conditions[indices % len(self.conditions)]
        return self.setup.class_captions(indices) or condition_captions(conditions)

    def _settings(self, small: Mapping[str, np.ndarray | None]) -> dict[str, Any]:
        """Everything that decides the pixels, except rounding, as JSON values. small: images that an upsampler enlarges."""
        config, setup = self.config, self.setup
        options = to_dict(config)
        sampling = {
            key: value
            for key, value in options["sampling"].items()
            if key not in LEAVES_WITHOUT_EFFECT and key not in _FILES
        }
        sampling["clip"] = resolve_clip(config)
        if config.sampling.label is not None and setup.classes is not None:  # a name and a number may be of one class
            sampling["label"] = list(setup.classes)
        return {
            "weights_digest": params_digest(self.trained.params),
            "classifier_digest": None if setup.classifier_params is None else params_digest(setup.classifier_params),
            "conditions_digest": _digest(self.conditions),
            "low_resolution_digest": {name: _digest(array) for name, array in small.items()},
            "normalization": {name: value.to_json() for name, value in self.trained.normalizations.items()},
            "image_shape": list(data.example_shape(config.data)),
            "model": options["model"],
            "diffusion": options["diffusion"],
            "sampling": sampling,
            "batch_size": self.batch_size,
        }

    def _write(self, samples: np.ndarray) -> None:
        indices = np.arange(len(samples))
        labels = self.setup.label(indices)
        # The samples come first, for programs that read the first array.
        arrays = {"arr_0": samples} | ({} if labels is None else {"arr_1": labels})
        if self.conditions is not None:
            arrays["condition"] = self.conditions[indices % len(self.conditions)]
        versions = {
            "diffusion_jax": diffusion_jax.__version__,
            "jax": jax.__version__,
            "backend": jax.default_backend(),
        }
        files = {leaf: self.config.sampling[leaf] for leaf in _FILES if self.config.sampling[leaf]}
        stored = {"settings": self.settings, "drawn_with": versions | files}
        save_npz(self.path, arrays | {"settings": np.array(json.dumps(stored))})
        shown = samples[:_MAX_IMAGES_IN_GRID] if pictures.is_of_images(samples) else samples
        picture = pictures.draw_samples(shown, f"Samples: {self.name}", self.captions(len(shown)))
        pictures.save(self.path.with_suffix(".png"), picture)
        self.workdir.upload(self.path, self.path.with_suffix(".png"))


def _digest(array: np.ndarray | None) -> str | None:
    return None if array is None else hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def read_settings(path: pathlib.Path) -> dict[str, Any] | None:
    """{"settings": everything that decides the samples of an .npz, "drawn_with": versions}; None if it stores none."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return json.loads(str(arrays["settings"]))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def _why_not_reused(path: pathlib.Path, settings: Mapping[str, Any]) -> str | None:
    """Why a file does not hold the samples of these settings; "" if there is no file, None if it holds them."""
    if not path.exists():
        return ""
    stored = read_settings(path)
    if stored is None:
        return "does not store the settings of its samples"
    old, new = flatten(stored["settings"]), flatten(json.loads(json.dumps(settings)))
    differing = [key for key in new | old if old.get(key) != new.get(key)]
    changes = [f"{key}={shorten(str(old.get(key)), 40)}, now {shorten(str(new.get(key)), 40)}" for key in differing]
    return f"was drawn with other settings ({shorten('; '.join(changes), 300)})" if differing else None
