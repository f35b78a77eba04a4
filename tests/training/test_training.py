"""The train step: components against optax and independent NumPy, one program, sharding, and steps in one call."""

import dataclasses

import jax
import numpy as np
import optax
import pytest

from diffusion_jax import training
from helpers.configs import a_batch, tiny_config


@pytest.mark.thorough
def test_create_gives_a_state_and_a_step_that_learns():
    config = tiny_config()
    state, train_step = training.create(config)
    assert int(state.step) == 0
    jax.tree.map(np.testing.assert_array_equal, state.params, state.ema_params)
    batch, losses = a_batch(config), []
    for _ in range(60):
        before = state
        state, metrics = train_step(before, batch)
        losses.append(float(metrics["loss"]))
    assert before.params["conv_in"]["kernel"].is_deleted()  # donated
    assert np.mean(losses[-10:]) < 0.7 * np.mean(losses[:5])
    assert int(state.step) == 60 and train_step._cache_size() == 1  # compiled once
    means = training.mean_metrics(jax.device_get(state.averages))
    np.testing.assert_allclose(means["loss"], np.mean(losses), rtol=1e-5)


@pytest.mark.thorough
def test_accumulated_gradients_are_those_of_the_whole_batch():
    """The same draws, dropout and dropped labels included, so the same step up to the order of float32 sums.

    Initially the last layers in residual branches are almost 0, which would hide the preceding dropout.
    """
    drawing = {"data.random_flip": True, "model.num_classes": 10, "model.label_dropout": 0.5, "model.dropout": 0.5}
    bound = {"loss": "hybrid", "variance": "learned_range", "timestep_sampler": "loss_second_moment"}
    after = []
    for parts in (1, 2):
        config = tiny_config(**drawing, **{"training.accumulation_steps": parts})
        config.diffusion.update(bound)
        state, train_step = training.create(config)
        leaves, tree = jax.tree.flatten(state.params)
        keys = jax.random.split(jax.random.key(5), len(leaves))
        leaves = [p + 0.05 * jax.random.normal(key, p.shape) for p, key in zip(leaves, keys, strict=True)]
        state = dataclasses.replace(state, params=jax.tree.unflatten(tree, leaves))
        state, metrics = train_step(state, a_batch(config))
        after.append((metrics, state.loss_history, optax.tree.get(state.opt_state, "mu")))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), *after)


@pytest.mark.thorough
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


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"model.kind": "mlp"}, "an MLP .* does not fit data of shape .* need model.kind=unet"),
        ({"data.image_size": ()}, "a U-Net .* does not fit .*need model.kind=mlp"),
        ({"training.accumulation_steps": 3}, "nearest: 6 or 9"),
        ({"diffusion.schedule": "jsd"}, "diffusion.prediction=v"),
        ({"diffusion.loss": "hybrid"}, "needs a learned variance"),
        ({"model.num_groups": 3}, "num_groups=3"),
        ({"diffusion.loss": "classify"}, "num_classes=0: a classifier needs at least 2 classes"),
    ],
)
def test_configs_that_cannot_be_built(overrides, words):
    with pytest.raises(ValueError, match=words):
        training.create(tiny_config(**overrides))


def test_all_seeds_have_one_program_of_the_initialization():
    programs = [training.build_program(tiny_config(seed=seed)).init for seed in (0, 2**32 - 1)]
    traced = {str(program.func.trace(*program.args).jaxpr) for program in programs}
    assert len(traced) == 1
