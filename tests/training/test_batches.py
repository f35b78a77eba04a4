"""A train step's batches: accepted and refused arrays, flips, and several steps in one call."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import training
from diffusion_jax.errors import ConfigError
from diffusion_jax.training.batches import Examples, random_flip, read_batch
from helpers.array_configs import array_config
from helpers.configs import a_batch, classifier_config, tiny_config
from helpers.recorded_steps import floats, recorded

LABELS = {"model.num_classes": 10}
IMAGE = np.zeros((8, 8, 8, 1), np.uint8)
LABELED = {"image": IMAGE, "label": np.zeros(8, np.int32)}


def traced(config, batch):
    """The metrics' shapes: the batch is checked when the step is traced, so nothing is compiled."""
    classifies = config.diffusion.loss == "classify"
    output = lambda w, x_t, time: w * (x_t[:, 0, 0] * jnp.ones(10) if classifies else x_t)  # noqa: E731
    _, state, run = recorded(config, output, config.model.num_classes)
    return jax.eval_shape(jax.jit(run), state, batch)[1]


def test_labels_are_needed_only_where_something_takes_them():
    image = a_batch(tiny_config())["image"]
    for config in (tiny_config(), tiny_config(**{"training.accumulation_steps": 2})):
        assert traced(config, {"image": image})["loss"].dtype == jnp.float32
        assert traced(config, {"image": image, "label": np.zeros(3)})
    for config in (tiny_config(**LABELS), classifier_config()):
        with pytest.raises(ValueError, match=r'a batch must have "label", int \[8\].*got \'image\''):
            traced(config, {"image": image})
        assert traced(config, {"image": image, "label": np.zeros(8, np.int64)})


@pytest.mark.thorough
def test_the_compiled_step_of_create_works_inside_scan_steps():
    config = array_config("vectors", "", **{"model.dropout": 0.0})
    batches = [{"x": np.random.default_rng(i).normal(size=(8, 3)).astype(np.float32)} for i in range(3)]
    state, train_step = training.create(config)
    many, last = jax.jit(training.scan_steps(train_step))(state, jax.tree.map(lambda *x: np.stack(x), *batches))
    for batch in batches:
        state, metrics = train_step(state, batch)
    assert int(many.step) == 3
    # Two programs: sums of a few hundred float32 products in another order, and Adam divides small gradients by their size.
    np.testing.assert_allclose(last["loss"], metrics["loss"], rtol=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), many.params, state.params)


def test_weights_to_start_from_are_not_for_create():
    with pytest.raises(
        ValueError, match=r"init_from='runs/old': training.create does not load weights.*pretrained.load"
    ):
        training.create(tiny_config(init_from="runs/old"))
    training.build_program(tiny_config(init_from="runs/old"))  # the program loads them itself


@pytest.mark.parametrize("settings", [{"levels": None}, {"image_size": (8,)}, {"image_size": (8, 8, 8)}])
def test_only_images_are_mirrored(settings):
    """A config without `random_flip` has True."""
    model = {"channels": 4, "channel_multipliers": (1,), "num_groups": 4, "num_res_blocks": 1, "attention_levels": ()}
    config = {"data": {"image_size": 8, "channels": 1} | settings, "model": model, "training": {"batch_size": 8}}
    with pytest.raises(ConfigError, match="random_flip=True mirrors only images .*use --config.data.random_flip=False"):
        training.build_program(config)
    config["data"]["random_flip"] = False
    training.build_program(config)


def test_a_condition_is_none_where_it_is_marked_and_unmarked_nan_makes_the_example_nan():
    x = np.arange(10.0, dtype=np.float32).reshape(5, 2)
    condition = np.float32([[1, 2], [3, 4], [np.nan, np.nan], [5, np.nan], [np.nan, 6]])
    batch = {"x": x, "condition": condition, "condition_missing": np.array([False, True, False, False, True])}
    overrides = {"data.image_size": (), "data.channels": 2, "model.condition_features": 2}
    config = array_config("vectors", "", **overrides, **{"model.condition_dropout": 0.1})
    x_0, _, found = jax.jit(lambda batch: read_batch(batch, config))(batch)
    np.testing.assert_array_equal(x_0, np.where(np.array([0, 0, 1, 1, 0])[:, None], np.nan, x))
    np.testing.assert_array_equal(np.asarray(found)[[0, 1, 4]], np.float32([[1, 2], [np.nan] * 2, [np.nan] * 2]))
    config = array_config("vectors", "", **{"model.condition_features": 2})
    batch = {"x": np.zeros((8, 3), np.float32), "condition": np.zeros((8, 2)), "condition_missing": np.zeros(8, bool)}
    with pytest.raises(ValueError, match="set model.condition_dropout above 0, or leave it out"):
        traced(config, batch)


def test_float_data_are_not_mirrored_by_default():
    """A config without levels has 256 levels, so only the batch shows that the data are no images."""
    for overrides, batch, words in (
        (
            {"data.random_flip": True},
            {"x": IMAGE * 1.0},
            "mirrors only uint8 images: use data.random_flip=False",
        ),
        ({"data.levels": None}, {"image": IMAGE}, "data.levels=None is for continuous data .*use data.levels=256"),
        ({"diffusion.loss": "vlb"}, {"x": IMAGE * 1.0}, "data.levels=17: the loss vlb .* use data.levels=None"),
    ):
        with pytest.raises(ValueError, match=words):
            traced(tiny_config(**overrides), batch)
    assert traced(tiny_config(**{"data.random_flip": True}), {"image": IMAGE})
    assert traced(tiny_config(**{"data.levels": None}), {"x": IMAGE * 1.0})


def test_a_mirrored_image_has_its_condition_mirrored():
    """Left to right, the second spatial axis, both or neither; vectors and labels stay."""
    x_0 = jnp.arange(64 * 3 * 5 * 2.0).reshape(64, 3, 5, 2)
    field, vector, y = 1000 + x_0[..., :1], jnp.arange(64 * 5.0).reshape(64, 5), jnp.arange(64)
    found = random_flip(jax.random.key(0), Examples(x_0, y, field))
    turned = np.array([(image != old).any() for image, old in zip(found.x_0, x_0, strict=True)])
    assert 0 < turned.sum() < 64
    for array, old in ((found.x_0, x_0), (found.condition, field)):
        expected = np.where(turned[:, None, None, None], np.flip(old, axis=2), old)
        np.testing.assert_array_equal(array, expected)
    np.testing.assert_array_equal(found.y, y)
    np.testing.assert_array_equal(random_flip(jax.random.key(0), Examples(x_0, y, vector)).condition, vector)


@pytest.mark.thorough
def test_the_hybrid_loss_of_float_data_is_the_sum_of_its_terms():
    """data.levels=None selects the bound for continuous data."""
    hybrid = {"diffusion.loss": "hybrid", "diffusion.variance": "learned_range", "diffusion.num_timesteps": 4}
    output = lambda w, x_t, _: w * jnp.concatenate([x_t] * 2, -1)  # noqa: E731
    _, state, run = recorded(tiny_config(**hybrid, **{"data.levels": None}), output)
    metrics = run(state, {"x": floats()})[1]
    np.testing.assert_allclose(metrics["loss"], metrics["mse"] + 0.001 * metrics["vlb"], rtol=1e-5)


@pytest.mark.thorough
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_float_data_are_taken_as_they_are(dtype):
    """The same step as with the corresponding uint8 images, where the numbers are equal."""
    config = tiny_config()
    levels = np.array([0, 255], np.uint8)  # -1 and 1, which every type holds
    image = np.random.default_rng(0).choice(levels, (8, 8, 8, 1))
    x = jnp.asarray(image / 127.5 - 1, dtype)
    network, state, run = recorded(config, lambda w, x_t, time: w * x_t)
    of_image, of_x = (run(state, batch)[1] for batch in ({"image": image}, {"x": x}))
    assert of_x["loss"].dtype == jnp.float32 and network.calls[1].x_t.dtype == jnp.float32
    # Two programs: x_t is a sum of two products, the loss a mean of squares, rounded to 2^-24 each time.
    np.testing.assert_allclose(network.calls[0].x_t, network.calls[1].x_t, rtol=1e-5, atol=1e-6)
    assert float(of_image["loss"]) == pytest.approx(float(of_x["loss"]), rel=1e-5)


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        (
            {"image": IMAGE / 127.5 - 1},
            r'must have "image", uint8.*float data.* are given as "x".*got float(32|64)',
        ),
        ({"x": IMAGE}, r'must have "x", float.*given as "image"\); got uint8'),
        ({"image": IMAGE, "x": IMAGE * 1.0}, r"either \"image\".* or \"x\".*got 'image', 'x'"),
        ({"image": np.zeros((8, 8, 8, 3), np.uint8)}, r"uint8 \[8, 8, 8, 1\].*data.channels.*got uint8 \[8, 8, 8, 3\]"),
        ({"image": np.zeros((0, 8, 8, 1), np.uint8)}, "at least one example, .* got 0"),
        ({"image": IMAGE, "label": [0] * 8}, r'must have "label".*; got a list'),
        ({"image": IMAGE, "label": np.zeros(7, np.int32)}, r"got int32 \[7\]"),
        (LABELED, r'a batch must have "condition", float \[8, 2\], for model.condition_features'),
        (
            LABELED | {"condition": np.zeros((8, 3))},
            r'must have "condition", float \[8, 2\], for model.condition_features.*; got float.* \[8, 3\]',
        ),
        (
            LABELED | {"condition": np.zeros((8, 2)), "condition_missing": np.zeros(8)},
            r'must have "condition_missing", bool \[8\], for examples without a condition; got float.* \[8\]',
        ),
    ],
)
def test_a_wrong_batch_is_refused_in_one_line(batch, words):
    with pytest.raises(ValueError, match=words) as caught:
        read_batch(batch, tiny_config(**LABELS, **{"model.condition_features": 2, "model.condition_dropout": 0.1}))
    assert "\n" not in str(caught.value)
