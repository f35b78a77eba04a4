"""The U-Net of the DDPM family, as one Flax Linen module, for series, images and volumes; and ADM's classifier.

The defaults are Ho et al.'s network (DDPM appendix B): residual blocks of GroupNorm, SiLU and 3x3 convolution with the time
embedding added between the two halves, self-attention at chosen levels, and skip connections. Other values give OpenAI's
networks (Improved DDPM, ADM), DDPM++ and NCSN++. The U-Net contains no diffusion mathematics: it maps (x_t, network time) to
an output with the same spatial shape.

The classifier of noisy images, for classifier guidance (ADM, Dhariwal & Nichol 2021, section 4), is the downsampling path
with attention pooling over the remaining positions.

Layer names have the level (0 is full resolution) and the place: `down_1_block_0`, `mid_attn`, `up_3_upsample`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from diffusion_jax.models.conditions import Conditional
from diffusion_jax.models.layers import (
    KEPT_INSIDE,
    Attention,
    FourierEmbedding,
    LayerFactory,
    ResBlock,
    average_2x,
    downsample_2x,
    downsample_smooth,
    split_heads,
    times_of_rows,
    timestep_embedding,
    upsample_2x,
    upsample_smooth,
)

# For jax.checkpoint policies: names of the activations that `remat` keeps for the backward pass, between blocks and inside
# the blocks that are not recomputed.
_KEPT_BETWEEN = "between blocks"
KEPT_NAMES = (_KEPT_BETWEEN, KEPT_INSIDE)
_AXES = {1: "L", 2: "H, W", 3: "D, H, W"}
_ARCHITECTURES = ("ddpm", "ddpm++", "ncsn++")
# {whether the padding is periodic: NCSN++'s functions (reduce, enlarge)}
_SMOOTH = {
    periodic: (functools.partial(downsample_smooth, mode=mode), functools.partial(upsample_smooth, mode=mode))
    for periodic, mode in ((False, "constant"), (True, "wrap"))
}
_REMAT_BLOCK, _REMAT_ATTENTION = nn.remat(ResBlock, static_argnums=(3,)), nn.remat(Attention)


class Encoder(nn.Module):
    """The downsampling path and the middle, with their fields and layers.

    channels: the width that `channel_multipliers` multiplies, an even number of at least 4 for `timestep_embedding`.
      `num_groups` must divide the width of every level.
    channel_multipliers: the width of each level divided by `channels`; may be fractional (ADM's first is 0.5 at 512
      pixels). Each level after the first halves the resolution.
    num_res_blocks: residual blocks in each level of the downsampling path; each level of the upsampling path has one more.
    attention_levels: levels with self-attention after each block; (1,) is 16x16 for 32-pixel images, (4,) for 256-pixel
      images. The middle always has self-attention.
    num_heads: attention heads in every layer. head_channels: the number of channels per head (64 in ADM), which replaces
      `num_heads`, so that wider layers have more heads.
    resample_blocks: whether residual blocks change the resolution: they average 2x2 pixels or repeat pixels in both branches
      (ADM). By default, a stride-2 convolution halves the sizes, and a convolution of repeated pixels doubles them.
    scale_shift_norm: whether the time embedding scales and shifts the output of a block's second norm; otherwise the
      embedding is added to the norm's input.
    architecture: "ddpm", or "ddpm++" (Song et al. 2021, appendix H, in EDM's form): the sum in each residual block and
      attention layer is divided by sqrt(2); blocks that change the resolution have a projection in their shortcut; in the
      upsampling path, only the last block of a level is followed by self-attention; the first convolution has `channels`
      channels; labels and condition vectors are added to the sines and cosines of the time, before its dense layers. The
      published DDPM++ also has `resample_blocks`, and 4 blocks per level. "ncsn++" (Song et al., in EDM's form) differs from
      DDPM++: changes of the resolution use the filter [1, 3, 3, 1] along each axis; each reduction adds the convolved and
      filtered input (after the first reduction, the previous sum) and divides by sqrt(2); the time embedding has 2 `channels`
      sines and cosines, whose random frequencies, N(0, 16^2) and not trained, suit network times of about 1. NCSN++ needs
      `resample_blocks`, and uses neither `embedding_cos_first` nor `embedding_freq_shift`.
    embedding_cos_first, embedding_freq_shift: arguments of `timestep_embedding`; True and 0 in OpenAI's networks.
    time_scale: multiplies the network time before its embedding; 1000 in OpenAI's networks with EDM's preconditioning.
    downsample_padding: the padding before and after each axis in the stride-2 convolution; (1, 1) in OpenAI's networks.
    num_groups, norm_epsilon: the groups and the epsilon of every GroupNorm; OpenAI's epsilon is 1e-5.
    initializer: "ho" or "openai" (PyTorch's default for kernels, N(0, 1) for classes). Biases start at 0 in both.
    dropout: the dropout rate before the second convolution in each block, in training only.
    dtype: "float32" or "bfloat16", the compute dtype of the layers. Parameters, normalization statistics, the softmax and the
      output stay float32.
    precision: the precision of float32 products, in the network and its gradients. By default GPUs round the inputs to TF32
      (11 bits) and TPUs to bfloat16 (8 bits). "high" is more precise on TPUs only (three bfloat16 products per float32
      product); "highest" is full float32. "default" follows `jax.default_matmul_precision`. CPUs always compute in float32.
    remat: whether to recompute the activations of every block in the backward pass, which saves memory and takes time; or a
      tuple of the levels to recompute. Level 0 has the most activations.
    spatial_dims: 1 for series [B, L, C], 2 for images [B, H, W, C], 3 for volumes [B, D, H, W, C].
    padding: "zeros", or "periodic" for data on a torus: convolutions wrap around at the ends of an array, so that shifting a
      U-Net's input by a multiple of 2^(levels - 1) positions shifts the output equally.
    """

    channels: int = 128
    channel_multipliers: tuple[float, ...] = (1, 2, 2, 2)
    num_res_blocks: int = 2
    attention_levels: tuple[int, ...] = (1,)
    num_heads: int = 1
    head_channels: int | None = None
    resample_blocks: bool = False
    scale_shift_norm: bool = False
    architecture: str = "ddpm"
    embedding_cos_first: bool = False
    embedding_freq_shift: float = 1.0
    time_scale: float = 1.0
    downsample_padding: tuple[int, int] = (0, 1)
    num_groups: int = 32
    norm_epsilon: float = 1e-6
    initializer: str = "ho"
    dropout: float = 0.1
    dtype: str = "float32"
    precision: str = "default"
    remat: bool | tuple[int, ...] = False
    spatial_dims: int = 2
    padding: str = "zeros"

    @property
    def layers(self) -> LayerFactory:
        """The factory for this network's layers."""
        return LayerFactory(
            self.num_groups,
            self.norm_epsilon,
            self.initializer,
            jnp.dtype(self.dtype),
            self.spatial_dims,
            self.padding == "periodic",
            self.precision,
        )

    @property
    def is_ncsnpp(self) -> bool:
        """Whether the architecture is NCSN++."""
        return self.architecture == "ncsn++"

    @property
    def is_plus_plus(self) -> bool:
        """Whether the architecture is DDPM++ or NCSN++."""
        return self.architecture != "ddpm"

    @property
    def divisor(self) -> int:
        """2^(levels - 1), the factor by which the downsampling path divides sizes."""
        return 2 ** (len(self.channel_multipliers) - 1)

    def width(self, level: int) -> int:
        """Returns the number of channels at a level."""
        return round(self.channels * self.channel_multipliers[level])

    def residual_block(
        self, h, embedding, level: int, name: str, train: bool, resample: Callable | None = None
    ) -> jax.Array:
        """Applies a residual block with the level's width to h."""
        keep = not self._recomputes(level)
        kind = ResBlock if keep else _REMAT_BLOCK
        width, rescale = self.width(level), self.is_plus_plus
        block = kind(width, self.dropout, self.scale_shift_norm, self.layers, resample, keep, rescale, name=name)
        return checkpoint_name(block(h, embedding, train), _KEPT_BETWEEN)

    def attention(self, h, level: int, name: str) -> jax.Array:
        """Applies a self-attention layer at a level to h."""
        keep = not self._recomputes(level)
        kind = Attention if keep else _REMAT_ATTENTION
        layer = kind(self.num_heads, self.head_channels, self.layers, keep, self.is_plus_plus, name=name)
        return checkpoint_name(layer(h), _KEPT_BETWEEN)

    @property
    def _resamplings(self) -> tuple[Callable, Callable]:
        """(reduce, enlarge): the functions of the blocks that change the resolution."""
        return _SMOOTH[self.padding == "periodic"] if self.is_ncsnpp else (downsample_2x, upsample_2x)

    def _recomputes(self, level: int) -> bool:
        """Whether `remat` recomputes the blocks at a level."""
        return self.remat if isinstance(self.remat, bool) else level in self.remat

    def waves(self, time, x_t) -> jax.Array:
        """Returns the sines and cosines of the network time ([B] or []): [B, channels], or [B, 2 channels] in NCSN++."""
        if self.time_scale != 1:
            time = jnp.asarray(time, jnp.float32) * self.time_scale
        time, options = times_of_rows(time, x_t), {"freq_shift": self.embedding_freq_shift}
        if self.is_ncsnpp:
            return FourierEmbedding(self.channels, name="time_fourier")(time)
        return timestep_embedding(time, self.channels, cos_first=self.embedding_cos_first, **options)

    def encode(self, x, embedding, train: bool) -> tuple[jax.Array, list[jax.Array]]:
        """Encodes x [B, *spatial, C]. Returns (the middle's output, the activations for skip connections, in order)."""
        num_levels = len(self.channel_multipliers)
        width = self.channels if self.is_plus_plus else self.width(0)
        inputs = x.astype(self.dtype)
        h = checkpoint_name(self.layers.conv(width, "conv_in")(inputs), _KEPT_BETWEEN)
        skips = [h]
        for level in range(num_levels):
            for j in range(self.num_res_blocks):
                h = self.residual_block(h, embedding, level, f"down_{level}_block_{j}", train)
                if level in self.attention_levels:
                    h = self.attention(h, level, f"down_{level}_attn_{j}")
                skips.append(h)
            if level < num_levels - 1:
                name = f"down_{level}_downsample"
                if self.resample_blocks:
                    h = self.residual_block(h, embedding, level, name, train, self._resamplings[0])
                else:
                    h = self.layers.conv(h.shape[-1], name, stride=2, padding=self.downsample_padding)(h)
                    h = checkpoint_name(h, _KEPT_BETWEEN)
                if self.is_ncsnpp:
                    reduced = average_2x(self.layers.conv(h.shape[-1], f"down_{level}_input", padding=(2, 2))(inputs))
                    h = inputs = checkpoint_name((h + reduced) * math.sqrt(0.5), _KEPT_BETWEEN)
                skips.append(h)
        h = self.residual_block(h, embedding, num_levels - 1, "mid_block_0", train)
        h = self.attention(h, num_levels - 1, "mid_attn")
        return self.residual_block(h, embedding, num_levels - 1, "mid_block_1", train), skips

    @property
    def remat_choices(self) -> tuple[bool | tuple[int, ...], ...]:
        """The values of `remat` in order of recomputation: no level, the first levels, all levels."""
        return (False, *(tuple(range(n)) for n in range(1, len(self.channel_multipliers))), True)

    def check_input(self, x) -> None:
        """Raises ValueError for fields that do not describe a network, or arrays that do not fit the network."""
        num_levels = len(self.channel_multipliers)
        kind = type(self).__name__
        if self.spatial_dims not in _AXES:
            raise ValueError(f"spatial_dims={self.spatial_dims} must be 1, 2 or 3; vectors need an MLP")
        if self.architecture not in _ARCHITECTURES:
            raise ValueError(f"architecture={self.architecture!r} must be one of {', '.join(_ARCHITECTURES)}")
        if self.is_ncsnpp and not self.resample_blocks:
            raise ValueError("architecture='ncsn++' needs resample_blocks=True")
        if self.padding not in ("zeros", "periodic"):
            raise ValueError(f"padding={self.padding!r} must be 'zeros' or 'periodic'")
        noun = "images" if self.spatial_dims == 2 else "arrays"
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(
                f"the {kind} needs float {noun}, such as images in [-1, 1]; got {x.dtype}; convert uint8 images with "
                "x / 127.5 - 1"
            )
        if x.ndim != self.spatial_dims + 2:
            raise ValueError(
                f"the {kind} needs {noun} [B, {_AXES[self.spatial_dims]}, C], got shape {x.shape}; spatial_dims gives the "
                "number of spatial axes"
            )
        for name in ("attention_levels", "remat"):
            value = getattr(self, name)
            outside = [] if isinstance(value, bool) else [level for level in value if not 0 <= level < num_levels]
            if outside:
                raise ValueError(f"{name} must lie in 0 ... {num_levels - 1}, got {outside[0]}")

    def check_divisible(self, x, reason: str) -> None:
        """Raises ValueError, with the reason, for sizes not divisible by 2^(levels - 1)."""
        if any(size % self.divisor for size in x.shape[1:-1]):
            raise ValueError(
                f"a {type(self).__name__} of {len(self.channel_multipliers)} levels needs sizes divisible by {self.divisor}, "
                f"because {reason}; got {x.shape[1:-1]}; resize the arrays or use fewer channel_multipliers"
            )


class UNet(Encoder, Conditional):
    """The U-Net; the default fields give Ho et al.'s network.

    `UNet(...).apply({"params": params}, x_t, time, y, train, condition)` -> [B, *spatial, out_channels] float32. With
    zero padding an axis may have any size: the network pads x_t and an array condition with zeros at the end, to a multiple
    of 2^(levels - 1), and crops the output. The padded positions take part in attention and in the statistics of norms.
    Fields: the fields of `Encoder` and `Conditional`, and

    out_channels: output channels; None for as many as x_t has. For a learned variance, give twice as many.
    """

    out_channels: int | None = None

    @nn.compact
    def __call__(self, x_t, time, y=None, train: bool = False, condition=None) -> jax.Array:
        """x_t: [B, *spatial, C]; time: float [B], or [] for all rows; train: whether dropout is active.

        y: int [B] for a network with classes. condition: float [B, D] for a network with condition_features, or
        [B, *spatial, K] for a network with condition_channels; None for no conditions, if condition_dropout is above 0.

        Raises: ValueError for arrays that are not float or whose number of axes does not fit `spatial_dims`, sizes not
          divisible by 2^(levels - 1) if the padding is periodic, labels or conditions that are missing or that the network
          does not take, labels that are not int or out of range, or a condition with another shape.
        """
        self.check_input(x_t)
        embedding, features = self.waves(time, x_t), 4 * self.channels
        embedding = embedding if self.is_plus_plus else self.layers.embed_time(embedding, features)
        h, embedding = self.add_conditions(self.layers, x_t, embedding, y, condition, train)
        embedding = self.layers.embed_time(embedding, features) if self.is_plus_plus else embedding
        h, skips = self.encode(self._pad(h), embedding, train)
        h = self._decode(h, skips, embedding, train)
        h = nn.silu(self.layers.norm("norm_out")(h))
        out_channels = self.out_channels or x_t.shape[-1]
        h = checkpoint_name(self.layers.conv(out_channels, "conv_out", last=True)(h), _KEPT_BETWEEN).astype(jnp.float32)
        return h if h.shape[:-1] == x_t.shape[:-1] else h[tuple(map(slice, x_t.shape[:-1]))]

    def _pad(self, x) -> jax.Array:
        """Pads x [B, *spatial, C] with zeros at the end of each axis whose size 2^(levels - 1) does not divide."""
        missing = [-size % self.divisor for size in x.shape[1:-1]]
        if not any(missing):
            return x
        if self.padding == "periodic":
            self.check_divisible(x, "with padding='periodic' the sizes are the period")
        return jnp.pad(x, ((0, 0), *((0, size) for size in missing), (0, 0)))

    def _decode(self, h, skips: list[jax.Array], embedding, train: bool) -> jax.Array:
        """Applies the upsampling path to the middle's output. Returns: [B, *spatial, width of level 0]."""
        first_attention = self.num_res_blocks if self.is_plus_plus else 0
        for level in reversed(range(len(self.channel_multipliers))):
            for j in range(self.num_res_blocks + 1):
                h = jnp.concatenate([h, skips.pop()], axis=-1)
                h = self.residual_block(h, embedding, level, f"up_{level}_block_{j}", train)
                if level in self.attention_levels and j >= first_attention:
                    h = self.attention(h, level, f"up_{level}_attn_{j}")
            if level > 0:
                name = f"up_{level}_upsample"
                if self.resample_blocks:
                    h = self.residual_block(h, embedding, level, name, train, self._resamplings[1])
                else:
                    h = checkpoint_name(self.layers.conv(h.shape[-1], name, upsample=True)(h), _KEPT_BETWEEN)
        return h


class AttentionPool(nn.Module):
    """[B, *spatial, C] -> [B, features]: attention from the mean of all positions to the mean and the positions, as in CLIP.

    The N + 1 tokens are the mean and the N positions (H W in an image), each with a learned position embedding. The output
    of one attention layer, with the mean as the only query, is projected to `features`.
    """

    features: int
    num_heads: int
    head_channels: int | None
    layers: LayerFactory

    @nn.compact
    def __call__(self, x) -> jax.Array:
        """x: [B, *spatial, C]; returns [B, features]. Raises: ValueError if initialized with another number of positions."""
        b, *spatial, c = x.shape
        positions = math.prod(spatial)
        heads, tokens = split_heads(c, self.num_heads, self.head_channels), positions + 1
        known = self.get_variable("params", "position")
        if known is not None and len(known) != tokens:
            raise ValueError(
                f"the position embedding of this classifier fixes the image size: it has {len(known) - 1} positions after "
                f"downsampling, and these images have {'x'.join(map(str, spatial))}; resize the images"
            )
        position = self.param("position", nn.initializers.normal(c**-0.5), (tokens, c), jnp.float32)
        x = x.reshape(b, positions, c)
        x = jnp.concatenate([x.mean(axis=1, keepdims=True), x], axis=1) + position
        q, k, v = (
            self.layers.dense(c, name)(part).reshape(b, -1, heads, c // heads)
            for name, part in (("q", x[:, :1]), ("k", x), ("v", x))
        )
        return self.layers.dense(self.features, "proj")(self.layers.attend(q, k, v).reshape(b, c))


class Classifier(Encoder):
    """Computes logits for x_t and a network time. `models.preset("adm_classifier128")` is ADM's 128x128 ImageNet classifier.

    `Classifier(...).apply({"params": params}, x_t, time, train=False)` -> [B, num_classes] float32, unnormalized log
    probabilities. The classifier accepts only sizes that 2^(levels - 1) divides, with as many positions as at initialization.
    Other sizes with equally many positions, such as 8x2 for 4x4, raise no error but get wrong position embeddings. Fields:
    the fields of `Encoder`, and

    num_classes: the number of classes.
    """

    num_classes: int = 1000

    @nn.compact
    def __call__(self, x_t, time, train: bool = False) -> jax.Array:
        """x_t: [B, *spatial, C]; time: float [B], or [] for all rows; train: whether dropout is active.

        Raises: ValueError for arrays that `UNet` does not take, for sizes not divisible by 2^(levels - 1), for another number
          of positions than at initialization, and for fewer than 2 classes.
        """
        self.check_input(x_t)
        self.check_divisible(x_t, "its pooling reads every position")
        if self.num_classes < 2:
            raise ValueError(f"num_classes={self.num_classes}: a classifier needs at least 2 classes")
        h, _ = self.encode(x_t, self.layers.embed_time(self.waves(time, x_t), 4 * self.channels), train)
        layers = dataclasses.replace(self.layers, dtype=jnp.dtype("float32"))
        h = nn.silu(layers.norm("norm_out")(h))
        return AttentionPool(self.num_classes, self.num_heads, self.head_channels, layers, name="pool")(h)
