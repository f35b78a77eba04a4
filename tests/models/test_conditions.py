"""Vectors and arrays as conditions: against networks without conditions that have the same weights."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import models
from diffusion_jax.models.conditions import Conditional
from diffusion_jax.training.step import Microbatch
from helpers.networks import TINY, apply, parameter_shapes, redraw, silu

SMALL = {"channels": 8, "num_res_blocks": 1, "dropout": 0.0}


def parameters(model, *inputs, **named):
    """Parameters that are large enough for conditions to matter."""
    params = redraw(parameter_shapes(model, *inputs, **named))
    return jax.tree.map(lambda leaf: 3 * leaf, params)


def without(params, *names):
    return {name: own for name, own in params.items() if name not in names}


@pytest.mark.parametrize(
    ("kind", "fields", "shape"),
    [
        (models.MLP, SMALL, (3,)),
        pytest.param(models.UNet, TINY | {"spatial_dims": 1}, (4, 3), marks=pytest.mark.thorough),
    ],
)
def test_a_vector_shifts_the_time_embedding(kind, fields, shape):
    """Two dense layers, in NumPy: a network without conditions has the same output if its time embedding gets the shift as a
    bias."""
    model = kind(**fields, condition_features=2)
    x, c, time = jax.random.normal(jax.random.key(0), (1, *shape)), jnp.array([[0.7, -2.0]]), jnp.array([30.0])
    params = parameters(model, x, time, condition=c)
    p = jax.tree.map(np.float64, params)
    shift = silu(np.float64(c) @ p["condition_0"]["kernel"] + p["condition_0"]["bias"])
    shift = shift @ p["condition_1"]["kernel"] + p["condition_1"]["bias"]
    plain = without(params, "condition_0", "condition_1")
    shifted = plain | {"time_1": plain["time_1"] | {"bias": plain["time_1"]["bias"] + jnp.float32(shift[0])}}
    expected = apply(kind(**fields), shifted, x, time)
    np.testing.assert_allclose(apply(model, params, x, time, condition=c), expected, rtol=1e-4, atol=1e-4)
    assert abs(apply(kind(**fields), plain, x, time) - expected).max() > 1e-2


@pytest.mark.parametrize("dropout", [pytest.param(0.0, marks=pytest.mark.thorough), 0.1])
@pytest.mark.parametrize(
    ("kind", "fields", "shape"),
    [
        (models.MLP, SMALL, (3,)),
        pytest.param(models.UNet, TINY | {"spatial_dims": 1}, (4, 3), marks=pytest.mark.thorough),
    ],
)
def test_an_array_is_concatenated_to_the_channels(kind, fields, shape, dropout):
    """With condition dropout, an additional channel marks examples that have a condition."""
    model = kind(**fields, condition_channels=2, condition_dropout=dropout)
    x, time = jax.random.normal(jax.random.key(0), (2, *shape)), jnp.array([30.0, 7.0])
    c = jax.random.normal(jax.random.key(1), (2, *shape[:-1], 2))
    params = parameters(model, x, time, condition=c)
    marks = [jnp.ones((2, *shape[:-1], 1))] if dropout else []
    plain = kind(**fields, out_channels=3)
    expected = apply(plain, params, jnp.concatenate([x, c, *marks], -1), time)
    np.testing.assert_allclose(apply(model, params, x, time, condition=c), expected, rtol=1e-4, atol=1e-4)
    if dropout:
        null = apply(plain, params, jnp.concatenate([x, 0 * c, 0 * marks[0]], -1), time)
        np.testing.assert_allclose(apply(model, params, x, time), null, rtol=1e-4, atol=1e-4)
        assert abs(apply(model, params, x, time, condition=0 * c) - null).max() > 1e-3  # zeros are data


@pytest.mark.thorough
@pytest.mark.parametrize("kind", ["features", "channels"])
def test_dropout_gives_the_null_condition_in_training_alone(kind):
    """A training output equals the output for the condition or for the null condition, at the configured rate."""
    rate, n = 0.3, 400
    model = models.MLP(**SMALL, **{f"condition_{kind}": 2}, condition_dropout=rate)
    x, time, c = jnp.ones((n, 3)), jnp.zeros(n), jnp.broadcast_to(jnp.array([2.0, -1.0]), (n, 2))
    params = parameters(model, x[:1], time[:1])
    assert np.isnan(model.null_condition) and models.MLP(**SMALL, condition_features=2).null_condition is None
    mixed = apply(model, params, x, time, condition=c.at[0].set(model.null_condition))
    null, given = mixed[0], mixed[1]
    assert abs(given - null).max() > 1e-2
    np.testing.assert_allclose(mixed[2:], jnp.broadcast_to(given, (n - 2, 3)), atol=1e-4)
    np.testing.assert_allclose(apply(model, params, x, time), jnp.broadcast_to(null, (n, 3)), atol=1e-4)
    trained = apply(model, params, x, time, condition=c, train=True, rngs={"dropout": jax.random.key(1)})
    kept, dropped = (abs(trained - one).max(axis=1) < 1e-3 for one in (given, null))
    assert (kept ^ dropped).all()
    assert abs(dropped.mean() - rate) < 4 * (rate * (1 - rate) / n) ** 0.5
    # A single NaN entry does not mean "no condition".
    assert np.isnan(apply(model, params, x, time, condition=c.at[3, 0].set(jnp.nan))).any(axis=1).nonzero()[0] == [3]


class Dropped(Conditional):
    """Returns the labels and conditions that a network sees in training."""

    @nn.compact
    def __call__(self, y, condition, train):
        return self._drop(y, condition)


def both_dropped(label_rate, rate, n=4000):
    """(a function of labels and conditions that drops them at these rates, n labels 1 and conditions [2, -1])."""
    model = Dropped(num_classes=3, label_dropout=label_rate, condition_features=2, condition_dropout=rate)
    inputs = jnp.ones(n, jnp.int32), jnp.broadcast_to(jnp.array([2.0, -1.0]), (n, 2))
    return lambda *given: model.apply({}, *given, train=True, rngs={"dropout": jax.random.key(1)}), inputs


@pytest.mark.parametrize(("label_rate", "rate"), [(0.5, 0.6), (0.7, 0.4)])
def test_a_label_and_a_condition_are_dropped_together(label_rate, rate):
    """Rows without the label, the condition, both or neither have the expected shares, so each dropout keeps its rate."""
    drop, (y, condition) = both_dropped(label_rate, rate)
    labels, conditions = drop(y, condition)
    no_label, no_condition = labels == 3, np.isnan(conditions).all(axis=1)
    np.testing.assert_array_equal(labels[~no_label], 1)
    np.testing.assert_array_equal(conditions[~no_condition], condition[~no_condition])
    both = min(label_rate, rate)
    for dropped, share in (
        (no_label & ~no_condition, label_rate - both),
        (no_condition & ~no_label, rate - both),
        (no_label & no_condition, both),
    ):
        assert abs(dropped.mean() - share) <= 4.5 * (share * (1 - share) / len(y)) ** 0.5


def test_microbatches_drop_the_labels_and_conditions_of_the_whole_batch():
    drop, inputs = both_dropped(0.5, 0.6, n=64)
    whole = drop(*inputs)
    for index in range(2):
        microbatch = Microbatch(index, 2)
        with nn.intercept_methods(microbatch.dropout):
            found = drop(*map(microbatch.take, inputs))
        for one, both in zip(found, whole, strict=True):
            np.testing.assert_array_equal(one, microbatch.take(both))


@pytest.mark.thorough
@pytest.mark.parametrize("kind", ["features", "channels"])
def test_gradients_are_finite_where_some_have_no_condition(kind):
    model = models.MLP(**SMALL, **{f"condition_{kind}": 2}, condition_dropout=0.5, dtype="bfloat16")
    x, time, c = jax.random.normal(jax.random.key(0), (4, 3)), jnp.zeros(4), jnp.ones((4, 2)).at[0].set(jnp.nan)
    params = parameters(model, x, time)

    def loss(params, c):
        return (model.apply({"params": params}, x, time, condition=c) ** 2).sum()

    grads, of_condition = jax.jit(jax.grad(loss, (0, 1)))(params, c)
    assert all(np.isfinite(leaf).all() and (leaf != 0).any() for leaf in jax.tree.leaves(grads))
    assert (of_condition[0] == 0).all() and (of_condition[1:] != 0).all() and np.isfinite(of_condition).all()
