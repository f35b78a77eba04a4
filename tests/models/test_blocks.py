"""Network layers and blocks: resampling blocks, GroupNorm and dropout, against float64 NumPy."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import models
from diffusion_jax.models.layers import Dropout, GroupNorm, LayerFactory, ResBlock, convolve, downsample_2x, upsample_2x
from helpers.networks import parameter_shapes, redraw, silu


def conv3x3(x, layer):
    """A 3x3 convolution with zeros around, one kernel entry at a time."""
    _, h, w, _ = x.shape
    padded, kernel = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))), layer["kernel"]
    return sum(padded[:, i : i + h, j : j + w] @ kernel[i, j] for i in range(3) for j in range(3)) + layer["bias"]


def group_norm(x, layer, groups=2, epsilon=1e-5):
    b, h, w, c = x.shape
    x = x.reshape(b, h * w, groups, c // groups)
    x = (x - x.mean((1, 3), keepdims=True)) / np.sqrt(x.var((1, 3), keepdims=True) + epsilon)
    return x.reshape(b, h, w, c) * layer["norm"]["scale"] + layer["norm"]["bias"]


@pytest.mark.thorough
@pytest.mark.parametrize("resample", [downsample_2x, upsample_2x])
def test_resampling_block_equals_adm_in_numpy(resample):
    """In float64 NumPy: both branches are resampled; the residual branch between its first SiLU and its first
    convolution."""
    layers = LayerFactory(num_groups=2, norm_epsilon=1e-5, initializer="openai", dtype=jnp.float32)
    block = ResBlock(6, 0.0, True, layers, resample)
    x, embedding = jax.random.normal(jax.random.key(0), (2, 4, 6, 4)), jax.random.normal(jax.random.key(1), (2, 5))
    params = redraw(parameter_shapes(block, x, embedding, False))
    out = block.apply({"params": params}, x, embedding, False)
    x, embedding, p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), (x, embedding, params))
    if resample is downsample_2x:
        resized = lambda a: (a[:, ::2, ::2] + a[:, 1::2, ::2] + a[:, ::2, 1::2] + a[:, 1::2, 1::2]) / 4  # noqa: E731
    else:
        resized = lambda a: np.kron(a, np.ones((1, 2, 2, 1)))  # noqa: E731
    h = conv3x3(resized(silu(group_norm(x, p["norm1"]))), p["conv1"])
    time = (silu(embedding) @ p["time_proj"]["kernel"] + p["time_proj"]["bias"])[:, None, None]
    h = group_norm(h, p["norm2"]) * (1 + time[..., :6]) + time[..., 6:]
    expected = resized(x) @ p["skip"]["kernel"] + p["skip"]["bias"] + conv3x3(silu(h), p["conv2"])
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.thorough
def test_group_norm_equals_numpy():
    x = np.random.default_rng(0).normal(size=(2, 4, 4, 6)) * np.array([0.1, 1, 5, 1, 1, 1]) + 100.0
    norm = GroupNorm(2, 1e-6, jnp.dtype("float32"))
    params = redraw(norm.init(jax.random.key(0), jnp.float32(x)))
    true = group_norm(x, jax.tree.map(np.float64, params["params"]), epsilon=1e-6)
    # x itself is rounded to 100 x 2^-24, next to a standard deviation of about one.
    np.testing.assert_allclose(norm.apply(params, jnp.float32(x)), true, atol=2e-5)


@pytest.mark.thorough
@pytest.mark.parametrize("mean", [0, 10, 60])
def test_group_norm_of_a_bfloat16_array_is_as_precise_as_the_array(mean):
    """The error of the sums is below the error of x, whose rounding is known here."""
    exact = np.random.default_rng(1).normal(size=(4, 16, 16, 6)) + mean
    x = jnp.asarray(exact, jnp.bfloat16)
    norm = GroupNorm(2, 1e-6, jnp.dtype("float32"))
    params = redraw(norm.init(jax.random.key(0), x))
    layer = jax.tree.map(np.float64, params["params"])
    true, rounded = (group_norm(np.float64(each), layer, epsilon=1e-6) for each in (exact, x))
    assert np.abs(norm.apply(params, x) - rounded).max() < max(1e-4, 0.05 * np.abs(true - rounded).max())


@pytest.mark.thorough
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_group_norm_of_a_constant_array_is_its_bias(dtype):
    """The variance is 0, so the sums must not round to a negative number below -epsilon."""
    norm = GroupNorm(32, 1e-6, jnp.dtype("float32"))
    for mean in (8.125, 100.0):
        x = jnp.full((1, 28, 28, 32), mean, dtype)
        params = redraw(norm.init(jax.random.key(0), x))
        y = norm.apply(params, x)
        np.testing.assert_allclose(y - params["params"]["norm"]["bias"], 0, atol=1e-3 * mean)
        assert np.isfinite(jax.grad(lambda x, p=params: jnp.sin(norm.apply(p, x)).sum())(x)).all()


@pytest.mark.thorough
def test_group_norm_of_a_shifted_array_scales_and_shifts_the_result():
    """The value and the derivatives, also with respect to the shift, equal those of the norm applied to the sum."""
    keys = iter(jax.random.split(jax.random.key(0), 5))
    x, scale, after = (jax.random.normal(next(keys), shape) for shape in ((2, 5, 3, 6), (2, 6), (2, 6)))
    shift = 30 * jax.random.normal(next(keys), (2, 6))  # far larger than a channel's standard deviation
    norm = GroupNorm(2, 1e-6, jnp.dtype("float32"))
    params = redraw(norm.init(jax.random.key(1), x))
    weights = jax.random.normal(next(keys), x.shape)

    def together(x, shift, scale, after):
        return norm.apply(params, x, shift, (scale, after))

    def apart(x, shift, scale, after):
        scale, after = scale[:, None, None], after[:, None, None]
        linen = nn.GroupNorm(2, epsilon=1e-6, use_fast_variance=False)
        out = linen.apply({"params": params["params"]["norm"]}, x + shift[:, None, None])
        return out * (1 + scale) + after

    arguments = (x, shift, scale, after)
    np.testing.assert_allclose(together(*arguments), apart(*arguments), rtol=1e-4, atol=2e-5)
    mine, true = (jax.grad(lambda a, f=f: (weights * f(*a) ** 2).sum())(arguments) for f in (together, apart))
    for a, b in zip(mine, true, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * np.abs(b).max())


def test_dropout_drops_at_its_rate_and_keeps_the_mean():
    x = jnp.ones((64, 16, 16, 7))  # with an odd number of channels, half of a pixel's last draw is used

    def drop(key, rate=0.1):
        return Dropout(rate).apply({}, x, deterministic=False, rngs={"dropout": key})

    y = drop(jax.random.key(0))
    error = np.sqrt(0.09 / x.size)
    assert abs((y == 0).mean() - 0.1) < 4 * error
    np.testing.assert_allclose(np.unique(y), [0, 1 / (1 - round(0.1 * 2**16) / 2**16)], rtol=1e-6)
    dropped = np.asarray(y == 0)
    pairs = np.asarray(jax.random.bits(jax.random.key(0), (64, 16, 16, 4), jnp.uint32))  # two 16-bit numbers in each
    numbers = np.stack([pairs % 2**16, pairs // 2**16], axis=-1).reshape(64, 16, 16, 8)
    given = Dropout(0.1).apply({}, x, False, jax.random.key(0))
    np.testing.assert_array_equal(given == 0, numbers[..., :7] < round(0.1 * 2**16))
    together = (dropped[..., 0] & dropped[..., 1]).mean()  # the two halves of one draw
    assert abs(together - 0.01) < 4 * np.sqrt(0.01 / dropped[..., 0].size)
    assert (drop(jax.random.key(1)) != y).any()
    np.testing.assert_array_equal(Dropout(0.1).apply({}, x, deterministic=True), x)
    half = Dropout(0.1).apply({}, jnp.bfloat16(3 * x), deterministic=False, rngs={"dropout": jax.random.key(0)})
    assert half.dtype == jnp.bfloat16 and half.max() == jnp.bfloat16(3.0 / (1 - round(0.1 * 2**16) / 2**16))


def test_a_call_does_not_change_parameters_that_are_numpy_arrays():
    """Parameters are NumPy arrays, as from a weight file; a sum in place would change the parameters."""
    block = ResBlock(8, 0.0, False, models.UNet(num_groups=4).layers)
    x, embedding = jnp.ones((1, 4, 4, 4)), jnp.ones((1, 6))  # 4 to 8 channels, so with a projection
    params = jax.eval_shape(lambda: block.init(jax.random.key(0), x, embedding, False))["params"]
    params = jax.tree.map(lambda leaf: np.full(leaf.shape, 0.5, leaf.dtype), params)
    before = jax.tree.map(np.copy, params)
    block.apply({"params": params}, x, embedding, False)
    jax.tree.map(np.testing.assert_array_equal, params, before)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"strides": 2},
        {"strides": (2, 1), "padding": "VALID"},
        {"padding": [(1, 0), (2, 2)]},
        {"kernel_dilation": 2},
        {"feature_group_count": 4},
    ],
)
def test_convolve_in_a_plain_layer_gives_its_values_and_gradients(options):
    """A network of one's own may take `convolve` for fast gradients in loops on CPUs."""
    x = jax.random.normal(jax.random.key(1), (2, 7, 6, 8))
    plain, ours = nn.Conv(8, (3, 3), **options), nn.Conv(8, (3, 3), conv_general_dilated=convolve, **options)
    params = plain.init(jax.random.key(0), x)
    values = [
        jax.value_and_grad(lambda p, x, m=m: jnp.sum(jnp.tanh(m.apply(p, x))), (0, 1))(params, x) for m in (plain, ours)
    ]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), *values)
    twice = [
        jax.grad(lambda x, m=m: jnp.sum(jax.grad(lambda x: jnp.sum(jnp.tanh(m.apply(params, x)) ** 2))(x) ** 2))(x)
        for m in (plain, ours)
    ]
    np.testing.assert_allclose(*twice, rtol=1e-4, atol=1e-5)
