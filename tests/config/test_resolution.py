"""Complete configs from partial mappings and from command lines."""

import pathlib

import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from diffusion_jax import config, models


def test_a_partial_mapping_is_completed():
    resolved = config.resolve({"training": {"batch_size": 4}, "seed": 3})
    assert resolved.training.batch_size == 4 and resolved.seed == 3
    expected = config.default()
    expected.training.batch_size, expected.seed = 4, 3
    assert resolved.to_dict() == expected.to_dict()


def test_resolving_changes_nothing_twice_and_leaves_its_argument_alone():
    given = ConfigDict({"data": {"image_size": [8, 16]}})
    resolved = config.resolve(given)
    assert resolved.data.image_size == (8, 16) and given.to_dict() == {"data": {"image_size": [8, 16]}}
    assert config.resolve(resolved).to_dict() == resolved.to_dict()
    resolved.sampling.steps, resolved.data.image_size = 5, 8  # a setting with several types still accepts all types
    assert config.resolve(resolved).sampling.steps == 5


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"training": {"batchsize": 3}}, "unknown setting training.batchsize; did you mean training.batch_size?"),
        ({"sampling": {"class": 3}}, "unknown setting sampling.class; use sampling.label"),
        ({"xyz": 3}, "unknown setting xyz; docs/reference/configuration.md lists all settings"),
        ({"training": 5}, "training is a group; set one of its settings, such as training.num_steps"),
        (
            {"training": {"num_steps": 5e3}},
            "training.num_steps=5000.0 must be a whole number of at least 1; write 5000",
        ),
    ],
)
def test_what_is_wrong_is_one_line(given, line):
    with pytest.raises(config.ConfigError) as caught:
        config.resolve(given)
    assert str(caught.value) == line
    with pytest.raises(config.ConfigError):
        config.override(given, {"data.image_size": "8"})


def test_a_classifier_has_the_defaults_of_its_own_network():
    resolved = config.resolve({"diffusion": {"loss": "classify"}, "model": {"num_classes": 3}})
    assert resolved.model.num_classes == 3 and resolved.model.channel_multipliers == (1, 1, 2, 3, 4)
    assert config.override({}, {"diffusion.loss": "classify", "model.num_classes": "4"}).model.num_classes == 4
    with pytest.raises(ValueError, match=r"model.label_dropout=0.1 has no effect on a classifier .*; use 0.0"):
        models.from_config(dict(resolved.model) | {"label_dropout": 0.1}, models.Classifier)


@pytest.mark.parametrize(
    ("setting", "text", "value"),
    [
        ("training.num_steps", "1e4", 10_000),
        ("training.num_steps", "2147483647", 2**31 - 1),
        ("optimizer.learning_rate", "3e-4", 3e-4),
        ("model.remat", "true", True),
        ("model.head_channels", "None", None),
        ("data.split", "None", "None"),
        ("data.image_size", "(8, 16)", (8, 16)),
        ("data.image_size", "()", ()),
        ("model.attention_levels", "1", (1,)),
        ("model.channel_multipliers", "[1, 2.5]", (1, 2.5)),
        ("sampling.steps", "10,15,20", (10, 15, 20)),
        ("sampling.steps", "(3, 4.5)", (3, 4.5)),
        ("sampling.clip", "dynamic", "dynamic"),
        ("sampling.guidance_interval", "0,inf", (0.0, float("inf"))),
        ("sampling.class", "7", 7),
        ("sampling.label", "'7'", "7"),
        ("sampling.label", "tench, Tinca tinca", "tench, Tinca tinca"),  # one name
        ("sampling.label", "('tench, Tinca tinca', cat, 3)", ("tench, Tinca tinca", "cat", 3)),
        ("evaluation.metrics", "fid", ("fid",)),
        ("evaluation.metrics", "('fid', 'kid')", ("fid", "kid")),
    ],
)
def test_text_is_read_as_the_type_of_its_setting(setting, text, value):
    found = config.flatten(config.override({}, {setting: text}))[setting.replace("class", "label")]
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("setting", "text", "words"),
    [
        ("training.num_steps", "2 * 5", "must be a whole number of at least 1; description: Number of training steps"),
        ("training.num_steps", "1.5", "must be a whole number"),
        ("training.num_steps", "1e30", "must be a whole number of at least 1; the largest whole number is 2147483647"),
        ("optimizer.learning_rate", "nan", "must be a number above 0"),
        ("data.limits", "5,5", "must be a tuple of two rising numbers"),
        ("data.limits", "5", "must be a tuple of two rising numbers"),
        ("data.limits", "0,inf", "inf is not allowed"),
        ("evaluation.metrics", "fid,kidd", "'kidd' is not allowed; did you mean kid?"),
        ("model.remat", "maybe", "must be True or False or a tuple of resolutions"),
    ],
)
def test_text_that_is_no_value_of_its_setting_is_refused(setting, text, words):
    with pytest.raises(config.ConfigError) as caught:
        config.override({}, {setting: text})
    assert str(caught.value).startswith(f"{setting}={text} must be") and words in str(caught.value)


@pytest.mark.parametrize(
    ("setting", "value"), [("num_steps", True), ("checkpoint_every", 2.5), ("profile", 1), ("num_steps", None)]
)
def test_values_of_another_type_are_refused(setting, value):
    with pytest.raises(config.ConfigError, match=f"training.{setting}={value} must be"):
        config.resolve({"training": {setting: value}})


def test_values_of_other_libraries_are_taken_as_python_values():
    given = {
        "training": {"num_steps": np.array(7), "profile": np.bool_(True)},
        "optimizer": {"learning_rate": jnp.float32(0.5), "grad_clip": 1},
        "model": {"attention_levels": np.array([0, 1]), "channel_multipliers": [1, 0.5], "dtype": jnp.bfloat16},
        "sampling": {"guidance_interval": np.array([0, np.inf])},
        "data": {"data_dir": pathlib.Path("images")},
    }
    flat = config.flatten(config.resolve(given))
    values = {name: flat[name] for name in config.flatten(given)}
    assert values == {
        "training.num_steps": 7,
        "training.profile": True,
        "optimizer.learning_rate": 0.5,
        "optimizer.grad_clip": 1.0,
        "model.attention_levels": (0, 1),
        "model.channel_multipliers": (1, 0.5),
        "model.dtype": "bfloat16",
        "sampling.guidance_interval": (0.0, float("inf")),
        "data.data_dir": "images",
    }
    items = [item for value in values.values() for item in (value if isinstance(value, tuple) else (value,))]
    assert {type(item) for item in items} == {int, float, bool, str} and type(values["optimizer.grad_clip"]) is float


def test_a_config_file_may_have_an_argument_and_a_colon_in_its_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "C:mine.py").write_text("def get_config(seed='1'):\n    return {'seed': int(seed)}\n")
    assert config.experiment("C:mine.py").seed == 1 and config.experiment("C:mine.py:23").seed == 23
    with pytest.raises(config.ConfigError, match="^C:mine.py:x: line 2 of C:mine.py raises ValueError"):
        config.experiment("C:mine.py:x")


def test_fields_that_refer_to_an_overridden_one_follow_it():
    given = config.default()
    given.optimizer.decay_steps = given.training.get_ref("num_steps")
    given.training.log_every = given.training.get_ref("num_steps") // 100
    given.lock()
    for more, decay_steps in (({}, 1000), ({"optimizer.decay_steps": "5"}, 5)):
        resolved = config.override(given, {"training.num_steps": "1000"} | more)
        steps = resolved.training.num_steps, resolved.optimizer.decay_steps, resolved.training.log_every
        assert steps == (1000, decay_steps, 10)
    assert given.training.num_steps == given.optimizer.decay_steps == 800_000  # the argument is left alone
