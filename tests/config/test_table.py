"""The table of settings: every setting refuses a wrong type and a wrong value, and the table agrees with its readers."""

import pytest

from diffusion_jax import config, models, sampling
from diffusion_jax.config import values
from diffusion_jax.evaluation import ode_likelihood


def wrong_value(kind):
    """A value of the right type that a kind does not allow, or bytes if the kind allows every value of the type."""
    match kind:
        case values.OneOf():
            return wrong_value(kind.kinds[0]) if len(kind.kinds) == 2 else b"bytes"
        case values.Number():
            low = kind.minimum if kind.minimum is not None else kind.above
            return float("nan") if low is None else low - 1
        case values.Choice():
            return "no such choice"
        case values.Tuple():
            return (2, 1, 0) if kind.rising else () if kind.minimum_length else (wrong_value(kind.item),)
        case _:
            return b"bytes"


@pytest.mark.parametrize("name", config.SETTINGS)
def test_every_setting_refuses_a_wrong_type_and_a_wrong_value(name):
    """The line has the setting, the value and what is allowed; the default is allowed as a value and as text."""
    setting = config.SETTINGS[name]
    kind = setting.kind
    assert kind.check(setting.default) == setting.default
    if name != "model.options":  # text sets one option, --config.model.options.NAME=VALUE
        assert values.parse(kind, str(setting.default)) == setting.default
    group, _, last = name.rpartition(".")
    for value in (b"bytes", wrong_value(kind)):
        with pytest.raises(config.ConfigError) as caught:
            config.resolve({group: {last: value}} if group else {last: value})
        line = str(caught.value)
        assert line.startswith(f"{name}={value!r} must be {kind.allowed}; "), line
        assert len(line.splitlines()) == 1 and len(line) < 500, line
        assert isinstance(caught.value, ValueError) and caught.value.exit_code == 2


@pytest.mark.parametrize("name", ["diffusion.num_timesteps", "sampling.steps", "sampling.preview_steps"])
def test_counts_of_timesteps_that_would_fill_the_memory_are_refused(name):
    with pytest.raises(config.ConfigError, match=f"{name}=1000001 must be "):
        group, last = name.split(".")
        config.resolve({group: {last: 10**6 + 1}})


def test_the_model_settings_are_the_fields_of_the_networks():
    """Except the fields `spatial_dims` and `out_channels`, which follow from the data and the variance."""
    defaults = config.defaults({"diffusion": {"loss": "simple"}})
    for network in (models.UNet, models.MLP):
        fields = models.network_fields(network)
        for name in ("spatial_dims", "out_channels"):
            fields.pop(name, None)
        assert fields == {name: defaults[f"model.{name}"] for name in fields}
    assert {f"model.{name}" for name in ["kind", "options", *models.network_fields(models.UNet)]} - {
        "model.spatial_dims",
        "model.out_channels",
    } == {name for name in config.SETTINGS if name.startswith("model.")}


def test_names_of_higher_layers_are_those_of_the_functions_that_read_them():
    def names(setting):
        kind = config.SETTINGS[setting].kind
        kind = kind.kinds[0] if isinstance(kind, values.OneOf) else kind
        return kind.choices

    assert names("sampling.sampler") == tuple(sampling.SAMPLERS)
    assert names("evaluation.ode_dequantization") == ode_likelihood.DEQUANTIZATIONS


def test_identity_is_what_decides_the_numbers_of_a_run():
    identity = config.identity_settings(config.default())
    assert {"seed", "data.dataset", "model.channels", "training.batch_size", "optimizer.b1", "ema.decay"} <= set(
        identity
    )
    others = {"data.data_dir", "model.precision", "model.remat", "training.num_steps", "sampling.steps", "mesh.fsdp"}
    assert not others & set(identity)


def test_the_clip_follows_the_data_unless_it_is_given():
    continuous = {"levels": None, "normalization": "limits", "limits": (0, 1)}
    for given, clip in (
        ({}, True),
        ({"data": {"levels": None}}, False),
        ({"data": continuous}, True),
        ({"sampling": {"clip": False}}, False),
        ({"data": {"levels": None}, "sampling": {"clip": "dynamic"}}, "dynamic"),
    ):
        assert config.resolve_clip(config.resolve(given)) == clip
