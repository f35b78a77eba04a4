"""A network for vectors [B, C]: residual blocks of dense layers, with the U-Net's time embedding and conditions."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffusion_jax.models.conditions import Conditional
from diffusion_jax.models.layers import LayerFactory, ResBlock, times_of_rows, timestep_embedding

_REMAT_BLOCK = nn.remat(ResBlock, static_argnums=(3,))


class MLP(Conditional):
    """A residual MLP for vectors.

    `MLP(...).apply({"params": params}, x_t, time, y, train, condition)` -> [B, out_channels] float32. Each block is
    x + dense(dropout(silu(norm(dense(silu(norm(x))) + time projection)))), with norms over all channels.
    Fields: the fields of `Conditional` (an array condition is [B, K] here), and

    channels: width of every block, an even number of at least 4.
    num_res_blocks: the number of blocks.
    scale_shift_norm: whether the time embedding scales and shifts the output of a block's second norm; otherwise the
      embedding is added to the norm's input.
    initializer: "ho" or "openai", as in the U-Net. The last layer in each block and in the network starts at or near 0.
    dropout: the dropout rate before the second dense layer in each block, in training only.
    out_channels: output channels; None for as many as x_t has. For a learned variance, give twice as many.
    dtype: "float32" or "bfloat16", the compute dtype of the layers. Parameters, normalization statistics and the output stay
      float32.
    precision: as in the U-Net.
    remat: whether to recompute each block's activations in the backward pass.
    """

    channels: int = 128
    num_res_blocks: int = 2
    scale_shift_norm: bool = False
    initializer: str = "ho"
    dropout: float = 0.1
    out_channels: int | None = None
    dtype: str = "float32"
    precision: str = "default"
    remat: bool = False

    remat_choices = (False, True)

    @property
    def layers(self) -> LayerFactory:
        """The factory for this network's layers; its norms have one group."""
        return LayerFactory(
            num_groups=1,
            norm_epsilon=1e-6,
            initializer=self.initializer,
            dtype=jnp.dtype(self.dtype),
            spatial_dims=0,
            precision=self.precision,
        )

    @nn.compact
    def __call__(self, x_t, time, y=None, train: bool = False, condition=None) -> jax.Array:
        """x_t: [B, C]; time: float [B], or [] for all rows; y, condition, train: as in `UNet`.

        Raises: ValueError for an x_t that is not float or has another number of axes, for a remat with levels, and for labels
          and conditions as in `UNet`.
        """
        if not jnp.issubdtype(x_t.dtype, jnp.floating) or x_t.ndim != 2:
            raise ValueError(
                f"the MLP needs float vectors [B, C], got {x_t.dtype} of shape {x_t.shape}; a UNet takes arrays with spatial "
                "axes"
            )
        if not isinstance(self.remat, bool):
            raise ValueError(f"remat={self.remat} must be True or False: an MLP has one level")
        layers = self.layers
        embedding = layers.embed_time(timestep_embedding(times_of_rows(time, x_t), self.channels), 4 * self.channels)
        h, embedding = self.add_conditions(layers, x_t, embedding, y, condition, train)
        h = layers.dense(self.channels, "dense_in")(h.astype(self.dtype))
        block = _REMAT_BLOCK if self.remat else ResBlock
        for j in range(self.num_res_blocks):
            h = block(self.channels, self.dropout, self.scale_shift_norm, layers, name=f"block_{j}")(
                h, embedding, train
            )
        h = nn.silu(layers.norm("norm_out")(h))
        return layers.dense(self.out_channels or x_t.shape[-1], "dense_out", last=True)(h).astype(jnp.float32)
