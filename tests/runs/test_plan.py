"""The plan: counted bytes and FLOPs, proposed settings, and notes about problems in a config."""

import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import data, training
from diffusion_jax.config import default, default_classifier, experiment, experiment_names, override, resolve
from diffusion_jax.distributed import sharding, topologies
from diffusion_jax.errors import UserError
from diffusion_jax.models.layers import compiling_for
from diffusion_jax.runs import plan
from helpers.configs import tiny_config


@pytest.fixture(scope="module")
def choices():
    """(a config, all possible settings on eight devices), for a small network whose arrays are also split."""
    settings = {"training.batch_size": 32, "data.image_size": 16, "model.channel_multipliers": (1, 2)}
    config = resolve(tiny_config(**settings))
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
    split = by_settings[plan.Settings(8, False, 1)]
    assert split.state < none.state
    # Each element of a split array has 16 bytes of state, of which a device holds an eighth, and one gathered value.
    width = jnp.dtype(choices[0]["model"]["dtype"]).itemsize
    np.testing.assert_allclose(split.working - none.working, (none.state - split.state) * 8 / 7 / 16 * width)
    every_split = by_settings[plan.Settings(8, True, 1)]
    assert 0 < every_split.working - every.working < split.working - none.working


@pytest.mark.whole
def test_an_estimate_is_that_of_the_compiled_program():
    """The state is exact; FLOPs and the peak agree up to differences in the compiler."""
    config = resolve(tiny_config(**{"training.batch_size": 32, "data.image_size": 16}))
    program = training.build_program(config)
    traced = plan.trace(config, [False])
    found = plan.estimate(config, traced, plan.Settings(1, False, 1), 1)
    state = (program.abstract_state.params, program.abstract_state.ema_params, program.abstract_state.opt_state)
    assert found.state + 8 == sum(leaf.size * 4 for leaf in jax.tree.leaves(state))  # and two step counters
    batch = {"image": jax.ShapeDtypeStruct((32, 16, 16, 1), "uint8"), "label": jax.ShapeDtypeStruct((32,), "int32")}
    compiled = program.train_step.lower(program.abstract_state, batch).compile()
    memory = compiled.memory_analysis()
    assert 0.5 < (memory.argument_size_in_bytes + memory.temp_size_in_bytes) / found.total < 2
    assert 0.8 < compiled.cost_analysis()["flops"] / 32 / traced.flops[False] < 1.25


@pytest.mark.thorough
def test_levels_to_recompute_that_no_plan_proposes_are_planned():
    config = resolve(tiny_config(**{"model.channel_multipliers": (1, 2), "model.remat": (1,)}))
    traced = plan.trace(config, [(1,)])
    found = plan.estimate(config, traced, plan.Settings(1, (1,), 1), 1)
    assert found.activations < config.training.batch_size * traced.activations[False]


def test_the_counted_activations_do_not_depend_on_this_machine():
    """Convolutions have another form on CPUs, whose arguments are no new arrays."""
    config = resolve(tiny_config(**{"model.channel_multipliers": (1, 2)}))
    here = plan.activations_per_example(config)
    with compiling_for("tpu"):
        there = plan.activations_per_example(config)
    assert there == here


@pytest.mark.thorough
def test_a_plan_for_a_topology_has_the_bytes_and_cycles_of_the_compiled_step(capsys, monkeypatch):
    """With the CPU in place of a TPU: `make tpu` compiles for a TPU."""
    config = tiny_config(**{"mesh.device": "v5e:2x2", "training.batch_size": 16})
    with pytest.raises(UserError, match="'v5e' is not a TPU topology; use a chip"):
        plan.run(tiny_config(**{"mesh.device": "v5e"}))
    with monkeypatch.context() as patch, pytest.raises(UserError, match="needs libtpu"):
        patch.setattr(topologies.importlib.util, "find_spec", lambda name: None)
        plan.run(config)
    monkeypatch.setattr(topologies, "tpu_devices", lambda topology: jax.devices()[:1])
    monkeypatch.setattr(plan.hlo, "Program", lambda text: types.SimpleNamespace(cycles=3_000_000))
    plan.run(config)
    out = capsys.readouterr().out
    assert "On 1 devices of v5e:2x2 (data 1, fsdp 1), batch 16:" in out and "fit" not in out
    # The peak, 197 TFLOP/s, is 2^17 FLOP a cycle.
    assert "3,000,000 cycles: 2.0 ms at 1.50 GHz, 8,016 examples/s. The compiler's estimate, not a measurement" in out
    state = training.build_program(config).abstract_state
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    (held,) = re.findall(r"state and batch ([\d.]+) MB", out)
    assert size < 1e6 * float(held) < 1.1 * size + 1e5
    monkeypatch.setitem(topologies.CHIPS, "v5e", topologies.CHIPS["v5e"]._replace(memory=1e5))
    plan.run(config)
    assert "does not fit        use --config.model.remat=True" in capsys.readouterr().out

    def refuse(text):
        raise RuntimeError("RESOURCE_EXHAUSTED: 20G of 16G\nand many lines")

    monkeypatch.setattr(plan, "abstract_batch", refuse)
    with pytest.raises(
        UserError, match=r"^mesh.device=v5e:2x2: RESOURCE_EXHAUSTED: 20G of 16G; use --config.model.remat=True"
    ):
        plan.run(config)


@pytest.mark.whole
@pytest.mark.parametrize(("memory", "words"), [(1e9, "first that fits"), (1e3, "none fits; smallest")])
def test_a_plan_proposes_settings(memory, words, choices, capsys, monkeypatch):
    monkeypatch.setitem(plan.DEVICES, "h100", memory)
    monkeypatch.setattr(plan, "all_estimates", lambda *_: choices[1])
    plan.run(tiny_config(**{"mesh.device": "h100"}))
    out = capsys.readouterr().out
    assert "of any kind (data" in out and f"On {jax.device_count()} x h100 (may use" in out
    assert words in out and "--config.mesh.fsdp=" in out and "'--config.model.remat=" in out
    assert "as given" in out and ("does not fit" in out) == (memory == 1e3)


# ---- Notes

LONG = {"training.num_steps": 2000, "optimizer.warmup_steps": 100, "ema.warmup": True}
CONTINUOUS = {"data.levels": None, "data.random_flip": False}
EDM = {"diffusion.path": "edm", "diffusion.draw": "log_normal", "diffusion.prediction": "x_0"}

# Settings that differ from the defaults, and the start of the note.
NOTES = [
    (LONG | {"optimizer.warmup_steps": 5000}, "optimizer.warmup_steps=5000 is not below training.num_steps=2000"),
    (LONG | {"optimizer.schedule": "cosine", "optimizer.decay_steps": 1500}, "optimizer.decay_steps=1500 is below "),
    # 0.9999**2000 = 0.819
    (LONG | {"ema.warmup": False}, "at training.num_steps=2000 the EMA (ema.decay=0.9999) still holds 82% of the "),
    (LONG | CONTINUOUS, "diffusion.prediction=eps on continuous data (data.levels=None) without a clip"),
    # the product of 1 - beta is 0.904
    (
        LONG | {"diffusion.num_timesteps": 10},
        "diffusion.num_timesteps=10 with the schedule linear ends at alpha_bar=0.",
    ),
    # log(sigma / std) has the mean -1.2 - log(0.5) = -0.507 for images
    (LONG | CONTINUOUS | EDM, "diffusion.draw_mean=None is EDM's -1.2 for data with standard deviation 0.5"),
]


def changed(base, **settings):
    return override(base, {name: str(value) for name, value in settings.items()})


@pytest.mark.parametrize(("settings", "start"), NOTES)
def test_each_problem_has_a_note_with_a_remedy_that_removes_it(settings, start):
    config = changed(default(), **settings)
    (note,) = plan.notes(config)
    assert note.startswith(start) and "use --config." in note
    for name, value in re.findall(r"--config\.(\S+)=(-?[\w.]*\w)", note):
        assert plan.notes(changed(config, **{name: value})) == [], name


@pytest.mark.parametrize(
    "config",
    [
        *map(experiment, experiment_names()),
        changed(default(), **{"training.num_steps": 20}),  # a trial
        changed(default(), **LONG | {"optimizer.warmup_steps": 1999}),
        changed(default(), **LONG | {"ema.warmup": False, "training.num_steps": 23_025}),
        changed(default(), **LONG | CONTINUOUS | {"sampling.clip": True}),
        changed(default(), **LONG | CONTINUOUS | {"diffusion.prediction": "x_0"}),
        changed(default(), **LONG | {"diffusion.num_timesteps": 500}),  # alpha_bar 0.006
        changed(default(), **LONG | EDM),  # images
        changed(default(), **LONG | CONTINUOUS | EDM | {"diffusion.sigma_data": 0.5, "diffusion.weighting": "edm"}),
        changed(default(), **LONG | CONTINUOUS | EDM | {"data.normalization": "none"}),  # any standard deviation
        changed(default_classifier(), **LONG | {"diffusion.num_timesteps": 10}),
    ],
)
def test_what_works_has_no_note(config):
    assert plan.notes(resolve(config)) == []


def test_data_that_do_not_fit_the_settings_have_a_note():
    """A batch that repeats examples, and gray levels that differ from the images' levels."""
    source = data.load(tiny_config().data)
    for overrides, words in (
        ({"training.batch_size": len(source)}, None),
        ({"training.batch_size": len(source) + 1}, "every batch repeats some; use --config.training.batch_size=1024$"),
        ({"data.levels": 17}, None),
        ({"data.levels": 16}, r"data.levels=16, but the images contain the value \d+, .*; use data.levels=256"),
    ):
        notes = plan.notes(tiny_config(**overrides), source)
        assert len(notes) == (words is not None) and all(re.search(words or "", note) for note in notes), notes
