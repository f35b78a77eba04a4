"""The U-Net: counts, embedding and initialization as published, and accepted and refused arguments."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import models
from diffusion_jax.models.layers import FourierEmbedding
from helpers import own_networks
from helpers.networks import TINY, apply, init, init_shapes, redraw


def test_timestep_embedding_equals_published_values():
    embedding = models.timestep_embedding(jnp.arange(128), 64)
    expected = [[0.9646, 0.9804, 0.9892], [0.9615, 0.9787, 0.9882], [0.9582, 0.9769, 0.9872]]
    np.testing.assert_allclose(embedding[23:26, 47:50], expected, atol=5e-5)
    openai = models.timestep_embedding(jnp.arange(128), 64, cos_first=True, freq_shift=0)
    expected = [[0.3019, 0.2280, 0.1716], [0.3146, 0.2377, 0.1790], [0.3272, 0.2474, 0.1864]]
    np.testing.assert_allclose(openai[23:26, 47:50], expected, atol=6e-5)
    np.testing.assert_allclose(models.timestep_embedding(jnp.array([0.5]), 64)[0, :32].max(), np.sin(0.5), rtol=1e-6)
    with pytest.raises(ValueError, match="even"):
        models.timestep_embedding(jnp.arange(2), 7)


@pytest.mark.parametrize(
    "kind", ["mlp", "custom", *(pytest.param(k, marks=pytest.mark.thorough) for k in ("unet", "classifier"))]
)
def test_one_time_serves_all_rows_and_another_number_of_times_is_refused(kind):
    shape, small = (8,) if kind == "mlp" else (8, 8, 1), {"channels": 8, "num_res_blocks": 1}
    model = {
        "mlp": lambda: models.MLP(**small),
        "custom": lambda: models.CustomNetwork(kind="own", function=own_networks.linen),
        "unet": lambda: models.UNet(**TINY),
        "classifier": lambda: models.Classifier(**TINY, num_classes=3),
    }[kind]()
    x = jax.random.normal(jax.random.key(0), (3, *shape))
    params = redraw(init_shapes(model, x.shape))
    one = apply(model, params, x, 7.0)
    np.testing.assert_array_equal(one, apply(model, params, x, jnp.full(3, 7.0)))
    assert (one != apply(model, params, x, jnp.float32(8.0))).any()
    for time in (jnp.zeros(2), jnp.zeros(1), jnp.zeros((3, 1))):
        with pytest.raises(
            ValueError, match=r"time must be one number, or 3 numbers, one for each row of x_t; got shape \("
        ):
            jax.eval_shape(lambda time: model.apply({"params": params}, x, time), time)


def test_frequencies_of_ncsnpp_are_normal_and_not_trained():
    layer, time = FourierEmbedding(4096), jnp.array([0.1, -0.3])
    params = layer.init(jax.random.key(0), time)
    frequencies = np.float64(params["params"]["frequencies"])
    assert abs(frequencies.std() / 16 - 1) < 4 / np.sqrt(2 * 4096) and abs(frequencies.mean()) < 4 * 16 / np.sqrt(4096)
    angles = 2 * np.pi * np.outer(time, frequencies)
    np.testing.assert_allclose(layer.apply(params, time), np.hstack([np.sin(angles), np.cos(angles)]), atol=1e-4)
    gradient = jax.grad(lambda params: layer.apply(params, time).sum())(params)
    assert not gradient["params"]["frequencies"].any()


@pytest.mark.thorough
def test_initialization_equals_ho_et_al():
    """Uniform with variance 1 / fan_avg, biases 0; the last layer in every residual branch and in the network is near 0."""
    params = init(models.UNet(**{**TINY, "channels": 64, "num_groups": 32}))
    kernel = params["down_1_block_0"]["conv1"]["kernel"]
    bound = np.sqrt(3 / (9 * (64 + 128) / 2))
    assert 0.98 * bound < abs(kernel).max() <= bound and abs(kernel.var() - bound**2 / 3) < 0.02 * bound**2
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = jax.tree_util.keystr(path)
        if "bias" in name:
            assert (leaf == 0).all(), name
        elif (
            "kernel" in name
            and any(last in name for last in ("conv2", "proj'", "conv_out"))
            and "time_proj" not in name
        ):
            assert 0 < abs(leaf).max() < 1e-5, name
        elif "kernel" in name:
            assert abs(leaf).max() > 1e-2, name


@pytest.mark.thorough
def test_initialization_equals_openai():
    """PyTorch's default kernels, uniform within 1 / sqrt(fan_in), and zeros where a branch ends."""
    params = init(models.UNet(**{**TINY, "channels": 64, "num_groups": 32}, initializer="openai"))
    kernel, bound = params["down_1_block_0"]["conv1"]["kernel"], (9 * 64) ** -0.5
    assert 0.98 * bound < abs(kernel).max() <= bound and abs(kernel.var() - bound**2 / 3) < 0.02 * bound**2
    for layer in (params["down_1_block_0"]["conv2"], params["mid_attn"]["proj"], params["conv_out"]):
        assert (layer["kernel"] == 0).all()


@pytest.mark.thorough
@pytest.mark.parametrize(
    "fields",
    [{}, {"scale_shift_norm": True, "resample_blocks": True}, {"architecture": "ddpm++", "resample_blocks": True}],
)
def test_every_parameter_has_a_gradient(fields):
    model = models.UNet(**TINY, num_classes=3, **fields)
    x, y = jax.random.normal(jax.random.key(2), (2, 8, 8, 3)), jnp.array([0, 1])
    params = redraw(init_shapes(model, y=y[:1]))
    grads = jax.grad(lambda p: (apply(model, p, x, jnp.array([3.0, 700.0]), y) ** 2).sum())(params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
        if "['k']['bias']" not in jax.tree_util.keystr(path):  # a constant in all logits cancels in the softmax
            assert abs(leaf).max() > 1e-6, jax.tree_util.keystr(path)


@pytest.mark.thorough
def test_output_depends_on_labels_time_and_dropout():
    model = models.UNet(**{**TINY, "num_classes": 3, "dropout": 0.5})
    x = jnp.ones((1, 8, 8, 3))
    params = redraw(init_shapes(model, y=jnp.zeros(1, int)))
    run = lambda t=0.0, y=0, **kw: apply(model, params, x, jnp.array([t]), jnp.array([y]), **kw)  # noqa: E731
    assert abs(run() - run(y=1)).max() > 1e-3 and abs(run() - run(t=500.0)).max() > 1e-3
    a, b = (run(train=True, rngs={"dropout": jax.random.key(i)}) for i in (0, 1))
    assert abs(a - b).max() > 1e-3
    np.testing.assert_array_equal(run(), run())
    concrete = lambda x, y: model.apply({"params": params}, x, jnp.zeros(1), y)  # noqa: E731
    for label in (3, -1):  # a label out of range never selects another label's embedding
        with pytest.raises(ValueError, match=rf"labels must lie in 0 \.\.\. 2, got {label}"):
            concrete(x, jnp.array([label]))
        assert np.isnan(run(y=label)).all()
    with pytest.raises(ValueError, match=r"labels must be int, 0 \.\.\. 2; got float32"):
        concrete(x, jnp.array([1.0]))
    with pytest.raises(ValueError, match="needs float images"):
        concrete(x.astype(jnp.uint8), jnp.array([0]))


@pytest.mark.thorough
def test_head_channels_equal_the_same_number_of_heads():
    x, time = jax.random.normal(jax.random.key(2), (1, 8, 8, 3)), jnp.array([3.0])
    by_number = models.UNet(**{**TINY, "num_heads": 4})  # one attention layer width, 16
    params = redraw(init_shapes(by_number))
    by_channels = models.UNet(**TINY, head_channels=4)
    split, counted = (apply(model, params, x, time) for model in (by_channels, by_number))
    np.testing.assert_allclose(split, counted, rtol=1e-5, atol=1e-5)  # two programs of some twenty layers


@pytest.mark.thorough
def test_remat_keeps_the_output_and_bfloat16_changes_it_by_rounding():
    x, time = jax.random.normal(jax.random.key(2), (2, 8, 8, 3)), jnp.array([3.0, 700.0])
    plain = models.UNet(**TINY)
    params = redraw(init_shapes(plain))

    def gradient_and_output(model):
        def loss(params):
            out = model.apply({"params": params}, x, time)
            return (out**2).mean(), out

        return jax.jit(jax.grad(loss, has_aux=True))(params)

    expected, reference = gradient_and_output(plain)
    for levels in (True, (0,)):
        gradient, out = gradient_and_output(models.UNet(**TINY, remat=levels))
        np.testing.assert_allclose(out, reference, rtol=1e-5, atol=1e-5)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), expected, gradient)
    half = models.UNet(**TINY, dtype="bfloat16")
    out = apply(half, params, x, time)
    # bfloat16 keeps 8 bits: 0.4% per rounding, with some tens of roundings in a row.
    assert out.dtype == jnp.float32 and np.linalg.norm(out - reference) < 0.05 * np.linalg.norm(reference)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(init_shapes(half)))


IMAGE, VECTOR, TWO_SERIES, Y = (1, 8, 8, 3), (1, 2), (2, 8, 3), jnp.zeros(1, int)


@pytest.mark.parametrize(
    ("kind", "shape", "fields", "inputs", "words"),
    [
        ("UNet", (8, 8, 3), {"spatial_dims": 2}, {}, r"\[B, H, W, C\]"),
        ("UNet", IMAGE, {"num_groups": 3}, {}, "num_groups=3"),
        ("UNet", IMAGE, {"initializer": "he"}, {}, "'ho' or 'openai'"),
        ("UNet", IMAGE, {"num_heads": 3}, {}, "num_heads=3 does not divide an attention layer of 16"),
        ("UNet", IMAGE, {"head_channels": 0}, {}, "head_channels=0"),
        ("UNet", IMAGE, {"attention_levels": (2,)}, {}, "attention_levels must lie in 0 ... 1"),
        ("UNet", IMAGE, {"spatial_dims": 1}, {}, r"needs arrays \[B, L, C\], got shape \(1, 8, 8, 3\)"),
        ("UNet", (1, 3), {"spatial_dims": 0}, {}, "spatial_dims=0 must be 1, 2 or 3; vectors need an MLP"),
        ("UNet", IMAGE, {"padding": "reflect"}, {}, "padding='reflect' must be 'zeros' or 'periodic'"),
        ("UNet", IMAGE, {"architecture": "unet"}, {}, "architecture='unet' must be one of ddpm"),
        ("UNet", IMAGE, {"architecture": "ncsn++"}, {}, r"architecture='ncsn\+\+' needs resample_blocks=True"),
        ("UNet", (1, 8, 9, 3), {"padding": "periodic"}, {}, r"needs sizes divisible by 2, .*padding='periodic' .*\(8, 9\)"),
        ("UNet", IMAGE, {"num_classes": 2}, {}, "needs y"),
        ("UNet", IMAGE, {}, {"y": Y}, "without classes"),
        ("UNet", IMAGE, {"label_dropout": 1.0, "num_classes": 2}, {"y": Y}, r"label_dropout must lie in \[0, 1\)"),
        ("UNet", TWO_SERIES, {}, {"condition": jnp.zeros((2, 2))}, "a condition was given to a network without"),
        ("UNet", TWO_SERIES, {"condition_dropout": 0.1}, {}, "condition_dropout=0.1 needs conditions to drop"),
        ("UNet", TWO_SERIES, {"condition_features": 2}, {}, r"needs a condition of shape \(2, 2\)"),
        ("UNet", TWO_SERIES, {"condition_features": 2}, {"condition": jnp.zeros((2, 3))}, r"float of shape \(2, 2\), got"),
        ("UNet", TWO_SERIES, {"condition_features": 2, "condition_channels": 1}, {}, "takes one kind of condition"),
        ("MLP", (1, 4, 2), {}, {}, r"needs float vectors \[B, C\], got float32 of shape \(1, 4, 2\); a UNet takes"),
        ("MLP", VECTOR, {"dropout": 1.0}, {}, r"dropout must lie in \[0, 1\)"),
    ],
)  # fmt: skip
def test_fields_and_inputs_that_do_not_fit_are_refused(kind, shape, fields, inputs, words):
    base = {"channels": 8, "num_res_blocks": 1} if kind == "MLP" else TINY | {"spatial_dims": len(shape) - 2}
    model = getattr(models, kind)(**{**base, **fields})
    with pytest.raises(ValueError, match=words):
        jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros(shape), jnp.zeros(shape[0]), **inputs))


def test_from_config_builds_a_unet_and_refuses_unknown_settings():
    assert models.from_config({**TINY, "channel_multipliers": [1, 2]}) == models.UNet(**TINY)
    with pytest.raises(ValueError, match=r"model.width is not a field"):
        models.from_config({"width": 3})


def test_the_time_embedding_has_four_times_the_channels():
    """Ho et al.'s and OpenAI's networks, which all published weights follow."""
    shapes = init_shapes(models.UNet(**TINY), (1, 8, 8, 3))
    assert {shapes["time_0"]["kernel"].shape[1], shapes["time_1"]["kernel"].shape[1]} == {4 * TINY["channels"]}


def test_time_scale_multiplies_the_network_time():
    model = models.UNet(**TINY | {"channel_multipliers": (1,), "attention_levels": ()})
    x = jax.random.normal(jax.random.key(0), (2, 4, 4, 1))
    params = redraw(init_shapes(model, x.shape))
    run, scaled = jax.jit(model.apply), jax.jit(model.clone(time_scale=1000.0).apply)
    time = jnp.array([-1.5, 0.25])
    np.testing.assert_allclose(scaled({"params": params}, x, time), run({"params": params}, x, 1000 * time), atol=1e-5)
    assert not np.allclose(scaled({"params": params}, x, time), run({"params": params}, x, time), atol=1e-3)
