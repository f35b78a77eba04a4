"""Errors in the functions of a user: one line names the function, the line and the file; --debug adds the traceback."""

import dataclasses

import numpy as np
import pytest
from tensorboard.backend.event_processing import event_accumulator

from diffusion_jax import config as configs
from diffusion_jax import data, pretrained, sampling, training
from diffusion_jax.errors import UserError, as_user_error, describe_exception
from diffusion_jax.evaluation import __main__ as evaluation
from diffusion_jax.functions import import_function
from diffusion_jax.report.figures import training_charts
from diffusion_jax.runs import edit, evaluate, logging, sample, sampling_setup, train, workdir
from helpers.array_configs import array_config, write_arrays
from helpers.launcher import launch
from helpers.work_directories import untrained

# The line that raises ends with the name of the function.
MINE = """
import dataclasses

import flax.linen as nn
import jax.numpy as jnp
from diffusion_jax import losses, sampling


class Network(nn.Module):
    @nn.compact
    def __call__(self, x_t, time):
        return jnp.concatenate([x_t, time[0]])  # Network.__call__


def network(shapes):
    return Network()


class Working(nn.Module):
    @nn.compact
    def __call__(self, x_t, time):
        return nn.Dense(x_t.shape[-1])(x_t) + time[:, None] / 1000


def working(shapes):
    return Working()


def with_scalars(key, schedule, denoise_fn, x_0, *, timestep_sampler=None):
    found, aux = losses.simple(key, schedule, denoise_fn, x_0)
    return found, aux._replace(scalars={"doubled": 2 * found})


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


@dataclasses.dataclass(frozen=True)
class shrunk(sampling.Sampler):
    eta: float
    factor: float = 0.5

    def step(self, key, denoiser, x_t, transition, state):
        new = sampling.ddim(self.eta).step(key, denoiser, x_t, transition, state)
        return new._replace(x_prev=self.factor * new.x_prev)


class flat(sampling.Sampler):
    def step(self, key, denoiser, x_t, transition, state):
        return sampling.Step(x_t[:, 0], denoiser(x_t, transition).x_0)


class NoStep(sampling.Sampler):
    pass


class NoSampler:
    pass


class fails(sampling.Sampler):
    def step(self, key, denoiser, x_t, transition, state):
        return x_t.absent  # fails.step
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


@pytest.fixture(scope="module")
def vectors(tmp_path_factory):
    directory = tmp_path_factory.mktemp("vectors")
    config = array_config("vectors", write_arrays("vectors", directory / "data.npz"), **{"sampling.steps": 3})
    return untrained(directory / "run", config, data.load(config.data))


@pytest.fixture(scope="module")
def series(tmp_path_factory):
    directory = tmp_path_factory.mktemp("series")
    config = array_config("series", write_arrays("series", directory / "data.npz"), **{"sampling.steps": 3})
    return untrained(directory / "run", config, data.load(config.data))


@pytest.mark.whole
def test_the_scalars_of_a_loss_are_in_the_log_tensorboard_and_the_report(mine, vectors, tmp_path):
    texts = {"model.kind": f"{mine}:working", "model.dropout": "0", "diffusion.loss": f"{mine}:with_scalars"}
    texts |= {"training.num_steps": "2", "training.log_every": "1"}
    train.run(configs.override(workdir.load_config(vectors), texts), tmp_path / "run")
    lines = logging.read_metrics(tmp_path / "run")
    assert [line["loss/doubled"] for line in lines] == pytest.approx([2 * line["loss"] for line in lines])
    events = event_accumulator.EventAccumulator(str(tmp_path / "run")).Reload()
    assert {"loss/loss", "loss/doubled"} <= set(events.Tags()["scalars"])
    (chart,) = (chart for chart in training_charts({"run": lines}) if chart["title"] == "loss/doubled")
    assert chart["series"][0]["x"] == [1, 2]


@pytest.mark.whole
def test_a_sampler_of_a_user_draws_with_the_settings_it_names(mine, vectors):
    """The same samples as from the class itself; eta is sampling.eta, and factor has no setting."""
    texts = {"sampling.sampler": f"{mine}:shrunk", "sampling.eta": "0.5"}
    config = configs.override(workdir.load_config(vectors), texts)
    setup = sampling_setup.resolve_sampling(config, pretrained.load(vectors))
    own = import_function(texts["sampling.sampler"])
    assert setup.sampler == own(eta=0.5)
    (path,) = {sample.run(config, vectors).path} & set((vectors / "samples").glob("*shrunk3_*.npz"))
    count = config.sampling.batch_size
    by_hand = dataclasses.replace(setup, sampler=own(0.5)).generate_batch(config.sampling.seed, 0, count)
    with np.load(path) as arrays:
        np.testing.assert_allclose(arrays["arr_0"][:count], by_hand, rtol=1e-5)
    ddim = dataclasses.replace(setup, sampler=sampling.ddim(0.5)).generate_batch(config.sampling.seed, 0, count)
    assert np.abs(ddim - by_hand).max() > 0.01


@pytest.mark.parametrize("mode", [sample, evaluate, edit, train])
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("NoSampler", "mine.py:NoSampler must be a class derived from sampling.Sampler"),
        ("metric", r"metric\(\) missing 2 required positional arguments"),
        ("absent", "sampling.sampler=.*mine.py:absent cannot be imported"),
        ("flat", r"flat.step returned x_prev float32\[2\], not floats like x_t float32\[2,3\]"),
        ("NoStep", "NoStep defines no step"),
    ],
)
def test_a_class_that_makes_no_sampler_is_one_line_before_data_are_read(name, words, mode, mine, vectors, monkeypatch):
    monkeypatch.setattr(data, "load", None)
    texts = {"sampling.sampler": f"{mine}:{name}", "editing.task": "sdedit", "editing.example": "0"}
    texts |= {"evaluation.num_samples": "20", "evaluation.metrics": "energy_distance,"}
    with pytest.raises(UserError, match=words) as caught:
        mode.run(configs.override(workdir.load_config(vectors), texts | {"training.num_steps": "3"}), vectors)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("mode", "texts", "words"),
    [
        (sample, {"sampling.conditions": "numbers.npy"}, "sampling.conditions='numbers.npy': this network takes no"),
        (evaluate, {"sampling.conditions": "numbers.npy"}, "sampling.conditions='numbers.npy': this network takes no"),
        (edit, {"sampling.conditions": "absent.npy"}, "sampling.conditions='absent.npy' cannot be read"),
        (edit, {"editing.operator": "numbers.npy"}, "editing.operator='numbers.npy': points of 2 numbers"),
        (
            evaluate,
            {"editing.operator": "numbers.npy", "evaluation.metrics": "calibration,"},
            "editing.operator='numbers.npy': ",
        ),
        (train, {"init_from": "absent.npz"}, "init_from=absent.npz: .*no such file"),
    ],
)
def test_files_that_do_not_fit_are_refused_before_data_are_read(mode, texts, words, series, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save("numbers.npy", np.zeros((5, 2)))
    monkeypatch.setattr(data, "load", None)
    texts = {
        "editing.task": "sparse",
        "editing.example": "0",
        "editing.noise": "0.1",
        "evaluation.num_samples": "20",
    } | texts
    texts = {"evaluation.metrics": "energy_distance,", "training.num_steps": "3", **texts}
    directory = tmp_path / "new" if mode is train else series
    with pytest.raises((UserError, pretrained.PretrainedError), match=words) as caught:
        mode.run(configs.override(workdir.load_config(series), texts), directory)
    assert "\n" not in str(caught.value)


@pytest.mark.whole
def test_an_error_in_a_step_names_it(mine, vectors):
    config = configs.override(workdir.load_config(vectors), {"sampling.sampler": f"{mine}:fails"})
    with pytest.raises(AttributeError) as caught:
        sample.run(config, vectors)
    assert describe_exception(caught.value).startswith(f"{place(mine, 'fails.step')}AttributeError: ")


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
