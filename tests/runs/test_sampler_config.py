"""The sampler and the steps from config.sampling, against the core's."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import pretrained, sampling, schedules
from diffusion_jax.config import SETTINGS
from diffusion_jax.denoiser import clip_x_0, dynamic_threshold
from diffusion_jax.runs import sampling_setup
from helpers.configs import conditional, tiny_config
from helpers.samplers import NAMED

OFF_DEFAULT = {"eta": 0.5, "order": 3}


@pytest.mark.parametrize("name", NAMED)
def test_the_defaults_of_the_settings_are_those_of_the_samplers(name):
    parameters = inspect.signature(sampling.SAMPLERS[name]).parameters
    for setting in parameters.keys() & {"eta", "order"}:
        assert parameters[setting].default == SETTINGS[f"sampling.{setting}"].default


@pytest.mark.whole
@pytest.mark.parametrize("name", NAMED)
def test_every_sampler_of_a_config_equals_that_of_the_core(name):
    """The same samples as from the core's sampler with the same options; each option changes the samples."""
    options = {setting: value for setting, value in OFF_DEFAULT.items() if name in sampling.samplers_with(setting)}
    schedule = schedules.respace(schedules.from_betas(schedules.betas("linear", 1000)), 6, "log_snr")
    network = lambda x, time: jnp.sin(3 * x) * (1 + time[:, None] / 1000)  # noqa: E731
    x_T = jax.random.normal(jax.random.key(2), (2, 3))

    def run(sampler):
        return np.asarray(sampling.sample(jax.random.key(0), schedule, network, x_T, sampler))

    def configured(**settings):
        settings = {f"sampling.{setting}": value for setting, value in {"sampler": name, **settings}.items()}
        return run(sampling_setup.sampler_from_config(conditional(**settings).sampling))

    np.testing.assert_array_equal(configured(**options), run(sampling.SAMPLERS[name](**options)))
    for setting in options:
        without = {key: value for key, value in options.items() if key != setting}
        assert (configured(**without) != configured(**options)).any(), setting


def test_every_clip_of_a_config_changes_the_predicted_x_0():
    x = 3 * jax.random.normal(jax.random.key(2), (1, 50))
    for settings, expected in (
        ({"clip": True}, np.clip(x, -1, 1)),
        ({"clip": False}, x),
        ({"clip": "dynamic", "clip_quantile": 0.6}, dynamic_threshold(0.6)(x)),
    ):
        config = conditional(**{f"sampling.{setting}": value for setting, value in settings.items()})
        clip = sampling_setup.resolve_sampling(config, pretrained.from_config(config)).options["clip"]
        np.testing.assert_allclose(clip_x_0(x, clip), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("steps", "spacing", "same"),
    [
        (None, "karras", (range(1000),)),
        (12, None, (12, "trailing")),
        (250, "openai", ("250",)),
        ((10, 15, 20), None, ("10,15,20",)),
        (50, "openai_ddim", ("ddim50",)),
        ((10, 300.5, 900), "given", ([10, 300.5, 900],)),
    ],
)
def test_steps_of_a_config_are_those_of_respace(steps, spacing, same):
    net = pretrained.from_config(tiny_config(**{"diffusion.num_timesteps": 1000}))
    arguments = sampling_setup.steps_from_config({"steps": steps, "spacing": spacing})
    _, found = net.configure(net.denoiser(), sampling.ddpm(), *arguments)
    np.testing.assert_array_equal(found.timesteps, schedules.respace(net.schedule, *same).timesteps)
