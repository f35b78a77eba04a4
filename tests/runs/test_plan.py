"""The plan: the bytes and FLOPs that it counts, and the settings that it proposes."""

import jax
import pytest

from diffusion_jax import training
from diffusion_jax.config import resolve
from diffusion_jax.distributed import sharding
from diffusion_jax.runs import plan
from helpers.configs import tiny_config


@pytest.fixture(scope="module")
def choices():
    """(a config, all its settings for eight devices), of a small network whose arrays are split, too."""
    config = resolve(tiny_config(**{"training.batch_size": 32, "data.image_size": 16, "model.num_groups": 4}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "MIN_SPLIT_SIZE", 64)
        return config, plan.all_estimates(config, plan.trace(config, [False, (0,), True]), 8)


@pytest.mark.whole
def test_settings_trade_memory_for_time(choices):
    by_settings = {each.settings: each for each in choices[1]}
    assert len(by_settings) == 4 * 3 * 3  # fsdp 1, 2, 4, 8; remat of no, the first and all levels; 1, 2, 4 microbatches
    none, first, every = (by_settings[plan.Settings(1, remat, 1)] for remat in (False, (0,), True))
    assert none.activations > first.activations > every.activations > 0
    order = [each.settings for each in choices[1]]
    assert order[0] == none.settings
    assert order.index(none.settings) < order.index(first.settings) < order.index(every.settings)
    split = by_settings[plan.Settings(1, False, 4)]
    assert split.activations == none.activations / 4 and split.gradients == 2 * none.gradients
    assert by_settings[plan.Settings(8, False, 1)].state < none.state


@pytest.mark.whole
def test_an_estimate_is_that_of_the_compiled_program():
    """The state exactly, FLOPs and the peak up to what one compiler does otherwise."""
    config = resolve(tiny_config(**{"training.batch_size": 32, "data.image_size": 16}))
    program = training.build_program(config)
    traced = plan.trace(config, [False])
    found = plan.estimate(config, traced, plan.Settings.of(config), 1)
    state = (program.abstract_state.params, program.abstract_state.ema_params, program.abstract_state.opt_state)
    assert found.state + 8 == sum(leaf.size * 4 for leaf in jax.tree.leaves(state))  # and two counters of steps
    batch = {"image": jax.ShapeDtypeStruct((32, 16, 16, 1), "uint8"), "label": jax.ShapeDtypeStruct((32,), "int32")}
    compiled = program.train_step.lower(program.abstract_state, batch).compile()
    memory = compiled.memory_analysis()
    assert 0.5 < (memory.argument_size_in_bytes + memory.temp_size_in_bytes) / found.total < 2
    assert 0.8 < compiled.cost_analysis()["flops"] / 32 / traced.flops[False] < 1.25


@pytest.mark.whole
@pytest.mark.parametrize(("memory", "words"), [(1e9, "first that fits"), (1e3, "nothing fits; least")])
def test_a_plan_proposes_settings(memory, words, choices, capsys, monkeypatch):
    monkeypatch.setitem(plan.DEVICES, "h100", memory)
    monkeypatch.setattr(plan, "all_estimates", lambda *_: choices[1])
    plan.run(tiny_config(**{"mesh.device": "h100"}))
    out = capsys.readouterr().out
    assert words in out and "--config.mesh.fsdp=" in out and "'--config.model.remat=" in out
    assert "as given" in out and ("does not fit" in out) == (memory == 1e3)
