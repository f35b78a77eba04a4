"""The Inception network for the FID, InceptionV3 from 2015-12-05, for inference: layers, weights and resizes.

The network differs from torchvision's: average pools exclude the padding from the mean, the last block uses max pooling, and
there are 1008 classes. Layer names are from the PyTorch port. Weights are read from the port's file or the TensorFlow graph.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
import pathlib
import re
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.errors import PretrainedError, needs_extra
from diffusion_jax.pretrained import parameters
from diffusion_jax.storage.downloads import local_path

__all__ = ["DOWNLOAD_SOURCES", "RESIZES", "Inception", "load_inception", "to_inception"]

IMAGE_SIZE = 299  # pixels in height and width
RESIZES = ("tf1", "pytorch", "clean")
_SPATIAL_BLOCK = "Mixed_6d"  # TensorFlow's mixed_6
_SPATIAL_CHANNELS = 7
_PRECISION = jax.lax.Precision.HIGHEST  # full float32, also on accelerators whose default is lower
# Digests of the two files that published FIDs use.
_PORT_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
_GRAPH_MD5 = "e6bb154e85f5d4331c22abcddb5dcf31"
# The sources of the two files, for messages.
DOWNLOAD_SOURCES = (
    "pt_inception-2015-12-05-6726825d.pth of pytorch-fid's releases, "
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth, or "
    "classify_image_graph_def.pb, out of TensorFlow's inception-2015-12-05.tgz"
)
# The names of parameters in the PyTorch port and in the TensorFlow graph.
_NAMES = {
    "kernel": ("conv.weight", "conv2d_params"),
    "scale": ("bn.weight", "batchnorm/gamma"),
    "bias": ("bn.bias", "batchnorm/beta"),
    "mean": ("bn.running_mean", "batchnorm/moving_mean"),
    "var": ("bn.running_var", "batchnorm/moving_variance"),
    "fc": ("fc.weight", "softmax/weights"),
    "fc_bias": ("fc.bias", "softmax/biases"),
}
_STEM = ("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "Conv2d_3b_1x1", "Conv2d_4a_3x3")


# ---- Resizes


def to_inception(images, resize: str) -> jax.Array:
    """Converts images, float32 [B, H, W, 3] in 0 ... 255, to Inception's input, [B, 299, 299, 3] in about [-1, 1]."""
    if resize == "clean":
        # Keys' cubic kernel (a = -1/2), whose support grows when images shrink, as in Pillow's BICUBIC.
        shape = (len(images), IMAGE_SIZE, IMAGE_SIZE, 3)
        images = jax.image.resize(images, shape, "cubic", antialias=True, precision=jax.lax.Precision.HIGHEST)
        return (jnp.clip(images, 0, 255) - 128) / 128
    center = 0.5 if resize == "pytorch" else 0.0
    for axis in (2, 1):
        images = _resize_linear(images, axis, center)
    return images / 127.5 - 1 if resize == "pytorch" else (images - 128) / 128


def _resize_linear(x, axis: int, center: float) -> jax.Array:
    """Resizes one axis of x to 299 by linear interpolation. center: position of a pixel's center, 0 (TensorFlow 1) or 0.5."""
    size = x.shape[axis]
    output_positions = np.arange(IMAGE_SIZE, dtype=np.float32) + np.float32(center)
    position = output_positions * np.float32(size / IMAGE_SIZE) - np.float32(center)
    position = np.maximum(position, 0)
    low = position.astype(np.int32)
    weight = jnp.expand_dims(position - low, tuple(i for i in range(x.ndim) if i != axis))
    first, second = jnp.take(x, low, axis), jnp.take(x, np.minimum(low + 1, size - 1), axis)
    return first + (second - first) * weight


# ---- The network


class Conv(nn.Module):
    """Convolution, batch normalization with stored statistics, ReLU. The normalization is folded into the kernel."""

    features: int
    kernel: tuple[int, int]
    strides: int = 1
    padding: str = "SAME"

    @nn.compact
    def __call__(self, x) -> jax.Array:
        ones, zeros, c = nn.initializers.ones, nn.initializers.zeros, self.features
        kernel = self.param("kernel", nn.initializers.he_normal(), (*self.kernel, x.shape[-1], c))
        scale, bias = self.param("scale", ones, (c,)), self.param("bias", zeros, (c,))
        mean, var = self.param("mean", zeros, (c,)), self.param("var", ones, (c,))
        factor = scale * jax.lax.rsqrt(var + 1e-3)
        options = {"dimension_numbers": ("NHWC", "HWIO", "NHWC"), "precision": _PRECISION}
        x = jax.lax.conv_general_dilated(x, kernel * factor, (self.strides,) * 2, self.padding, **options)
        return nn.relu(x + (bias - mean * factor))


_WINDOW = {"window_shape": (3, 3), "strides": (1, 1), "padding": "SAME"}
_average_pool = functools.partial(nn.avg_pool, **_WINDOW, count_include_pad=False)
_max_pool = functools.partial(nn.max_pool, **_WINDOW)
_shrink = functools.partial(nn.max_pool, window_shape=(3, 3), strides=(2, 2), padding="VALID")
_POINT, _ROW, _COLUMN, _FORK = (1, 1), (1, 7), (7, 1), (384, "fork")


def _block_a(pool_features: int) -> tuple:
    five = ("branch5x5", (48, _POINT), (64, (5, 5)))
    twice = ("branch3x3dbl", (64, _POINT), (96, (3, 3)), (96, (3, 3)))
    return ("branch1x1", (64, _POINT)), five, twice, ("branch_pool", _average_pool, (pool_features, _POINT))


def _block_c(width: int) -> tuple:
    seven = ("branch7x7", (width, _POINT), (width, _ROW), (192, _COLUMN))
    twice = ("branch7x7dbl", (width, _POINT), (width, _COLUMN), (width, _ROW), (width, _COLUMN), (192, _ROW))
    return ("branch1x1", (192, _POINT)), seven, twice, ("branch_pool", _average_pool, (192, _POINT))


def _block_e(pool: Callable) -> tuple:
    three, twice = ("branch3x3", (384, _POINT), _FORK), ("branch3x3dbl", (448, _POINT), (384, (3, 3)), _FORK)
    return ("branch1x1", (320, _POINT)), three, twice, ("branch_pool", pool, (192, _POINT))


# The branches of each block: (name, *layers). A layer is a pooling function, or the fields of a convolution: (features,
# kernel[, strides, padding]).
_BLOCKS: dict[str, tuple] = {
    "Mixed_5b": _block_a(32),
    "Mixed_5c": _block_a(64),
    "Mixed_5d": _block_a(64),
    "Mixed_6a": (
        ("branch3x3", (384, (3, 3), 2, "VALID")),
        ("branch3x3dbl", (64, _POINT), (96, (3, 3)), (96, (3, 3), 2, "VALID")),
        ("pool", _shrink),
    ),
    "Mixed_6b": _block_c(128),
    "Mixed_6c": _block_c(160),
    "Mixed_6d": _block_c(160),
    "Mixed_6e": _block_c(192),
    "Mixed_7a": (
        ("branch3x3", (192, _POINT), (320, (3, 3), 2, "VALID")),
        ("branch7x7x3", (192, _POINT), (192, _ROW), (192, _COLUMN), (192, (3, 3), 2, "VALID")),
        ("pool", _shrink),
    ),
    "Mixed_7b": _block_e(_average_pool),
    "Mixed_7c": _block_e(_max_pool),
}


class Block(nn.Module):
    """Concatenates the outputs of parallel branches. A fork ends a branch with two parallel convolutions, 1x3 and 3x1.

    A convolution has the name of its branch, with _1, _2, ... if the branch has several convolutions.
    """

    branches: tuple

    @nn.compact
    def __call__(self, x) -> jax.Array:
        outputs = []
        for name, *layers in self.branches:
            y, number, count = x, 0, sum(not callable(layer) for layer in layers)
            for layer in layers:
                if callable(layer):
                    y = layer(y)
                    continue
                number += 1
                conv = f"{name}_{number}" if count > 1 else name
                if layer == _FORK:
                    pair = [Conv(384, kernel, name=conv + end)(y) for end, kernel in (("a", (1, 3)), ("b", (3, 1)))]
                    y = jnp.concatenate(pair, axis=-1)
                else:
                    y = Conv(*layer, name=conv)(y)
            outputs.append(y)
        return jnp.concatenate(outputs, axis=-1)


class Inception(nn.Module):
    """Computes the features "pool" and "spatial" of images, float32 [B, 299, 299, 3], scaled to about [-1, 1].

    pool: [B, 2048], TensorFlow's pool_3. spatial: [B, 2023], the first 7 channels of TensorFlow's mixed_6/conv at 17x17
    positions. The last layer, from pool to 1008 classes, is called only to create its parameters.
    """

    @nn.compact
    def __call__(self, x) -> dict[str, jax.Array]:
        """x: float32 [B, 299, 299, 3]."""
        x = Conv(32, (3, 3), 2, "VALID", name="Conv2d_1a_3x3")(x)
        x = Conv(32, (3, 3), 1, "VALID", name="Conv2d_2a_3x3")(x)
        x = _shrink(Conv(64, (3, 3), name="Conv2d_2b_3x3")(x))
        x = Conv(80, (1, 1), name="Conv2d_3b_1x1")(x)
        x = _shrink(Conv(192, (3, 3), 1, "VALID", name="Conv2d_4a_3x3")(x))
        outputs = {}
        for name, branches in _BLOCKS.items():
            x = outputs[name] = Block(branches, name=name)(x)
        spatial = outputs[_SPATIAL_BLOCK][..., :_SPATIAL_CHANNELS].reshape(len(x), -1)
        pool = x.mean(axis=(1, 2))
        nn.Dense(1008, use_bias=False, name="fc")(pool)
        self.param("fc_bias", nn.initializers.zeros, (1008,))
        return {"pool": pool, "spatial": spatial}


# ---- Weights


def load_inception(path: str | os.PathLike) -> tuple[dict, str, bool]:
    """Returns (parameters of `Inception`, the file's SHA-256, whether published FIDs use the file).

    path: `pt_inception-2015-12-05-6726825d.pth` (also named `weights-inception...`, by torch-fidelity), a safetensors file
    with the same tensors, or `classify_image_graph_def.pb`.
    Raises: PretrainedError, one line, if the file does not exist or contains another network.
    """
    path = local_path(path)
    if not path.is_file():
        raise PretrainedError(f"{path}: no such file; download the weights of FID's Inception, {DOWNLOAD_SOURCES}")
    content = path.read_bytes()
    digest, md5 = hashlib.sha256(content).hexdigest(), hashlib.md5(content).hexdigest()
    is_graph = content.startswith(b"\n")  # the first field of a GraphDef holds the nodes
    tensors = _read_graph(path, content) if is_graph else parameters.open_tensors(path)
    tensor_name = _graph_name if is_graph else _torch_name
    shapes = {name: shape for name, shape in tensors.shapes.items() if not name.endswith("num_batches_tracked")}
    tensors = dataclasses.replace(tensors, shapes=shapes)
    image = jax.ShapeDtypeStruct((1, IMAGE_SIZE, IMAGE_SIZE, 3), jnp.float32)
    tree = jax.eval_shape(Inception().init, jax.random.key(0), image)
    shapes = parameters.flat_shapes(tree["params"])
    convert = parameters.keep_layout if is_graph else parameters.from_torch
    params = parameters.build_params(path, shapes, tensors, tensor_name, convert)
    return params, digest, digest == _PORT_SHA256 or md5 == _GRAPH_MD5


def _torch_name(path: parameters.Path) -> str:
    return _NAMES[path[0]][0] if path[0] in _NAMES else ".".join((*path[:-1], _NAMES[path[-1]][0]))


def _graph_name(path: parameters.Path) -> str:
    """Returns a parameter's name in the graph, where TensorFlow numbers layers (conv, conv_1 ...), towers and blocks."""
    if path[0] in _NAMES:
        return _NAMES[path[0]][1]
    module, *branch, leaf = path
    if not branch:
        scope = _numbered("conv", _STEM.index(module))
    else:
        towers = [name for name, *layers in _BLOCKS[module] if len(layers) > 1]  # branches with several layers
        scope = f"{_numbered('mixed', list(_BLOCKS).index(module))}/{_tower(branch[0], towers)}"
    return f"{scope}/{_NAMES[leaf][1]}"


def _numbered(name: str, i: int) -> str:
    return f"{name}_{i}" if i else name


def _tower(branch: str, towers: list[str]) -> str:
    """Returns the scope of a convolution in its block; only branches with several layers (a pool counts) have a tower."""
    match = re.fullmatch(r"(\w+?)(?:_(\d)([ab]?))?", branch)
    assert match is not None  # every convolution in a branch has such a name
    name, position, fork = match.groups()
    if name not in towers:
        return "conv"
    conv = "mixed/" + _numbered("conv", "ab".index(fork)) if fork else _numbered("conv", int(position or 1) - 1)
    return f"{_numbered('tower', towers.index(name))}/{conv}"


def _read_graph(path: pathlib.Path, content: bytes) -> parameters.Tensors:
    """Reads the variables of a frozen TensorFlow graph, which are stored as constants. Raises: PretrainedError."""
    with needs_extra(f"{path} needs TensorFlow", "tfds", PretrainedError):
        import tensorflow as tf
    graph = tf.compat.v1.GraphDef()
    try:
        graph.ParseFromString(content)
    except Exception as error:  # protobuf's errors have no common public class
        raise PretrainedError(f"{path} cannot be read as a TensorFlow graph ({error}); download it again") from None
    ends = tuple(name for _, name in _NAMES.values())
    nodes = {n.name: n.attr["value"].tensor for n in graph.node if n.op == "Const" and n.name.endswith(ends)}
    shapes = {name: tuple(dim.size for dim in tensor.tensor_shape.dim) for name, tensor in nodes.items()}
    return parameters.Tensors("TensorFlow", shapes, lambda name: tf.make_ndarray(nodes[name]))
