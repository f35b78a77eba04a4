"""Drawing images from a trained model: pictures during training, and `--mode=sample`."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from diffusion_jax import data, sampling, schedules
from diffusion_jax.runs import pictures, weights
from diffusion_jax.runs import workdir as work
from diffusion_jax.runs.console import Bar, say
from diffusion_jax.runs.errors import UserError, as_user_error
from diffusion_jax.runs.parts import Parts, digest
from diffusion_jax.training import compiler, model_from_config, schedule_from_config, sharding


def sampler_from_config(config: Mapping, diffusion: Mapping) -> sampling.Sampler:
    """The sampler of `config.sampling`, for what `config.diffusion` says the network predicts. Raises: ValueError."""
    prediction, variance, clip = diffusion["prediction"], diffusion["variance"], config["clip"]
    if config["sampler"] == "ddpm":
        return sampling.ddpm(prediction, variance, clip)
    if config["sampler"] == "ddim":
        return sampling.ddim(config["eta"], prediction, variance, clip)
    raise ValueError(f"sampling.sampler={config['sampler']!r} is unknown; known: ddpm, ddim")


def draw_images(
    key,
    schedule: schedules.Schedule,
    model,
    params,
    sampler,
    shape,
    y=None,
    *,
    constrain: Callable = lambda x: x,
    trajectory=False,
):
    """Images [B, H, W, C] in [-1, 1] from noise, or what `sampling.sample` gives with a trajectory; pure.

    shape: (B, H, W, C). y: int32 [B] for a conditional model. constrain: applied to x_T, to place it on a mesh.
    """
    key_noise, key_steps = jax.random.split(key)
    x_T = constrain(jax.random.normal(key_noise, shape))

    def denoise_fn(x_t, time):
        return model.apply({"params": params}, x_t, time, y)

    return sampling.sample(key_steps, schedule, denoise_fn, x_T, sampler, trajectory=trajectory)


def respaced(schedule: schedules.Schedule, config: Mapping) -> schedules.Schedule:
    """The schedule that `config.sampling` walks: all of it, or `steps` of it. Raises: ValueError."""
    steps = config["steps"]
    if steps is None:
        return schedule
    if isinstance(steps, tuple):  # the command line reads 10,15,20 as a tuple; sections are what is meant
        steps = ",".join(map(str, steps))
    return schedules.respace(schedule, steps, config["spacing"])


class Generator:
    """Compiled sampling for a config: `generator(params, seed, batch) -> uint8 [B, H, W, C]`, spread over the devices.

    Batch i holds samples i B ... (i + 1) B - 1; those of a conditional model have the classes in turn.
    """

    def __init__(self, config: Mapping, model, schedule: schedules.Schedule, mesh, batch_size: int):
        self.schedule = respaced(schedule, config["sampling"])
        self.num_classes, self.batch_size = config["model"]["num_classes"], batch_size
        sampler = sampler_from_config(config["sampling"], config["diffusion"])
        shape, rows = (batch_size, *data.image_shape(config["data"])), sharding.batch_sharding(mesh)

        def constrain(x):
            return jax.lax.with_sharding_constraint(x, rows)

        def generate(params, seed, batch):
            y = None
            if self.num_classes:
                y = constrain((batch * batch_size + jnp.arange(batch_size)) % self.num_classes)
            key = jax.random.fold_in(jax.random.key(seed), batch)
            x = draw_images(key, self.schedule, model, params, sampler, shape, y, constrain=constrain)
            return pictures.to_uint8(x)

        whole = sharding.replicated(mesh)
        self._generate = jax.jit(
            generate, in_shardings=(whole, whole, whole), out_shardings=rows, compiler_options=compiler.options()
        )

    def labels(self, count: int) -> np.ndarray | None:
        """Labels of the first `count` samples; None for an unconditional model."""
        return np.arange(count, dtype=np.int32) % self.num_classes if self.num_classes else None

    def __call__(self, params, seed: int, batch: int = 0) -> np.ndarray:
        """One batch, gathered on every process."""
        images = self._generate(params, np.uint32(seed), np.int32(batch))
        return np.asarray(multihost_utils.process_allgather(images, tiled=True))


def trajectory_picture(
    key, config: Mapping, model, schedule, params, columns: int, rows: int = 4, show: str = "x_t"
) -> np.ndarray:
    """From noise (left) to images (right): x_t at `columns - 1` evenly spread steps, and x_0. uint8 [H, W, C].

    show: "x_t", or "x_0" for the x_0 predicted at those steps (DDPM figure 6).
    """
    schedule = respaced(schedule, config["sampling"])
    sampler = sampler_from_config(config["sampling"], config["diffusion"])
    kept = np.unique(np.linspace(0, schedule.num_timesteps - 1, columns).round().astype(int))[1:]
    params = jax.device_get(params)  # one process draws this, on one device
    num_classes = config["model"]["num_classes"]
    y = jnp.arange(rows, dtype=jnp.int32) % num_classes if num_classes else None
    shape = (rows, *data.image_shape(config["data"]))

    def draw(params, key):
        return draw_images(key, schedule, model, params, sampler, shape, y, trajectory=kept)

    x_0, passed = jax.jit(draw, compiler_options=compiler.options())(params, key)
    through = np.concatenate([np.asarray(getattr(passed, show)), np.asarray(x_0)[None]])  # [columns, rows, H, W, C]
    images = np.asarray(pictures.to_uint8(through)).swapaxes(0, 1)
    return pictures.grid(images.reshape(-1, *images.shape[2:]), columns=len(through))


def sample(config: ConfigDict, directory: pathlib.Path) -> None:
    """`--mode=sample`: a PNG grid and an .npz (arr_0 uint8 [N, H, W, C]; arr_1 the labels, where there are any).

    Every batch is kept as it is made, so a relaunch of the same command goes on where it stopped.
    """
    work.check_identity(config, directory)
    options = config.sampling
    if options.num_samples < 1:
        raise UserError(f"sampling.num_samples={options.num_samples} must be at least 1")
    if options.batch_size < 1:
        raise UserError(f"sampling.batch_size={options.batch_size} must be at least 1")
    work.check_seed("sampling.seed", options.seed)
    if options.trajectory < 0 or options.trajectory == 1:
        raise UserError(f"sampling.trajectory={options.trajectory} must be 0, or at least 2 columns")
    with as_user_error("config"):
        mesh = sharding.make_mesh(config.mesh)
        batch_size = -(-min(options.batch_size, options.num_samples) // mesh.size) * mesh.size
        model, schedule = model_from_config(config), schedule_from_config(config.diffusion)
        generator = Generator(config, model, schedule, mesh, batch_size)
    step, params = weights.load(directory, model, data.image_shape(config.data), mesh, options.use_ema)

    kind = "ema" if options.use_ema else "raw"
    sampler = f"{options.sampler}{generator.schedule.num_timesteps}"
    if options.sampler == "ddim" and options.eta:
        sampler += f"_eta{options.eta:g}"
    name = f"step{step}_{kind}_{sampler}_seed{options.seed}_n{options.num_samples}"
    say(f"Sampling {options.num_samples} images from step {step} ({'EMA' if options.use_ema else 'raw'} weights).")
    samples = directory / "samples"
    drawn = {key: value for key, value in work.to_dict(options).items() if not key.startswith("preview")}
    parts = Parts(samples / f".{name}_{digest(drawn, batch_size)}")
    batches = -(-options.num_samples // batch_size)
    done = len(parts.done) * batch_size
    with Bar("Sampling", options.num_samples, min(done, options.num_samples)) as bar:
        left = [i for i in range(batches) if i not in parts.done]
        if left:
            say("Compiling the sampler, and the first batch ...")
        for i in left:
            parts.save(i, images=generator(params, options.seed, i))
            bar.update(min((i + 1) * batch_size, options.num_samples))
    if jax.process_index() == 0:
        _collect(config, generator, parts, batches, samples / name)
        if options.trajectory:
            say("Compiling the sampler of the way from noise to images ...")
            picture = trajectory_picture(
                jax.random.key(options.seed), config, model, schedule, params, options.trajectory
            )
            pictures.save_png(samples / f"{name}_trajectory.png", picture)
            say(f"From noise to images: {samples / f'{name}_trajectory.png'}")


def _collect(config: ConfigDict, generator: Generator, parts: Parts, batches: int, path: pathlib.Path) -> None:
    """Joins the parts into PATH.npz and PATH.png, and removes them."""
    n = config.sampling.num_samples
    images = np.concatenate([parts.load(i)["images"] for i in range(batches)])[:n]
    labels = generator.labels(n)
    arrays = [images] if labels is None else [images, labels]
    temporary = path.with_name(path.name + ".partial.npz")
    np.savez(temporary, *arrays)
    temporary.replace(path.with_name(path.name + ".npz"))
    pictures.save_png(path.with_name(path.name + ".png"), pictures.grid(images[:256]))
    parts.remove()
    if images.shape[2] <= 12:
        say(pictures.as_text(images[: 72 // images.shape[2]]))
    say(f"{n} images: {path}.npz, a grid: {path}.png")
