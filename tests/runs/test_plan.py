"""The plan of every kind of data: its batches, and the bytes that it counts."""

import math
from unittest import mock

import jax
import pytest

from diffusion_jax import training
from diffusion_jax.config import resolve
from diffusion_jax.config.table import MESH
from diffusion_jax.data import example_shape
from diffusion_jax.distributed import sharding
from diffusion_jax.runs import plan, plan_settings
from helpers.array_configs import SHAPES, array_config
from helpers.configs import tiny_config


@pytest.mark.parametrize("kind", list(SHAPES))
def test_the_batch_of_a_plan_is_one_of_a_train_step(kind):
    conditions = "model.condition_features" if kind == "vectors" else "model.condition_channels"
    config = array_config(kind, "", **{conditions: 2, "model.num_classes": 3})
    shapes = plan.batch_shapes(config)
    assert set(shapes) == {"x", "label", "condition"}
    assert shapes["x"].shape == (8, *example_shape(config.data)) and shapes["x"].dtype == "float32"
    assert shapes["condition"].shape == (8, *SHAPES[kind][:-1], 2)
    program = training.build_program(config)
    state, _ = jax.eval_shape(program.train_step, program.abstract_state, shapes)
    assert jax.tree.map(lambda leaf: leaf.shape, state) == jax.tree.map(lambda leaf: leaf.shape, program.abstract_state)


def test_images_are_planned_as_uint8():
    shapes = plan.batch_shapes(tiny_config())
    assert set(shapes) == {"image", "label"} and shapes["image"].dtype == "uint8"


@pytest.mark.whole
def test_the_activations_of_an_example_grow_with_its_size():
    sizes = [
        plan_settings.activations_per_example(array_config("series", "", **{"data.image_size": (n,)}))
        for n in (8, 16, 32)
    ]
    # All is proportional to the length, but the time embedding and the few bytes of the middle's attention.
    assert sizes[2] - sizes[1] == pytest.approx(2 * (sizes[1] - sizes[0]), rel=0.05)


@pytest.mark.whole
def test_vectors_with_conditions_are_planned(capsys):
    config = array_config("vectors", "", **{"model.condition_features": 2})
    found = plan.estimate(config)
    params = sum(leaf.size for leaf in jax.tree.leaves(training.build_program(config).abstract_state.params))
    assert found.num_parameters == params and found.params == 4 * params
    plan.run(config)
    out = capsys.readouterr().out
    assert "per example" in out and "image" not in out


def test_every_device_of_the_config_has_its_figures():
    allowed = MESH["device"].kind.allowed
    assert allowed == f"{', '.join(plan_settings.DEVICES)} or None".replace(", h100", " or h100")


@pytest.fixture(scope="module")
def choices():
    """All settings of a small network for eight devices with links that are slower the more devices a ring has."""
    device = plan_settings.Device(memory=1e9, flops=1e12, links=((4, 1e13), (math.inf, 1e12)))
    config = resolve(tiny_config(**{"training.batch_size": 32, "data.image_size": 16, "model.num_groups": 4}))
    with mock.patch.object(sharding, "MIN_SPLIT_SIZE", 64):  # the arrays of a small network are split, too
        return plan_settings.estimates(config, plan_settings.trace(config), 8, device)


@pytest.mark.whole
def test_settings_trade_memory_for_time(choices):
    by_settings = {each.settings: each for each in choices}
    settings = plan_settings.Settings
    assert len(by_settings) == 4 * 3 * 3  # fsdp 1, 2, 4, 8; remat of no, the first and all levels; 1, 2, 4 microbatches
    none, first, every = (by_settings[settings(1, remat, 1)] for remat in (False, (0,), True))
    assert none.activations > first.activations > every.activations > 0
    # Four examples on each device, of which one level's activations are recomputed.
    assert none.seconds < first.seconds < every.seconds and none.settings == choices[0].settings
    split = by_settings[settings(1, False, 4)]
    assert split.activations == none.activations / 4 and split.gradients == 2 * none.gradients
    assert by_settings[settings(8, False, 1)].state < none.state


@pytest.mark.whole
def test_the_state_of_an_estimate_is_that_of_the_program(choices):
    """And its peak is that of the compiled program up to what one compiler schedules otherwise."""
    config = tiny_config(**{"training.batch_size": 32, "data.image_size": 16})
    found = plan.estimate(config)
    config = resolve(config)
    estimates = plan_settings.estimates(config, plan_settings.trace(config), 1, plan_settings.DEVICES["h100"])
    (same,) = [each for each in estimates if each.settings == plan_settings.Settings(1, False, 1)]
    assert found.params + found.ema + found.optimizer == same.state + 8  # and two counters of steps
    assert same.activations == 32 * found.activations_per_example
    assert 0.5 < (found.arguments + found.temporaries) / same.total < 2


@pytest.mark.whole
@pytest.mark.parametrize(("memory", "said"), [(1e9, "fastest that fits"), (1e3, "nothing fits; least")])
def test_a_plan_proposes_settings(memory, said, choices, capsys, monkeypatch):
    monkeypatch.setitem(plan_settings.DEVICES, "h100", plan_settings.DEVICES["h100"]._replace(memory=memory))
    monkeypatch.setattr(plan_settings, "trace", lambda config: None)
    monkeypatch.setattr(plan_settings, "estimates", lambda *_: choices)
    plan.log_settings(tiny_config(**{"mesh.device": "h100"}), 8)
    out = capsys.readouterr().out
    assert said in out and "--config.mesh.fsdp=" in out and "'--config.model.remat=" in out
    assert "as given" in out and ("does not fit" in out) == (memory == 1e3)
