"""Work directories without training, and comparisons of a run's files."""

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax import data, training
from diffusion_jax.run_dir import RunDir, open_run_dir
from diffusion_jax.runs import workdir
from diffusion_jax.runs.logging import read_metrics
from diffusion_jax.runs.sample import SampleFile
from diffusion_jax.training.checkpoints import Checkpoints

SPEED = ("images_per_second", "seconds_left", "step_seconds", "compute", "data_wait", "logging", "goodput")


def draw_weights(shapes, seed):
    """Draws kernels with variance 1 / fan_in, and scales around 1: samples have many values between -1 and 1."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        is_scale, fan_in = jax.tree_util.keystr(path).endswith("['scale']"), max(np.prod(leaf.shape[:-1]), 1)
        return jnp.asarray(is_scale + rng.normal(size=leaf.shape) * fan_in**-0.5, leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def untrained(directory, config, source=None):
    """A run (on a source) whose checkpoint has drawn weights, and otherwise zeros; nothing is compiled."""
    state = training.build_program(config).abstract_state
    zeros = jax.tree.map(lambda leaf: jax.device_put(np.zeros(leaf.shape, leaf.dtype), leaf.sharding), state)
    drawn = {name: draw_weights(getattr(state, name), seed) for name, seed in (("params", 2), ("ema_params", 1))}
    state = zeros.replace(**drawn, averages=zeros.averages | {"nonfinite_step": zeros.averages["nonfinite_step"] - 1})
    workdir.write_config(config, directory)
    if source is not None:
        workdir.check_data(source, RunDir(directory), data.find_normalizations(config.data, source))
    with Checkpoints(directory / "checkpoints") as checkpoints:
        checkpoints.save(1, state)
        checkpoints.finish()
    return directory


def take_arrays(folder, pattern="*.npz", has_picture=False):
    """The arrays of the only file in a folder that matches the pattern; the file (and its picture) is removed."""
    (path,) = folder.glob(pattern)
    if has_picture:
        path.with_suffix(".png").unlink()
    with np.load(path) as arrays:
        found = dict(arrays)
    path.unlink()
    return found


def lines(directory, without=SPEED):
    return [{key: value for key, value in row.items() if key not in without} for row in read_metrics(directory)]


def assert_close_losses(one, two):
    """Checks that two runs' losses agree up to the order of sums: a batch mean is a mean of partial means."""
    one, two = lines(one), lines(two)
    assert [row["step"] for row in one] == [row["step"] for row in two]
    np.testing.assert_allclose([row["loss"] for row in two], [row["loss"] for row in one], rtol=1e-4)


def last_state(config, directory):
    with Checkpoints(open_run_dir(directory).subdirectory("checkpoints"), read_only=True) as checkpoints:
        return checkpoints.restore(training.build_program(config).abstract_state)


def reuse_or_draw(config, directory):
    """The samples that --mode=evaluate gets."""
    file = SampleFile(config, directory)
    file.write(reuse=True)
    return file
