"""A U-Net with a few thousand parameters: initialization, a compiled call, and weights without a zero."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

TINY = {"channels": 8, "channel_multipliers": (1, 2), "num_res_blocks": 1, "attention_levels": (1,), "num_groups": 4}


def redraw(params, seed=1):
    """Draws arrays of these shapes, none of them zero."""
    rng = np.random.default_rng(seed)  # jax.random would compile a program for every shape
    return jax.tree.map(lambda leaf: jnp.asarray(0.2 * rng.normal(size=leaf.shape), jnp.float32), params)


def silu(x):
    """In NumPy."""
    return x / (1 + np.exp(-x))


def init(model, shape=(1, 8, 8, 3), y=None):
    """A model's parameters for images of this shape and labels y."""
    return jax.jit(model.init)(jax.random.key(0), jnp.zeros(shape), jnp.zeros(shape[0]), y)["params"]


def parameter_shapes(model, *inputs, **named):
    """The shapes of a model's parameters, for `redraw`: compiling the initialization takes longer than a forward pass."""
    return jax.eval_shape(lambda: model.init(jax.random.key(0), *inputs, **named))["params"]


def init_shapes(model, shape=(1, 8, 8, 3), y=None):
    """The shapes of what `init` returns."""
    return jax.eval_shape(lambda: init(model, shape, y))


@functools.cache
def _compiled(model, train):
    return jax.jit(lambda params, *args, **kwargs: model.apply({"params": params}, *args, train=train, **kwargs))


def apply(model, params, *args, train=False, **kwargs):
    """A model's output, compiled once for each model, because single operations would take longer to dispatch."""
    return _compiled(model, train)(params, *args, **kwargs)
