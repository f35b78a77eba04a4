"""`net.sample`, compiled once, against the core with the same keys."""

import dataclasses
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import Denoiser, editing, guidance, models, sampling, schedules
from diffusion_jax.data import Normalization
from diffusion_jax.distributed import sharding
from diffusion_jax.measurements import Measurement, masked
from diffusion_jax.pretrained.model import make_model
from diffusion_jax.training.state import abstract_params
from helpers.baselines import dps
from helpers.networks import redraw

KEY = jax.random.key(0)
FIELDS = {"channels": 8, "channel_multipliers": (1,), "num_res_blocks": 1, "attention_levels": (), "num_groups": 4}


def net_of(prediction="eps", variance="fixed_large", low_resolution=0, **fields):
    model = models.UNet(**FIELDS | {"out_channels": 2 if variance.startswith("learned") else 1} | fields)
    diffusion = {"schedule": "cosine", "num_timesteps": 100, "prediction": prediction, "variance": variance}
    found = make_model("test's", model, 4, diffusion, channels=1, low_resolution=low_resolution)
    return found.with_params(redraw(abstract_params(found.model, found.example_shape)))


def by_hand(denoiser, schedule, sampler, n):
    key_noise, key_steps = jax.random.split(KEY)
    x_T = jax.random.normal(key_noise, (n, 4, 4, 1))
    return jax.jit(lambda x: sampling.sample(key_steps, schedule, denoiser, x, sampler))(x_T)


@pytest.mark.thorough
def test_samples_are_the_core_s():
    net = net_of("v", "learned_range", num_classes=3, label_dropout=0.1)
    sampler = sampling.dpm_solver_pp(2)
    images = net.sample(KEY, 4, y=[0, 1, 2, 1], sampler=sampler, steps=4, guidance_scale=2.0)
    assert images.shape == (4, 4, 4, 1) and images.dtype == jnp.float32 and abs(images).max() <= 1
    apply = lambda x, time, y: net.model.apply({"params": net.params}, x, time, y)  # noqa: E731
    own = Denoiser(apply, prediction="v", variance="learned_range")
    guided = guidance.classifier_free(own, jnp.array([0, 1, 2, 1]), 3, 2.0)
    schedule = schedules.respace(net.schedule, 4, "trailing")
    np.testing.assert_allclose(images, by_hand(guided, schedule, sampler, 4), atol=2e-4)


@pytest.mark.thorough
def test_new_keys_parameters_labels_conditions_and_scales_compile_nothing(sampling_programs):
    """New numbers in equal shapes reuse the program, and each of them changes the samples."""
    net = net_of("v", num_classes=3, label_dropout=0.1, condition_features=2, condition_dropout=0.1)
    model = models.Classifier(**FIELDS | {"num_classes": 3, "head_channels": 4})
    diffusion = {"schedule": "cosine", "num_timesteps": 100}
    classifier = make_model("test's", model, 4, diffusion, channels=1)
    classifier = classifier.with_params(redraw(abstract_params(model, (4, 4, 1))))

    def moved(net):
        return net.with_params(jax.tree.map(lambda leaf: leaf * 1.1, net.params))

    def draw(net=net, key=KEY, **changed):
        options = {"y": [0, 1, 2, 1], "condition": [1.0, 2.0], "guidance_scale": 2.0, "guidance_interval": (5.0, 90.0)}
        options |= {"classifier": classifier, "classifier_scale": 2.0, "sampler": sampling.dpm_solver_pp(2), "steps": 4}
        return np.asarray(net.sample(key, 4, **options | changed))

    images = draw()
    assert sampling_programs() == 1
    np.testing.assert_array_equal(draw(), images)
    for changed in (
        {"net": moved(net)},
        {"key": jax.random.key(5)},
        {"y": np.int64(2)},
        {"condition": np.ones((4, 2))},
        {"condition": None},
        {"guidance_scale": 3},
        {"guidance_interval": (5.0, 50.0)},
        {"classifier": moved(classifier)},
        {"classifier_scale": 1.5},
    ):
        assert (draw(**changed) != images).any(), changed
        assert sampling_programs() == 0, changed
    draw(sampler=sampling.ddim())
    assert sampling_programs() == 1


@pytest.mark.thorough
def test_a_mesh_gives_the_same_samples_and_compiles_once(sampling_programs):
    net, n = net_of("v", num_classes=3, label_dropout=0.1), 2 * jax.device_count()
    split = net.on_mesh(sharding.make_mesh({"data": -1, "fsdp": 1}))
    options = {"y": 1, "sampler": sampling.ddim(), "steps": 4, "guidance_scale": 2.0}
    np.testing.assert_allclose(split.sample(KEY, n, **options), net.sample(KEY, n, **options), atol=2e-4)
    assert sampling_programs() == 2  # one for the mesh, one for one device
    other = split.with_params(jax.tree.map(lambda leaf: leaf * 1.1, split.params)).sample(KEY, n, **options)
    split.sample(KEY, n, **options | {"guidance_scale": 3.0})
    assert isinstance(other, np.ndarray) and sampling_programs() == 0


FIRST_ROW = np.arange(4)[:, None, None] == 0


def measured(value):
    """A measurement of all rows but the first, with noise 0.1: each entry is `value`."""
    return Measurement(masked(~FIRST_ROW), np.full((2, 4, 4, 1), value, np.float32), 0.1)


def replaced(sampler, value):
    """A sampler that replaces the first row of each image by `value`."""
    return editing.replacement(sampler, np.full((2, 4, 4, 1), value, np.float32), FIRST_ROW)


# Samplers that hold an image, a measurement or both, in which each entry has this value.
HOLDING = {
    "replacement": lambda value: replaced(sampling.ddim(), value),
    "dps": lambda value: dps(sampling.ddim(), measured(value), 0.5 + value),
    "dps of replacement": lambda value: dps(replaced(sampling.ddim(), value), measured(value)),
    "replacement of dps": lambda value: replaced(dps(sampling.ddim(), measured(value)), value),
}


@pytest.mark.thorough
@pytest.mark.parametrize("name", HOLDING)
def test_another_image_or_measurement_in_a_sampler_compiles_nothing(name, sampling_programs):
    """Samples are of the image and the measurement that their own sampler holds."""
    net = net_of("v")
    first, second = (net.sample(KEY, 2, sampler=HOLDING[name](value), steps=4) for value in (0.25, -0.1))
    assert sampling_programs() == 1
    schedule = schedules.respace(net.schedule, 4, "trailing")
    np.testing.assert_allclose(second, by_hand(net.denoiser(), schedule, HOLDING[name](-0.1), 2), atol=2e-4)
    assert abs(first - second).max() > 0.01


@pytest.mark.thorough
def test_a_draw_has_a_gradient_by_what_a_sampler_holds():
    """Also after a draw with the same number."""
    net = net_of("v", "fixed_large")

    def mean(zeta):
        return net.sample(KEY, 2, sampler=dps(sampling.ddim(), measured(0.25), zeta), steps=4).mean()

    slope = (mean(0.55) - mean(0.45)) / 0.1
    assert abs(mean(0.5) - mean(0.4)) > 1e-3
    np.testing.assert_allclose(jax.grad(mean)(0.5), slope, rtol=0.05)


@pytest.mark.thorough
def test_a_wrapped_sampler_of_a_user_may_hold_arrays(sampling_programs):
    """Without `traced` the sampler compiles for itself; a field that is neither traced nor hashable is an error."""

    @dataclasses.dataclass(frozen=True, eq=False)
    class shifted(sampling.WrappedSampler):
        shift: Any

        def step(self, key, denoiser, x_t, transition, state):
            new = self.sampler.step(key, denoiser, x_t, transition, state)
            return new._replace(x_prev=new.x_prev + self.shift)

    @dataclasses.dataclass(frozen=True, eq=False)
    class scaled(shifted, traced=("shift",)):
        factor: Any = 1.0

    net, shifts = net_of("v"), [jnp.zeros((4, 4, 1)), jnp.ones((4, 4, 1))]
    for make, programs in ((shifted, 2), (scaled, 1)):
        first, second = (net.sample(KEY, 2, sampler=make(sampling.ddim(), shift), steps=4) for shift in shifts)
        assert sampling_programs() == programs
        np.testing.assert_allclose(first, net.sample(KEY, 2, sampler=sampling.ddim(), steps=4), atol=1e-5)
        assert (second != first).all()
        sampling_programs()
    with pytest.raises(TypeError, match="unhashable"):
        net.sample(KEY, 2, sampler=scaled(sampling.ddim(), *shifts), steps=4)
    with pytest.raises(TypeError, match="shfit"):
        net.sample(KEY, 2, sampler=type("misspelled", (shifted,), {}, traced=("shfit",))(sampling.ddim(), 0.0), steps=4)


@pytest.mark.thorough
def test_what_a_net_draws_by_default():
    net = net_of()
    images = net.sample(KEY, 2)
    expected = by_hand(net.denoiser(), net.schedule, sampling.ddpm("fixed_large"), 2)
    np.testing.assert_allclose(images, expected, atol=2e-3)  # a hundred steps of rounding
    heun = net.sample(KEY, 2, sampler=sampling.heun(), steps=15)
    schedule = schedules.respace(net.schedule, 15, "log_snr")  # what suits heun
    np.testing.assert_allclose(heun, by_hand(net.denoiser(), schedule, sampling.heun(), 2), atol=2e-4)


@pytest.mark.thorough
def test_a_sampler_inside_of_another_gets_the_same_steps():
    net, x_0 = net_of("v"), jnp.zeros((1, 4, 4, 1))
    nothing_known = editing.replacement(sampling.ddim(), x_0, np.zeros((4, 4, 1)))
    wrapped = net.sample(KEY, 2, sampler=nothing_known, steps=3)
    np.testing.assert_allclose(wrapped, net.sample(KEY, 2, sampler=sampling.ddim(), steps=3), atol=1e-5)
    heun = editing.replacement(sampling.heun(), x_0, np.zeros((4, 4, 1)))
    assert sampling.default_spacing(heun, net.schedule, net.denoiser()) == "log_snr"
    assert sampling.find_problem(heun, schedules.respace(net.schedule, 5, "trailing"))


@pytest.mark.thorough
def test_a_net_warns_of_steps_on_which_its_errors_grow():
    net, options = net_of(), {"sampler": sampling.ddim(), "clip": False, "steps": 10}
    with pytest.warns(UserWarning, match="sample errors of .* use spacing='log_snr' or more steps, a clip"):
        net.sample(KEY, 2, **options, spacing="trailing")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        images = net.sample(KEY, 2, **options)
    schedule = schedules.respace(net.schedule, 10, "log_snr")
    expected = by_hand(net.denoiser(clip=False), schedule, sampling.ddim(), 2)
    np.testing.assert_allclose(images, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.thorough
def test_what_does_not_fit_a_net_is_one_line():
    plain, conditional = net_of(), net_of(num_classes=3)
    for net, options, words in (
        (plain, {"y": 1}, "has no classes, got y=1; omit y"),
        (conditional, {}, "has 3 classes: give y, one label or 2"),
        (conditional, {"y": 3}, r"labels must lie in 0 \.\.\. 2, got 3"),
        (net_of(num_classes=3, label_dropout=0.1), {"y": 7}, r"lie in 0 \.\.\. 2 \(or 3, the null label\), got 7"),
        (conditional, {"y": [0, 1, 2]}, r"one label or 2, one for each example; got shape \(3,\)"),
        (conditional, {"y": 1, "guidance_scale": 2.0}, "needs a network trained with label_dropout"),
        (plain, {"low": jnp.zeros((2, 2, 2, 1))}, "low= is for super-resolution networks"),
        (net_of(low_resolution=2), {}, "low= is for super-resolution networks"),
        (plain, {"sampler": sampling.heun(), "steps": 5, "spacing": "trailing"}, "use spacing='log_snr'"),
    ):
        with pytest.raises(ValueError, match=words) as caught:
            net.sample(KEY, 2, **options)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="num_images=0 must be at least 1"):
        plain.sample(KEY, 0)


def test_models_differ_in_units_and_output():
    """Weights of other units or another output load without an error, and give wrong samples."""
    net = net_of()
    x, wide = Normalization((0.5,), (1.0,)), Normalization((0.5,), (2.0,))
    units = dataclasses.replace(net, normalizations={"x": x, "condition": x})
    assert not units.find_differences(units)
    for other, expected in (
        ({"normalizations": {"x": wide, "condition": x}}, ["x: (data - (0.5)) / (2) there, (data - (0.5)) / (1) here"]),
        ({"normalizations": {"x": x}}, ["condition: none there, (data - (0.5)) / (1) here"]),
        ({"levels": None}, ["levels: None there, 256 here"]),
        (
            {"prediction": "v", "sigma_data": 1.0},
            ["prediction: 'v' there, 'eps' here", "sigma_data: 1.0 there, None here"],
        ),
        ({"variance": "fixed_small"}, []),  # the same output
        ({"schedule": schedules.respace(net.schedule, 10)}, ["another noise schedule"]),
    ):
        assert units.find_differences(dataclasses.replace(units, **other)) == expected
