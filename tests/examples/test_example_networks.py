"""The networks in examples/: their commands, train steps, every form of data, and whole runs."""

import importlib.util
import shlex
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import cli, data, models, pretrained, training
from diffusion_jax import config as configs
from diffusion_jax.functions import import_function
from diffusion_jax.models import Shapes
from diffusion_jax.runs import train
from diffusion_jax.training.state import abstract_params
from helpers.array_configs import array_batch, array_config, write_arrays
from helpers.configs import a_batch, tiny_config
from helpers.networks import redraw
from helpers.paths import ROOT
from helpers.work_directories import untrained

OPTIONS = {
    "transformer.py:transformer": {"width": "12", "depth": "1", "heads": "2", "patch": "4"},
    "nnx_mlp.py:mlp": {"width": "8", "depth": "1"},
    "equinox_unet.py:unet": {"width": "8"},
}
LABELS = {"model.num_classes": "10", "model.label_dropout": "0.5"}
VECTOR = {"model.condition_features": "3", "model.condition_dropout": "0.5"}
ARRAY = {"model.condition_channels": "2", "model.condition_dropout": "0.5"}
LEARNED = {"diffusion.variance": "learned_range", "diffusion.loss": "hybrid"}

every_network = pytest.mark.parametrize("name", OPTIONS, ids=["transformer", "nnx_mlp", "equinox_unet"])


def own(config, name, texts=None):
    """A config with the network of an example, and settings by text as on the command line."""
    options = {f"model.options.{option}": text for option, text in OPTIONS[name].items()}
    return configs.override(config, {"model.kind": f"{ROOT / 'examples' / name}", **options, **(texts or {})})


def function_of(name):
    return import_function(str(ROOT / "examples" / name))


@every_network
def test_the_command_of_the_docstring_builds_the_network(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    lines = (ROOT / "examples" / name.partition(":")[0]).read_text().split("\n\n")[1].replace("\\\n", " ")
    command = shlex.split(lines)
    assert command[:2] == ["python", "main.py"]
    config = cli.parse(command[2:]).config
    assert config.model.kind == str(ROOT / "examples" / name) and len(config.model.options) == 1
    assert isinstance(training.model_from_config(config), models.CustomNetwork)  # with the dropout of the digits


@pytest.mark.thorough
@every_network
def test_two_train_steps(name):
    config = own(tiny_config(), name, {"model.options.levels": "1"} if name == "equinox_unet.py:unet" else {})
    state, step = training.create(config)
    before = jax.device_get(state.params["network"])
    for key in range(2):
        state, metrics = step(state, a_batch(config, key))
        assert np.isfinite(metrics["loss"]) and metrics["grad_norm"] > 0
    changed = jax.tree.map(lambda one, two: bool((one != two).any()), before, jax.device_get(state.params["network"]))
    assert sum(jax.tree.leaves(changed)) > 1


@every_network
@pytest.mark.parametrize("texts", [LABELS, VECTOR, ARRAY | LEARNED], ids=["labels", "vector", "array"])
def test_labels_conditions_and_a_learned_variance(name, texts):
    """`training.model_from_config` checks the shape of the output, and that labels, conditions and dropout have an effect."""
    model = training.model_from_config(own(tiny_config(), name, {"model.dropout": "0.2", **texts}))
    assert model.out_channels == (2 if "diffusion.variance" in texts else 1)
    shape = (8, 8, 1)
    model.clone(dtype="bfloat16").check_data(shape)


@every_network
def test_bfloat16_reaches_every_product(name):
    model = training.model_from_config(own(tiny_config(), name, {"model.dtype": "bfloat16", **LABELS}))
    inputs = {"x_t": jnp.zeros((2, 8, 8, 1)), "time": jnp.zeros(2), "y": jnp.zeros(2, jnp.int32)}
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), **inputs))["params"]
    jaxpr = jax.make_jaxpr(lambda params: model.apply({"params": params}, **inputs))(params)
    products = [line for line in str(jaxpr).splitlines() if " = dot_general" in line or " = conv_general" in line]
    assert products and all(":bf16[" in line.partition(" = ")[0] for line in products)


@pytest.mark.parametrize(
    ("kind", "name"),
    [("series", "transformer.py:transformer"), ("volume", "transformer.py:transformer"), ("vectors", "nnx_mlp.py:mlp")],
)
def test_other_arrays_than_images(kind, name):
    config = own(array_config(kind, "data.npz"), name)
    assert isinstance(training.model_from_config(config), models.CustomNetwork)


def test_patches_keep_their_place():
    """Each token holds the values of one patch, and the inverse restores the array, for 1 to 3 spatial axes."""
    module = sys.modules[function_of("transformer.py:transformer").__module__]
    x = np.arange(2 * 4 * 6 * 3).reshape(2, 4, 6, 3)
    tokens = module.to_patches(jnp.asarray(x), 2)
    np.testing.assert_array_equal(tokens[1, 4], x[1, 2:4, 2:4].reshape(-1))
    for spatial in ((8,), (4, 6), (2, 4, 6)):
        x = jnp.arange(2 * np.prod(spatial) * 3).reshape(2, *spatial, 3)
        np.testing.assert_array_equal(module.from_patches(module.to_patches(x, 2), spatial, 2), x)


def test_positions_differ_and_follow_the_formula():
    module = sys.modules[function_of("transformer.py:transformer").__module__]
    table = np.asarray(module.positions((3, 2), 10))  # 4 numbers for each axis, and 2 zeros
    frequencies = np.array([1.0, 10_000**-0.5])
    expected = [
        np.concatenate([f(n * frequencies) for n in (row, column) for f in (np.sin, np.cos)] + [np.zeros(2)])
        for row in range(3)
        for column in range(2)
    ]
    np.testing.assert_allclose(table, expected, atol=1e-6)
    assert len(np.unique(table.round(4), axis=0)) == 6


@pytest.mark.thorough
def test_a_new_transformer_is_zero_and_its_blocks_are_the_identity():
    network = function_of("transformer.py:transformer")(Shapes((8, 8, 1), (8, 8, 1)), width=8, depth=1, heads=2)
    x, time = jax.random.normal(jax.random.key(0), (2, 8, 8, 1)), jnp.array([0.0, 700.0])
    variables = jax.jit(network.init)(jax.random.key(1), x, time)
    with nn.intercept_methods(record := Inputs()):
        output = network.apply(variables, x, time)
    assert not output.any() and variables["params"]["patches"]["kernel"].any()
    np.testing.assert_array_equal(*record.of_block)


class Inputs:
    """An interceptor that keeps the first argument and the result of the last block."""

    def __call__(self, function, args, kwargs, context):
        result = function(*args, **kwargs)
        if (context.module.name or "").startswith("block"):
            self.of_block = (args[0], result)
        return result


@pytest.mark.parametrize(
    ("name", "texts", "words"),
    [
        ("transformer.py:transformer", {"model.options.patch": "3"}, r"patch=3 must divide the spatial sizes \[8, 8\]"),
        ("transformer.py:transformer", {"model.options.heads": "5"}, "width=12 must be a multiple of heads=5"),
        ("equinox_unet.py:unet", {"model.options.levels": "5"}, r"images whose sizes levels=5 can halve"),
    ],
)
def test_options_that_do_not_fit_the_data(name, texts, words):
    with pytest.raises(ValueError, match=words) as caught:
        training.model_from_config(own(tiny_config(), name, texts))
    assert "\n" not in str(caught.value)


def test_without_equinox_the_error_is_one_line(monkeypatch):
    path = ROOT / "examples" / "equinox_unet.py"
    monkeypatch.delitem(sys.modules, str(path.resolve()), raising=False)
    monkeypatch.setitem(sys.modules, "equinox", None)
    with pytest.raises(ValueError, match="raises ImportError: Equinox is not installed: pip install equinox") as caught:
        models.import_network(f"{path}:unet")
    assert "\n" not in str(caught.value) and str(path.resolve()) not in sys.modules
    monkeypatch.undo()
    assert importlib.util.find_spec("equinox") is not None


@pytest.mark.thorough
def test_low_rank_changes_of_a_trained_network(tmp_path):
    """The first output is that of the weights; training changes the small matrices only, and the output."""
    config, weights = array_config("vectors", ""), tmp_path / "net.safetensors"
    base = pretrained.from_config(config, redraw(abstract_params(training.model_from_config(config), (3,))))
    pretrained.save_safetensors(base, weights)
    texts = {"model.kind": f"{ROOT / 'examples' / 'low_rank.py'}:low_rank", "model.options.weights": str(weights)}
    texts |= {"model.options.rank": "2", "model.dropout": "0", "optimizer.frozen": "network/base/*,"}
    config = configs.override(config, texts | {"optimizer.learning_rate": "0.01"})
    state, step = training.create(config)
    network, batch = training.model_from_config(config), array_batch("vectors")
    x, time = batch["x"], jnp.full(8, 300.0)

    def output(params):
        return np.asarray(network.apply({"params": params}, x, time))

    of_base = base.denoiser().output(jnp.asarray(x), base.schedule.path.at(time, x))
    np.testing.assert_allclose(output(state.params), of_base, rtol=1e-5, atol=1e-5)
    before = jax.device_get(state.params["network"])
    for _ in range(2):  # in the first step, the gradient of `down` is 0
        state, _ = step(state, batch)
    after = jax.device_get(state.params["network"])
    jax.tree.map(np.testing.assert_array_equal, after["base"], before["base"])
    assert all((a != b).any() for name in ("up", "down") for a, b in pairs(after[name], before[name]))
    assert abs(output(state.params) - of_base).max() > 1e-3


@pytest.mark.whole
def test_low_rank_changes_of_a_run(tmp_path):
    config = array_config("vectors", write_arrays("vectors", tmp_path / "data.npz"))
    untrained(tmp_path / "base", config, data.load(config.data))
    texts = {"model.kind": f"{ROOT / 'examples' / 'low_rank.py'}:low_rank", "model.dropout": "0"}
    texts |= {"model.options.weights": str(tmp_path / "base"), "optimizer.frozen": "network/base/*,"}
    train.run(configs.override(config, texts), tmp_path / "low_rank")
    net = pretrained.load(tmp_path / "low_rank", network=True)
    assert np.isfinite(net.sample(jax.random.key(0), 2, steps=2, spacing="log_snr")).all()


def pairs(one, other):
    return zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
