"""The weights of the FID's Inception network: its PyTorch port's file, or the original TensorFlow graph."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import pathlib
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from diffusion_jax.errors import PretrainedError
from diffusion_jax.models.inception import IMAGE_SIZE, Inception
from diffusion_jax.pretrained import parameters
from diffusion_jax.storage.downloads import local_path

__all__ = ["DOWNLOAD_SOURCES", "InceptionWeights", "load_inception"]

# Digests of the two files with which published FIDs are computed.
_PORT_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
_GRAPH_MD5 = "e6bb154e85f5d4331c22abcddb5dcf31"
# The sources of the two files, for messages.
DOWNLOAD_SOURCES = (
    "pt_inception-2015-12-05-6726825d.pth of pytorch-fid's releases, "
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth, or "
    "classify_image_graph_def.pb, out of TensorFlow's inception-2015-12-05.tgz"
)
_LEAVES = {
    "kernel": "conv.weight",
    "scale": "bn.weight",
    "bias": "bn.bias",
    "mean": "bn.running_mean",
    "var": "bn.running_var",
}
_GRAPH_LEAVES = {
    "kernel": "conv2d_params",
    "scale": "batchnorm/gamma",
    "bias": "batchnorm/beta",
    "mean": "batchnorm/moving_mean",
    "var": "batchnorm/moving_variance",
}
_STEM = ("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "Conv2d_3b_1x1", "Conv2d_4a_3x3")
_A = ("branch5x5", "branch3x3dbl", "branch_pool")
_C = ("branch7x7", "branch7x7dbl", "branch_pool")
_E = ("branch3x3", "branch3x3dbl", "branch_pool")
# The towers of each block, in TensorFlow's order.
_BLOCKS = {
    "Mixed_5b": _A,
    "Mixed_5c": _A,
    "Mixed_5d": _A,
    "Mixed_6a": ("branch3x3dbl",),
    "Mixed_6b": _C,
    "Mixed_6c": _C,
    "Mixed_6d": _C,
    "Mixed_6e": _C,
    "Mixed_7a": ("branch3x3", "branch7x7x3"),
    "Mixed_7b": _E,
    "Mixed_7c": _E,
}


class InceptionWeights(NamedTuple):
    """The weights of a file.

    params: of `models.inception.Inception`. digest: SHA-256 of the file. published: whether it is one of the two files with
    which published FIDs are computed.
    """

    params: Any
    digest: str
    published: bool


def load_inception(path: str | os.PathLike) -> InceptionWeights:
    """The weights of the Inception network of FID.

    path: `pt_inception-2015-12-05-6726825d.pth` (torch-fidelity's `weights-inception...` is the same), its tensors as
    safetensors, or `classify_image_graph_def.pb`.
    Raises: PretrainedError, one line, for a file that does not exist or is of another network.
    """
    path = local_path(path)
    if not path.is_file():
        raise PretrainedError(f"{path}: no such file; download the weights of FID's Inception, {DOWNLOAD_SOURCES}")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        file.seek(0)
        md5 = hashlib.file_digest(file, "md5").hexdigest()
        file.seek(0)
        is_graph = file.read(1) == b"\n"  # the first field of a GraphDef: its nodes
    tensors, name_of = (_read_graph(path), _graph_name) if is_graph else (parameters.open_tensors(path), _torch_name)
    shapes = {name: shape for name, shape in tensors.shapes.items() if not name.endswith("num_batches_tracked")}
    tensors = dataclasses.replace(tensors, shapes=shapes)
    image = jax.ShapeDtypeStruct((1, IMAGE_SIZE, IMAGE_SIZE, 3), jnp.float32)
    tree = jax.eval_shape(Inception().init, jax.random.key(0), image)
    shapes = parameters.flat_shapes(tree["params"])
    convert = parameters.keep_layout if is_graph else parameters.from_torch
    params = parameters.build_params(path, shapes, tensors, name_of, convert)
    return InceptionWeights(params, digest, digest == _PORT_SHA256 or md5 == _GRAPH_MD5)


def _torch_name(path: parameters.Path) -> str:
    if path[0].startswith("fc"):
        return "fc.bias" if path == ("fc_bias",) else "fc.weight"
    *module, leaf = path
    return ".".join((*module, _LEAVES[leaf]))


def _graph_name(path: parameters.Path) -> str:
    """The name in the graph, where TensorFlow numbers layers in a scope (conv, conv_1 ...), towers and blocks (mixed ...)."""
    if path[0].startswith("fc"):
        return "softmax/biases" if path == ("fc_bias",) else "softmax/weights"
    module, *branch, leaf = path
    if not branch:
        scope = _numbered("conv", _STEM.index(module))
    else:
        scope = f"{_numbered('mixed', list(_BLOCKS).index(module))}/{_tower(branch[0], _BLOCKS[module])}"
    return f"{scope}/{_GRAPH_LEAVES[leaf]}"


def _numbered(name: str, i: int) -> str:
    return f"{name}_{i}" if i else name


def _tower(branch: str, towers: tuple[str, ...]) -> str:
    """A branch's scope in its block: a single convolution is outside of the towers, which are chains or pools."""
    match = re.fullmatch(r"(\w+?)(?:_(\d)([ab]?))?", branch)
    assert match is not None  # every branch of `models.inception` has such a name
    name, position, fork = match.groups()
    if name not in towers:
        return "conv"
    conv = "mixed/" + _numbered("conv", "ab".index(fork)) if fork else _numbered("conv", int(position or 1) - 1)
    return f"{_numbered('tower', towers.index(name))}/{conv}"


def _read_graph(path: pathlib.Path) -> parameters.Tensors:
    """The variables of a frozen TensorFlow graph, which are its constants. Raises: PretrainedError."""
    tf = parameters.require_module("tensorflow", "TensorFlow")
    graph = tf.compat.v1.GraphDef()
    try:
        graph.ParseFromString(path.read_bytes())
    except Exception as error:  # protobuf's errors have no common public class
        raise PretrainedError(f"{path} cannot be read as a TensorFlow graph ({error}); download it again") from None
    ends = (*_GRAPH_LEAVES.values(), "softmax/weights", "softmax/biases")
    nodes = {n.name: n.attr["value"].tensor for n in graph.node if n.op == "Const" and n.name.endswith(ends)}
    shapes = {name: tuple(dim.size for dim in tensor.tensor_shape.dim) for name, tensor in nodes.items()}
    return parameters.Tensors("TensorFlow", shapes, lambda name: tf.make_ndarray(nodes[name]))
