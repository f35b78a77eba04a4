"""A config's optimizer against optax's."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffusion_jax.config import default
from diffusion_jax.training import optimizer


@pytest.mark.parametrize("size", [0.01, 100.0])
def test_optimizer_clips_as_optax(size):
    """The state has the structure of optax's state, which checkpoints contain."""
    config = default().optimizer
    config.update(warmup_steps=0, grad_clip=1.0)
    mine = optimizer.from_config(config)
    true = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(2e-4, config.b1, config.b2, config.eps))
    params = {"kernel": jnp.ones((3, 4)), "bias": jnp.zeros(4)}
    grads = jax.tree.map(lambda p: size * jax.random.normal(jax.random.key(p.size), p.shape), params)
    states = mine.init(params), true.init(params)
    assert jax.tree.structure(optax.tree.get(states[0], "mu")) == jax.tree.structure(params)
    assert len(jax.tree.leaves(states[0])) == len(jax.tree.leaves(states[1])) + 1  # and the schedule's counter
    _, state = mine.update(grads, states[0], params, grad_norm=optax.tree.norm(grads))
    _, expected = true.update(grads, states[1], params)
    for name in ("mu", "nu"):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5),
            *(optax.tree.get(each, name) for each in (state, expected)),
        )


@pytest.mark.parametrize(
    ("settings", "steps", "rates"),
    [
        ({}, [0, 2500, 5000, 10**6], [0, 1e-4, 2e-4, 2e-4]),
        ({"schedule": "cosine", "decay_steps": 15_000}, [2500, 10_000, 15_000, 20_000], [1e-4, 1e-4, 0, 0]),
        ({"schedule": "linear", "decay_steps": 15_000}, [2500, 10_000, 15_000, 20_000], [1e-4, 1e-4, 0, 0]),
        ({"schedule": "linear", "warmup_steps": 0, "decay_steps": 300_000}, [100_000], [2e-4 * (1 - 1 / 3)]),
    ],
)
def test_learning_rates(settings, steps, rates):
    options = default().optimizer
    options.update(settings)
    rate = optimizer.learning_rate(options)
    np.testing.assert_allclose([rate(step) for step in steps], rates, rtol=1e-6, atol=1e-10)
