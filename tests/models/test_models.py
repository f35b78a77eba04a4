"""The U-Net: counts, embedding and initialization as published, and what it accepts and refuses."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import models
from diffusion_jax.models import convolution
from diffusion_jax.models.blocks import ResBlock, downsample_2x, upsample_2x
from diffusion_jax.models.layers import Dropout, GroupNorm, LayerFactory
from helpers.jaxprs import equations
from helpers.networks import TINY, redraw


def init(model, shape=(1, 8, 8, 3), y=None):
    return jax.jit(model.init)(jax.random.key(0), jnp.zeros(shape), jnp.zeros(shape[0]), y)["params"]


def apply(model, params, *args, **kwargs):
    """Compiled whole: op by op costs more time than the network."""
    train = kwargs.pop("train", False)
    return jax.jit(lambda p, *a, **kw: model.apply({"params": p}, *a, train=train, **kw))(params, *args, **kwargs)


@pytest.mark.parametrize(
    ("fields", "size", "count"),
    [
        ({}, 32, 35_746_307),
        ({"channel_multipliers": (1, 1, 2, 2, 4, 4), "attention_levels": (4,)}, 256, 113_673_219),
    ],
)
def test_parameter_counts_of_ho_et_al(fields, size, count):
    shapes = jax.eval_shape(lambda: init(models.UNet(**fields), (1, size, size, 3)))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == count


ADM = {
    "channels": 256,
    "scale_shift_norm": True,
    "resample_blocks": True,
    "head_channels": 64,
    "embedding_cos_first": True,
    "embedding_freq_shift": 0.0,
    "norm_epsilon": 1e-5,
    "initializer": "openai",
    "dropout": 0.0,
    "num_classes": 1000,
    "out_channels": 6,
}


@pytest.mark.parametrize(
    ("size", "fields", "count"),
    [
        (64, {"channels": 192, "channel_multipliers": (1, 2, 3, 4), "num_res_blocks": 3}, 295_904_454),
        (128, {"channel_multipliers": (1, 1, 2, 3, 4), "num_heads": 4, "head_channels": None}, 421_529_606),
        (256, {"channel_multipliers": (1, 1, 2, 2, 4, 4)}, 553_838_086),
        (256, {"channel_multipliers": (1, 1, 2, 2, 4, 4), "num_classes": 0}, 552_814_086),
        (512, {"channel_multipliers": (0.5, 1, 1, 2, 2, 4, 4)}, 558_997_638),
    ],
)
def test_parameter_counts_of_adm(size, fields, count):
    levels = tuple(i for i in range(len(fields["channel_multipliers"])) if size >> i in (32, 16, 8))
    model = models.UNet(**{**ADM, **fields, "attention_levels": levels})
    y = jnp.zeros(1, int) if model.num_classes else None
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, size, size, 3)), jnp.zeros(1), y))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == count


def test_timestep_embeddings_are_the_published_ones():
    embedding = models.timestep_embedding(jnp.arange(128), 64)
    expected = [[0.9646, 0.9804, 0.9892], [0.9615, 0.9787, 0.9882], [0.9582, 0.9769, 0.9872]]
    np.testing.assert_allclose(embedding[23:26, 47:50], expected, atol=5e-5)
    openai = models.timestep_embedding(jnp.arange(128), 64, cos_first=True, freq_shift=0)
    expected = [[0.3019, 0.2280, 0.1716], [0.3146, 0.2377, 0.1790], [0.3272, 0.2474, 0.1864]]
    np.testing.assert_allclose(openai[23:26, 47:50], expected, atol=6e-5)
    np.testing.assert_allclose(models.timestep_embedding(jnp.array([0.5]), 64)[0, :32].max(), np.sin(0.5), rtol=1e-6)
    with pytest.raises(ValueError, match="even"):
        models.timestep_embedding(jnp.arange(2), 7)


def test_initialization_is_ho_et_al_s():
    """Uniform of variance 1 / fan_avg, biases 0; the last layer of every residual branch and of the network near 0."""
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


def test_initialization_is_openai_s():
    """PyTorch's default kernels, uniform within 1 / sqrt(fan_in), and zeros where a branch ends."""
    params = init(models.UNet(**{**TINY, "channels": 64, "num_groups": 32}, initializer="openai"))
    kernel, bound = params["down_1_block_0"]["conv1"]["kernel"], (9 * 64) ** -0.5
    assert 0.98 * bound < abs(kernel).max() <= bound and abs(kernel.var() - bound**2 / 3) < 0.02 * bound**2
    for layer in (params["down_1_block_0"]["conv2"], params["mid_attn"]["proj"], params["conv_out"]):
        assert (layer["kernel"] == 0).all()


@pytest.mark.parametrize("adm", [False, True])
def test_every_parameter_has_a_gradient(adm):
    model = models.UNet(**TINY, num_classes=3, scale_shift_norm=adm, resample_blocks=adm)
    x, y = jax.random.normal(jax.random.key(2), (2, 8, 8, 3)), jnp.array([0, 1])
    params = redraw(init(model, y=y[:1]))
    grads = jax.grad(lambda p: (apply(model, p, x, jnp.array([3.0, 700.0]), y) ** 2).sum())(params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
        if "['k']['bias']" not in jax.tree_util.keystr(path):  # a constant added to every logit moves no softmax
            assert abs(leaf).max() > 1e-6, jax.tree_util.keystr(path)


@pytest.mark.parametrize("shape", [(2, 8, 8, 3), (1, 12, 20, 1), (1, 2, 2, 4)])
def test_any_size_that_divides_and_any_channels(shape):
    model = models.UNet(**TINY)
    out = apply(model, redraw(init(model, shape)), jnp.ones(shape), jnp.zeros(shape[0]))
    assert out.shape == shape and out.dtype == jnp.float32 and np.isfinite(out).all()
    wide = models.UNet(**TINY, out_channels=2 * shape[-1])
    out = jax.eval_shape(lambda: wide.apply({"params": init(wide, shape)}, jnp.ones(shape), jnp.zeros(shape[0])))
    assert out.shape == (*shape[:-1], 2 * shape[-1])


def test_parameters_do_not_depend_on_the_image_size():
    small, large = (jax.eval_shape(lambda s=s: init(models.UNet(**TINY), s)) for s in ((1, 8, 8, 3), (1, 16, 24, 3)))
    assert small == large


def test_labels_time_and_dropout_matter():
    model = models.UNet(**{**TINY, "num_classes": 3, "dropout": 0.5})
    x = jnp.ones((1, 8, 8, 3))
    params = redraw(init(model, y=jnp.zeros(1, int)))
    run = lambda t=0.0, y=0, **kw: apply(model, params, x, jnp.array([t]), jnp.array([y]), **kw)  # noqa: E731
    assert abs(run() - run(y=1)).max() > 1e-3 and abs(run() - run(t=500.0)).max() > 1e-3
    a, b = (run(train=True, rngs={"dropout": jax.random.key(i)}) for i in (0, 1))
    assert abs(a - b).max() > 1e-3
    np.testing.assert_array_equal(run(), run())
    concrete = lambda x, y: model.apply({"params": params}, x, jnp.zeros(1), y)  # noqa: E731
    for label in (3, -1):  # a label out of range is never a neighbor's
        with pytest.raises(ValueError, match=rf"labels must lie in 0 \.\.\. 2, got {label}"):
            concrete(x, jnp.array([label]))
        assert np.isnan(run(y=label)).all()
    with pytest.raises(ValueError, match=r"labels must be int, 0 \.\.\. 2; got float32"):
        concrete(x, jnp.array([1.0]))
    with pytest.raises(ValueError, match="needs float images"):
        concrete(x.astype(jnp.uint8), jnp.array([0]))


def test_label_dropout_gives_the_null_label_in_training_alone():
    """With every other randomness off, a training output is that of the label or of the null label, at the rate asked."""
    rate, n = 0.3, 400
    model = models.UNet(**TINY, dropout=0.0, num_classes=3, label_dropout=rate)
    assert model.null_label == 3 and models.UNet(**TINY, num_classes=3).null_label is None
    x, time, y = jnp.ones((n, 2, 2, 3)), jnp.zeros(n), jnp.ones(n, int)
    params = redraw(init(model, x.shape, y))
    assert params["class"]["embedding"].shape == (4, 32)
    evaluated = apply(model, params, x, time, y.at[0].set(model.null_label))
    null, labeled = evaluated[0], evaluated[1]
    assert abs(labeled - null).max() > 1e-2
    np.testing.assert_allclose(evaluated[2:], jnp.broadcast_to(labeled, (n - 2, 2, 2, 3)), atol=1e-4)
    trained = apply(model, params, x, time, y, train=True, rngs={"dropout": jax.random.key(1)})
    kept, dropped = (abs(trained - one).max(axis=(1, 2, 3)) < 1e-3 for one in (labeled, null))
    assert (kept ^ dropped).all()
    assert abs(dropped.mean() - rate) < 4 * (rate * (1 - rate) / n) ** 0.5


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


def silu(x):
    return x / (1 + np.exp(-x))


@pytest.mark.parametrize("resample", [downsample_2x, upsample_2x])
def test_a_resampling_block_is_adm_s(resample):
    """In float64 NumPy: both branches are resampled, the residual one between its first SiLU and its first convolution."""
    layers = LayerFactory(num_groups=2, norm_epsilon=1e-5, initializer="openai", dtype=jnp.float32)
    block = ResBlock(6, 0.0, True, layers, resample)
    x, embedding = jax.random.normal(jax.random.key(0), (2, 4, 6, 4)), jax.random.normal(jax.random.key(1), (2, 5))
    params = redraw(block.init(jax.random.key(2), x, embedding, False)["params"])
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


def test_resampling_blocks_stand_where_the_convolutions_did():
    """Same places, widths and sizes: only the layers between levels change."""
    model, plain = models.UNet(**TINY, resample_blocks=True), models.UNet(**TINY)
    params, others = (jax.eval_shape(lambda m=m: init(m, (1, 8, 12, 3))) for m in (model, plain))
    assert {k: v for k, v in params.items() if "sample" not in k} == {
        k: v for k, v in others.items() if "sample" not in k
    }
    assert params["down_0_downsample"]["conv1"]["kernel"].shape == (3, 3, 8, 8)
    assert params["up_1_upsample"]["conv2"]["kernel"].shape == (3, 3, 16, 16)
    x = jnp.zeros((2, 8, 12, 3))
    assert jax.eval_shape(lambda p: model.apply({"params": p}, x, jnp.zeros(2)), params).shape == x.shape


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"num_classes": 3},
        {"remat": True},
        {"scale_shift_norm": True, "resample_blocks": True, "dtype": "bfloat16", "convolution": "xla"},
    ],
)
def test_a_tabulated_network_is_the_network_without_the_products_of_the_time(fields):
    model, times = models.UNet(**TINY, **fields), np.array([3.0, 250.5, 700.0])
    y = jnp.array([2, 0]) if model.num_classes else None
    params = redraw(init(model, y=y if y is None else y[:1]))
    x, time = jax.random.normal(jax.random.key(2), (2, 8, 8, 3)), jnp.array([700.0, 250.5])
    tabulated = jax.jit(lambda p, x, time: models.precompute_time_embeddings(model, p, times)(x, time, y))
    reference = apply(model, params, x, time, y)
    # The same sums, in another order perhaps; in bfloat16 a rounding of 0.4% then grows as in the test of remat below.
    tolerance = 0.05 if model.dtype == "bfloat16" else 1e-5
    assert np.linalg.norm(tabulated(params, x, time) - reference) < tolerance * np.linalg.norm(reference)
    assert np.isnan(tabulated(params, x, jnp.array([700.0, 251.0]))[1]).all()  # a time that is not in the table

    def count(network):
        """Products of matrices, and casts of convolutions' kernels."""
        made = list(equations(jax.make_jaxpr(lambda x, time: network(x, time, y))(x, time).jaxpr))
        products = sum(e.primitive.name == "dot_general" and e.invars[0].aval.ndim == 2 for e in made)
        casts = (e.invars[0].aval for e in made if e.primitive.name == "convert_element_type")
        return products, sum(cast.shape[:2] == (3, 3) and cast.dtype == jnp.float32 for cast in casts)

    products, casts = count(lambda x, time, y: model.apply({"params": params}, x, time, y))
    blocks = sum("time_proj" in own for own in params.values())
    assert products == 2 + blocks and (casts > 0) == (model.dtype == "bfloat16")
    assert count(models.precompute_time_embeddings(model, params, times)) == (blocks if model.num_classes else 0, 0)


def test_heads_by_their_channels_equal_heads_by_their_number():
    x, time = jax.random.normal(jax.random.key(2), (1, 8, 8, 3)), jnp.array([3.0])
    by_number = models.UNet(**{**TINY, "num_heads": 4})  # one attention layer width, 16
    params = redraw(init(by_number))
    by_channels = models.UNet(**TINY, head_channels=4)
    split, counted = (apply(model, params, x, time) for model in (by_channels, by_number))
    np.testing.assert_allclose(split, counted, rtol=1e-5, atol=1e-5)  # two programs of some twenty layers


@pytest.mark.parametrize(
    ("size", "padding"),
    [((3, 3), ((1, 1), (1, 1))), ((3, 3), ((0, 2), (1, 0))), ((2, 2), ((1, 0), (0, 1))), ((3, 1), ((0, 1), (0, 0)))],
)
def test_convolutions_as_products(size, padding):
    keys = jax.random.split(jax.random.key(0), 3)
    x, kernel = jax.random.normal(keys[0], (2, 6, 4, 5)), jax.random.normal(keys[1], (*size, 5, 3))
    y = convolution.convolve_xla(x, kernel, padding)
    g = jax.random.normal(keys[2], y.shape).astype(jnp.bfloat16).astype(jnp.float32)

    def both(convolve, *inputs):
        y, pullback = jax.vjp(lambda x, kernel: convolve(x, kernel, padding), *inputs)
        return y, *pullback(g)

    for mine, true in zip(
        both(convolution.convolve_matmul, x, kernel), both(convolution.convolve_xla, x, kernel), strict=True
    ):
        np.testing.assert_allclose(mine, true, rtol=1e-5, atol=1e-5)
    # In bfloat16 operands are rounded and sums are not: the same as of rounded numbers, gradients rounded once more.
    low = [a.astype(jnp.bfloat16) for a in (x, kernel)]
    computed = both(convolution.convolve_matmul, *low)
    assert [a.dtype for a in computed] == [jnp.float32, jnp.bfloat16, jnp.bfloat16]
    true = both(convolution.convolve_xla, *(a.astype(jnp.float32) for a in low))
    for mine, exact, rtol in zip(computed, true, (1e-5, 2**-8, 2**-8), strict=True):
        np.testing.assert_allclose(mine.astype(np.float32), exact, rtol=rtol, atol=1e-5)


def test_a_doubled_convolution_adds_its_kernel_up_before_it_rounds():
    keys = jax.random.split(jax.random.key(0), 2)
    x, kernel = jax.random.normal(keys[0], (2, 8, 8, 64)), jax.random.normal(keys[1], (3, 3, 64, 64))
    low, true = x.astype(jnp.bfloat16), convolution.convolve_xla(upsample_2x(x), kernel)

    def error(y):
        return np.linalg.norm(y.astype(np.float32) - true) / np.linalg.norm(true)

    plain, first = convolution.convolve_matmul(upsample_2x(low), kernel), kernel.astype(jnp.bfloat16)
    for products, convolve in ((True, convolution.convolve_matmul), (False, convolution.convolve_xla)):
        layers = LayerFactory(4, 1e-6, "ho", jnp.dtype("bfloat16"), products)
        params = {"params": {"kernel": kernel, "bias": jnp.zeros(64)}}
        y = layers.conv(64, "up", upsample=True).apply(params, low)
        # As of the doubled image itself; with kernels that are rounded before they are added up 1.25 times that.
        assert error(y) < 1.05 * error(plain.astype(jnp.bfloat16))
        assert error(convolution.convolve_upsampled(convolve, low, first).astype(jnp.bfloat16)) > 1.2 * error(y)


@pytest.mark.parametrize("convolve", [convolution.convolve_xla, convolution.convolve_matmul])
@pytest.mark.parametrize("size", [(4, 6), (1, 1)])
def test_a_convolution_of_a_doubled_image(convolve, size):
    keys = jax.random.split(jax.random.key(0), 3)
    x, kernel = jax.random.normal(keys[0], (2, *size, 5)), jax.random.normal(keys[1], (3, 3, 5, 3))
    g = jax.random.normal(keys[2], (2, 2 * size[0], 2 * size[1], 3))
    y, pullback = jax.vjp(lambda x, kernel: convolution.convolve_upsampled(convolve, x, kernel), x, kernel)
    true, true_pullback = jax.vjp(lambda x, kernel: convolution.convolve_xla(upsample_2x(x), kernel), x, kernel)
    for mine, exact in zip((y, *pullback(g)), (true, *true_pullback(g)), strict=True):
        np.testing.assert_allclose(mine, exact, rtol=1e-5, atol=2e-5)


def test_a_network_of_products_is_the_same_network():
    fields = {**TINY, "scale_shift_norm": True, "num_heads": 2}
    x, time = jax.random.normal(jax.random.key(1), (2, 8, 8, 3)), jnp.array([3.0, 700.0])
    params = redraw(init(models.UNet(**fields)))

    def run(**more):
        model = models.UNet(**fields, **more)
        return jax.jit(jax.value_and_grad(lambda p: (model.apply({"params": p}, x, time) ** 2).mean()))(params)

    (loss, grads), (true, true_grads) = run(convolution="products"), run(convolution="xla")
    np.testing.assert_allclose(loss, true, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), grads, true_grads)
    # In bfloat16 no further from float32 than XLA's own convolutions, loss and gradients.

    def error(dtype_run):
        flat = [
            np.concatenate([np.ravel(a) for a in jax.tree.leaves(tree)]) for tree in (dtype_run, (true, true_grads))
        ]
        return np.linalg.norm(flat[0] - flat[1]) / np.linalg.norm(flat[1])

    by_products, by_xla = (run(dtype="bfloat16", convolution=how) for how in ("products", "xla"))
    assert error(by_products) < 1.2 * error(by_xla) and error(by_xla) < 0.05


def test_products_are_for_bfloat16_on_one_cpu(monkeypatch):
    monkeypatch.setattr("jax.default_backend", lambda: "cpu")
    monkeypatch.setattr("jax.device_count", lambda: 1)
    assert models.UNet(dtype="bfloat16").layers.use_matmul
    assert not models.UNet().layers.use_matmul
    assert not models.UNet(dtype="bfloat16", convolution="xla").layers.use_matmul
    monkeypatch.setattr("jax.device_count", lambda: 8)  # laying out would gather images from all of them
    assert not models.UNet(dtype="bfloat16").layers.use_matmul
    monkeypatch.setattr("jax.default_backend", lambda: "tpu")
    assert not models.UNet(dtype="bfloat16").layers.use_matmul


def test_group_norm_in_float64_and_its_derivatives():
    x = np.random.default_rng(0).normal(size=(2, 4, 4, 6)) * np.array([0.1, 1, 5, 1, 1, 1]) + 100.0
    norm = GroupNorm(2, 1e-6, jnp.dtype("float32"))
    params = redraw(norm.init(jax.random.key(0), jnp.float32(x)))
    scale, bias = (np.float64(params["params"]["norm"][name]) for name in ("scale", "bias"))
    groups = x.reshape(2, 16, 2, 3)
    mean, variance = groups.mean((1, 3), keepdims=True), groups.var((1, 3), keepdims=True)
    true = ((groups - mean) / np.sqrt(variance + 1e-6)).reshape(x.shape) * scale + bias
    # x itself is rounded to 100 x 2^-24, next to a standard deviation of about one.
    np.testing.assert_allclose(norm.apply(params, jnp.float32(x)), true, atol=2e-5)

    linen = nn.GroupNorm(2, epsilon=1e-6, use_fast_variance=False)
    x, v = jnp.float32(x) - 100, jax.random.normal(jax.random.key(1), x.shape)

    def derivatives(apply):
        first = jax.grad(lambda x: (apply(x) ** 3).sum())
        return first(x), jax.jvp(first, (x,), (v,))[1]

    mine = derivatives(lambda x: norm.apply(params, x))
    for a, b in zip(mine, derivatives(lambda x: linen.apply({"params": params["params"]["norm"]}, x)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * np.abs(b).max())


def test_dropout_in_bfloat16_rounds_once():
    x = jnp.full((1, 1, 1, 64), 3.0, jnp.bfloat16)
    y = Dropout(0.1).apply({}, x, deterministic=False, rngs={"dropout": jax.random.key(0)})
    assert y.dtype == jnp.bfloat16
    assert y.max() == jnp.bfloat16(3.0 / (1 - round(0.1 * 2**16) / 2**16))


def test_dropout_drops_at_its_rate_and_keeps_the_mean():
    x = jnp.ones((64, 16, 16, 7))  # an odd number of channels: the last draw of a pixel is used by half

    def drop(key, rate=0.1):
        return Dropout(rate).apply({}, x, deterministic=False, rngs={"dropout": key})

    y = drop(jax.random.key(0))
    error = np.sqrt(0.09 / x.size)
    assert abs((y == 0).mean() - 0.1) < 4 * error
    np.testing.assert_allclose(np.unique(y), [0, 1 / (1 - round(0.1 * 2**16) / 2**16)], rtol=1e-6)
    dropped = np.asarray(y == 0)
    together = (dropped[..., 0] & dropped[..., 1]).mean()  # the two halves of one draw
    assert abs(together - 0.01) < 4 * np.sqrt(0.01 / dropped[..., 0].size)
    assert (drop(jax.random.key(1)) != y).any()
    np.testing.assert_array_equal(Dropout(0.1).apply({}, x, deterministic=True), x)


def test_remat_changes_nothing_and_bfloat16_little():
    x, time = jax.random.normal(jax.random.key(2), (2, 8, 8, 3)), jnp.array([3.0, 700.0])
    plain = models.UNet(**TINY)
    params = redraw(init(plain))
    reference = apply(plain, params, x, time)
    loss = lambda model: jax.grad(lambda p: (apply(model, p, x, time) ** 2).mean())(params)  # noqa: E731
    remat = models.UNet(**TINY, remat=True)
    np.testing.assert_allclose(apply(remat, params, x, time), reference, rtol=1e-5, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), loss(plain), loss(remat))
    half = models.UNet(**TINY, dtype="bfloat16")
    out = apply(half, params, x, time)
    # bfloat16 keeps 8 bits: 0.4% a rounding, some tens of them in a row.
    assert out.dtype == jnp.float32 and np.linalg.norm(out - reference) < 0.05 * np.linalg.norm(reference)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(init(half)))


@pytest.mark.parametrize(
    ("fields", "shape", "y", "words"),
    [
        ({}, (1, 9, 8, 3), None, "that 2 divides"),
        ({}, (8, 8, 3), None, r"\[B, H, W, C\]"),
        ({"num_groups": 3}, (1, 8, 8, 3), None, "num_groups=3"),
        ({"initializer": "he"}, (1, 8, 8, 3), None, "'ho' or 'openai'"),
        ({"convolution": "fft"}, (1, 8, 8, 3), None, "'auto', 'products' or 'xla'"),
        ({"num_heads": 3}, (1, 8, 8, 3), None, "num_heads=3 does not divide an attention layer of 16"),
        ({"head_channels": 3}, (1, 8, 8, 3), None, "head_channels=3 does not divide an attention layer of 16"),
        ({"head_channels": 0}, (1, 8, 8, 3), None, "head_channels=0"),
        (
            {"label_dropout": 1.0, "num_classes": 2},
            (1, 8, 8, 3),
            jnp.zeros(1, int),
            r"label_dropout must lie in \[0, 1\)",
        ),
        ({"label_dropout": 0.1}, (1, 8, 8, 3), None, "needs labels to drop"),
        ({"attention_levels": (2,)}, (1, 8, 8, 3), None, "attention_levels must lie in 0 ... 1"),
        ({"num_classes": 2}, (1, 8, 8, 3), None, "needs y"),
        ({}, (1, 8, 8, 3), jnp.zeros(1, int), "without classes"),
    ],
)
def test_refusals(fields, shape, y, words):
    with pytest.raises(ValueError, match=words):
        init(models.UNet(**{**TINY, **fields}), shape, y)


def test_from_config():
    assert models.from_config({**TINY, "channel_multipliers": [1, 2]}) == models.UNet(**TINY)
    with pytest.raises(ValueError, match=r"model.width is not a field"):
        models.from_config({"width": 3})
