r"""A small U-Net for images, as a pair (init, apply) around an Equinox module.

    python main.py --config=digits --workdir=runs/equinox_unet \
        --config.model.kind=examples/equinox_unet.py:unet --config.model.options.width=32

`init(key)` returns the arrays of the module, and `apply` combines them with the rest of the module. Equinox layers take one
example, channels first, so `apply` moves the channels and maps the module over the batch.
"""

import itertools

import jax
import jax.numpy as jnp

from diffusion_jax.models import Shapes, timestep_embedding

try:
    import equinox as eqx
except ImportError:
    raise ImportError("Equinox is not installed: pip install equinox, or the extra ode of this package") from None


def unet(shapes: Shapes, *, width: int = 32, levels: int = 2, dropout: float = 0.0):
    """Makes the pair (init, apply).

    width: channels of the first resolution, a multiple of 8; each further resolution has twice as many. levels: number of
    resolutions, each half of the one before. dropout: rate in each block.
    """
    if len(shapes.data) != 3 or any(size % 2 ** (levels - 1) for size in shapes.data[:-1]):
        raise ValueError(f"data of shape {list(shapes.data)} must be images whose sizes {levels=} can halve")

    def make(key):
        return UNet(shapes, width, levels, dropout, key)

    abstract = eqx.filter_eval_shape(make, jax.random.key(0))
    static = eqx.filter(abstract, lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct), inverse=True)

    def init(key):
        return eqx.filter(make(key), eqx.is_inexact_array)

    def apply(params, x_t, time, y=None, condition=None, train=False, key=None):
        network = eqx.combine(params, static)
        if condition is not None:  # a vector becomes constant channels
            condition = condition if condition.ndim == 4 else condition[:, None, None]
            channels = jnp.broadcast_to(condition, (*x_t.shape[:-1], condition.shape[-1]))
            x_t = jnp.concatenate([x_t, channels.astype(x_t.dtype)], axis=-1)
        keys = jax.random.split(key, len(x_t)) if train else None
        output = jax.vmap(network)(jnp.moveaxis(x_t, -1, 1), timestep_embedding(time, width).astype(x_t.dtype), y, keys)
        return jnp.moveaxis(output, 1, -1)

    apply.null_condition = 0.0  # training replaces conditions by this value with probability model.condition_dropout
    return init, apply


class UNet(eqx.Module):
    """A block for each resolution on the way down and up; the outputs of those down are concatenated on the way up."""

    label: eqx.nn.Embedding | None
    first: eqx.nn.Conv2d
    down: list
    up: list
    last: eqx.nn.Conv2d

    def __init__(self, shapes: Shapes, width: int, levels: int, dropout: float, key):
        keys = iter(jax.random.split(key, 2 * levels + 3))
        widths = [width * 2**level for level in range(levels)]
        channels = shapes.data[-1] + (shapes.condition[-1] if shapes.condition else 0)
        self.label = eqx.nn.Embedding(shapes.num_labels, width, key=next(keys)) if shapes.num_labels else None
        self.first = eqx.nn.Conv2d(channels, width, 3, padding=1, key=next(keys))
        inputs = [width, *widths[:-1]]
        self.down = [Block(m, n, width, dropout, next(keys)) for m, n in zip(inputs, widths, strict=True)]
        pairs = itertools.pairwise([*widths[::-1], width])
        self.up = [Block(2 * m, n, width, dropout, next(keys)) for m, n in pairs]
        self.last = eqx.nn.Conv2d(width, shapes.output[-1], 3, padding=1, key=next(keys))

    def __call__(self, x, embedding, y, key):
        """x: [C, H, W]; embedding: [width]; y: an int or None; key: for dropout, or None."""
        keys = itertools.repeat(None) if key is None else iter(jax.random.split(key, 2 * len(self.down)))
        if self.label is not None:
            embedding += self.label(y)
        h, skips = self.first(x), []
        for level, block in enumerate(self.down):
            h = halve(h) if level else h
            h = block(h, embedding, next(keys))
            skips.append(h)
        for level, block in enumerate(self.up):
            h = h.repeat(2, axis=1).repeat(2, axis=2) if level else h
            h = block(jnp.concatenate([h, skips.pop()]), embedding, next(keys))
        return self.last(h)


class Block(eqx.Module):
    """conv(x) + conv(dropout(silu(norm(conv(silu(norm(x))) + linear(silu(embedding))))))."""

    norms: list
    convs: list
    linear: eqx.nn.Linear
    skip: eqx.nn.Conv2d
    dropout: eqx.nn.Dropout

    def __init__(self, inputs: int, outputs: int, width: int, dropout: float, key):
        keys = jax.random.split(key, 4)
        self.norms = [eqx.nn.GroupNorm(8, channels) for channels in (inputs, outputs)]
        self.convs = [
            eqx.nn.Conv2d(channels, outputs, 3, padding=1, key=each)
            for channels, each in zip((inputs, outputs), keys[:2], strict=True)
        ]
        self.linear = eqx.nn.Linear(width, outputs, key=keys[2])
        self.skip = eqx.nn.Conv2d(inputs, outputs, 1, key=keys[3])
        self.dropout = eqx.nn.Dropout(dropout)

    def __call__(self, x, embedding, key):
        """x: [C, H, W]; embedding: [width]."""
        h = self.convs[0](jax.nn.silu(self.norms[0](x)))
        h += self.linear(jax.nn.silu(embedding))[:, None, None]
        h = self.dropout(jax.nn.silu(self.norms[1](h)), key=key, inference=key is None)
        return self.skip(x) + self.convs[1](h)


def halve(x):
    """Averages squares of 2 x 2 pixels, [C, H, W] -> [C, H/2, W/2]."""
    channels, height, width = x.shape
    return x.reshape(channels, height // 2, 2, width // 2, 2).mean(axis=(2, 4))
