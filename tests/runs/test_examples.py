"""examples.npz: the training examples that a run stores, and the pictures that show them."""

import dataclasses

import numpy as np
import pytest

from diffusion_jax import data, pictures, pretrained
from diffusion_jax.config import ConfigError, identity_settings, override, resolve
from diffusion_jax.run_dir import RunDir
from diffusion_jax.runs import examples
from diffusion_jax.runs.examples import draw_beside_examples, read_channels, write_examples
from diffusion_jax.runs.sampling_setup import make_captions, resolve_sampling
from helpers.array_configs import array_config
from helpers.configs import conditional, upsampler_config


def stored(directory, **arrays):
    """Writes the examples of a source with these arrays, and reads the file."""
    write_examples(data.InMemory(arrays, 3), RunDir(directory))
    with np.load(directory / "examples.npz") as found:
        return dict(found)


def images(count, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, 8, 8, 1), dtype=np.uint8)


def test_the_examples_are_few_evenly_spread_and_of_every_class(tmp_path):
    x = np.arange(100, dtype=np.float32)[:, None, None] + np.zeros((1, 4, 2), np.float32)
    assert stored(tmp_path, x=x)["x"].shape == (16, 4, 2)
    x = np.arange(600, dtype=np.float32)[:, None, None] + np.zeros((1, 4, 2), np.float32)
    found = stored(tmp_path, x=x, condition=np.arange(600.0)[:, None])
    assert found["x"].shape == (256, 4, 2) and np.ptp(np.diff(found["x"][:, 0, 0])) <= 1
    np.testing.assert_array_equal(found["condition"][:, 0], found["x"][:, 0, 0])
    labels = np.repeat([0, 1, 2], [150, 1, 9])
    found = stored(tmp_path, image=images(160), label=labels)
    assert np.bincount(found["label"]).tolist()[1:] == [1, 7] and found["label"][:3].tolist() == [0, 1, 2]
    labels = np.arange(200) % 100
    assert np.ptp(stored(tmp_path, image=images(200), label=labels)["label"]) > 80  # not the first classes alone
    assert len(stored(tmp_path, x=np.zeros((3000, 2), np.float32))["x"]) == 1000
    assert len(stored(tmp_path, x=np.zeros((20, 2**19), np.float32)[:, :, None])["x"]) == 4  # 8 MB


def test_the_examples_of_a_run_with_a_checkpoint_do_not_change(tmp_path):
    stored(tmp_path, image=images(3))
    (tmp_path / "checkpoints" / "1").mkdir(parents=True)
    (tmp_path / "checkpoints" / "1" / "digests.json").write_text("{}")
    np.testing.assert_array_equal(stored(tmp_path, image=images(3, seed=1))["image"], images(3))


def test_limits_are_robust_and_names_and_units_are_the_configs(tmp_path):
    x = np.random.default_rng(0).standard_normal((16, 40, 1)).astype(np.float32)
    x[0, 0] = 1e6
    stored(tmp_path, x=x)
    names = {"data.channels": 1, "data.channel_names": ("heat",), "data.channel_units": ("W",)}
    config = array_config("series", "", **names)
    channels = read_channels(config, RunDir(tmp_path))
    assert channels.label(0) == "heat (W)" and 2 < -channels.limits[0, 0] < 5 and 2 < channels.limits[0, 1] < 5


def beside(directory, config, samples, **changes):
    """The arguments of `pictures.draw_samples`."""
    setup = resolve_sampling(config, pretrained.from_config(config), read_files=False)
    calls = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(examples.pictures, "draw_samples", lambda x, *_, **given: calls.append((x, given)))
        draw_beside_examples(RunDir(directory), dataclasses.replace(setup, **changes), samples, "title")
    return calls[0]


def test_pictures_have_the_classes_of_the_examples(tmp_path):
    stored(tmp_path, image=images(6), label=np.arange(6) % 3)
    _, given = beside(tmp_path, conditional(), images(12))
    assert given["labels"].tolist() == [*range(10), 0, 1]
    assert given["examples"].captions == ["class 0", "class 1", "class 2"] * 2 and given["examples"].labels is not None
    _, given = beside(tmp_path, conditional(**{"model.num_classes": 0, "model.label_dropout": 0.0}), images(12))
    assert given["labels"] is given["examples"].captions is given["examples"].labels is None


def test_samples_are_beside_the_examples_with_the_nearest_conditions(tmp_path):
    """Sample i has condition i, and a cycle of the conditions repeats them: the picture shows one cycle."""
    rates = np.random.default_rng(0).permutation(np.linspace(0, 1, 100))[:, None].astype(np.float32)
    x = np.broadcast_to(rates[:, :, None, None], (100, 6, 8, 5))
    missing = np.arange(100) == 40
    stored(tmp_path, x=x, condition=np.concatenate([rates, 0 * rates], axis=1), condition_missing=missing)
    requested = np.array([[0.0, 0], [0.3, 0], [1.0, 0], [rates[0, 0], 0]], np.float32)
    conditions = {"condition": requested, "condition_missing": np.array([False, False, False, True])}
    config = array_config("field", "", **{"model.condition_features": 2})
    shown, given = beside(tmp_path, config, np.arange(7.0)[:, None, None, None] + x[:7], conditions=conditions)
    found = given["examples"]
    assert len(shown) == 4 and found.pairs.shape == (4,)
    np.testing.assert_allclose(found.x[found.pairs][:3, 0, 0, 0], requested[:3, 0], atol=0.011)
    assert [
        float(found.captions[i].split(",")[0].removeprefix("condition ")) for i in found.pairs[:3]
    ] == pytest.approx([0, 0.3, 1], abs=0.011)
    assert found.captions[found.pairs[3]] == "no condition"


@pytest.mark.parametrize(
    ("kind", "labels", "width", "captions"),
    [
        ("series", None, 2, ["condition 0.123, -2", "no condition"]),
        ("series", np.array([1, 0]), 1, ["class 1: dog, condition 0.123", "class 0: cat, no condition"]),
        ("series", None, 5, ["condition 0.123, -2, 1e+06, 0, ...", "no condition"]),
        ("series", None, 0, None),
        ("images", None, 2, ["0.123, -2", "no condition"]),
        ("images", None, 5, None),
        ("images", np.array([1, 0]), 1, ["class 1: dog", "class 0: cat"]),
    ],
)
def test_captions_are_classes_and_the_numbers_of_conditions(kind, labels, width, captions):
    config = conditional() if kind == "images" else array_config(kind, "")
    net = dataclasses.replace(pretrained.from_config(config), class_names=("cat", "dog"))
    values = np.tile(np.array([0.12345, -2, 1e6, 0, 7], np.float32)[:width], (2, 1))
    conditions = {"condition": values, "condition_missing": np.array([False, True])} if width else {}
    assert make_captions(net, labels, conditions) == captions


def test_an_upsampler_has_its_inputs_before_its_samples(tmp_path):
    found, small = stored(tmp_path, image=images(4))["image"], images(2)[:, :4, :4]
    samples = images(3, seed=1)
    x, given = beside(tmp_path, upsampler_config(), samples, small_images=small)
    np.testing.assert_array_equal(x[:, :, 8:], samples)
    np.testing.assert_array_equal(x[:, ::2, :8:2], small[[0, 1, 0]])
    means = found.reshape(4, 4, 2, 4, 2, 1).mean(axis=(2, 4))
    np.testing.assert_allclose(given["examples"].x[:, 1::2, 1:8:2], means, atol=0.5)
    np.testing.assert_array_equal(given["examples"].x[:, :, 8:], found)
    wide = examples._pair(np.ones((1, 2, 3, 1)), np.zeros((1, 4, 6, 1)))
    assert wide.shape == (1, 4, 12, 1) and wide[:, :, :6].all() and not wide[:, :, 6:].any()


@pytest.mark.parametrize("content", [None, b"PK\x03\x04 torn"])
def test_a_run_without_readable_examples_has_pictures_of_samples_alone(content, tmp_path, capsys):
    if content:
        (tmp_path / "examples.npz").write_bytes(content)
    assert beside(tmp_path, conditional(), images(12))[1]["examples"] is None
    assert read_channels(conditional(), RunDir(tmp_path)) == pictures.Channels()
    assert ("cannot be read, so pictures omit the training examples" in capsys.readouterr().out) == bool(content)


@pytest.mark.parametrize("name", ["channel_names", "channel_units"])
def test_names_and_units_fit_the_channels_and_may_change(name):
    config = resolve({"data": {name: ("u", "v", "T")}})
    assert identity_settings(config) == identity_settings(resolve({}))
    words = rf"data.{name}=\('u', 'v', 'T'\) must have one text for each of data.channels=2"
    with pytest.raises(ConfigError, match=words):
        override(config, {"data.channels": "2"})
