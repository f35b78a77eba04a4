"""Super-resolution networks: inputs, checked in closed form, and training."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import cli, training
from diffusion_jax.errors import UserError
from diffusion_jax.models import upsampling
from diffusion_jax.runs import train
from diffusion_jax.training.batches import Examples
from diffusion_jax.training.step import make_objective
from helpers.configs import upsampler_config


def test_downsample_takes_means():
    x = np.arange(2 * 4 * 8 * 3, dtype=np.float32).reshape(2, 4, 8, 3)
    low = upsampling.downsample(x, 2)
    assert low.shape == (2, 2, 4, 3)
    np.testing.assert_allclose(low[1, 0, 3, 2], x[1, :2, 6:, 2].mean(), rtol=1e-6)
    np.testing.assert_allclose(low.mean((1, 2)), x.mean((1, 2)), rtol=1e-6)
    np.testing.assert_array_equal(upsampling.downsample(x, 4), x)
    for height in (0, 3, 8):
        with pytest.raises(ValueError, match=f"resolution of {height} pixels does not divide 4x8 images"):
            upsampling.downsample(x, height)
    with pytest.raises(ValueError, match="does not divide 4x6 images"):
        upsampling.downsample(x[:, :, :6], 1)


def test_enlarge_inverts_downsample_for_linear_images():
    """A mean over a square equals a linear function's value at the center, so bilinear interpolation recovers the
    function."""
    y, x = np.mgrid[:8, :16] + 0.5
    image = jnp.float32((3 + 0.5 * x - 0.25 * y)[None, :, :, None])
    low = upsampling.downsample(image, 4)
    again = upsampling.enlarge(low, (8, 16))
    np.testing.assert_allclose(again[:, 1:-1, 1:-1], image[:, 1:-1, 1:-1], rtol=1e-5)
    np.testing.assert_allclose(again[0, 0, 0], low[0, 0, 0], rtol=1e-6)  # beyond the outer centers
    constant = jnp.full((1, 8, 8, 3), 0.3)
    np.testing.assert_allclose(upsampling.enlarge(upsampling.downsample(constant, 2), (8, 8)), constant, rtol=1e-6)


def test_condition_concatenates_the_small_image_and_its_noise():
    shape = (2, 4, 8, 3)
    low, std = jax.random.normal(jax.random.key(1), (2, 2, 4, 3)), jnp.array([0.1, 0.7])
    given = upsampling.condition(low, shape, std)
    assert given.shape == (2, 4, 8, upsampling.condition_channels(3, 0.7)) == (2, 4, 8, 4)
    large = upsampling.enlarge(low, (4, 8))
    np.testing.assert_allclose(given[..., :3], large, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(given[..., 3], std[:, None, None].repeat(4, 1).repeat(8, 2))
    np.testing.assert_array_equal(upsampling.condition(low, shape, 0.1)[..., 3], jnp.full((2, 4, 8), 0.1))
    np.testing.assert_array_equal(upsampling.condition(large, shape), large)  # as enlarged already
    assert upsampling.condition_channels(3, 0.0) == 3
    for wrong in (low[:1], low[..., :1]):
        with pytest.raises(ValueError, match="needs as many small images with as many channels"):
            upsampling.condition(wrong, shape)


def test_augment_adds_noise_of_the_given_standard_deviation():
    std = jnp.array([0.0, 0.5, 2.0])
    noisy = upsampling.augment(jax.random.key(0), jnp.ones((3, 64, 64, 1)), std)
    np.testing.assert_allclose((noisy - 1).std((1, 2, 3)), std, rtol=4 / (2 * 64**2) ** 0.5)


class Spy:
    """A network that records its inputs; the output is the single parameter."""

    num_classes = 0
    seen: list

    def __init__(self):
        self.seen = []

    def apply(self, variables, x, time, train, rngs, condition):
        jax.debug.callback(lambda condition: self.seen.append(np.asarray(condition)), condition)
        return x * variables["params"]["w"]


@pytest.mark.thorough
@pytest.mark.parametrize("most", [0.0, 0.8])
def test_objective_conditions_on_the_downsampled_x_0(most):
    """With noise, too: the noise channel is uniform up to the maximum and equals the standard deviation of the added
    noise."""
    config = upsampler_config(**{"diffusion.conditioning_noise": most})
    spy, n = Spy(), 512
    objective = make_objective(config, spy, training.schedule_from_config(config.diffusion))
    x_0 = jax.random.normal(jax.random.key(0), (n, 8, 8, 1))
    objective({"w": jnp.ones(())}, None, jax.random.key(1), Examples(x_0, jnp.zeros(n, int)))
    jax.effects_barrier()
    given, exact = spy.seen[0], np.asarray(upsampling.enlarge(upsampling.downsample(x_0, 4), (8, 8)))[..., 0]
    channels = training.model_from_config(config).condition_channels
    assert given.shape == (n, 8, 8, channels) == (n, 8, 8, 2 if most else 1)
    if not most:
        np.testing.assert_allclose(given[..., 0], exact, atol=1e-6)
        return
    std = given[:, 0, 0, 1]
    np.testing.assert_array_equal(given[..., 1], std[:, None, None].repeat(8, 1).repeat(8, 2))
    assert 0 <= std.min() and std.max() < most
    assert abs(std.mean() - most / 2) < 4 * most / (12 * n) ** 0.5
    # Enlarged unit white noise has the mean square that follows from enlarging single pixels.
    pixels = upsampling.enlarge(jnp.eye(16).reshape(16, 4, 4, 1), (8, 8))
    ratio = ((given[..., 0] - exact) ** 2).mean((1, 2)) / std**2 / ((pixels**2).sum(0).mean())
    assert abs(ratio.mean() - 1) < 4 * ratio.std() / n**0.5


def test_a_network_that_is_no_upsampler_is_refused():
    with pytest.raises(ValueError, match="data.low_resolution=3 must divide the size of images, data.image_size=8"):
        training.model_from_config(upsampler_config(**{"data.low_resolution": 3}))


@pytest.mark.whole
def test_upsampler_run_draws_no_pictures_and_is_not_evaluated(tmp_path):
    steps = {"training.num_steps": 2, "training.sample_every": 2}
    config = upsampler_config(**steps, **{"diffusion.conditioning_noise": 0.1})
    train.run(config, tmp_path)
    assert not (tmp_path / "samples").exists()
    for mode in ("edit", "evaluate"):
        with pytest.raises(UserError, match=r"enlarges images \(data.low_resolution=4\)"):
            cli.check_mode(mode, config)
