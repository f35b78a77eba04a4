"""Work directories: made without training, and what a run left in its own."""

import jax
import jax.numpy as jnp

from diffusion_jax import training
from diffusion_jax.run_dir import RunDir, open_run_dir
from diffusion_jax.runs import workdir
from diffusion_jax.runs.logging import read_metrics
from diffusion_jax.runs.sample import SampleFile
from diffusion_jax.training.checkpoints import Checkpoints

SPEED = ("images_per_second", "seconds_left", "step_seconds", "compute", "data_wait", "logging", "goodput")


def untrained(directory, config):
    """A work directory as training leaves it, with weights at random: compiling a train step would take longest."""
    built = training.build_program(config)
    state = built.init()
    leaves, tree = jax.tree.flatten(state.params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    moved = [leaf + 0.05 * jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)]
    params = jax.tree.unflatten(tree, moved)
    directory.mkdir()
    with Checkpoints(directory / "checkpoints") as checkpoints:
        checkpoints.save(1, state.replace(params=params, ema_params=jax.tree.map(jnp.copy, params)))
        checkpoints.finish(1)
    workdir.write_config(config, RunDir(directory))
    return directory


def lines(directory, without=SPEED):
    return [{key: value for key, value in row.items() if key not in without} for row in read_metrics(directory)]


def last_state(config, directory):
    with Checkpoints(open_run_dir(directory).subdirectory("checkpoints"), read_only=True) as checkpoints:
        return checkpoints.restore(training.build_program(config).abstract_state)


def reuse_or_draw(config, directory):
    """The samples as --mode=evaluate gets them."""
    file = SampleFile(config, directory)
    file.draw(reuse=True)
    return file
