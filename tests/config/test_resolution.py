"""Complete configs from partial mappings, from command lines and from the files of earlier versions."""

import json
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from diffusion_jax import config, data, training

TINY = {"channels": 8, "channel_multipliers": [1], "num_res_blocks": 1, "attention_levels": [], "num_groups": 4}


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
    resolved.sampling.steps, resolved.data.image_size = 5, 8  # leaves of several types stay open to all of them
    assert config.resolve(resolved).sampling.steps == 5


def test_values_get_the_type_of_their_leaf():
    resolved = config.resolve(
        {
            "training": {"num_steps": np.int64(7)},
            "optimizer": {"grad_clip": 1},
            "model": {"channel_multipliers": [1, 0.5]},
            "sampling": {"steps": [3, 4.5]},
        }
    )
    assert type(resolved.training.num_steps) is int and type(resolved.optimizer.grad_clip) is float
    assert resolved.model.channel_multipliers == (1, 0.5) and type(resolved.model.channel_multipliers[0]) is int
    assert resolved.sampling.steps == (3, 4.5)


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"training": {"batchsize": 3}}, "unknown leaf training.batchsize; did you mean training.batch_size?"),
        ({"trainng": {"num_steps": 3}}, "unknown leaf trainng.num_steps; did you mean training.num_steps?"),
        ({"sede": 3}, "unknown leaf sede; did you mean seed?"),
        ({"xyz": 3}, "unknown leaf xyz; docs/reference/configuration.md lists all leaves"),
        ({"trainnig": {}}, "unknown leaf trainnig; did you mean training?"),
        ({"data": {"foo": {}}}, "unknown leaf data.foo; docs/reference/configuration.md lists all leaves"),
        (
            {"seed": {}},
            "seed={} must be a whole number in 0 ... 4294967295; description: Seed of the initial parameters, the batches "
            "and the noise of training",
        ),
        (
            {"training.num_steps": 3},
            "the key 'training.num_steps' has a dot; nest it: {'training': {'num_steps': ...}}",
        ),
        (
            None,
            "a config must be a nested mapping, such as {'training': {'num_steps': 800000}}, and not None",
        ),
        ([1], "a config must be a nested mapping, such as {'training': {'num_steps': 800000}}, and not [1]"),
        (
            {"diffusion": {"loss": np.zeros((2, 2))}},
            "the line starts with diffusion.loss=array([[0., 0.], [0., 0.]]) must be",
        ),
        (
            {"data": {"channels": 3.0}},
            "data.channels=3.0 must be a whole number of at least 1; write 3",
        ),
        ({"model": {"dtype": "float16"}}, "type: gradients underflow without loss scaling, so use bfloat16"),
        ({"model": {"dtype": np.float16}}, "type: gradients underflow without loss scaling, so use bfloat16"),
        ({"seed": {"value": 3}}, "unknown leaf seed.value; seed is a leaf itself, not a group"),
        ({"training": 5}, "training=5 must be a group of leaves, such as {'num_steps': 800000}"),
        (
            {"training": {"num_steps": 1e4}},
            "training.num_steps=10000.0 must be a whole number of at least 1; write 10000",
        ),
        (
            {"ema": {"decay": 2}},
            "ema.decay=2 must be a number in [0, 1]; description: Decay rate of the moving average of the parameters",
        ),
        ({"evaluation": {"metrics": ("fid", "kidd")}}, "'kidd' is not allowed; did you mean kid?"),
        ({"sampling": {"steps": "10,15"}}, "type --config.sampling.steps=10,15 --config.sampling.spacing=openai"),
        (
            {"diffusion": {"loss": "classify"}, "model": {"label_dropout": 0.1}},
            "unknown leaf model.label_dropout: the model of a classifier (diffusion.loss=classify) has none; remove it",
        ),
    ],
)
def test_what_is_wrong_is_one_line(given, line):
    with pytest.raises(config.ConfigError) as caught:
        config.resolve(given)
    part = line.removeprefix("the line starts with ").removeprefix("type: ")
    assert str(caught.value) == line or (part in str(caught.value) and line[0] in "'t")
    assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(config.ConfigError):
        config.override(given, {"data.image_size": "8"})


def test_a_classifier_has_the_leaves_of_its_own_network():
    resolved = config.resolve({"diffusion": {"loss": "classify"}, "model": {"num_classes": 3}})
    assert resolved.model.num_classes == 3 and resolved.model.channel_multipliers == (1, 1, 2, 3, 4)
    assert "label_dropout" not in resolved.model
    assert config.default_classifier().model.num_classes == 1000


def test_overrides_are_read_as_their_leaf():
    resolved = config.override(
        {},
        {
            "training.num_steps": "1e4",
            "data.image_size": "(8, 16)",
            "sampling.class": "'7'",
            "sampling.steps": "1e2",
            "sampling.clip": "dynamic",
            "sampling.spacing": "None",
            "model.remat": "true",
            "model.channel_multipliers": "(1, 2.5)",
            "optimizer.learning_rate": "3e-4",
            "evaluation.metrics": "('fid', 'kid')",
        },
    )
    assert resolved.training.num_steps == 10_000 and resolved.data.image_size == (8, 16)
    assert resolved.sampling.label == "7" and resolved.sampling.steps == 100 and resolved.sampling.clip == "dynamic"
    assert resolved.sampling.spacing is None and resolved.model.remat is True
    assert resolved.model.channel_multipliers == (1, 2.5) and resolved.optimizer.learning_rate == 3e-4
    assert resolved.evaluation.metrics == ("fid", "kid")
    assert config.override({}, {"diffusion.loss": "classify", "model.num_classes": "4"}).model.num_classes == 4


@pytest.mark.whole
def test_training_takes_a_partial_mapping():
    data = {"dataset": "digits", "image_size": 8, "channels": 1, "random_flip": False}
    state, train_step = training.create({"data": data, "model": TINY, "training": {"batch_size": 2}})
    batch = {"image": np.zeros((2, 8, 8, 1), np.uint8), "label": np.zeros(2, np.int32)}
    state, metrics = train_step(state, batch)
    assert int(state.step) == 1 and np.isfinite(float(metrics["loss"]))
    with pytest.raises(ValueError, match=r"unknown leaf training.batchsize; did you mean training.batch_size\?"):
        training.create({"data": data, "training": {"batchsize": 3}})


def test_a_config_of_version_0_1_is_translated():
    stored = json.loads(config.default().to_json())
    del stored["evaluation"]["ode_dequantization"]
    stored["evaluation"]["ode_dequantisation"] = "uniform"
    stored["evaluation"]["metrics"] = ["fid", "memorisation"]
    stored["editing"]["task"] = "colourise"
    resolved = config.resolve(config.migrate(stored))
    assert resolved.evaluation.ode_dequantization == "uniform" and resolved.editing.task == "colorize"
    assert resolved.evaluation.metrics == ("fid", "memorization")
    assert resolved.model.channel_multipliers == (1, 2, 2, 2)
    assert "ode_dequantisation" in stored["evaluation"]  # the argument is left alone


@pytest.mark.parametrize(
    ("text", "steps", "spacing"),
    [("ddim50", 50, "openai_ddim"), ("250", 250, "openai"), ("10,15,20", (10, 15, 20), "openai")],
)
def test_stored_steps_that_are_text_become_numbers_and_a_spacing(text, steps, spacing):
    resolved = config.resolve(config.migrate({"sampling": {"steps": text}}))
    assert resolved.sampling.steps == steps and resolved.sampling.spacing == spacing


def test_a_config_of_this_version_is_not_changed_by_migration():
    stored = json.loads(config.experiment("mnist_conditional").to_json())
    assert config.migrate(stored) == stored
    assert config.resolve(config.migrate(stored)).to_dict() == config.experiment("mnist_conditional").to_dict()
    assert config.migrate({"sampling": 5}) == {"sampling": 5}  # `resolve` refuses it


def test_fields_that_refer_to_an_overridden_one_follow_it():
    given = config.default()
    given.optimizer.decay_steps = given.training.get_ref("num_steps")
    given.training.log_every = given.training.get_ref("num_steps") // 100
    given.lock()
    resolved = config.override(given, {"training.num_steps": "1000"})
    assert (resolved.training.num_steps, resolved.optimizer.decay_steps, resolved.training.log_every) == (
        1000,
        1000,
        10,
    )
    resolved = config.override(given, {"training.num_steps": "1000", "optimizer.decay_steps": "5"})
    assert (resolved.training.num_steps, resolved.optimizer.decay_steps, resolved.training.log_every) == (1000, 5, 10)
    assert given.training.num_steps == given.optimizer.decay_steps == 800_000  # the argument is left alone


def test_values_of_other_libraries_are_taken_as_python_values():
    given = {
        "training": {"num_steps": np.array(7), "batch_size": jnp.int32(4), "profile": np.bool_(True)},
        "optimizer": {"learning_rate": jnp.float32(0.5)},
        "model": {"attention_levels": np.array([0, 1]), "dtype": jnp.bfloat16},
        "diffusion": {"weighting": None},
        "sampling": {"guidance_interval": np.array([0, np.inf]), "steps": range(1, 3)},
        "data": {"data_dir": pathlib.Path("images")},
    }
    resolved = config.resolve(given)
    flat = config.flatten(resolved)
    values = {name: flat[name] for name in config.flatten(given)}
    assert values == {
        "training.num_steps": 7,
        "training.batch_size": 4,
        "training.profile": True,
        "optimizer.learning_rate": 0.5,
        "model.attention_levels": (0, 1),
        "model.dtype": "bfloat16",
        "diffusion.weighting": "none",
        "sampling.guidance_interval": (0.0, float("inf")),
        "sampling.steps": (1, 2),
        "data.data_dir": "images",
    }
    items = [item for value in values.values() for item in (value if isinstance(value, tuple) else (value,))]
    assert {type(item) for item in items} == {int, float, bool, str}
    assert {type(bound) for bound in resolved.sampling.guidance_interval} == {float}
    assert config.resolve({"model": {"dtype": np.dtype("float32")}}).model.dtype == "float32"


@pytest.mark.parametrize(
    ("leaf", "text", "value"),
    [
        ("model.attention_levels", "1", (1,)),
        ("model.attention_levels", "()", ()),
        ("model.attention_levels", "1,2", (1, 2)),
        ("evaluation.metrics", "fid", ("fid",)),
        ("evaluation.metrics", "fid, kid", ("fid", "kid")),
        ("sampling.label", "tench, Tinca tinca", "tench, Tinca tinca"),  # one name
    ],
)
def test_a_tuple_may_be_written_without_parentheses(leaf, text, value):
    assert config.flatten(config.override({}, {leaf: text}))[leaf] == value


def test_steps_that_are_not_all_numbers_are_not_translated():
    assert config.migrate({"sampling": {"steps": "10,x,20"}}) == {"sampling": {"steps": "10,x,20"}}


def test_a_group_that_is_no_group_is_refused_with_overrides():
    with pytest.raises(config.ConfigError, match="data=5 must be a group of leaves"):
        config.override({"data": 5}, {"data.image_size": "8"})


def test_a_config_file_may_have_an_argument_and_a_colon_in_its_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "C:mine.py").write_text("def get_config(seed='1'):\n    return {'seed': int(seed)}\n")
    assert config.load_experiment("C:mine.py").seed == 1 and config.load_experiment("C:mine.py:23").seed == 23
    with pytest.raises(config.ConfigError, match="C:mine.py:x: line 2 of C:mine.py raises ValueError"):
        config.load_experiment("C:mine.py:x")


def test_data_takes_a_partial_mapping():
    source = data.load({"dataset": "digits", "image_size": 8, "channels": np.int64(1)})
    assert len(source) > 0 and source.read(np.arange(2))["image"].shape == (2, 8, 8, 1)
