"""Drawing images from a trained model: pictures during training, and `--mode=sample`."""

from __future__ import annotations

import hashlib
import json
import pathlib
import zipfile
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

import diffusion_jax
from diffusion_jax import data
from diffusion_jax.distributed import compiler, sharding
from diffusion_jax.distributed.processes import broadcast_from_process_0
from diffusion_jax.distributed.watchdog import watch_batches
from diffusion_jax.errors import UserError, as_user_error
from diffusion_jax.runs import pictures, trained_model
from diffusion_jax.runs import workdir as work
from diffusion_jax.runs.artifacts import Parts, digest
from diffusion_jax.runs.console import Bar, say
from diffusion_jax.runs.sampling_setup import SamplingSetup
from diffusion_jax.training import model_from_config, schedule_from_config


class Generator:
    """Compiled sampling for a config: `generator(params, seed, batch) -> uint8 [B, H, W, C]`, spread over the devices.

    Batch i holds samples i B ... (i + 1) B - 1. low: uint8 [N, h, w, C], the images that an upsampler enlarges, in turn.
    on_step: called with the number of steps that a batch has taken, while it is drawn.
    """

    def __init__(
        self,
        config: Mapping,
        recipe: SamplingSetup,
        mesh,
        batch_size: int,
        low: np.ndarray | None = None,
        on_step: Callable[[int], None] | None = None,
    ):
        self.recipe, self.batch_size, self._low = recipe, batch_size, low
        shape, rows = (batch_size, *data.image_shape(config["data"])), sharding.batch_sharding(mesh)
        whole = sharding.replicated(mesh)

        def constrain(x):
            return jax.lax.with_sharding_constraint(x, rows)

        def generate(params, guide, seed, batch, y, low):
            # Split parameters, of a run in progress, are gathered once: every step needs them all, and no gradient or
            # activation of another step takes their room.
            params = jax.lax.with_sharding_constraint(params, whole)
            y, low = jax.tree.map(constrain, (y, low))
            low = None if low is None else low.astype(jnp.float32) / 127.5 - 1.0
            key = jax.random.fold_in(jax.random.key(seed), batch)
            x = recipe.draw(params, guide, key, shape, y, low, constrain=constrain, progress=on_step)
            return pictures.to_uint8(x)

        self._generate = jax.jit(
            generate,
            in_shardings=(None, whole, whole, whole, whole, whole),  # None: as the parameters are
            out_shardings=rows,
            compiler_options=compiler.options(),
        )

    def __call__(self, params, seed: int, batch: int = 0) -> np.ndarray:
        """One batch, gathered on every process."""
        numbers = batch * self.batch_size + np.arange(self.batch_size)
        low = None if self._low is None else self._low[numbers % len(self._low)]
        y = self.recipe.labels(numbers)
        images = self._generate(params, self.recipe.guide, np.uint32(seed), np.int32(batch), y, low)
        return np.asarray(multihost_utils.process_allgather(images, tiled=True))


def trajectory_picture(
    key, config: Mapping, recipe: SamplingSetup, params, columns: int, rows: int = 4, show: str = "x_t", low=None
) -> np.ndarray:
    """From noise (left) to images (right): x_t at `columns - 1` evenly spread steps, and x_0. uint8 [H, W, C].

    show: "x_t", or "x_0" for the x_0 predicted at those steps (DDPM figure 6). low: as `Generator`.
    """
    kept = np.unique(np.linspace(0, recipe.schedule.num_timesteps - 1, columns).round().astype(int))[1:]
    params, guide = jax.device_get((params, recipe.guide))  # one process draws this, on one device
    shape = (rows, *data.image_shape(config["data"]))
    if low is not None:
        low = low[np.arange(rows) % len(low)].astype(np.float32) / 127.5 - 1.0

    def draw(params, guide, key, y, low):
        return recipe.draw(params, guide, key, shape, y, low, trajectory=kept)

    drawn = jax.jit(draw, compiler_options=compiler.options())(params, guide, key, recipe.labels(np.arange(rows)), low)
    x_0, passed = drawn
    through = np.concatenate([np.asarray(getattr(passed, show)), np.asarray(x_0)[None]])  # [columns, rows, H, W, C]
    images = np.asarray(pictures.to_uint8(through)).swapaxes(0, 1)
    headers = pictures.time_headers(np.asarray(recipe.schedule.timesteps)[kept[::-1]])  # the noisiest first, as drawn
    return pictures.grid(images.reshape(-1, *images.shape[2:]), columns=len(through), headers=headers)


def _low_resolution(config: ConfigDict) -> tuple[np.ndarray | None, np.ndarray | None]:
    """The images that an upsampler enlarges, uint8 [N, h, w, C], and their labels, if they have any; None for other models.

    Raises: UserError, DataError.
    """
    path, side = config.sampling.low_resolution, config.data.low_resolution
    if not side:
        return None, None
    if not path:
        raise UserError(
            "this model enlarges images: name them by sampling.low_resolution, an .npz of --mode=sample or a folder of images"
        )
    height, width, channels = data.image_shape(config.data)
    small = (side, width * side // height)
    source = pathlib.Path(path).expanduser()
    if source.is_dir():
        folder = data.Folder(str(source), small, channels)
        return folder.read(np.arange(len(folder)))[0], None
    if source.is_file() and not zipfile.is_zipfile(source):
        raise UserError(f"sampling.low_resolution={path!r} is neither a folder nor an .npz with arr_0")
    try:
        with np.load(source, allow_pickle=False) as arrays:
            images, labels = arrays["arr_0"], arrays.get("arr_1")
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"sampling.low_resolution={path!r} is neither a folder nor an .npz with arr_0: {error}"
        ) from None
    if images.dtype != np.uint8 or images.shape[1:] != (*small, channels):
        raise UserError(
            f"sampling.low_resolution={path!r} holds {images.dtype} {images.shape}; this model enlarges uint8 images of "
            f"{small[0]}x{small[1]} with {channels} channels"
        )
    if not len(images):
        raise UserError(f"sampling.low_resolution={path!r} holds no images")
    if labels is not None and labels.shape != images.shape[:1]:
        raise UserError(
            f"sampling.low_resolution={path!r} holds {len(images)} images and labels of shape {labels.shape}"
        )
    return images, labels


class Drawn(NamedTuple):
    """path: the .npz. step: of the weights, 0 for untrained ones. num_steps: the sampler's. batch_size: as it was used."""

    path: pathlib.Path
    step: int
    num_steps: int
    batch_size: int


def check_options(config: ConfigDict) -> None:
    """Raises: UserError for leaves of `config.sampling` that say how many images are drawn from what, and cannot be."""
    options = config.sampling
    for leaf in ("num_samples", "batch_size"):
        if options[leaf] < 1:
            raise UserError(f"sampling.{leaf}={options[leaf]} must be at least 1")
    work.check_seed("sampling.seed", options.seed)
    if options.trajectory < 0 or options.trajectory == 1:
        raise UserError(f"sampling.trajectory={options.trajectory} must be 0, or at least 2 columns")
    if options.low_resolution and not config.data.low_resolution:
        raise UserError(
            f"sampling.low_resolution={options.low_resolution!r} is for models that enlarge images (data.low_resolution)"
        )


def sample(config: ConfigDict, directory: pathlib.Path, again: bool = True) -> Drawn:
    """`--mode=sample`: a PNG grid and an .npz (arr_0 uint8 [N, H, W, C]; arr_1 the labels, where there are any; settings).

    Every batch is kept as it is made, so a relaunch of the same command goes on where it stopped. again: also where the file
    holds samples of the same settings already.
    """
    work.check_identity(config, directory)
    options = config.sampling
    check_options(config)
    with as_user_error("config"):
        mesh = sharding.make_mesh(config.mesh)
        batch_size = -(-min(options.batch_size, options.num_samples) // mesh.size) * mesh.size
        model, schedule = model_from_config(config), schedule_from_config(config.diffusion)
        recipe = SamplingSetup(config, model, schedule, mesh, work.class_names(config, directory))
        (low, low_labels), num_steps = _low_resolution(config), recipe.schedule.num_timesteps
        if low_labels is not None:
            recipe.take_labels(low_labels)
    for note in recipe.notes:
        say(f"Note: {note}.")
    step, params = trained_model.load(config, directory, model, mesh, options.use_ema)
    if again:
        work.keep_config(config, directory)
    origin = trained_model.origin(config, step)
    name = f"{origin}_{'ema' if options.use_ema else 'raw'}_{recipe.name}_seed{options.seed}_n{options.num_samples}"
    samples = directory / "samples"
    drawing = Drawn(samples / f"{name}.npz", step, num_steps, batch_size)
    given = {"images": low, "labels": low_labels}
    settings = _settings(config, recipe, params, batch_size, mesh.size, given)
    reason = broadcast_from_process_0(lambda: _why_not_reused(drawing.path, settings))
    if reason is None and not again:
        return drawing
    if reason:
        say(f"Drawing anew: {drawing.path} {reason}.")
    say(f"Sampling {options.num_samples} images from {origin} ({'EMA' if options.use_ema else 'raw'} weights).")
    parts = Parts(samples / f".{name}_{digest(settings)}")
    batches = -(-options.num_samples // batch_size)
    done = len(parts.done) * batch_size
    with Bar("Sampling", options.num_samples, min(done, options.num_samples)) as bar:

        def on_step(taken):
            bar.update(min(done, options.num_samples), f"step {int(taken)} of {num_steps}")

        generator = Generator(config, recipe, mesh, batch_size, low, on_step if options.progress else None)
        left = [i for i in range(batches) if i not in parts.done]
        if left:
            say("Compiling the sampler, and the first batch ...")
        for i in watch_batches(left, config.training.stall_timeout):
            with as_user_error("config"):  # what shows only when the sampler is traced
                images = generator(params, options.seed, i)
            parts.save(i, images=images)
            done = (i + 1) * batch_size
            bar.update(min(done, options.num_samples))
    if jax.process_index() == 0:
        _collect(config, recipe, parts, batches, samples / name, settings)
        if options.trajectory:
            say("Compiling the sampler of the way from noise to images ...")
            picture = trajectory_picture(
                jax.random.key(options.seed), config, recipe, params, options.trajectory, low=low
            )
            pictures.save_png(samples / f"{name}_trajectory.png", picture)
            say(f"From noise to images: {samples / f'{name}_trajectory.png'}")
    return drawing


# Leaves of `config.sampling` that no image depends on, and those whose files are told apart by what they hold.
_NO_SETTINGS = ("preview", "progress", "trajectory", "batch_size", "use_ema")
_FILES = ("classifier", "low_resolution")


def _settings(
    config: ConfigDict,
    recipe: SamplingSetup,
    params,
    batch_size: int,
    devices: int,
    given: Mapping[str, np.ndarray | None],
) -> dict[str, Any]:
    """All that decides the pixels of samples, but for rounding: plain JSON values. given: what an upsampler enlarges."""
    options = work.to_dict(config)
    sampling = {
        key: value
        for key, value in options["sampling"].items()
        if not key.startswith(_NO_SETTINGS) and key not in _FILES
    }
    if config.sampling.label is not None:  # a name and a number may be of one class
        sampling["label"] = list(recipe.classes)
    # What a number of steps and a spacing stand for may change with the version; to a rounding of other machines.
    times = np.round(np.asarray(recipe.schedule.timesteps, np.float64), 4) + 0.0
    return {
        "weights_digest": trained_model.digest(params),
        "classifier_digest": None if recipe.guide is None else trained_model.digest(recipe.guide),
        "low_resolution_digest": {
            name: hashlib.sha256(array.tobytes()).hexdigest() for name, array in given.items() if array is not None
        },
        "image_shape": list(data.image_shape(config.data)),
        "model": options["model"],
        "diffusion": options["diffusion"],
        "sampling": sampling,
        "times_digest": hashlib.sha256(times.tobytes()).hexdigest(),
        "batch_size": batch_size,
        "devices": devices,
        "random": {
            name: getattr(jax.config, name)
            for name in ("jax_default_prng_impl", "jax_threefry_partitionable", "jax_enable_x64")
        },
    }


def read_settings(path: pathlib.Path) -> dict[str, Any] | None:
    """What the samples in an .npz were drawn with: "settings", which decide them, and "drawn_with", versions. None where the
    file does not say, as those of version 0.1.0.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            stored = json.loads(str(arrays["settings"]))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    return stored if isinstance(stored, dict) and isinstance(stored.get("settings"), dict) else None


def _why_not_reused(path: pathlib.Path, settings: Mapping[str, Any]) -> str | None:
    """Why a file does not hold the samples of these settings; "" where there is none, None where it holds them."""
    if not path.exists():
        return ""
    stored = read_settings(path)
    if stored is None:
        return "does not say with which settings it was drawn (files of version 0.1.0 do not)"
    then, now = work.flatten(stored["settings"]), work.flatten(json.loads(json.dumps(settings)))
    differing = [key for key in now | then if key not in then or key not in now or then[key] != now[key]]
    told = [f"{key}={_short(then.get(key))}, now {_short(now.get(key))}" for key in differing]
    more = f"; and {len(told) - 3} more" if len(told) > 3 else ""
    return f"was drawn with other settings ({'; '.join(told[:3])}{more})" if differing else None


def _short(value) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:8] + "..."


def _collect(
    config: ConfigDict,
    recipe: SamplingSetup,
    parts: Parts,
    batches: int,
    path: pathlib.Path,
    settings: Mapping[str, Any],
) -> None:
    """Joins the parts into PATH.npz, beside the settings, and PATH.png, and removes them."""
    n = config.sampling.num_samples
    images = np.concatenate([parts.load(i)["images"] for i in range(batches)])[:n]
    labels = recipe.labels(np.arange(n))
    arrays = {"arr_0": images} | ({} if labels is None else {"arr_1": labels})  # first, for what reads the first array
    temporary = path.with_name(path.name + ".partial.npz")
    versions = {"diffusion_jax": diffusion_jax.__version__, "jax": jax.__version__, "backend": jax.default_backend()}
    files = {key: config.sampling[key] for key in _FILES if config.sampling[key]}
    stored = {"settings": settings, "drawn_with": versions | files}
    np.savez(temporary, **arrays, settings=np.array(json.dumps(stored)))
    temporary.replace(path.with_name(path.name + ".npz"))
    pictures.save_png(
        path.with_name(path.name + ".png"), pictures.grid(images[:256], captions=recipe.captions(np.arange(n)[:256]))
    )
    parts.remove()
    if images.shape[2] <= 12:
        say(pictures.as_text(images[: 72 // images.shape[2]]))
    say(f"{n} images: {path}.npz, a grid: {path}.png")
