"""Settings that name a function of the user: the train step equals that with the function itself."""

import jax
import numpy as np
import optax
import pytest

from diffusion_jax import config as configs
from diffusion_jax import schedules, training
from diffusion_jax.config import ConfigError
from diffusion_jax.training.optimizer import from_config
from diffusion_jax.training.step import make_timestep_sampler
from helpers import own_networks
from helpers.array_configs import array_batch, array_config
from helpers.configs import a_batch, tiny_config
from helpers.networks import redraw


def name(function):
    return f"helpers.own_networks:{function.__name__}"


def tiny_mlp(**overrides):
    return array_config("vectors", "", **overrides)


def config_with(**settings):
    """Settings of a tiny MLP's config, by text as on the command line."""
    texts = {key: value if isinstance(value, str) else name(value) for key, value in settings.items()}
    return configs.override(tiny_mlp(), {key.replace("__", "."): value for key, value in texts.items()})


def test_betas_and_a_path():
    config = config_with(diffusion__schedule=own_networks.betas)
    np.testing.assert_allclose(
        training.schedule_from_config(config.diffusion).betas, np.linspace(1e-3, 0.03, 1000), rtol=1e-6
    )
    config = config_with(diffusion__path=own_networks.path)
    assert training.schedule_from_config(config.diffusion).path.interval == schedules.edm(0.01, 50.0).interval


def test_betas_for_another_number_of_timesteps():
    config = config_with(diffusion__schedule=own_networks.hundred_betas)
    words = r"hundred_betas \(diffusion.schedule\) returned betas of shape \(100,\) for diffusion.num_timesteps=1000"
    with pytest.raises(ValueError, match=words):
        training.schedule_from_config(config.diffusion)
    assert training.schedule_from_config({**config.diffusion, "num_timesteps": 100}).num_timesteps == 100


def test_a_draw():
    config = config_with(diffusion__path="edm", diffusion__draw=own_networks.draw)
    assert make_timestep_sampler(config.diffusion) is own_networks.draw
    words = r"diffusion.draw=.*draw_without_density draws levels with the log density -inf"
    with pytest.raises(ValueError, match=words):
        training.create(config_with(diffusion__path="edm", diffusion__draw=own_networks.draw_without_density))


def metrics_of(config):
    state, step = training.create(config)
    return jax.device_get(step(state, array_batch("vectors"))[1])


@pytest.mark.thorough
def test_a_loss_on_a_path_gets_the_timestep_sampler():
    """`draw` is the sampler's name in 0.3."""
    sampler = {"diffusion__timestep_sampler": "log_normal", "diffusion__loss": own_networks.half_loss}
    found = metrics_of(config_with(diffusion__path="edm", **sampler))
    earlier = {"diffusion__timestep_sampler": "stratified", "diffusion__draw": "log_normal"}
    plain = metrics_of(config_with(diffusion__path="edm", **earlier))
    np.testing.assert_allclose(found["loss"], plain["loss"] / 2, rtol=1e-6)


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("one_number", r"losses is of shape \[\]"),
        ("a_column", r"losses is of shape \[8, 1\]"),
        ("a_number_per_entry", r"losses is of shape \[8, 3\]"),
        ("without_aux", "it returned a "),
        ("aux_without_t", "aux.t is a NoneType"),
        ("a_scalar_of_the_batch", r"aux.scalars\['mean'\] is of shape \[\]"),
        ("scalars_without_names", "aux.scalars is a .*, not a dictionary"),
    ],
)
def test_a_loss_without_a_number_for_each_example_is_refused_before_compiling(function, words):
    config = config_with(diffusion__loss=f"helpers.own_networks:{function}", training__batch_size="8")
    expected = (
        rf"^diffusion.loss=helpers.own_networks:{function} must return \(losses \[8\], losses.LossAux\), .*{words}"
    )
    with pytest.raises(ValueError, match=expected) as caught:
        training.build_program(config)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("function", "is_noted"),
    [
        ("the_mean", True),
        ("half_loss", False),
        ("always_zero", False),
        ("relative_to_the_batch", False),
        ("in_groups_of_four", False),
    ],
)
def test_a_loss_that_returns_the_mean_of_the_batch_is_noted_once(function, is_noted, capsys):
    """Losses that are equal but independent, and losses that relate examples, are allowed."""
    training.build_program(config_with(diffusion__loss=f"helpers.own_networks:{function}"))
    (*notes,) = (line for line in capsys.readouterr().out.splitlines() if "return a loss for each example" in line)
    assert len(notes) == is_noted and all(f"diffusion.loss=helpers.own_networks:{function}" in note for note in notes)


@pytest.mark.parametrize("accumulation", [pytest.param("1", marks=pytest.mark.thorough), "2"])
def test_scalars_of_a_loss_are_metrics_and_averages(accumulation):
    """The averages are of two steps, in each of which every example counts once."""
    texts = {"diffusion__loss": "helpers.own_networks:with_scalars", "training__accumulation_steps": accumulation}
    state, step = training.create(config_with(**texts))
    found = []
    for key in range(2):
        state, metrics = step(state, array_batch("vectors", key=key))
        found.append(jax.device_get(metrics))
        np.testing.assert_allclose(metrics["loss/doubled"], 4 * metrics["loss"], rtol=1e-6)
    assert found[0]["loss/step"] != found[1]["loss/step"]
    means = training.mean_metrics(jax.device_get(state.averages))
    for name in ("loss/doubled", "loss/step"):
        np.testing.assert_allclose(means[name], (found[0][name] + found[1][name]) / 2, rtol=1e-6)


def test_microbatches_are_refused_for_a_loss_that_relates_examples():
    """The test below has microbatches and a loss that does not."""
    texts = {"diffusion__loss": "helpers.own_networks:relative_to_the_batch", "training__accumulation_steps": "2"}
    config = config_with(**texts, diffusion__timestep_sampler="loss_second_moment")
    with pytest.raises(ValueError, match="outputs for other examples, .* use training.accumulation_steps=1 and not 2"):
        training.build_program(config)


@pytest.mark.parametrize("accumulation", [pytest.param(1, marks=pytest.mark.thorough), 2])
def test_a_loss_that_gives_the_network_further_numbers(accumulation):
    def loss(function):
        texts = {"model.kind": "helpers.own_networks:pair", "model.dropout": "0"}
        texts |= {"diffusion.loss": f"helpers.own_networks:{function.__name__}"}
        texts |= {"training.accumulation_steps": str(accumulation)}
        config = configs.override(tiny_config(), texts)
        state, step = training.create(config)
        return float(step(state, a_batch(config, 0))[1]["loss"])

    found = loss(own_networks.with_extra)
    np.testing.assert_allclose(found, loss(own_networks.with_addition), rtol=1e-5)
    assert found > 1.5  # without the numbers, the loss is about 1


@pytest.mark.thorough
def test_a_weighting():
    found, plain = metrics_of(config_with(diffusion__weighting=own_networks.weight)), metrics_of(tiny_mlp())
    assert found["loss"] < 10 * plain["loss"] and found["loss"] != plain["loss"]
    assert found["loss_q4"] < 0.5 * plain["loss_q4"]  # the SNR is small there


def test_a_timestep_sampler():
    found = metrics_of(config_with(diffusion__timestep_sampler=own_networks.last_quarter))
    assert np.isnan([found[f"loss_q{i}"] for i in (1, 2, 3)]).all() and np.isfinite(found["loss_q4"])


def test_an_optimizer():
    config = config_with(optimizer__name=own_networks.lion, optimizer__grad_clip="0")
    params, grads = {"w": np.ones(3, np.float32)}, {"w": np.array([1.0, -2.0, 0.5], np.float32)}
    rate = training.optimizer.learning_rate(config.optimizer)
    for transformation in (found := from_config(config.optimizer), expected := optax.lion(rate, b1=0.9)):
        assert transformation.init(params) is not None
    updates = [
        t.update(grads, t.init(params), params, **extra)[0]["w"]
        for t, extra in ((found, {"grad_norm": 1.0}), (expected, {}))
    ]
    np.testing.assert_array_equal(*updates)


def test_functions_that_are_missing_are_one_line():
    with pytest.raises(
        ValueError, match="diffusion.weighting=helpers.own_networks:absent cannot be imported"
    ) as caught:
        training.create(config_with(diffusion__weighting="helpers.own_networks:absent"))
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="diffusion.weighting=sqrt must be none, snr, .* or module:function"):
        config_with(diffusion__weighting="sqrt")


def test_functions_that_a_config_imports():
    config = config_with(diffusion__weighting=own_networks.weight, model__kind=own_networks.pair)
    assert configs.untrusted_values(config) == {
        "diffusion.weighting": name(own_networks.weight),
        "model.kind": name(own_networks.pair),
    }
    assert configs.untrusted_values(tiny_mlp()) == {}
    several = {"evaluation.metrics": f"energy_distance,{name(own_networks.mean_shift)}"}
    several |= {"logging.writers": f"wandb,{name(own_networks.Lines)}"}
    assert configs.untrusted_values(configs.override(tiny_mlp(), several)) == several


@pytest.mark.parametrize(
    "frozen", [("dense_in", "time_*"), pytest.param("helpers.own_networks:is_encoder", marks=pytest.mark.thorough)]
)
def test_frozen_parameters_do_not_change(frozen):
    """They have no moments, and the norm that clips the gradient is that of the other parameters."""
    config = tiny_mlp(**{"optimizer.frozen": frozen, "optimizer.name": "adamw", "optimizer.weight_decay": 0.1})
    state, step = training.create(config)
    state = state.replace(params=redraw(state.params))  # a new network has gradients of 0 in most layers
    before = jax.device_get(state.params)
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if getattr(leaf, "ndim", 0)]
    state, metrics = step(state, array_batch("vectors"))
    trained = [name for name in before if not name.startswith(("dense_in", "time_"))]
    for name in before:
        pairs = zip(*map(jax.tree.leaves, (before[name], state.params[name])), strict=True)
        assert any((a != b).any() for a, b in pairs) == (name in trained), name
        averages = zip(*map(jax.tree.leaves, (state.ema_params[name], state.params[name])), strict=True)
        assert any((a != b).any() for a, b in averages) == (name in trained), name
    sizes = sum(leaf.size for name in trained for leaf in jax.tree.leaves(before[name]))
    assert sum(leaf.size for leaf in moments) == 2 * sizes
    whole, step = training.create(tiny_mlp())
    whole = whole.replace(params=redraw(whole.params))
    assert 0 < metrics["grad_norm"] < 0.999 * step(whole, array_batch("vectors"))[1]["grad_norm"]


@pytest.mark.thorough
def test_the_encoder_of_a_unet_can_be_frozen():
    config = tiny_config(**{"optimizer.frozen": ("down_*", "mid_*")})
    state, step = training.create(config)
    state = state.replace(params=redraw(state.params))
    before = jax.device_get(state.params)
    after = jax.device_get(step(state, a_batch(config))[0].params)
    for name in before:
        same = jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), before[name], after[name]))
        assert same == name.startswith(("down_", "mid_")), name


def test_patterns_that_freeze_nothing_or_everything_are_refused():
    for frozen, words in ((("dense_on",), "freezes no parameter; some of the"), (("*",), "freezes every parameter")):
        with pytest.raises(ValueError, match=words):
            training.create(tiny_mlp(**{"optimizer.frozen": frozen}))
