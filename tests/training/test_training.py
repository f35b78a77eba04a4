"""The train step: its parts against optax and NumPy written here, one program, sharding, and steps in one call."""

import dataclasses

import jax
import numpy as np
import optax
import pytest

from diffusion_jax import training
from diffusion_jax.config import default
from diffusion_jax.distributed import sharding
from diffusion_jax.training import optimizer
from helpers.configs import a_batch, tiny_config


@pytest.mark.whole
def test_create_gives_a_state_and_a_step_that_learns():
    config = tiny_config()
    state, train_step = training.create(config)
    assert int(state.step) == 0
    jax.tree.map(np.testing.assert_array_equal, state.params, state.ema_params)
    batch, losses = a_batch(config), []
    for _ in range(60):
        state, metrics = train_step(state, batch)
        losses.append(float(metrics["loss"]))
    assert np.mean(losses[-10:]) < 0.7 * np.mean(losses[:5])
    assert int(state.step) == 60 and train_step._cache_size() == 1  # compiled once
    window = training.window_means(jax.device_get(state.window))
    np.testing.assert_allclose(window["loss"], np.mean(losses), rtol=1e-5)


@pytest.mark.whole
def test_the_state_is_donated():
    config = tiny_config()
    state, train_step = training.create(config)
    new, _ = train_step(state, a_batch(config))
    assert state.params["conv_in"]["kernel"].is_deleted() and not new.params["conv_in"]["kernel"].is_deleted()


@pytest.mark.whole
def test_one_step_is_adam_and_ema_in_numpy():
    """From the gradient that Adam's own first moment tells: the update, the clip and the EMA."""
    config = tiny_config(
        **{"optimizer.learning_rate": 0.01, "optimizer.grad_clip": 0.5, "ema.warmup": False, "ema.decay": 0.9}
    )
    state, train_step = training.create(config)
    before = jax.device_get(state)
    after, metrics = train_step(state, a_batch(config))
    after = jax.device_get(after)
    adam = next(s for s in jax.tree.leaves(after.opt_state, is_leaf=lambda s: hasattr(s, "mu")) if hasattr(s, "mu"))
    clipped = jax.tree.map(lambda m: m / 0.1, adam.mu)  # mu = 0.1 g after one step
    norm = np.sqrt(sum((g**2).sum() for g in jax.tree.leaves(clipped)))
    np.testing.assert_allclose(norm, min(0.5, float(metrics["grad_norm"])), rtol=1e-4)
    moved = jax.tree.map(lambda p, g: p - 0.01 * g / (np.abs(g) + 1e-8), before.params, clipped)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), after.params, moved)
    ema = jax.tree.map(lambda p, q: 0.9 * p + 0.1 * q, before.params, after.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), after.ema_params, ema)


@pytest.mark.whole
def test_a_learned_variance_doubles_the_output_and_logs_both_losses():
    config = tiny_config(**{"diffusion.loss": "hybrid", "diffusion.variance": "learned_range"})
    state, train_step = training.create(config)
    assert state.params["conv_out"]["kernel"].shape[-1] == 2 and state.loss_history is None
    _, metrics = train_step(state, a_batch(config))
    np.testing.assert_allclose(metrics["loss"], metrics["mse"] + 0.001 * metrics["vlb"], rtol=1e-5)


@pytest.mark.whole
def test_accumulated_gradients_are_those_of_the_whole_batch():
    """The same draws, dropout and dropped labels included, so the same step up to the order of float32 sums.

    The initial last layers of residual branches are almost 0, which would hide the dropout before them.
    """
    drawing = {"data.random_flip": True, "model.num_classes": 10, "model.label_dropout": 0.5, "model.dropout": 0.5}
    bound = {"loss": "hybrid", "variance": "learned_range", "timestep_sampler": "loss_second_moment"}
    after = []
    for parts in (1, 2):
        config = tiny_config(**drawing, **{"model.channel_multipliers": (1,), "training.accumulation_steps": parts})
        config.diffusion.update(bound)
        state, train_step = training.create(config)
        leaves, tree = jax.tree.flatten(state.params)
        keys = jax.random.split(jax.random.key(5), len(leaves))
        leaves = [p + 0.05 * jax.random.normal(key, p.shape) for p, key in zip(leaves, keys, strict=True)]
        state = dataclasses.replace(state, params=jax.tree.unflatten(tree, leaves))
        state, metrics = train_step(state, a_batch(config))
        after.append((metrics, state.loss_history, optax.tree.get(state.opt_state, "mu")))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), *after)


@pytest.mark.whole
def test_labels_reach_a_conditional_network_and_dropped_ones_its_null_label():
    config = tiny_config(**{"model.num_classes": 10, "model.label_dropout": 0.5})
    state, train_step = training.create(config)
    assert state.params["class"]["embedding"].shape == (11, 32)
    before = np.asarray(state.params["class"]["embedding"])
    batch = a_batch(config)
    batch["label"][:] = 3
    for _ in range(3):
        state, _ = train_step(state, batch)
    changed = abs(np.asarray(state.params["class"]["embedding"]) - before).max(axis=1) > 0
    assert np.flatnonzero(changed).tolist() == [3, 10]


def test_learning_rates():
    options = default().optimizer
    rate = optimizer.learning_rate(options)
    np.testing.assert_allclose([rate(0), rate(2500), rate(5000), rate(10**6)], [0, 1e-4, 2e-4, 2e-4], rtol=1e-6)
    options.update(schedule="cosine", decay_steps=15_000)
    rate = optimizer.learning_rate(options)
    np.testing.assert_allclose([rate(2500), rate(10_000), rate(15_000), rate(20_000)], [1e-4, 1e-4, 0, 0], atol=1e-10)
    options.schedule = "linear"
    rate = optimizer.learning_rate(options)
    np.testing.assert_allclose([rate(2500), rate(10_000), rate(15_000), rate(20_000)], [1e-4, 1e-4, 0, 0], atol=1e-10)
    options.update(warmup_steps=0, decay_steps=300_000)
    np.testing.assert_allclose(optimizer.learning_rate(options)(100_000), 2e-4 * (1 - 1 / 3), rtol=1e-6)
    bad = default().optimizer
    bad.update(schedule="cosine", decay_steps=10)
    with pytest.raises(ValueError, match="exceed"):
        optimizer.from_config(bad)
    bad = default().optimizer
    bad.weight_decay = 0.1
    with pytest.raises(ValueError, match="adamw"):
        optimizer.from_config(bad)


def test_the_compiler_option_is_a_user_s_to_set(monkeypatch):
    from diffusion_jax.distributed import compiler

    compiler.options.cache_clear()
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_experimental_ynn_fusion_type=-individual_convolution")
    assert compiler.options() == {}
    compiler.options.cache_clear()
    monkeypatch.delenv("XLA_FLAGS")
    assert set(compiler.options()) <= {"xla_cpu_experimental_ynn_fusion_type"}
    assert compiler.options(deterministic=True) == compiler.options()  # CPUs need nothing for it
    monkeypatch.setattr("jax.default_backend", lambda: "gpu")
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_autotune_level=2")
    compiler.options.cache_clear()
    assert compiler.options(deterministic=True) == {"xla_gpu_exclude_nondeterministic_ops": True}
    assert compiler.options() == {}
    compiler.options.cache_clear()


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"model.kind": "mlp"}, "model.kind='mlp' is for vectors .*with 2 spatial axes need 'unet'"),
        ({"data.image_size": ()}, r"data.image_size=\(\), vectors, need model.kind='mlp'"),
        (
            {"model.kind": "mlp", "data.image_size": (), "model.num_heads": 2},
            "model.[a-z_]*=.* has no effect on an MLP",
        ),
        ({"data.image_size": (8, 8, 8), "data.low_resolution": 4}, "data.low_resolution=4 is for images"),
        ({"training.accumulation_steps": 3}, "nearest: 6 or 9"),
        ({"diffusion.schedule": "jsd"}, "diffusion.prediction=v"),
        ({"diffusion.variance": "learned_range"}, "untrained"),
        ({"diffusion.loss": "hybrid"}, "use learned_range"),
        ({"diffusion.loss": "vlb", "diffusion.weighting": "snr"}, "is for L_simple"),
        ({"diffusion.loss": "vlb", "model.out_channels": 2}, "need 1"),
        ({"model.num_groups": 3}, "num_groups=3"),
        ({"diffusion.loss": "classify"}, "unknown leaf model.condition_channels: the model of a classifier"),
    ],
)
def test_configs_that_cannot_be_built(overrides, words):
    with pytest.raises(ValueError, match=words):
        training.create(tiny_config(**overrides))


def test_a_batch_that_does_not_divide_names_the_nearest():
    mesh = dataclasses.make_dataclass("Mesh", ["size"])(8)
    with pytest.raises(ValueError, match="nearest: 8 or 16"):
        sharding.check_divides(12, mesh, "training.batch_size")
    with pytest.raises(ValueError, match="nearest: 8$"):
        sharding.check_divides(3, mesh, "training.batch_size")
    with pytest.raises(
        ValueError, match=r"multiple of 32, the 8 devices times training.accumulation_steps=4; nearest: 32$"
    ):
        sharding.check_divides(16, mesh, "training.batch_size", 4)
    one_device = dataclasses.make_dataclass("Mesh", ["size"])(1)
    with pytest.raises(ValueError, match=r"multiple of 4, the 1 device times training.accumulation_steps=4"):
        sharding.check_divides(6, one_device, "training.batch_size", 4)


def test_all_seeds_have_one_program_of_the_initialization():
    programs = [training.build_program(tiny_config(seed=seed)).init for seed in (0, 2**32 - 1)]
    traced = {str(program.func.trace(*program.args).jaxpr) for program in programs}
    assert len(traced) == 1
