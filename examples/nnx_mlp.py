r"""A residual MLP for vectors and small images, as a Flax NNX module.

    python main.py --config=digits --workdir=runs/nnx_mlp \
        --config.model.kind=examples/nnx_mlp.py:mlp --config.model.options.width=512

The function has the argument `rngs`, because an NNX module draws its parameters when it is made. The program sets the
attribute `deterministic` of all layers, and gives dropout its random keys.
"""

import math

import jax.numpy as jnp
from flax import nnx

from diffusion_jax.models import Shapes, timestep_embedding


def mlp(shapes: Shapes, *, width: int = 256, depth: int = 4, dropout: float = 0.0, rngs: nnx.Rngs) -> nnx.Module:
    """Makes the network. width: features of every block, an even number. depth: number of blocks. dropout: rate in each."""
    return MLP(shapes, width, depth, dropout, rngs)


class MLP(nnx.Module):
    """All inputs, flattened, in one dense layer; then blocks to which the embeddings of time and label are added."""

    null_condition = 0.0  # training replaces conditions by this value with probability model.condition_dropout

    def __init__(self, shapes: Shapes, width: int, depth: int, dropout: float, rngs: nnx.Rngs):
        self.width, self.output = width, shapes.output
        size = math.prod(shapes.data) + (math.prod(shapes.condition) if shapes.condition else 0)
        self.first = nnx.Linear(size, width, rngs=rngs)
        self.time = nnx.Linear(width, width, rngs=rngs)
        self.label = nnx.Embed(shapes.num_labels, width, rngs=rngs) if shapes.num_labels else None
        self.blocks = nnx.List([Block(width, dropout, rngs) for _ in range(depth)])
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        zeros = nnx.initializers.zeros
        self.last = nnx.Linear(width, math.prod(shapes.output), kernel_init=zeros, rngs=rngs)

    def __call__(self, x_t, time, y=None, condition=None):
        """x_t: [B, *spatial, C]; time: float [B]; y: int [B]; condition: float [B, ...]."""
        inputs = [x_t] if condition is None else [x_t, condition]
        h = self.first(jnp.concatenate([x.reshape(len(x), -1).astype(x_t.dtype) for x in inputs], axis=-1))
        embedding = nnx.silu(self.time(timestep_embedding(time, self.width).astype(x_t.dtype)))
        if self.label is not None:
            embedding += self.label(y).astype(x_t.dtype)  # nnx.Embed returns its parameters' first dtype, float32
        for block in self.blocks:
            h = block(h, embedding)
        return self.last(nnx.silu(self.norm(h))).reshape(len(h), *self.output)


class Block(nnx.Module):
    """h + dense(dropout(silu(dense(norm(h)) + dense(embedding))))."""

    def __init__(self, width: int, dropout: float, rngs: nnx.Rngs):
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.first, self.embedding, self.last = (nnx.Linear(width, width, rngs=rngs) for _ in range(3))
        self.dropout = nnx.Dropout(dropout, rngs=rngs)

    def __call__(self, h, embedding):
        """h, embedding: [B, width]."""
        hidden = nnx.silu(self.first(self.norm(h)) + self.embedding(embedding))
        return h + self.last(self.dropout(hidden))
