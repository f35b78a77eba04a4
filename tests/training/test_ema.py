"""The initial weights' share in the EMA, and the weights that a run uses while this share is large."""

import jax
import numpy as np
import pytest

from diffusion_jax import pretrained
from diffusion_jax.config import default
from diffusion_jax.runs import sample, train
from diffusion_jax.runs.train import SampleBatches
from diffusion_jax.training.optimizer import ema_decay, initial_share, weights_kind
from helpers.configs import convolutions_config
from helpers.work_directories import last_state


def config_of(**settings):
    config = default()
    config.ema.update(settings)
    return config


@pytest.mark.parametrize(
    "settings", [{}, {"decay": 0.999, "warmup": True}, {"decay": 0.5, "warmup": True}, {"decay": 0.0}]
)
@pytest.mark.parametrize("step", [1, 2, 5, 3000])
def test_the_share_is_that_of_an_average_of_zeros_that_began_with_one(settings, step):
    config, average = config_of(**settings), 1.0
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


@pytest.mark.whole
def test_early_pictures_and_samples_use_the_raw_weights_and_show_it(tmp_path, monkeypatch, capsys):
    """A run whose EMA still equals the initial weights."""
    config = convolutions_config(**{"ema.warmup": False, "ema.decay": 0.9999, "training.sample_every": 2})
    drawn, draw = [], SampleBatches.__call__
    monkeypatch.setattr(
        SampleBatches, "__call__", lambda self, params: (drawn.append(jax.device_get(params)), draw(self, params))[1]
    )
    train.run(config, tmp_path)
    state = jax.device_get(last_state(config, tmp_path))
    jax.tree.map(np.testing.assert_array_equal, drawn[-1], state.params)
    capsys.readouterr()
    net = pretrained.load(tmp_path, network=True)
    jax.tree.map(np.testing.assert_array_equal, net.params, state.params)
    assert net.weights == "raw"
    note = "at step 4 the EMA (ema.decay=0.9999) still holds 100% of the random initial weights, so the raw weights are used"
    assert f"Note: {note}." in capsys.readouterr().out
    assert "_raw_" in sample.run(config, tmp_path).path.name
    assert "(raw weights)" in capsys.readouterr().out
