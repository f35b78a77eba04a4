"""Runs on continuous noise levels, with `diffusion.path`: training, samples, likelihoods and weight files."""

import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import coordinates, pretrained, sampling, training
from diffusion_jax.pretrained import PretrainedError
from diffusion_jax.pretrained.diffusers import save_diffusers
from diffusion_jax.runs import evaluate, likelihood, plan, sample, train
from diffusion_jax.training.step import make_timestep_sampler
from helpers.array_configs import array_batch, array_config
from helpers.configs import convolutions_config, tiny_config

EDM = {
    "diffusion.path": "edm",
    "diffusion.draw": "log_normal",
    "diffusion.weighting": "edm",
    "diffusion.preconditioning": "edm",
    "diffusion.prediction": "x_0",
}
FLOW = {"diffusion.path": "rectified_flow", "diffusion.prediction": "flow", "diffusion.draw": "logit_normal"}
VDM = {"diffusion.path": "vp_cosine", "diffusion.loss": "continuous_vlb", "diffusion.draw": "uniform_log_snr"}


@pytest.mark.parametrize(
    "settings", [EDM, *(pytest.param(s, marks=pytest.mark.whole) for s in (FLOW, VDM))], ids=["edm", "flow", "vdm"]
)
def test_a_train_step_on_a_path(settings):
    state, step = training.create(array_config("vectors", "", **settings))
    _, metrics = step(state, array_batch("vectors"))
    assert np.isfinite(metrics["loss"]) and np.isfinite(metrics["grad_norm"])
    in_bands = [metrics[f"loss_q{i}"] for i in (1, 2, 3, 4)]
    assert np.isfinite(in_bands).any()


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"diffusion.path": "rectified_flow"}, "use diffusion.prediction=flow"),
        (FLOW | {"diffusion.loss": "continuous_vlb"}, "loss='continuous_vlb' needs a finite .*'rectified_flow'"),
        (FLOW | {"diffusion.draw": "uniform_log_snr"}, "draw='uniform_log_snr' needs a finite log SNR"),
        (EDM | {"diffusion.draw_mean": -40.0}, "draws levels with the log density .* on diffusion.path='edm'"),
    ],
)
def test_settings_that_contradict_a_path_are_one_line(overrides, words):
    with pytest.raises(ValueError, match=words) as caught:
        training.create(tiny_config(**overrides))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("settings", [EDM, FLOW, FLOW | {"diffusion.draw": "uniform"}], ids=["edm", "flow", "uniform"])
def test_a_shift_moves_the_levels_of_training(settings):
    """And the mean of a draw that does not depend on the path."""
    means = []
    for shift in (0.0, -2.0):
        config = tiny_config(**settings, **{"diffusion.log_snr_shift": shift})
        path = training.schedule_from_config(config.diffusion).path
        time, _ = make_timestep_sampler(config.diffusion)(jax.random.key(0), 2000, path)
        means.append(np.median(path.log_snr(time)))
    assert abs(means[1] - means[0] + 2) < 0.15


@pytest.mark.parametrize(("std", "is_noted"), [(0.1, True), (0.5, False)])
def test_the_last_step_must_suit_the_standard_deviation_of_the_data(std, is_noted):
    """3 steps on the way from 80 to 0.002 end with sigma = 0.002 * 40,000^(1/3) = 0.068: a width of 0.83 for 0.1."""
    net = pretrained.from_config(tiny_config(**EDM, **{"diffusion.sigma_data": std}))
    with warnings.catch_warnings(record=True) as caught:
        net.configure(net.denoiser(clip=False), sampling.ddim(), 3, "trailing")
    assert ["they are 0.83 times as wide" in str(each.message) for each in caught] == [True] * is_noted


def test_one_level_of_a_path_is_the_noisiest():
    config = tiny_config(**EDM, **{"diffusion.num_timesteps": 1})
    np.testing.assert_allclose(training.schedule_from_config(config.diffusion).snr, [80.0**-2], rtol=1e-9)


@pytest.mark.parametrize("path", ["vp_linear", "rectified_flow"])
def test_the_bound_with_the_fixed_small_variance_has_levels_even_in_the_log_snr(path):
    settings = {"diffusion.path": path, "diffusion.prediction": "v"}
    for variance, is_even in (("fixed_small", True), ("fixed_large", False)):
        diffusion = tiny_config(**settings, **{"diffusion.variance": variance}).diffusion
        schedule = training.schedule_from_config(diffusion)
        used = likelihood.bound_schedule(diffusion, schedule)
        np.testing.assert_allclose(used.alpha_bar[[0, -1]], schedule.alpha_bar[[0, -1]], rtol=1e-12)
        steps = -np.diff(np.log(used.snr[: -1 if used.zero_terminal_snr else None]))
        assert (abs(steps / steps.mean() - 1).max() < 1e-6) == is_even


def test_summaries_name_the_path():
    net = pretrained.from_config(tiny_config(**EDM, **{"diffusion.log_snr_shift": -2.0}))
    summary = pretrained.format_summary(net)
    assert "path edm, log SNR -2" in summary and "sigma_data" in summary
    config = tiny_config(**EDM, **{"diffusion.log_snr_shift": 9.0})
    assert any("diffusion.path=edm with log_snr_shift=9 ends at" in note for note in plan.notes(config))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [({}, True), ({"data.levels": None}, False), ({"data.image_size": (8,)}, False), ({"data.channels": 2}, False)],
)
def test_images_are_gray_levels_with_one_or_three_channels(settings, expected):
    assert pretrained.from_config(tiny_config(**{"data.dataset": "arrays", **settings})).is_images is expected


@pytest.mark.whole
def test_a_model_has_the_preconditioning_of_its_training(tmp_path):
    """The same for a model from a file; standardized data have sigma_data 1."""
    config = tiny_config(**EDM)
    net = pretrained.from_config(config, training.create(config)[0].params)
    x, time = jnp.asarray(np.random.default_rng(0).normal(size=(2, 8, 8, 1)), jnp.float32), jnp.array([-1.0, 0.5])
    network = lambda x, time: net.model.apply({"params": net.params}, x, time)  # noqa: E731
    expected = coordinates.precondition(network, net.schedule.path, 0.5)(x, time)
    level = net.schedule.path.at(time, x)
    np.testing.assert_array_equal(net.denoiser().output(x, level), expected)
    pretrained.save_safetensors(net, tmp_path / "net.safetensors")
    again = pretrained.load(tmp_path / "net.safetensors")
    assert again.sigma_data == 0.5
    np.testing.assert_array_equal(again.denoiser().output(x, level), expected)
    np.testing.assert_array_equal(again.schedule.timesteps, net.schedule.timesteps)
    assert pretrained.from_config(tiny_config(**EDM, **{"data.levels": None})).sigma_data == 1.0
    with pytest.raises(PretrainedError, match="path='edm'; preconditioning='edm'"):
        save_diffusers(net, tmp_path / "folder")
    drawn = net.sample(jax.random.key(0), 2, steps=4, spacing="karras")
    assert np.isfinite(drawn).all()


@pytest.mark.whole
@pytest.mark.parametrize("settings", [EDM, FLOW], ids=["edm", "flow"])
def test_every_mode_on_a_path(tmp_path, settings):
    overrides = {"evaluation.num_samples": 16, "evaluation.num_examples": 16, "evaluation.ode": True}
    config = convolutions_config(
        **settings, **{"sampling.sampler": "ddim", "sampling.steps": 4, "training.sample_every": 4}
    )
    train.run(config, tmp_path / "run")
    sample.run(config, tmp_path / "run")
    config.update_from_flattened_dict(overrides)
    evaluate.run(config, tmp_path / "run")
    records = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert records
