"""Reads tensors from untrusted files without executing their contents, and builds parameters from the tensors.

The formats are safetensors, TensorFlow checkpoints and, by `pickles`, PyTorch's files and EDM's pickles. The format is
detected from the first bytes, not from the file name; a TensorFlow checkpoint is given by its prefix.
Parameters have paths such as ("down_1_block_0", "conv1", "kernel"); a `Naming` maps a path to the tensor name in another
project's files.
"""

from __future__ import annotations

import dataclasses
import math
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from diffusion_jax import untrusted
from diffusion_jax.errors import PretrainedError, first_line, list_names, needs_extra
from diffusion_jax.pretrained import pickles
from diffusion_jax.training.state import Network, abstract_params

Path = tuple[str, ...]

# ---- Files

_NOT_WEIGHTS = {
    b"version https://git-lfs": "a git-lfs pointer, not the file itself; run git lfs pull",
    b"<!DOCTYPE": "a web page, not weights; download the file again",
    b"<html": "a web page, not weights; download the file again",
}


@dataclasses.dataclass(frozen=True)
class Tensors:
    """The tensors of a file.

    framework: "safetensors", "PyTorch" or "TensorFlow". shapes: {name: shape}, known before tensors are read.
    read(name): returns a tensor, and may be called only once for each name. metadata: the metadata in a safetensors file,
    or the class and the arguments of EDM's network.
    """

    framework: str
    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], np.ndarray]
    metadata: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def rename(self, new_name: Callable[[str], str]) -> Tensors:
        """Returns the same tensors under other names."""
        old = {new_name(name): name for name in self.shapes}
        shapes = {name: self.shapes[old[name]] for name in old}
        return dataclasses.replace(self, shapes=shapes, read=lambda name: self.read(old[name]))


def is_tensorflow_checkpoint(path: pathlib.Path) -> bool:
    """Returns whether a path is a TensorFlow checkpoint prefix: .../model.ckpt-N, if model.ckpt-N.index exists."""
    return path.with_name(path.name + ".index").is_file()


def open_tensors(path: pathlib.Path, ema: bool = True) -> Tensors:
    """Opens a file, or a TensorFlow checkpoint by its prefix. Raises: PretrainedError."""
    if is_tensorflow_checkpoint(path):
        return _open_tensorflow(path, ema)
    if not path.is_file():
        raise PretrainedError(f"{path}: no such file")
    with path.open("rb") as file:
        head = file.read(32)
    for start, explanation in _NOT_WEIGHTS.items():
        if head.startswith(start):
            raise PretrainedError(f"{path} is {explanation}")
    # safetensors files start with the header's length, which may look like a pickle, so safetensors is checked first.
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 2**30:
        return _open_safetensors(path)
    if head[:2] == b"PK" or head[:1] == b"\x80":
        return _open_torch(path)
    raise PretrainedError(
        f"{path} ({path.stat().st_size:,} bytes) is not a file of weights: neither safetensors nor PyTorch's; give a "
        "TensorFlow checkpoint by its prefix, .../model.ckpt-N"
    )


def _open_safetensors(path: pathlib.Path) -> Tensors:
    try:
        file = safetensors.safe_open(str(path), framework="numpy")
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    except (safetensors.SafetensorError, OSError) as error:
        raise PretrainedError(f"{path} is a corrupted safetensors file ({error}); download it again") from None
    return Tensors("safetensors", shapes, file.get_tensor, file.metadata() or {})


def save_tensors(tensors: Mapping[str, np.ndarray], path: pathlib.Path, metadata: Mapping[str, str]) -> None:
    """Writes a safetensors file completely or not at all. Raises: PretrainedError, OSError."""
    try:
        with tempfile.TemporaryDirectory(prefix=".", dir=path.parent) as folder:  # safetensors would follow a link
            safetensors.numpy.save_file(dict(tensors), f"{folder}/{path.name}", dict(metadata))
            pathlib.Path(folder, "mode").touch()
            shutil.copymode(f"{folder}/mode", f"{folder}/{path.name}")  # save_file ignores the umask
            os.replace(f"{folder}/{path.name}", path)
    except safetensors.SafetensorError as error:
        raise PretrainedError(f"{path} cannot be written: {error}") from None


def _open_torch(path: pathlib.Path) -> Tensors:
    loaded, metadata = pickles.open_pickle(path)
    if isinstance(loaded, dict) and isinstance(loaded.get("state_dict"), dict):
        loaded = loaded["state_dict"]
    has_names = isinstance(loaded, dict) and all(isinstance(name, str) and name.isprintable() for name in loaded)
    if not has_names or not all(isinstance(value, pickles.Tensor) for value in loaded.values()):
        raise PretrainedError(f"{path} contains a {type(loaded).__name__}, not a state dict (tensors by name)")
    shapes = {name: value.shape for name, value in loaded.items()}
    num_bytes = sum(math.prod(value.shape) * value.storage.dtype.itemsize for value in loaded.values())
    if num_bytes > 4 * path.stat().st_size:  # tied weights share their numbers
        raise PretrainedError(f"{path} has tensors of {num_bytes:,} bytes, more than 4 times the size of the file")
    return Tensors("PyTorch", shapes, lambda name: loaded.pop(name).numpy(), metadata)  # memory holds weights only once


_EMA_SUFFIX = "/ExponentialMovingAverage"


def _open_tensorflow(path: pathlib.Path, ema: bool) -> Tensors:
    with needs_extra(f"{path} needs TensorFlow", "tfds", PretrainedError):
        import tensorflow as tf
    try:
        reader = tf.train.load_checkpoint(str(path))
        shapes = reader.get_variable_to_shape_map()
    except Exception as error:  # tf.errors and its base classes
        raise PretrainedError(f"{path} cannot be read as a TensorFlow checkpoint: {first_line(error)}") from None
    variables = {name.removesuffix(_EMA_SUFFIX): name for name in shapes if name.endswith(_EMA_SUFFIX)}
    if ema and not variables:
        raise PretrainedError(f"{path} contains no moving average; load the raw weights with ema=False")
    if not ema:  # a checkpoint also contains Adam's moments and the step
        names = variables or [name for name in shapes if "/" in name and not name.split("/")[-1].startswith("Adam")]
        variables = {name: name for name in names}
    own_shapes = {name: tuple(shapes[variable]) for name, variable in variables.items()}
    return Tensors("TensorFlow", own_shapes, lambda name: reader.get_tensor(variables[name]))


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """Reads a JSON object. Raises: PretrainedError."""
    try:
        return untrusted.read_json(path)
    except (OSError, ValueError) as error:
        raise PretrainedError(f"{path} cannot be read as JSON: {error}") from None


# ---- Parameters


@dataclasses.dataclass(frozen=True)
class Naming:
    """The names of parameters in another project's files.

    table: {this package's name: other name} for modules and for the layers in a block; names without an entry are the same.
    The modules of a level are "block", "attn", "downsample" and "upsample", or "downsample_conv" and "upsample_conv" if they
    are convolutions. Their other names are format strings with half ("input" or "output"), direction ("down" or "up"), level,
    order (the level, counted in the order of computation), number (in the level), position (in the half; conv_in is the first
    in "input"), and after_attention (2 if the level has attention, else 1).
    """

    table: Mapping[str, str]

    def __call__(self, path: Path, model: Any) -> str:
        """Returns the other project's name of a parameter in PyTorch's form, NAME.weight or NAME.bias."""
        module, *layers, leaf = path
        if layers and layers[-1] == "norm" and leaf in ("scale", "bias"):
            layers = layers[:-1]  # the layer inside `models.layers.GroupNorm`
        fields: dict[str, Any] = {}
        if match := re.fullmatch(r"(down|up)_(\d+)_(block|attn|downsample|upsample)_?(\d*)", module):
            size, level, is_down = model.num_res_blocks + 1, int(match[2]), match[1] == "down"
            number = int(match[4] or size - 1)  # a level ends with its resampling
            order = level if is_down else len(model.channel_multipliers) - 1 - level
            fields = {"direction": match[1], "level": level, "order": order, "number": number}
            fields |= {"half": "input" if is_down else "output", "position": is_down + order * size + number}
            fields["after_attention"] = 2 if level in model.attention_levels else 1
            module = match[3] if layers else f"{match[3]}_conv"
        names = [self.table.get(name, name).format(**fields) for name in (module, *layers)]
        leaf = {"bias": "bias", "position": "positional_embedding"}.get(leaf, "weight")
        return ".".join([*names, leaf])


def channel_multipliers(widths: Sequence[int], channels: int) -> tuple[float, ...]:
    """Returns `channel_multipliers` for these level widths, as ints where the quotient is a whole number."""
    return tuple(w // channels if w % channels == 0 else w / channels for w in widths)


def flat_shapes(tree) -> dict[Path, tuple[int, ...]]:
    """Returns {path: shape} for a tree of parameters."""
    return {tuple(key.key for key in path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def parameter_shapes(model: Network, shape: tuple[int, ...]) -> dict[Path, tuple[int, ...]]:
    """Returns {path: shape} for a network's parameters.

    shape: shape of an example, (*spatial, C). Raises: ValueError for fields that do not describe a network.
    """
    return flat_shapes(abstract_params(model, shape))


def _torch_axes(path: Path, ndim: int) -> tuple[int, ...]:
    """Returns a parameter's axes in PyTorch's order, which transpose HWIO to OIHW, and [in, out] to [out, in]."""
    if path[-1] not in ("kernel", "position"):
        return tuple(range(ndim))
    return (3, 2, 0, 1) if ndim == 4 else tuple(reversed(range(ndim)))


def keep_layout(value: np.ndarray, path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """Returns a tensor unchanged, because it is stored in Flax's layout."""
    return value


def from_torch(value: np.ndarray, path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """Converts a PyTorch tensor to Flax's layout; a 1x1 convolution becomes a matrix. shape: the result's shape."""
    if path[-1] in ("kernel", "position") and len(shape) == 2 and value.size == math.prod(value.shape[:2]):
        value = value.reshape(value.shape[:2])
    return value.transpose(np.argsort(_torch_axes(path, value.ndim)))


def to_torch(value: np.ndarray, path: Path) -> np.ndarray:
    """Inverts `from_torch`. The projection in a residual block, a matrix in Flax, becomes a 1x1 convolution."""
    value = value.transpose(_torch_axes(path, value.ndim))
    return np.ascontiguousarray(value[:, :, None, None] if path[-2:] == ("skip", "kernel") else value)


def torch_shape(shape: tuple[int, ...], path: Path) -> tuple[int, ...]:
    """Converts a shape from Flax's layout to PyTorch's, except for 1x1 convolutions."""
    return tuple(shape[axis] for axis in _torch_axes(path, len(shape)))


def build_params(
    source: pathlib.Path,
    shapes: Mapping[Path, tuple[int, ...]],
    tensors: Tensors,
    tensor_name: Callable[[Path], str],
    convert: Callable[[np.ndarray, Path, tuple[int, ...]], np.ndarray] = from_torch,
) -> dict:
    """Builds a tree of parameters, float32 JAX arrays.

    source: the file, for error messages. shapes: {path: shape} of the network's parameters. tensor_name: path -> tensor name.
    convert: (tensor, path, shape) -> tensor in this package's layout.
    Raises: PretrainedError that lists tensors that are missing, unexpected, not finite or have a wrong shape.
    """
    expected, names = {path: tensor_name(path) for path in shapes}, set(tensors.shapes)
    missing = [name for name in expected.values() if name not in names]
    unexpected = sorted(names - set(expected.values()))
    if missing or unexpected:
        problems = [f"{len(missing)} tensors are missing ({list_names(missing)})"] if missing else []
        problems += [f"{len(unexpected)} are unexpected ({list_names(unexpected)})"] if unexpected else []
        raise PretrainedError(f"{source} does not fit the network: {'; '.join(problems)}")
    params, wrong = {}, []
    for path, shape in shapes.items():
        name = expected[path]
        try:
            value = convert(tensors.read(name), path, shape)
        except Exception as error:  # for types that NumPy lacks, such as bfloat16, and missing files of TensorFlow
            advice = "convert it to float32, or restore a missing file"
            raise PretrainedError(f"{source}: {name} cannot be read ({first_line(error)}); {advice}") from None
        if value.shape != shape:
            wrong.append(f"{name} is {torch_shape(value.shape, path)}, not {torch_shape(shape, path)}")
            continue
        if not jnp.issubdtype(value.dtype, jnp.floating):
            raise PretrainedError(f"{source}: {name} is {value.dtype}; convert quantized weights to float32")
        if not np.isfinite(value).all():
            raise PretrainedError(f"{source}: {name} has values that are not finite; download the file again")
        params[path] = jnp.asarray(np.asarray(value, dtype=np.float32, order="C"))
    if wrong:
        raise PretrainedError(f"{source} does not fit the network: {len(wrong)} shapes differ ({list_names(wrong)})")
    return flax.traverse_util.unflatten_dict(params)
