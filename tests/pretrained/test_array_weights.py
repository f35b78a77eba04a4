"""Weights for series, fields, volumes and vectors, with conditions: a run, a file from this run, and their samples."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import Denoiser, data, models, pretrained, sampling, schedules
from diffusion_jax.data import Normalization
from diffusion_jax.pretrained import PretrainedError
from diffusion_jax.pretrained.model import make_model
from diffusion_jax.runs import workdir
from diffusion_jax.training.state import abstract_params
from helpers.array_configs import SHAPES, array_config, write_arrays
from helpers.networks import TINY, redraw
from helpers.work_directories import untrained

KEY = jax.random.key(3)
CONDITION = np.random.default_rng(5).standard_normal((24, 2)) * 4 + 50
VECTOR = {"model.condition_features": 2, "model.condition_dropout": 0.3}
DIFFUSION = {"num_timesteps": 50}
UNET = models.UNet(**TINY | {"attention_levels": ()})


def net_of(model, image_size, channels, **options):
    """Random weights, for data with offset 300 and scale 10."""
    normalizations = {"x": Normalization((300.0,) * channels, (10.0,) * channels)}
    options = {"levels": None, "clip": False, "normalizations": normalizations, **options}
    description = make_model("random", model, image_size, DIFFUSION, channels, **options)
    return description.with_params(redraw(abstract_params(model, description.example_shape)))


def vectors_net(**options):
    fields = {"num_classes": 3, "label_dropout": 0.1, "condition_features": 2, "condition_dropout": 0.1}
    normalizations = {
        "x": Normalization((300.0, -5.0), (10.0, 0.5)),
        "condition": Normalization((50.0, 0.0), (4.0, 2.0)),
    }
    model = models.MLP(channels=8, num_res_blocks=1, **fields | options)
    return net_of(model, (), 2, normalizations=normalizations)


@pytest.mark.whole
@pytest.mark.parametrize(
    ("kind", "overrides"),
    [
        ("vectors", VECTOR),
        ("series", {"model.condition_channels": 2}),
        ("field", {"model.padding": "periodic", "data.normalization": "limits", "data.limits": (0.0, 600.0)}),
    ],
)
def test_a_run_and_one_file_of_it_sample_the_same_to_the_bit(kind, overrides, tmp_path):
    condition = CONDITION if "model.condition_features" in overrides else None
    if "model.condition_channels" in overrides:
        condition = np.random.default_rng(1).standard_normal((24, *SHAPES[kind][:-1], 2))
    more = {} if condition is None else {"condition": condition}
    file = write_arrays(kind, tmp_path / "data.npz", **more)
    config = array_config(kind, file, **overrides)
    untrained(tmp_path / "run", config, data.load(config.data))
    net = pretrained.load(tmp_path / "run")
    pretrained.save_safetensors(net, tmp_path / "net.safetensors")
    again = pretrained.load(tmp_path / "net.safetensors")
    for field in ("model", "image_size", "channels", "levels", "normalizations", "limits", "clip", "variance"):
        assert getattr(again, field) == getattr(net, field), field
    assert net.image_size == SHAPES[kind][:-1] and net.channels == SHAPES[kind][-1]
    stored = json.loads((tmp_path / "run" / "data.json").read_text()).get("normalization", {})
    assert {name: value.to_json() for name, value in net.normalizations.items()} == stored
    assert net.clip is (config.data.normalization == "limits")
    options = {"steps": 3} if condition is None else {"steps": 3, "condition": condition[:2]}
    x, same = net.sample(KEY, 2, **options), again.sample(KEY, 2, **options)
    np.testing.assert_array_equal(x, same)
    assert x.shape == (2, *SHAPES[kind]) and x.dtype == jnp.float32
    if "x" in stored:
        without = {name: value for name, value in net.normalizations.items() if name != "x"}
        standardized = dataclasses.replace(net, normalizations=without).sample(KEY, 2, **options)
        scale, offset = (np.float32(stored["x"][name]) for name in ("scale", "offset"))
        np.testing.assert_allclose(x, standardized * scale + offset, rtol=1e-6)
    for path in (tmp_path / "run", tmp_path / "net.safetensors"):
        new = workdir.config_from_weights(str(path))
        for group in ("model", "data", "diffusion"):
            ignored = {"data_dir", "memory_mb", "workers", "dropout", "split", "out_channels"}
            for name, value in config[group].items():
                assert name in ignored or new[group][name] == value, (path, group, name)
    summary = pretrained.format_summary(again)
    assert ("continuous in 0 ... 600" in summary) == bool(net.limits) and f"{SHAPES[kind][-1]} channels" in summary


@pytest.mark.thorough
def test_samples_are_those_of_the_core_in_the_units_of_the_data():
    """Labels and conditions, guided by both; the core gets standardized conditions and returns standardized samples.

    The clip to [-1, 1] does not apply to standardized data.
    """
    net = vectors_net()
    y, condition = np.array([0, 2, 1]), np.array([[54.0, 0.0], [50.0, -2.0], [42.0, 4.0]])
    x = net.sample(KEY, 3, y=y, condition=condition, sampler=sampling.ddim(), steps=5, guidance_scale=2.0)
    standardized = np.float32([[1, 0], [0, -1], [-2, 2]])
    apply = lambda x_t, time, y, c: net.model.apply({"params": net.params}, x_t, time, y, condition=c)  # noqa: E731

    def guided(x_t, time):
        n = len(x_t)
        null = apply(x_t, time, np.full(n, 3), np.full((n, 2), np.nan, np.float32))
        return 2 * apply(x_t, time, y, standardized) - null

    key_noise, key_steps = jax.random.split(KEY)
    x_T = jax.random.normal(key_noise, (3, 2))
    schedule = schedules.respace(net.schedule, 5, "trailing")
    unclipped = Denoiser(guided, clip=False)
    expected = jax.jit(lambda x: sampling.sample(key_steps, schedule, unclipped, x, sampling.ddim()))(x_T)
    np.testing.assert_allclose((x - np.array([300, -5])) / np.array([10, 0.5]), expected, rtol=2e-4, atol=2e-4)
    time = np.zeros(3, np.float32)
    output = net.denoiser(y=y, condition=standardized).output(x_T, net.schedule.path.at(time, x_T))
    np.testing.assert_allclose(output, apply(x_T, time, y, standardized), rtol=1e-6)


def test_the_clip_of_continuous_data_is_the_network_s():
    net, own, other = vectors_net(), jnp.tanh, jnp.sin
    for levels, expected in ((None, own), (256, True)):
        net = dataclasses.replace(net, clip=own, levels=levels)
        found = [net.denoiser(clip=clip).clip for clip in (None, True, False, other)]
        assert found == [own, expected, False, other]


def test_the_steps_of_arrays_are_even_in_the_log_snr():
    net, sampler = vectors_net(), sampling.dpm_solver_pp()
    _, schedule = net.configure(net.denoiser(), sampler, 20)
    even = schedules.respace(net.schedule, 20, "log_snr")
    np.testing.assert_array_equal(schedule.timesteps, even.timesteps)
    _, schedule = dataclasses.replace(net, levels=256).configure(net.denoiser(), sampler, 20)
    np.testing.assert_array_equal(schedule.timesteps, schedules.respace(net.schedule, 20, "trailing").timesteps)
    with pytest.raises(ValueError, match="use more steps, or the sampler ddim"):
        net.configure(net.denoiser(), sampler, 3)


@pytest.mark.thorough
def test_one_condition_serves_all_and_none_is_the_null_condition():
    net = vectors_net(num_classes=0, label_dropout=0.0)
    sampler, one = sampling.ddim(), [54.0, 2.0]
    x = net.sample(KEY, 2, condition=one, sampler=sampler, steps=3)
    np.testing.assert_array_equal(x, net.sample(KEY, 2, condition=np.array([one, one]), sampler=sampler, steps=3))
    without = net.sample(KEY, 2, sampler=sampler, steps=3)
    some = net.sample(KEY, 2, condition=one, condition_missing=[True, False], sampler=sampler, steps=3)
    np.testing.assert_allclose(some, np.stack([without[0], x[1]]), rtol=1e-6)
    unguided = net.sample(KEY, 2, condition=one, sampler=sampler, steps=3, guidance_scale=0.0)
    np.testing.assert_allclose(unguided, without, rtol=1e-5)
    assert (x != without).any()
    own_clip = net.sample(KEY, 2, condition=one, sampler=sampler, clip=jnp.tanh, steps=3)
    assert (own_clip != x).any()
    np.testing.assert_array_equal(net.sample(KEY, 2, condition=one, sampler=sampler, clip=True, steps=3), x)


@pytest.mark.thorough
def test_conditions_that_do_not_fit_a_network_are_one_line():
    plain = net_of(models.MLP(channels=8, num_res_blocks=1), (), 2)
    needed, dropped = (
        vectors_net(condition_dropout=0.0, num_classes=0, label_dropout=0.0),
        vectors_net(num_classes=0, label_dropout=0.0),
    )
    for net, options, words in (
        (plain, {"condition": [1.0, 2.0]}, "takes no conditions; omit condition"),
        (needed, {}, r"needs condition, an array of shape \[2\] or \[3, 2\]"),
        (needed, {"condition": np.zeros((2, 2))}, r"of shape \[2\] or \[3, 2\]; got float64 \[2, 2\]"),
        (needed, {"condition": [1, 2], "condition_missing": [False, True, True]}, "sample 1 has no condition.*_dropout"),
        (dropped, {"condition": [[1, 2], [1, np.nan], [1, 2]]}, r"condition 1 has .* or set condition_missing\[1\] "),
        (dropped, {"condition": [[1, 2], [1, 2], [np.nan, np.nan]]}, "condition 2 has values that are not finite; correct"),
        (dropped, {"condition": [np.nan, np.nan]}, "condition 0 has values that are not finite; correct"),
        (dropped, {"condition": [1, 2], "condition_missing": [True, False]}, r"bool of shape \[3\].*got bool \[2\]"),
        (dropped, {"condition": [1, 2], "condition_missing": [0, 1, 0]}, r"bool of shape \[3\].*got int64 \[3\]"),
        (dropped, {"condition_missing": [False, True, True]}, "with and without a condition; give condition, too"),
        (dropped, {"guidance_scale": 2.0}, "guidance_scale=2.0 needs a condition"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words) as caught:
            net.sample(KEY, 3, **options)
        assert "\n" not in str(caught.value)


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("net", "words"),
    [
        (lambda: net_of(UNET.clone(spatial_dims=1), (8,), 2), "spatial_dims=1"),
        (vectors_net, "MLP: diffusers has no such network"),
        (lambda: net_of(UNET, (4, 5), 3), r"image_size=\(4, 5\), no multiple of 2"),
        (lambda: net_of(UNET, (4, 4), 3), r"normalizations \(data units\)"),
    ],
)
def test_networks_of_other_data_are_refused_by_diffusers(net, words, tmp_path):
    with pytest.raises(PretrainedError, match=f"{words}.*; use save_safetensors"):
        pretrained.save_diffusers(net(), tmp_path / "out")
