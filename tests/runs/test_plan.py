"""The plan of every kind of data: its batches, and the bytes that it counts."""

import jax
import pytest

from diffusion_jax import training
from diffusion_jax.data import example_shape
from diffusion_jax.runs import plan
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
    sizes = [plan.activations_per_example(array_config("series", "", **{"data.image_size": (n,)})) for n in (8, 16, 32)]
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
