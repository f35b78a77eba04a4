"""Errors in the functions of a user: one line names the function, the line and the file; --debug adds the traceback."""

import numpy as np
import pytest

from diffusion_jax import config as configs
from diffusion_jax import training
from diffusion_jax.errors import UserError, as_user_error, describe_exception
from diffusion_jax.evaluation import __main__ as evaluation
from helpers.array_configs import array_config
from helpers.launcher import launch

# The line that raises ends with the name of the function.
MINE = """
import flax.linen as nn
import jax.numpy as jnp
from diffusion_jax import losses


class Network(nn.Module):
    @nn.compact
    def __call__(self, x_t, time):
        return jnp.concatenate([x_t, time[0]])  # Network.__call__


def network(shapes):
    return Network()


def loss(key, schedule, denoise_fn, x_0, *, timestep_sampler=None):
    found, aux = losses.simple(key, schedule, denoise_fn, x_0)
    return found * jnp.ones(len(found) + 1), aux  # loss


def misspelled(key, schedule, denoise_fn, x_0, *, timestep_sampler=None):
    return losses.simpel(key, schedule, denoise_fn, x_0)  # misspelled


def asks_for_a_wrong_prediction(key, schedule, denoise_fn, x_0, *, timestep_sampler=None):
    return losses.simple(key, schedule, denoise_fn, x_0, prediction="x0")  # asks_for_a_wrong_prediction


def weighting(snr):
    return {}[1]  # weighting


def metric(reference, samples):
    return np.mean(samples)  # metric
"""


@pytest.fixture
def mine(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(MINE)
    return path


def place(path, function):
    (line,) = (i for i, text in enumerate(MINE.splitlines(), 1) if text.endswith(f"# {function}"))
    return f"{function}, line {line} of {path.resolve()}, raises "


@pytest.mark.parametrize(
    ("setting", "name", "function", "text"),
    [
        ("model.kind", "network", "Network.__call__", "TypeError: "),
        ("diffusion.loss", "loss", "loss", "TypeError: mul got incompatible shapes"),
        # Raised by this package, for an argument of the user.
        ("diffusion.loss", "asks_for_a_wrong_prediction", "asks_for_a_wrong_prediction", "ValueError: .*'x0'"),
        ("diffusion.weighting", "weighting", "weighting", "KeyError: 1"),
    ],
)
def test_an_error_names_the_function_the_line_and_the_file(setting, name, function, text, mine):
    texts = {setting: f"{mine}:{name}"} | ({"model.dropout": "0"} if name == "network" else {})
    config = configs.override(array_config("vectors", ""), texts)
    with pytest.raises(UserError, match=f"^config: {place(mine, function)}{text}"), as_user_error("config"):
        training.build_program(config)


def test_an_error_in_a_metric_names_it(mine, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.savez("x.npz", np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32))
    for flags in ([], ["--debug"]):
        with pytest.raises(SystemExit, match="2"):
            evaluation.main(["x.npz", "x.npz", "--metrics=mine.py:metric", *flags])
        *before, line = capsys.readouterr().err.strip().splitlines()
        assert line.startswith(f"error: {place(mine, 'metric')}NameError: name 'np' is not defined")
        assert line.endswith("; --debug prints the traceback") == (not flags)
        assert any("return np.mean(samples)" in text for text in before) == bool(flags)


def test_an_error_in_another_file_of_the_user_names_that_file(tmp_path):
    """If the file of the named function is not in the traceback."""
    (tmp_path / "layers.py").write_text("class Layer:\n    def __call__(self, key):\n        return key.absent\n")
    (tmp_path / "other.py").write_text(
        f"import sys\nsys.path.insert(0, {str(tmp_path)!r})\nfrom layers import Layer\n\n\n"
        "def network(shapes):\n    return Layer(), lambda params, x_t, time: x_t\n"
    )
    texts = {"model.kind": f"{tmp_path}/other.py:network", "model.dropout": "0"}
    config = configs.override(array_config("vectors", ""), texts)
    with pytest.raises(AttributeError) as caught:
        training.build_program(config)
    expected = f"Layer.__call__, line 3 of {tmp_path}/layers.py, raises AttributeError: "
    assert describe_exception(caught.value).startswith(expected)


@pytest.mark.whole
def test_the_command_line_prints_one_line_or_the_traceback(mine, tmp_path):
    flags = ["--config=digits", f"--workdir={tmp_path / 'run'}", f"--config.diffusion.loss={mine}:misspelled"]
    expected = f"error: {place(mine, 'misspelled')}AttributeError: module 'diffusion_jax.losses' has no attribute"
    code, _, err = launch(*flags)
    assert code == 2 and err.startswith(expected) and err.count("\n") == 1
    assert err.endswith("; --debug prints the traceback\n")
    code, _, err = launch(*flags, "--debug")
    assert code == 2 and err.startswith("Traceback") and "return losses.simpel(" in err
    assert err.splitlines()[-1].startswith(expected)
    assert not (tmp_path / "run").exists()
