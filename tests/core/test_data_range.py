"""Data outside [-1, 1] where a clip or gray levels assume that range: an error if the values are known, NaN if traced."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import Denoiser, likelihood, losses, schedules
from diffusion_jax.images import to_model_range

KEY = jax.random.key(0)
SCHEDULE = schedules.from_betas(schedules.betas("linear", 10, beta_start=5e-3, beta_end=0.6))


def network(x_t, time):
    """A network with a learned variance."""
    return jnp.concatenate([0.4 * x_t, jnp.tanh(x_t)], axis=-1)


def data(outside=1.5):
    """Three examples [3, 2, 1]; the second example has the value `outside`, which is out of range."""
    return jnp.array([-1.0, 1.0, 0.2, outside, 0.3, -0.4]).reshape(3, 2, 1)


# Each function returns the result [B] that must be NaN for examples out of range.
BOUNDS = {
    "vlb": lambda x, denoiser, gray_levels: losses.vlb(KEY, SCHEDULE, denoiser, x, gray_levels=gray_levels)[0],
    "bits_per_dim": lambda x, denoiser, gray_levels: (
        likelihood.bits_per_dim(KEY, SCHEDULE, denoiser, x, gray_levels=gray_levels).total
    ),
    "bound_term": lambda x, denoiser, gray_levels: likelihood.bound_term(
        SCHEDULE, denoiser, x, x, jnp.array([0, 0, 5]), gray_levels=gray_levels
    )[0],
    "decoder": lambda x, denoiser, gray_levels: likelihood.decoder_log_prob(x, 0 * x, 0 * x, gray_levels).sum((1, 2)),
}
ASSUME_THE_RANGE = [{"gray_levels": 256, "clip": False}, {"gray_levels": None, "clip": True}]


@pytest.mark.parametrize(
    ("name", "options"),
    [(name, options) for name in BOUNDS for options in ASSUME_THE_RANGE if name != "decoder" or not options["clip"]],
)
def test_data_outside_the_range(name, options):
    """Only one of three examples is out of range; the other examples' results do not change."""
    denoiser = Denoiser(network, variance="learned_range", clip=options["clip"])
    bound = lambda x: BOUNDS[name](x, denoiser, options["gray_levels"])  # noqa: E731
    compiled = jax.jit(bound)
    for outside in (1.1, -1.5, np.inf):
        with pytest.raises(ValueError, match=r"outside of \[-1, 1\].*(gray_levels=None|clip=False) for other data"):
            bound(data(outside))
        found, inside = compiled(data(outside)), compiled(data(0.9))
        np.testing.assert_array_equal(found[jnp.array([0, 2])], inside[jnp.array([0, 2])])
        assert np.isnan(found[1]) and np.isfinite(inside).all()


@pytest.mark.parametrize("clip", [False, lambda x_0: jnp.clip(x_0, -2, 2)])  # a function may have any range
def test_other_data_need_neither_a_clip_nor_gray_levels(clip):
    np.testing.assert_array_equal(likelihood.in_model_range(data(3.0), None, clip), data(3.0))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_images_scaled_in_any_precision_are_in_the_range(dtype):
    """Every common formula for [-1, 1], from all gray levels, and the largest value that two roundings of 2 allow."""
    levels = jnp.arange(256).astype(dtype)
    scales = [jnp.asarray(scale, dtype) for scale in (2 / 255, 1 / 127.5, 1 / 255)]
    scaled = [levels * scales[0] - 1, levels * scales[1] - 1, levels * scales[2] * 2 - 1]
    scaled += [(levels * scales[2] - 0.5) / 0.5, levels / 127.5 - 1, (levels - 127.5) / 127.5]
    largest = 1 + 2 * jnp.finfo(dtype).eps
    scaled.append(jnp.array([-largest, largest], dtype))
    for x in (*scaled, to_model_range(np.arange(256, dtype=np.uint8))):
        for options in ASSUME_THE_RANGE:
            np.testing.assert_array_equal(likelihood.in_model_range(jnp.float32(x), **options), jnp.float32(x))
