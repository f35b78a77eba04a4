"""The names and layouts of parameters in this package and in the files of other projects.

A parameter here has a path such as ("down_1_block_0", "conv1", "kernel"). Each `Naming` maps such a path to the name of the
same tensor elsewhere. `build_params` starts from the paths of the network, so it reports tensors that the file lacks and
tensors that the network does not use.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.errors import PretrainedError, list_names
from diffusion_jax.models import UNet, initial_inputs
from diffusion_jax.models.blocks import split_heads
from diffusion_jax.training.state import Network

__all__ = [
    "DIFFUSERS",
    "HO",
    "OPENAI",
    "Naming",
    "Path",
    "build_params",
    "channel_multipliers",
    "flat_shapes",
    "from_torch",
    "num_heads_of",
    "parameter_shapes",
    "to_torch",
    "torch_shape",
]

Path = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Naming:
    """The names of another project.

    module: (module here, whether it is a single layer, the network) -> its name there. layers: names of layers in a block.
    """

    module: Callable[[str, bool, Network], str]
    layers: Mapping[str, str]

    def __call__(self, path: Path, model: Network) -> str:
        """The name there of a parameter, as PyTorch writes it: NAME.weight and NAME.bias."""
        module, *layers, leaf = path
        if layers and layers[-1] == "norm" and leaf in ("scale", "bias"):
            layers = layers[:-1]  # the layer inside `models.layers.GroupNorm`
        name = self.module(module, not layers, model)
        if layers:
            name += "." + self.layers.get(layers[0], layers[0])
        if leaf == "position":
            return f"{name}.positional_embedding"
        return f"{name}.{'bias' if leaf == 'bias' else 'weight'}"


def _split_module(module: str) -> tuple[str, int, str, str] | None:
    """("down", 1, "block", "0") of down_1_block_0, and ("up", 2, "resample", "") of up_2_upsample; else None."""
    match = re.fullmatch(r"(down|up)_(\d+)_(?:(block|attn)_(\d+)|(?:down|up)sample)", module)
    return match and (match[1], int(match[2]), match[3] or "resample", match[4] or "")


def _diffusers_module(module: str, single: bool, model: Network) -> str:
    parts = _split_module(module)
    if parts:
        direction, level, kind, j = parts
        i = level if direction == "down" else len(model.channel_multipliers) - 1 - level
        if kind == "resample":
            return f"{direction}_blocks.{i}.{direction}samplers.0" + (".conv" if single else "")
        return f"{direction}_blocks.{i}.{'resnets' if kind == 'block' else 'attentions'}.{j}"
    return {
        "mid_block_0": "mid_block.resnets.0",
        "mid_attn": "mid_block.attentions.0",
        "mid_block_1": "mid_block.resnets.1",
        "time_0": "time_embedding.linear_1",
        "time_1": "time_embedding.linear_2",
        "class": "class_embedding",
        "norm_out": "conv_norm_out",
    }.get(module, module)


DIFFUSERS = Naming(
    _diffusers_module,
    {
        "time_proj": "time_emb_proj",
        "skip": "conv_shortcut",
        "norm": "group_norm",
        "q": "to_q",
        "k": "to_k",
        "v": "to_v",
        "proj": "to_out.0",
    },
)


def _openai_module(module: str, single: bool, model: Network) -> str:
    n, levels = model.num_res_blocks, len(model.channel_multipliers)
    parts = _split_module(module)
    if parts:
        direction, level, kind, j = parts
        has_attention = level in model.attention_levels
        if direction == "down":
            if kind == "resample":
                return f"input_blocks.{(level + 1) * (n + 1)}.0" + (".op" if single else "")
            return f"input_blocks.{1 + level * (n + 1) + int(j)}.{0 if kind == 'block' else 1}"
        first = (levels - 1 - level) * (n + 1)
        if kind == "resample":
            return f"output_blocks.{first + n}.{2 if has_attention else 1}" + (".conv" if single else "")
        return f"output_blocks.{first + int(j)}.{0 if kind == 'block' else 1}"
    return {
        "mid_block_0": "middle_block.0",
        "mid_attn": "middle_block.1",
        "mid_block_1": "middle_block.2",
        "time_0": "time_embed.0",
        "time_1": "time_embed.2",
        "class": "label_emb",
        "conv_in": "input_blocks.0.0",
        "norm_out": "out.0",
        "conv_out": "out.2",
        "pool": "out.2",
    }[module]


_OPENAI_LAYERS = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "skip": "skip_connection",
    "proj": "proj_out",
}
OPENAI = Naming(_openai_module, _OPENAI_LAYERS)


def _ho_module(module: str, single: bool, model: Network) -> str:
    parts = _split_module(module)
    if parts:
        direction, level, kind, j = parts
        name = f"{direction}sample.conv" if kind == "resample" else f"{kind}.{j}"
        return f"{direction}.{level}.{name}"
    return {
        "mid_block_0": "mid.block_1",
        "mid_attn": "mid.attn_1",
        "mid_block_1": "mid.block_2",
        "time_0": "temb.dense.0",
        "time_1": "temb.dense.1",
    }.get(module, module)


HO = Naming(_ho_module, {"time_proj": "temb_proj", "skip": "nin_shortcut", "proj": "proj_out"})


def channel_multipliers(widths: Sequence[int], channels: int) -> tuple[float, ...]:
    """`channel_multipliers` of levels with these widths: ints if the quotient is a whole number."""
    return tuple(w // channels if w % channels == 0 else w / channels for w in widths)


def flat_shapes(tree) -> dict[Path, tuple[int, ...]]:
    """Shape of every leaf of a tree of parameters, by its path."""
    return {tuple(key.key for key in path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def parameter_shapes(model: Network, shape: tuple[int, ...]) -> dict[Path, tuple[int, ...]]:
    """Shape of every parameter of a network, by its path.

    shape: (*spatial, C) of an example. Raises: PretrainedError for fields that do not describe a network.
    """
    try:
        # The key is an argument, as in `training.state.abstract_params`.
        tree = jax.eval_shape(lambda key: model.init(key, **initial_inputs(model, shape))["params"], jax.random.key(0))
    except (ValueError, TypeError, ArithmeticError) as error:
        raise PretrainedError(f"no network has these fields: {error}") from None
    return flat_shapes(tree)


def from_torch(value: np.ndarray, path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """A PyTorch tensor in Flax's layout: OIHW to HWIO, [out, in] to [in, out]; 1x1 convolutions are matrices here."""
    if path[-1] in ("kernel", "position"):
        if len(shape) == 2 and value.ndim > 2:
            value = value.reshape(value.shape[:2]) if value.size == value.shape[0] * value.shape[1] else value
        value = value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T
    return value


def to_torch(value: np.ndarray, path: Path) -> np.ndarray:
    """The inverse of `from_torch`; the 1x1 projection of a residual block is a convolution there."""
    if path[-1] == "kernel":
        value = value.transpose(3, 2, 0, 1) if value.ndim == 4 else value.T
        value = value[:, :, None, None] if path[-2] == "skip" else value
    return np.ascontiguousarray(value)


def torch_shape(shape: tuple[int, ...], path: Path) -> tuple[int, ...]:
    """PyTorch's order of a shape in Flax's layout, except for 1x1 convolutions."""
    if path[-1] not in ("kernel", "position"):
        return shape
    return (shape[3], shape[2], *shape[:2]) if len(shape) == 4 else shape[::-1]


def build_params(
    source: str,
    shapes: Mapping[Path, tuple[int, ...]],
    names: Iterable[str],
    name_of: Callable[[Path], str],
    read: Callable[[str, Path, tuple[int, ...]], np.ndarray],
) -> dict:
    """The tree of parameters, float32 JAX arrays.

    source: the file, for errors. shapes: of the network's parameters by path. names: of all tensors of the file. name_of: the
    tensor of a parameter. read(name, path, shape): a tensor in this package's layout.
    Raises: PretrainedError that lists tensors that are missing, unexpected, of another shape, or not finite.
    """
    expected, names = {path: name_of(path) for path in shapes}, set(names)
    missing = [name for name in expected.values() if name not in names]
    unexpected = sorted(names - set(expected.values()))
    if missing or unexpected:
        problems = [f"{len(missing)} tensors are missing ({list_names(missing)})"] if missing else []
        problems += [f"{len(unexpected)} are unexpected ({list_names(unexpected)})"] if unexpected else []
        raise PretrainedError(f"{source} does not fit the network: {'; '.join(problems)}")
    params, wrong = {}, []
    for path, shape in shapes.items():
        value = read(expected[path], path, shape)
        if value.shape != shape:
            wrong.append(f"{expected[path]} is {torch_shape(value.shape, path)}, not {torch_shape(shape, path)}")
            continue
        if not jnp.issubdtype(value.dtype, jnp.floating):
            raise PretrainedError(
                f"{source}: {expected[path]} is {value.dtype}, not floating-point; convert quantized weights to float32"
            )
        if not np.isfinite(value).all():
            raise PretrainedError(
                f"{source}: {expected[path]} contains values that are not finite; download the file again"
            )
        params[path] = jnp.asarray(np.ascontiguousarray(value, dtype=np.float32))
    if wrong:
        raise PretrainedError(f"{source} does not fit the network: {len(wrong)} shapes differ ({list_names(wrong)})")
    return flax.traverse_util.unflatten_dict(params)


def num_heads_of(path: Path, model: Network, channels: int) -> int:
    """The number of heads of an attention layer of that many channels."""
    num_heads_up = model.num_heads_up if isinstance(model, UNet) and path[0].startswith("up_") else None
    return split_heads(channels, num_heads_up or model.num_heads, model.head_channels)
