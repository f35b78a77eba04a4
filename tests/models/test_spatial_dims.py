"""Networks for series, images and volumes: layers against explicit sums in float64, and networks against each other."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import models
from diffusion_jax.models.layers import LayerFactory, compiling_for, downsample_2x, upsample_2x
from helpers.networks import TINY, apply, init_shapes, parameter_shapes, redraw

SIZES = {1: (6,), 2: (6, 4), 3: (4, 6, 2)}


def explicit(x, kernel, padding, stride=1, periodic=False):
    """A convolution in float64, one entry of the kernel at a time."""
    n = x.ndim - 2
    x = np.pad(np.float64(x), ((0, 0), *(padding,) * n, (0, 0)), mode="wrap" if periodic else "constant")
    kernel, y = np.float64(kernel), 0
    counts = [(size - 3) // stride + 1 for size in x.shape[1:-1]]
    for offsets in itertools.product(range(3), repeat=n):
        ranges = (slice(i, i + stride * count, stride) for i, count in zip(offsets, counts, strict=True))
        y = y + x[:, *ranges] @ kernel[offsets]
    return y


def layer(n, *, periodic=False, **options):
    """A convolution from 5 to 3 channels, an input, and the kernel."""
    factory = LayerFactory(1, 1e-6, "ho", jnp.dtype("float32"), n, periodic)
    conv = factory.conv(3, "conv", **options)
    x = jax.random.normal(jax.random.key(n), (2, *SIZES[n], 5))
    params = redraw(conv.init(jax.random.key(0), x))
    assert params["params"]["kernel"].shape == (*(3,) * n, 5, 3)
    return conv, params, x


@pytest.mark.parametrize("periodic", [False, True])
@pytest.mark.parametrize("n", [1, *(pytest.param(n, marks=pytest.mark.thorough) for n in (2, 3))])
def test_convolutions_are_the_explicit_sums(n, periodic):
    for options in ({}, {"stride": 2}, {"stride": 2, "padding": (0, 1)}):
        conv, params, x = layer(n, periodic=periodic, **options)
        kernel, bias = (params["params"][name] for name in ("kernel", "bias"))
        expected = explicit(x, kernel, options.get("padding", (1, 1)), options.get("stride", 1), periodic)
        np.testing.assert_allclose(conv.apply(params, x), expected + bias, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
@pytest.mark.parametrize("periodic", [False, True])
@pytest.mark.parametrize("n", [1, 2, pytest.param(3, marks=pytest.mark.thorough)])
def test_convolutions_of_upsampled_arrays_are_the_explicit_sums(n, periodic, platform):
    conv, params, x = layer(n, periodic=periodic, upsample=True)
    large = np.asarray(x)
    for axis in range(1, n + 1):
        large = large.repeat(2, axis)
    np.testing.assert_array_equal(upsample_2x(x), large)
    np.testing.assert_allclose(downsample_2x(large), x, rtol=1e-6)
    kernel, bias = (params["params"][name] for name in ("kernel", "bias"))
    expected = explicit(large, kernel, (1, 1), 1, periodic) + bias
    with compiling_for(platform):
        np.testing.assert_allclose(conv.apply(params, x), expected, rtol=1e-5, atol=2e-5)


def test_the_kernel_of_an_upsampled_image_is_summed_before_rounding():
    x, kernel = (np.random.default_rng(i).normal(size=size) for i, size in enumerate([(2, 8, 8, 64), (3, 3, 64, 64)]))
    low, true = jnp.asarray(x, jnp.bfloat16), explicit(x.repeat(2, 1).repeat(2, 2), kernel, (1, 1))
    layers = LayerFactory(4, 1e-6, "ho", jnp.dtype("bfloat16"))

    def error(y):
        return np.linalg.norm(np.float64(y) - true) / np.linalg.norm(true)

    def run(kernel, upsample, x):
        params = {"params": {"kernel": jnp.asarray(kernel, jnp.float32), "bias": jnp.zeros(64)}}
        return layers.conv(64, "up", upsample=upsample).apply(params, x)

    y, doubled = run(kernel, True, low), run(kernel, False, upsample_2x(low))
    # The error equals a convolution's of the doubled image; kernels that are rounded before their sum give 1.25 times this
    # error.
    assert error(y) < 1.05 * error(doubled)
    assert error(run(np.asarray(kernel, jnp.bfloat16), True, low)) > 1.1 * error(y)


def without_first_axis(params):
    """Parameters for a network without the first axis; both networks agree on arrays that are constant along this axis."""
    return jax.tree.map(lambda leaf: leaf.sum(0) if leaf.ndim > 2 else leaf, params)


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("n", "fields"),
    [(2, {}), (2, {"resample_blocks": True, "scale_shift_norm": True}), pytest.param(3, {}, marks=pytest.mark.slow)],
)
def test_a_network_of_constant_slices_is_the_network_with_one_axis_less(n, fields):
    """On a torus, kernels add up along an axis with constant values; norms and attention do not change with copies."""
    size = (8, 4)[: n - 1]
    large, small = (models.UNet(**TINY, **fields, padding="periodic", spatial_dims=d) for d in (n, n - 1))
    x, time = jax.random.normal(jax.random.key(2), (2, *size, 3)), jnp.array([3.0, 700.0])
    params = redraw(init_shapes(large, (1, 2, *size, 3)))
    expected_tree = init_shapes(small, (1, *size, 3))
    assert jax.tree.map(jnp.shape, without_first_axis(params)) == jax.tree.map(jnp.shape, expected_tree)
    expected = apply(large, params, jnp.stack([x, x], axis=1), time)
    out = apply(small, without_first_axis(params), x, time)
    np.testing.assert_allclose(expected[:, 0], expected[:, 1], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(out, expected[:, 0], rtol=1e-4, atol=1e-4)


NCSNPP = {"architecture": "ncsn++", "resample_blocks": True}


@pytest.mark.thorough
@pytest.mark.parametrize(("n", "fields"), [(1, NCSNPP), (2, {"resample_blocks": True}), (3, {})])
def test_a_shift_of_a_periodic_array_shifts_the_output(n, fields):
    size = (8, 4, 4)[:n]
    x, time = jax.random.normal(jax.random.key(2), (2, *size, 3)), jnp.array([3.0, 700.0])
    model = models.UNet(**TINY, **fields, padding="periodic", spatial_dims=n)
    params, axes = redraw(init_shapes(model, (1, *size, 3))), tuple(range(1, n + 1))

    def error(model, shift):
        shifted, out = (apply(model, params, a, time) for a in (jnp.roll(x, shift, axes), x))
        return abs(shifted - jnp.roll(out, shift, axes)).max() / abs(out).max()

    assert error(model, (2,) * n) < 1e-5 and error(model, (-4,) + (2,) * (n - 1)) < 1e-5
    assert error(model, (1,) * n) > 1e-3  # not a multiple of the second level's stride
    assert error(model.clone(padding="zeros"), (2,) * n) > 1e-3


@pytest.mark.thorough
@pytest.mark.parametrize("shape", [(7,), (5, 8), (3, 5, 2)])
def test_any_size_is_padded_with_zeros_and_cropped(shape):
    """Equal to the same network on the padded array and condition, cropped by hand."""
    n = len(shape)
    model = models.UNet(**TINY, spatial_dims=n, condition_channels=2)
    even = tuple(-(-size // 2) * 2 for size in shape)
    x, condition = (jax.random.normal(jax.random.key(c), (2, *shape, c)) for c in (3, 2))
    params = redraw(parameter_shapes(model, x, jnp.zeros(2), condition=condition))
    out = apply(model, params, x, jnp.ones(2), condition=condition)
    widths = ((0, 0), *((0, e - s) for e, s in zip(even, shape, strict=True)), (0, 0))
    padded = apply(model, params, jnp.pad(x, widths), jnp.ones(2), condition=jnp.pad(condition, widths))
    assert out.shape == x.shape and padded.shape == (2, *even, 3)
    np.testing.assert_allclose(out, padded[:, *map(slice, shape)], rtol=1e-5, atol=1e-5)
