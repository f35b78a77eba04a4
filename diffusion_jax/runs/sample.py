"""`--mode=sample`: draws samples from a trained model in batches.

`SampleFile` and `make_provenance` decide a sample file's name, and whether a finished file is reused.
"""

from __future__ import annotations

import dataclasses
import math
import os
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from diffusion_jax import data, pictures, pretrained, schedules
from diffusion_jax.config import SETTINGS, clips_by_default, is_identity, resolve
from diffusion_jax.console import CallCounter, log
from diffusion_jax.data.sources import read_conditions
from diffusion_jax.distributed import sharding
from diffusion_jax.distributed.processes import broadcast_from_process_0
from diffusion_jax.errors import UserError, as_user_error
from diffusion_jax.files import save_npz
from diffusion_jax.provenance import Provenance, array_digest, code_version, params_digest, settings_digest
from diffusion_jax.run_dir import ChunkStore, RunDir, open_run_dir
from diffusion_jax.runs.examples import draw_beside_examples, read_channels
from diffusion_jax.runs.sampling_setup import SamplingSetup, check_finite, keys_of_samples, resolve_sampling
from diffusion_jax.runs.workdir import open_model, to_dict, write_config_if_untrained
from diffusion_jax.untrusted import open_npz

_FILES = ("classifier", "low_resolution", "conditions")  # settings of `config.sampling` that name files
# Settings of `config.sampling` that a record omits, because the settings change no sample or the record has their result.
_SETTINGS_WITHOUT_EFFECT = ("preview_samples", "preview_steps", "trajectory", "batch_size", "use_ema", "files")
# Settings that the digest in file names omits: file names show them; `clip` is in the digest if it is not the default.
_NAMED_SETTINGS = ("sampler", "steps", "spacing", "label", "guidance_scale", "clip", "num_samples", "seed")
_MAX_CLASSES_IN_NAME = 40  # characters
_TRAJECTORY_ROWS, _TRAJECTORY_POINTS = 4, 400  # samples in the denoising picture: images, or vectors as points
_LOG_SNRS = -5.0, 3.0  # lowest and highest log SNR of the denoising picture's columns, besides the noisiest step
_MAX_IMAGES_IN_GRID = 256
_MAX_PIXELS_AS_TEXT = 12


def run(config: ConfigDict, workdir: RunDir | str | os.PathLike) -> SampleFile:
    """Writes samples as an .npz and a PNG picture.

    `sampling.trajectory` adds a picture of the first samples being denoised; `sampling.files=png` adds a file for each image.

    After an interruption, the same command continues after the last finished batch.
    Raises: UserError, DataError, PretrainedError.
    """
    config, workdir = resolve(config), open_run_dir(workdir)
    if config.sampling.files == "png" and not data.is_of_images(config.data):
        raise UserError("config.sampling.files=png is for images, which these data are not; use npz")
    file = SampleFile(config, workdir)
    write_config_if_untrained(config, workdir)
    file.write()
    if config.sampling.files == "png" and jax.process_index() == 0:
        _write_images(file)
    if config.sampling.trajectory and jax.process_index() == 0:
        _write_trajectory(file)
    return file


def _write_images(file: SampleFile) -> None:
    """Writes each image as a PNG in images/<name of the .npz>/, which reports do not read."""
    folder = file.workdir / "images" / file.path.stem
    folder.mkdir(parents=True, exist_ok=True)
    with open_npz(file.path, limit=math.inf) as arrays:
        images = arrays["arr_0"]
    paths = [folder / f"{i:05d}.png" for i in range(len(images))]
    for path, image in zip(paths, images, strict=True):
        pictures.save(path, image)
    file.workdir.upload(*paths)
    log(f"Single images: {folder}")


class SampleFile:
    """The samples of a config: PATH.npz with the samples, and PATH.png with a picture.

    The .npz has arr_0, uint8 [N, *spatial, C], or float32 in data units for continuous data, and the provenance. Samples with
    labels have them in arr_1; samples with conditions have condition (in data units) and optionally condition_missing.

    path: the .npz. setup: the model and the settings. provenance: everything that decides the values.
    """

    def __init__(
        self,
        config: ConfigDict,
        workdir: RunDir | str | os.PathLike,
        conditions: Mapping[str, np.ndarray] | None = None,
    ):
        """Checks the config, then loads the weights.

        conditions: replaces `sampling.conditions`, with the arrays of `SamplingSetup.conditions`.
        Raises: UserError, DataError, PretrainedError.
        """
        self.config, self.workdir = config, open_run_dir(workdir)
        options, net = config.sampling, open_model(config, self.workdir)
        with as_user_error("config"):
            setup = resolve_sampling(config, net, conditions)
        net = pretrained.load_weights(net, config, self.workdir, options.use_ema)
        self.setup = dataclasses.replace(setup, net=net)
        self.batch_size = -(-min(options.batch_size, options.num_samples) // net.num_devices) * net.num_devices
        provenance = make_provenance(self.setup)
        self.provenance = dataclasses.replace(provenance, name=f"{provenance.name}_n{options.num_samples}")
        self.path = self.workdir / "samples" / f"{self.provenance.name}.npz"

    def write(self, reuse: bool = False) -> None:
        """Draws the samples and writes the files. Each batch is stored, so that a rerun continues after the last batch.

        reuse: if the file already holds samples with these settings, do nothing.
        """
        reason = broadcast_from_process_0(lambda: self._find_difference(reuse))
        if reuse and reason is None:
            return log(f"Using the samples in {self.path}.")
        broadcast_from_process_0(self._check_space)
        if reason:
            log(f"Sampling again: {self.path} {reason}.")
        options, noun = self.config.sampling, data.noun(self.config.data)
        name, kind = self.setup.net.provenance.name, str(self.setup.net.weights)
        weights = f"{name.removesuffix(f'_{kind}')} ({kind.replace('ema', 'EMA')} weights)"
        log(f"Sampling {options.num_samples} {noun} from {weights}.")
        name = f"samples/.{self.provenance.name}_{self.provenance.digest}_{self.batch_size}"
        chunks = ChunkStore(self.workdir.subdirectory(name))

        counter = CallCounter(self.setup.sampler.num_calls(self.setup.schedule.num_timesteps))

        def compute(i: int) -> dict[str, np.ndarray]:
            with as_user_error("config"):  # some errors occur only when the sampler is traced
                samples = self.setup.generate_batch(options.seed, i, self.batch_size, counter.wrap)
            check_finite(samples)
            return {"images": samples}

        sizes, stall_timeout = (options.num_samples, self.batch_size), self.config.training.stall_timeout
        num_batches = chunks.fill("Sampling", *sizes, compute, stall_timeout, counter.begin)
        if jax.process_index() == 0:
            samples = np.concatenate([chunks.load(i)["images"] for i in range(num_batches)])[: options.num_samples]
            rows = self.setup.rows(np.arange(len(samples)))
            # The samples come first, for programs that read the first array.
            arrays = {"arr_0": samples, "arr_1": rows["y"], **read_conditions(rows)}
            shown = samples[:_MAX_IMAGES_IN_GRID] if pictures.is_of_images(samples) else samples
            title = f"Samples: {self.setup.title}" + f"; the first {len(shown)}" * (len(shown) < len(samples))
            picture = draw_beside_examples(self.workdir, self.setup, shown, title)
            write_samples(self.workdir, self.path, self.provenance, arrays, picture)
            chunks.delete()
            if pictures.is_of_images(samples) and samples.shape[2] <= _MAX_PIXELS_AS_TEXT:
                if text := pictures.as_text(samples, shutil.get_terminal_size().columns):
                    log(text)
            log(f"{len(samples)} {noun}: {self.path}, a picture: {self.path.with_suffix('.png')}")

    def _check_space(self) -> None:
        """Raises: UserError if disk or memory is too small for two copies of the samples, which writing the file needs."""
        count, shape = self.config.sampling.num_samples, self.setup.net.example_shape
        needed = 2 * count * math.prod(shape) * (1 if self.setup.net.is_images else 4)
        free = shutil.disk_usage(self.workdir).free
        # Windows has no sysconf.
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else free
        if needed > min(free, 0.8 * memory):
            raise UserError(
                f"sampling.num_samples={count} needs {needed / 1e9:,.1f} GB on disk and in memory; {self.workdir} has "
                f"{free / 1e9:,.1f} GB free, and this machine {memory / 1e9:,.1f} GB of memory; draw fewer at once, each "
                "time with another sampling.seed"
            )

    def _find_difference(self, reuse: bool) -> str | None:
        """Returns why the samples must be drawn again; "" if there is no file, None if the file has these settings."""
        if not self.workdir.fetch(self.path).exists():
            return ""
        stored = Provenance.read(self.path)
        if stored is None or stored.arrays_sha256 is None:  # version 0.3 stored no digest
            return "does not store the settings and the digest of its samples"
        if differences := self.provenance.differences(stored):
            return f"was drawn with other settings ({differences})"
        if reuse and not stored.describes(self.path):
            raise UserError(f"{self.path} was changed after it was written; to draw the samples again: rm {self.path}")
        return None


# ---- Names and provenance


def make_provenance(setup: SamplingSetup, **settings: Any) -> Provenance:
    """Returns the record of samples or edits; its name is the start of the file name.

    The record has all settings that decide the values, except settings that only change rounding. settings: further entries.
    """
    net, classifier, options = setup.net, setup.classifier, to_dict(setup.config)
    sampling = {k: v for k, v in options["sampling"].items() if k not in (*_SETTINGS_WITHOUT_EFFECT, *_FILES)}
    if sampling["label"] is not None and setup.labels is not None:  # a name and a number may mean the same class
        sampling["label"] = setup.labels.tolist()
    return Provenance(
        f"{net.provenance.name}_{_name_options(setup)}_seed{sampling['seed']}",
        {
            **net.provenance.settings,
            "weights_digest": params_digest(net.params),
            "classifier_digest": None if classifier is None else params_digest(classifier.params),
            "conditions_digest": array_digest(*setup.conditions.values()),
            "low_resolution_digest": array_digest(setup.small_images),
            "labels_digest": array_digest(setup.labels),
            "normalization": {name: value.to_json() for name, value in net.normalizations.items()},
            "image_shape": list(net.example_shape),
            "model": {name: value for name, value in options["model"].items() if is_identity(f"model.{name}")},
            "diffusion": options["diffusion"],
            "sampling": sampling,
            "num_steps": setup.schedule.num_timesteps,
            **settings,
        },
        {
            "diffusion_jax": code_version(),
            "jax": jax.__version__,
            "backend": jax.default_backend(),
            **net.provenance.details,
            **{name: options["sampling"][name] for name in _FILES if options["sampling"][name]},
        },
    )


def _name_options(setup: SamplingSetup) -> str:
    """Returns the sampler, steps, classes and guidance, and a digest of all other options that differ from the defaults."""
    options = setup.config.sampling.to_dict()
    hashed = {
        name: value
        for name, value in options.items()
        if name not in (*_SETTINGS_WITHOUT_EFFECT, *_NAMED_SETTINGS) and value != SETTINGS[f"sampling.{name}"].default
    }
    if options["clip"] != clips_by_default(setup.config):
        hashed["clip"] = options["clip"]
    if isinstance(options["steps"], tuple | list):
        hashed["steps"] = options["steps"]
    if ":" in options["sampler"]:
        hashed["sampler"] = options["sampler"]
    words = [f"{options['sampler'].rpartition(':')[2]}{setup.schedule.num_timesteps}"]
    words += [options["spacing"]] * (options["spacing"] is not None)
    if options["label"] is not None and setup.labels is not None:
        labels = setup.labels.tolist()
        classes = "class" + "-".join(map(str, labels))
        if len(classes) > _MAX_CLASSES_IN_NAME:
            classes, hashed["classes"] = f"{len(labels)}classes", labels
        words.append(classes)
    if options["guidance_scale"] != 1:
        words.append(f"guided{options['guidance_scale']}")
    return "_".join(words + ([settings_digest(hashed)[:6]] if hashed else []))


def write_samples(
    workdir: RunDir,
    path: pathlib.Path,
    provenance: Provenance,
    arrays: Mapping[str, np.ndarray | None],
    picture: pictures.Picture,
) -> None:
    """Writes and uploads an .npz (the arrays that are not None, and the provenance), and a PNG beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    given = {name: array for name, array in arrays.items() if array is not None}
    save_npz(path, provenance.add_to(given))
    pictures.save(path.with_suffix(".png"), picture)
    workdir.upload(path, path.with_suffix(".png"))


# ---- Samples being denoised


def _write_trajectory(file: SampleFile) -> None:
    """Writes the first samples being denoised: pictures of x_t and the predicted x_0, and an .npz with both.

    The .npz has x_t and x_0 [steps, rows, *spatial, C], the noisiest first, where x_0 is the network's prediction at each
    step (DDPM figure 6); times, the network times; samples [rows, *spatial, C], equal to the file's samples up to rounding.
    """
    log("Compiling the sampler of the trajectory ...")
    setup, options = file.setup.on_mesh(sharding.one_device_mesh()), file.config.sampling  # only process 0 runs this
    rows = _TRAJECTORY_POINTS if len(setup.net.example_shape) == 1 else _TRAJECTORY_ROWS
    rows = min(rows, file.batch_size, options.num_samples)
    steps = picture_steps(setup.schedule, options.trajectory - 1)
    keys = keys_of_samples(options.seed, np.arange(rows))
    samples, frames = setup.generate(keys, np.arange(rows), trajectory=steps)
    arrays = {"x_t": setup.to_examples(frames.x_t), "x_0": setup.to_examples(frames.x_0)}
    arrays |= {"times": setup.schedule.timesteps[steps[::-1]], "samples": setup.to_examples(samples)}

    channels = read_channels(file.config, file.workdir)

    def draw_picture(frames: str, what: str):
        x = np.concatenate([arrays[frames], arrays["samples"][None]])
        title = f"Samples {what}: {file.setup.title}"
        return pictures.draw_trajectory(x, arrays["times"], title, setup.captions(rows), channels)

    path = file.path.parent / "trajectories" / file.path.name
    write_samples(file.workdir, path, file.provenance, arrays, draw_picture("x_t", "being denoised"))
    path_of_x_0 = path.with_name(f"{path.stem}_x_0.png")
    pictures.save(path_of_x_0, draw_picture("x_0", "as predicted while they are denoised"))
    file.workdir.upload(path_of_x_0)
    log(f"Samples being denoised: {path.with_suffix('.png')}")


def picture_steps(schedule: schedules.Schedule, count: int) -> np.ndarray:
    """Returns at most `count` increasing indices of a schedule: the last, and others evenly spaced in log SNR.

    The log SNRs are in -5 ... 3, where the picture changes: below -5, the predicted x_0 is nearly the mean of the data, and
    above 3, x_t looks finished. Evenly spaced indices would mostly show noise, or the finished image.
    """
    with np.errstate(divide="ignore"):
        log_snr = np.log(np.asarray(schedule.snr, np.float64))
    wanted = np.linspace(max(_LOG_SNRS[0], log_snr[-1]), min(_LOG_SNRS[1], log_snr[0]), count - 1)
    return np.unique([*np.abs(log_snr - wanted[:, None]).argmin(axis=1), len(log_snr) - 1])
