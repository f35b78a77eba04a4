"""The share of the initial weights in the EMA, and the weights that a run uses as long as it is large."""

import warnings

import jax
import numpy as np
import pytest

from diffusion_jax import pretrained
from diffusion_jax.config import default
from diffusion_jax.runs import sample, train
from diffusion_jax.runs.trained_model import TrainedModel
from diffusion_jax.runs.training_outputs import PreviewPictures
from diffusion_jax.training.ema import ema_decay, initial_share, weights_kind
from helpers.configs import tiny_config
from helpers.work_directories import last_state


def config_of(**leaves):
    config = default()
    config.ema.update(leaves)
    return config


@pytest.mark.parametrize(
    "leaves", [{}, {"decay": 0.999, "warmup": True}, {"decay": 0.5, "warmup": True}, {"decay": 0.0}]
)
@pytest.mark.parametrize("step", [1, 2, 5, 3000])
def test_the_share_is_that_of_an_average_of_zeros_that_began_with_one(leaves, step):
    config, average = config_of(**leaves), 1.0
    for i in range(step):
        average += (1 - float(ema_decay(i, config.ema))) * (0.0 - average)
    np.testing.assert_allclose(initial_share(config, step), average, rtol=1e-9, atol=1e-300)


def test_the_default_average_is_used_from_step_23025_on():
    """ln(0.1) / ln(0.9999) = 23,024.7."""
    kinds = [weights_kind(default(), step) for step in (0, 23_024, 23_025, 800_000)]
    assert kinds == ["raw", "raw", "ema", "ema"]
    assert weights_kind(default(), 800_000, use_ema=False) == "raw"
    assert weights_kind(config_of(warmup=True), 1) == "ema"
    assert weights_kind(config_of(decay=1.0), 10**7) == "raw"
    from_weights = config_of()
    from_weights.init_from = "weights.pt"
    assert weights_kind(from_weights, 1) == "ema"


@pytest.fixture(scope="module")
def early(tmp_path_factory):
    """(config, directory, state, titles of pictures, parameters drawn with) of a run whose EMA is the initial weights."""
    config = tiny_config(**{"ema.warmup": False, "ema.decay": 0.9999, "training.sample_every": 2})
    directory = tmp_path_factory.mktemp("early")
    titles, drawn = [], []
    with pytest.MonkeyPatch.context() as patch:
        draw = PreviewPictures.draw
        patch.setattr(
            PreviewPictures, "draw", lambda self, params: (drawn.append(jax.device_get(params)), draw(self, params))[1]
        )
        patch.setattr(
            "diffusion_jax.runs.logging.RunMetrics.write_image",
            lambda self, step, name, picture, title: titles.append(title),
        )
        train.run(config, directory)
    return config, directory, jax.device_get(last_state(config, directory)), titles, drawn


@pytest.mark.whole
def test_early_pictures_and_samples_use_the_raw_weights_and_show_it(early, capsys):
    config, directory, state, titles, drawn = early
    assert len(titles) == 2 and all(title.endswith(", raw weights") for title in titles)
    jax.tree.map(np.testing.assert_array_equal, drawn[-1], state.params)
    trained = TrainedModel.open(config, directory, True)
    jax.tree.map(np.testing.assert_array_equal, trained.params, state.params)
    assert trained.weights_kind == "raw"
    note = "the EMA (ema.decay=0.9999) of step 4 still holds 100% of the random initial weights, so the raw weights are used"
    assert f"Note: {note}." in capsys.readouterr().out
    assert "_raw_" in sample.run(config, directory).path.name
    assert "(raw weights)" in capsys.readouterr().out
    with pytest.warns(UserWarning, match="so the raw weights are used"):
        net = pretrained.load(directory)
    jax.tree.map(np.testing.assert_array_equal, net.params, state.params)


@pytest.mark.whole
def test_a_run_from_weights_uses_its_average_at_once(early, tmp_path, capsys):
    config, directory, _, _, _ = early
    config = config.copy_and_resolve_references()
    config.init_from = str(directory)
    config.training.sample_every = 0
    train.run(config, tmp_path)
    state = jax.device_get(last_state(config, tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net = pretrained.load(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, net.params, state.ema_params)
    trained = TrainedModel.open(config, tmp_path, True)
    jax.tree.map(np.testing.assert_array_equal, trained.params, state.ema_params)
    assert trained.weights_kind == "ema" and "raw weights" not in capsys.readouterr().out
