"""A U-Net of a few thousand parameters, and weights without a zero."""

import jax

TINY = {"channels": 8, "channel_multipliers": (1, 2), "num_res_blocks": 1, "attention_levels": (1,), "num_groups": 4}


def redraw(params, seed=1):
    """Every leaf at random, the layers that start at zero included."""
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return jax.tree.unflatten(
        structure, [0.2 * jax.random.normal(k, leaf.shape) for k, leaf in zip(keys, leaves, strict=True)]
    )
