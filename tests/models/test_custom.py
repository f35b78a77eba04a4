"""Networks that a user's function makes: forms, options, checks, and the same numbers as the network itself."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from diffusion_jax import cli, models, pretrained, training
from diffusion_jax import config as configs
from diffusion_jax.errors import UserError
from diffusion_jax.models import Shapes
from diffusion_jax.run_dir import open_run_dir
from diffusion_jax.runs import workdir
from helpers import own_networks
from helpers.array_configs import array_config
from helpers.configs import a_batch, tiny_config

SHAPE = (8, 8, 1)
X, TIME = jax.random.normal(jax.random.key(1), (3, *SHAPE)), jnp.array([0.0, 3.0, 900.0])


def config_of(kind, texts=None, **overrides):
    """The tiny config with another network: `texts` as on the command line."""
    config = tiny_config(**overrides)
    return configs.override(
        config, {"model.kind": f"helpers.own_networks:{kind}", "model.dropout": "0"} | (texts or {})
    )


def network_of(kind, texts=None, **overrides):
    return training.model_from_config(config_of(kind, texts, **overrides))


def output_of(net):
    return net.denoiser().output(X, net.schedule.path.at(TIME, X))


def init(model, **inputs):
    return model.init(jax.random.key(0), X, TIME, **inputs)["params"]


def test_a_linen_module_gives_its_own_numbers():
    model = network_of("linen", {"model.options.width": "6"})
    params, own = init(model), own_networks.linen(Shapes(SHAPE, SHAPE), width=6)
    np.testing.assert_array_equal(
        model.apply({"params": params}, X, TIME), own.apply({"params": params["network"]}, X, TIME)
    )


def test_an_nnx_module_gives_its_own_numbers():
    model, own = network_of("of_nnx"), own_networks.of_nnx(Shapes(SHAPE, SHAPE), rngs=nnx.Rngs(5))
    params = {"network": nnx.to_pure_dict(nnx.state(own, nnx.Param))}
    np.testing.assert_array_equal(model.apply({"params": params}, X, TIME), own(X, TIME))
    drawn = init(model)["network"]["dense_0"]["kernel"]
    assert drawn.shape == (65, 8) and drawn.std() > 0


def test_a_pair_of_functions_takes_further_scalars():
    model = network_of("pair", {"model.options.scale": "2"})
    params = init(model)
    plain = model.apply({"params": params}, X, TIME)
    np.testing.assert_allclose(
        plain.reshape(3, -1),
        jnp.concatenate([X.reshape(3, -1), TIME[:, None] / 1000], 1) @ params["network"]["w"],
        rtol=1e-5,
    )
    more = model.apply({"params": params}, X, TIME, extra=jnp.full((3, 2), 5.0))
    np.testing.assert_allclose(more, plain + 5, rtol=1e-5)


@pytest.mark.parametrize("kind", [pytest.param("linen", marks=pytest.mark.thorough), "of_nnx"])
def test_dropout_follows_the_key_and_is_off_without_training(kind):
    model = network_of(kind, {"model.dropout": "0.5"})
    params = init(model)

    def call(seed, train=True):
        return model.apply({"params": params}, X, TIME, train=train, rngs={"dropout": jax.random.key(seed)})

    assert (call(0) == call(0)).all() and (call(0) != call(1)).any()
    np.testing.assert_array_equal(call(0, train=False), call(1, train=False))


def test_a_condition_is_replaced_by_the_null_that_the_network_declares():
    model = network_of("linen", {"model.condition_features": "2", "model.condition_dropout": "0.5"})
    condition = jnp.array([[1.0, 2.0], [jnp.nan, jnp.nan], [0.5, 0.5]])
    params = init(model, condition=condition)
    output = model.apply({"params": params}, X, TIME, condition=condition)
    null = model.apply(
        {"params": params}, X, TIME, condition=jnp.full((3, 2), own_networks.Convolutions.null_condition)
    )
    np.testing.assert_array_equal(output[1:], null[1:])
    assert (output[0] != null[0]).any()


def test_a_null_condition_may_be_learned():
    texts = {"model.kind": "helpers.own_networks:learns_null", "model.dropout": "0"}
    texts |= {"model.condition_features": "3", "model.condition_dropout": "0.5"}
    model = training.model_from_config(configs.override(array_config("vectors", ""), texts))
    x, condition = jnp.zeros((2, 3)), jnp.array([[1.0, 2.0, 3.0], [jnp.nan] * 3])
    params = model.init(jax.random.key(0), x, TIME[:2], condition=condition)["params"]

    def output(params):
        return model.apply({"params": params}, x, TIME[:2], condition=condition)

    np.testing.assert_allclose(output(params), [[1, 2, 3], [0.7] * 3], rtol=1e-6)
    np.testing.assert_array_equal(jax.grad(lambda p: output(p).sum())(params)["network"]["null"], np.ones(3))


def test_bfloat16_computes_in_bfloat16_and_returns_float32():
    low, high = (network_of("linen", {"model.dtype": dtype}) for dtype in ("bfloat16", "float32"))
    params = init(high)
    output = low.apply({"params": params}, X, TIME)
    error = abs(output - high.apply({"params": params}, X, TIME)).max()
    assert output.dtype == jnp.float32 and 1e-4 < error < 0.1


@pytest.mark.parametrize("kind", ["linen", "of_nnx", "pair"])
def test_extra_stays_float32_in_bfloat16(kind):
    """It may be a time, of which bfloat16 has only 8 bits: 499 and 501 would both be 500."""
    model = network_of(kind, {"model.dtype": "bfloat16"})
    params = init(model)
    low, high = (model.apply({"params": params}, X, TIME, extra=jnp.full((3, 1), n)) for n in (499.0, 501.0))
    np.testing.assert_allclose(high - low, 2, atol=2**-15)  # two roundings, to multiples of 2^-15


@pytest.mark.parametrize(
    ("kind", "texts", "words"),
    [
        ("without_time", {}, "the output does not depend on time"),
        ("too_wide", {}, r"has shape \[2, 2, 8, 8, 1\] .* must have \[2, 8, 8, 1\]"),
        ("pair", {"model.num_classes": "10"}, "the output does not depend on y"),
        ("pair", {"model.dropout": "0.1"}, "dropout=0.1 has no effect .* has no argument of this name; use 0.0"),
        ("ignores_dropout", {"model.dropout": "0.1"}, "draws no random numbers; use --config.model.dropout=0"),
        ("linen", {"diffusion.loss": "classify", "model.num_classes": "10"}, "a classifier is not made by"),
        ("batch_norm", {}, "'batch_stats', which a call changes.*GroupNorm"),
        ("number", {}, "must return a Linen module, an NNX module or a pair .* not a int"),
        ("linen", {"model.options.depth": "3"}, "model.options.depth is not an argument .*; its options: width"),
        ("linen", {"model.options.width": "wide"}, "model.options.width='wide' must be a whole number"),
        ("pair", {"model.options.mode": "wides"}, "model.options.mode='wides' must be plain or wide"),
        ("linen", {"model.channels": "64"}, "model.channels=64 has no effect .* use 128"),
        ("absent", {}, "helpers.own_networks:absent cannot be imported"),
        ("pair", {"model.condition_features": "2", "model.condition_dropout": "0.5"}, "does not depend on condition"),
    ],
)
def test_a_network_that_cannot_be_trained_is_one_line(kind, texts, words):
    with pytest.raises(ValueError, match=words) as caught:
        network_of(kind, texts)
    assert "\n" not in str(caught.value)


def test_options_are_settings_of_a_run():
    config = config_of("linen", {"model.options.width": "6"})
    assert config.model.options.to_dict() == {"width": 6} and config.model.channels == 128
    assert configs.identity_settings(config)["model.options"] == {"width": 6}
    again = configs.resolve(configs.override(config, {"model.options.width": "7"}).to_dict())
    assert again.model.options.to_dict() == {"width": 7}
    with pytest.raises(ValueError, match="model.options={'width': 3} are for"):
        training.model_from_config(configs.resolve({"model": {"options": {"width": 3}}}))


def test_a_file_is_found_beside_the_config_and_from_another_directory(tmp_path, monkeypatch):
    code = "def net(shapes):\n    return lambda key: 1.0, lambda params, x_t, time: params * x_t + time.sum()\n"
    (tmp_path / "mine.py").write_text(code)
    (tmp_path / "experiment.py").write_text(
        "from diffusion_jax.config import default\n\n\ndef get_config():\n"
        "    config = default()\n    config.model.kind = 'mine.py:net'\n"
        "    config.evaluation.metrics = ['fid', 'mine.py:net']\n    return config\n"
    )
    kind = f"{tmp_path.resolve()}/mine.py:net"
    found = configs.experiment(str(tmp_path / "experiment.py"))
    assert found.model.kind == kind and list(found.evaluation.metrics) == ["fid", kind]
    monkeypatch.chdir(tmp_path)
    config = configs.override(tiny_config(), {"model.kind": "mine.py:net"})
    assert config.model.kind == kind
    moved = configs.resolve(config.to_dict() | {"model": config.model.to_dict() | {"kind": "/moved/mine.py:net"}})
    assert configs.identity_settings(moved) == configs.identity_settings(config)


def test_a_file_with_annotations_as_text_defines_a_module(tmp_path):
    """Dataclasses look up the module of their annotations while the file runs."""
    path = tmp_path / "annotated.py"
    path.write_text(
        "from __future__ import annotations\nimport flax.linen as nn\n\n\nclass Net(nn.Module):\n    scale: float\n\n"
        "    @nn.compact\n    def __call__(self, x_t, time):\n"
        "        return self.scale * nn.Dense(1)(x_t) + time[:, None, None, None]\n\n\n"
        "def net(shapes, *, scale: float = 2.0):\n    return Net(scale)\n"
    )
    config = configs.override(tiny_config(), {"model.kind": f"{path}:net", "model.dropout": "0"})
    assert init(training.model_from_config(config))["network"]["Dense_0"]["kernel"].shape == (1, 1)
    path.with_name("broken.py").write_text("import absent_module\n")
    for _ in range(2):  # a file that fails is not kept
        with pytest.raises(ValueError, match="No module named 'absent_module'"):
            models.import_network(f"{path.with_name('broken.py')}:net")


class Line(NamedTuple):
    slope: jax.Array
    biases: list[jax.Array]


def test_the_parameters_of_a_pair_may_be_any_pytree(tmp_path):
    """Files hold them as nested dicts, whose leaves have another order; the pair gets its own pytree."""

    def line(shapes):
        def apply(params, x_t, time):
            return params.slope * x_t + params.biases[0] * time[:, None, None, None] + params.biases[1]

        return lambda key: Line(jnp.full((), 5.0), [jnp.full((), 2.0), jnp.full((1,), 3.0)]), apply

    config = configs.override(tiny_config(), {"model.kind": "any.module:line", "model.dropout": "0"})
    params = init(training.model_from_config(config, line))
    assert params["network"] == {"slope": 5.0, "biases": {"0": 2.0, "1": 3.0}}
    net = pretrained.from_config(config, params, network=line)
    pretrained.save_safetensors(net, tmp_path / "net.safetensors")
    output = output_of(pretrained.load(tmp_path / "net.safetensors", network=line))
    np.testing.assert_allclose(output, 5 * X + 2 * TIME[:, None, None, None] + 3, rtol=1e-6)


@pytest.mark.thorough
@pytest.mark.parametrize("kind", ["linen", "of_nnx", "pair"])
def test_microbatches_take_the_same_step(kind):
    """Two microbatches have the gradient of the batch, with Linen's dropout layers."""
    losses = []
    for count in (1, 2):
        texts = {"model.dropout": "0.5"} if kind == "linen" else None
        config = config_of(kind, texts, **{"training.accumulation_steps": count})
        state, step = training.create(config)
        for _ in range(2):
            state, metrics = step(state, a_batch(config))
        losses.append(metrics["loss"])
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)


def test_a_file_of_weights_imports_nothing_by_itself(tmp_path):
    config = config_of("linen")
    model = training.model_from_config(config)
    net = pretrained.from_config(config, init(model))
    pretrained.save_safetensors(net, tmp_path / "net.safetensors")
    with pytest.raises(pretrained.PretrainedError, match="loading imports no code by itself; give network=True"):
        pretrained.load(tmp_path / "net.safetensors")
    for network in (True, own_networks.linen):
        loaded = pretrained.load(tmp_path / "net.safetensors", network=network)
        np.testing.assert_array_equal(output_of(loaded), output_of(net))
    with pytest.raises(pretrained.PretrainedError, match="diffusers has no such network"):
        pretrained.save_diffusers(net, tmp_path / "folder")


def test_a_run_imports_its_network_only_if_it_is_named_again(tmp_path, capsys):
    config = config_of("linen", {"model.options.width": "6"})
    workdir.write_config(config, tmp_path)
    arguments = [f"--workdir={tmp_path}", "--mode=sample"]
    with pytest.raises(UserError, match="imports or opens helpers.own_networks:linen .*--trust_network"):
        cli.parse(arguments)
    for flag in ("--trust_network", "--config.model.kind=helpers.own_networks:linen"):
        assert cli.parse([*arguments, flag]).config.model.options.width == 6
    with pytest.raises(SystemExit):
        cli.parse(["--config.model.kind=helpers.own_networks:linen", "--help"])
    assert "--config.model.options.width: int=4" in capsys.readouterr().out


def test_only_the_help_describes_the_network_of_a_command_line(tmp_path, monkeypatch, capsys):
    described = []
    monkeypatch.setattr(cli, "_describe_network", lambda arguments: described.append(tuple(arguments)) or "")
    arguments = ["--config=digits", f"--workdir={tmp_path}", "--config.model.kind=helpers.own_networks:linen"]
    cli.parse(arguments)
    with pytest.raises(SystemExit):
        cli.parse([*arguments, "--help"])
    assert described == [(), (*arguments, "--help")]


def test_a_changed_file_of_a_network_is_a_note(tmp_path, capsys):
    path, run = tmp_path / "mine.py", open_run_dir(tmp_path / "run")
    path.write_text(
        "def net(shapes):\n    return lambda key: 1.0, lambda params, x_t, time: params * x_t + time.sum()\n"
    )
    config = configs.override(tiny_config(), {"model.kind": f"{path}:net", "model.dropout": "0"})
    model = training.model_from_config(config)
    (run / "checkpoints" / "5" / "rest").mkdir(parents=True)
    (run / "checkpoints" / "5" / "digests.json").write_text("{}")
    workdir.check_network_source(model, run, records=True)
    workdir.check_network_source(model, run)
    assert "changed" not in capsys.readouterr().out
    path.write_text(path.read_text() + "# another\n")
    workdir.check_network_source(model, run)
    assert f"Note: {path} changed since this run began (SHA-256 " in capsys.readouterr().out


def test_each_dropout_of_an_nnx_module_draws_its_own_mask():
    model = network_of("two_dropouts", {"model.dropout": "0.5"})
    params = init(model)

    def call(train):
        return model.apply({"params": params}, X, TIME, train=train, rngs={"dropout": jax.random.key(0)})

    ratio = np.asarray(call(True) / call(False))  # the product of two masks, 0 or 4
    assert set(np.unique(ratio.round(4))) == {0.0, 4.0} and abs((ratio > 0).mean() - 0.25) < 0.15


@pytest.mark.parametrize("kind", ["of_nnx", "with_key", "draws_itself", "attends"])
def test_microbatches_draw_different_numbers(kind):
    """Of a network that draws them outside Linen's dropout layers."""
    model = network_of(kind, {"model.dropout": "0.5"})
    params = init(model)
    keys = [{"dropout": jax.random.key(0), "microbatch": jax.random.key(i)} for i in (1, 2)]
    one, two = (model.apply({"params": params}, X, TIME, train=True, rngs=rngs) for rngs in keys)
    assert (one != two).mean() > 0.25


def test_weights_start_from_weights_with_another_dropout(tmp_path):
    config = config_of("linen", {"model.dropout": "0.3"})
    net = pretrained.from_config(config, init(training.model_from_config(config)))
    pretrained.save_safetensors(net, tmp_path / "net.safetensors")
    config = config_of("linen", **{"init_from": str(tmp_path / "net.safetensors")})
    loaded = pretrained.load_initial_weights(config, training.model_from_config(config))
    assert loaded.params.keys() == net.params.keys()
    other = configs.override(config, {"model.options.width": "9"})
    with pytest.raises(UserError, match="is another network"):
        pretrained.load_initial_weights(other, training.model_from_config(other))
    with pytest.raises(pretrained.PretrainedError, match="needs the function helpers.own_networks:linen"):
        unet = tiny_config(**{"init_from": str(tmp_path / "net.safetensors")})
        pretrained.load_initial_weights(unet, training.model_from_config(unet))


def test_no_flag_lets_weights_import_a_function_that_it_does_not_name(tmp_path):
    config = configs.override(config_of("linen"), {"diffusion.path": "helpers.own_networks:path"})
    path = tmp_path / "net.safetensors"
    pretrained.save_safetensors(pretrained.from_config(config, init(training.model_from_config(config))), path)
    for flag in ("--config.model.kind=unet", "--config.model.kind=helpers.own_networks:linen"):
        with pytest.raises(UserError, match="loading imports no code"):
            cli.parse([f"--pretrained={path}", f"--workdir={tmp_path / 'run'}", flag])
    with pytest.raises(pretrained.PretrainedError, match="needs the function helpers.own_networks:path"):
        pretrained.load(path, network=own_networks.linen)
    assert pretrained.load(path, network=True).schedule.path == own_networks.path()
    parsed = cli.parse([f"--pretrained={path}", f"--workdir={tmp_path / 'run'}", "--trust_network"])
    assert parsed.config.model.kind == "helpers.own_networks:linen"
    workdir.write_config(configs.override(tiny_config(), {"diffusion.weighting": "evil:weight"}), tmp_path / "other")
    (tmp_path / "other" / "checkpoints").mkdir()
    with pytest.raises(UserError, match="imports or opens evil:weight"):
        cli.parse([f"--pretrained={tmp_path / 'other'}", f"--workdir={tmp_path / 'run'}"])


def test_options_belong_to_one_network():
    config = config_of("linen", {"model.options.width": "6"})
    other = configs.override(config, {"model.kind": "helpers.own_networks:pair", "model.options.scale": "2"})
    assert other.model.options.to_dict() == {"scale": 2}
    assert configs.override(config, {"model.kind": "unet"}).model.options.to_dict() == {}
    with pytest.raises(configs.ConfigError, match="a.b is not the name of an argument"):
        configs.override(config, {"model.options.a.b": "1"})
