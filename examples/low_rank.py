r"""Low-rank fine-tuning (LoRA, Hu et al. 2022): adds trainable low-rank matrices to the frozen kernels of a trained network.

    python main.py --config=digits --workdir=runs/low_rank \
        --config.model.kind=examples/low_rank.py:low_rank --config.model.options.weights=runs/digits \
        --config.optimizer.frozen='network/base/*,' --config.model.dropout=0

Diffusion and data settings must be those of the weights, which sampling reads from the same path. Each kernel W becomes
W + down up, where down has `rank` columns; up begins at 0, so training begins with the output of the weights. The network
takes labels and conditions as the weights do, but `model.condition_dropout` must be 0.
"""

import functools
import math

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from diffusion_jax import pretrained
from diffusion_jax.models import Shapes


@functools.cache
def _load(weights: str) -> pretrained.Model:
    with jax.ensure_compile_time_eval():  # the program makes networks while JAX traces
        return pretrained.load(weights)


def low_rank(shapes: Shapes, *, weights: str, rank: int = 4):
    """Makes the network. weights: a run or a file that `pretrained.load` reads. rank: the rank of each update."""
    net = _load(weights)
    base = flatten_dict(net.params)
    kernels = {path: value for path, value in base.items() if path[-1] == "kernel"}

    def init(key):
        keys = dict(zip(kernels, jax.random.split(key, len(kernels)), strict=True))
        down = {path: jax.random.normal(keys[path], (*kernel.shape[:-1], rank)) for path, kernel in kernels.items()}
        down = {path: value / math.sqrt(math.prod(value.shape[:-1])) for path, value in down.items()}
        up = {path: jnp.zeros((rank, kernel.shape[-1])) for path, kernel in kernels.items()}
        return {"base": net.params, "down": unflatten_dict(down), "up": unflatten_dict(up)}

    def apply(params, x_t, time, y=None, condition=None):
        base, down, up = (flatten_dict(params[name]) for name in ("base", "down", "up"))
        changed = {path: base[path] + down[path] @ up[path] for path in down}
        return net.model.apply({"params": unflatten_dict(base | changed)}, x_t, time, y, condition=condition)

    return init, apply
