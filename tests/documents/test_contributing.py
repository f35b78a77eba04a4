"""Each example in CONTRIBUTING.md runs inside the module that the example extends."""

import re

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax import Denoiser, config, editing, losses, metrics, sampling, schedules
from diffusion_jax.runs import sampling_setup
from diffusion_jax.sampling import ancestral
from diffusion_jax.schedules import schedule as schedule_module
from diffusion_jax.training import step
from helpers.configs import tiny_config
from helpers.gaussian_mixtures import FULL, gaussian
from helpers.paths import ROOT

KEY = jax.random.key(0)
DENOISER = Denoiser(gaussian(), clip=False)


def example(name, module):
    """Runs the block that defines `name` in a module; returns the block's definitions."""
    blocks = re.findall(r"^```py\n(.*?)^```$", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE | re.DOTALL)
    (text,) = [block for block in blocks if f" {name}(" in block]
    assert len(text.splitlines()) < 20
    namespace = dict(vars(module))
    exec(text, namespace)
    return namespace[name]


def test_the_sampler_takes_its_settings_and_samples(monkeypatch):
    monkeypatch.setitem(sampling.SAMPLERS, "damped", example("damped", ancestral))
    x_T = jax.random.normal(KEY, (1000, 1))
    spread = []
    for eta in (0.0, 0.5):
        settings = tiny_config(**{"sampling.sampler": "damped", "sampling.eta": eta})
        sampler = sampling_setup.sampler_from_config(settings.sampling.to_dict())
        assert sampler.eta == eta and config.find_broken(settings, "without effect") == []
        x = sampling.sample(KEY, schedules.respace(FULL, 20, "log_snr"), DENOISER, x_T, sampler)
        assert abs(x.mean() - 0.3) < 0.1
        spread.append(x.std())
    assert abs(spread[0] - 0.5) < 0.1 and spread[1] < spread[0]


def test_the_schedule_and_the_loss_are_found_by_name(monkeypatch):
    monkeypatch.setitem(schedules.SCHEDULES, "cubic", example("_cubic", schedule_module))
    betas = schedules.betas("cubic", 10)
    np.testing.assert_allclose(betas[[0, -1]], [1e-4, 0.02])
    monkeypatch.setitem(losses.LOSSES, "absolute", example("absolute", losses))
    config = tiny_config()
    config.diffusion.loss = "absolute"
    loss_fn, options = step._loss_and_options(config)
    assert options == {}
    x_0 = jax.random.normal(jax.random.key(1), (4, 5))
    for prediction in ("eps", "x_0"):
        denoiser = Denoiser(lambda x, time: jnp.zeros_like(x), prediction)
        loss, aux = loss_fn(KEY, schedules.from_betas(betas), denoiser, x_0)
        target = {"eps": aux.eps, "x_0": x_0}[prediction]
        np.testing.assert_allclose(loss, abs(target).mean(1), rtol=1e-6)


def test_the_metric_computes():
    result = example("_mean_distance", metrics)(np.zeros((3, 2)), np.full((4, 2), 3.0), None)
    np.testing.assert_allclose(result.values["mean_distance"], np.hypot(3, 3))


def test_the_edit_changes_an_example_up_to_its_level():
    image, schedule = jnp.full((1000, 1), 0.3), schedules.respace(FULL, 20, "trailing")
    for level in (0, 19):
        edit = example("_renew", editing)(image, level=level)
        x = edit(KEY, schedule, DENOISER, image, sampling.ddim())
        assert (abs(x - image).mean() < 0.2) == (level == 0)
