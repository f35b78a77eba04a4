"""Tensors of files from untrusted sources, read without executing their contents.

The formats are safetensors, PyTorch's archives through its weights-only loader, and TensorFlow's checkpoints. A format is
detected from a file's first bytes, not from its name.
"""

from __future__ import annotations

import json
import pathlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from diffusion_jax.errors import PretrainedError
from diffusion_jax.files import atomic_write

__all__ = ["Tensors", "is_tensorflow_checkpoint", "open_tensors", "read_json", "require_module", "save_tensors"]

_NOT_WEIGHTS = {
    b"version https://git-lfs": "a git-lfs pointer, not the file itself; run git lfs pull",
    b"<!DOCTYPE": "a web page, not weights; download the file again",
    b"<html": "a web page, not weights; download the file again",
}


class Tensors(Mapping):
    """Tensors by name. Each is read at its first use, and may be read once only.

    framework: "safetensors", "PyTorch" or "TensorFlow". shapes: of all tensors, known without reading them. metadata: of a
    safetensors file.
    """

    def __init__(
        self, framework: str, shapes: Mapping[str, tuple[int, ...]], read: Callable[[str], np.ndarray], metadata=None
    ):
        self.framework, self.shapes, self.metadata = framework, dict(shapes), dict(metadata or {})
        self._read = read

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self.shapes:
            raise KeyError(name)
        return self._read(name)

    def __contains__(self, name: object) -> bool:  # a Mapping's own would read it
        return name in self.shapes

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def is_tensorflow_checkpoint(path: pathlib.Path) -> bool:
    """Whether a path is the prefix of a TensorFlow checkpoint: .../model.ckpt-N, if model.ckpt-N.index exists."""
    return path.with_name(path.name + ".index").is_file()


def open_tensors(path: pathlib.Path, ema: bool = True) -> Tensors:
    """The tensors of a file, or of a TensorFlow checkpoint's prefix. Raises: PretrainedError."""
    if is_tensorflow_checkpoint(path):
        return _open_tensorflow(path, ema)
    if not path.is_file():
        raise PretrainedError(f"{path}: no such file")
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(32)
    for start, explanation in _NOT_WEIGHTS.items():
        if head.startswith(start):
            raise PretrainedError(f"{path} is {explanation}")
    length = int.from_bytes(head[:8], "little")  # its first byte may be that of a pickle, so this is checked first
    if head[8:9] == b"{" and length < 2**30:
        if 8 + length > size:
            raise PretrainedError(f"{path} is a truncated safetensors file; download it again")
        return _open_safetensors(path)
    if head[:2] == b"PK" or head[:1] == b"\x80":
        return _open_torch(path)
    raise PretrainedError(
        f"{path} ({size:,} bytes) is not a file of weights: neither safetensors nor PyTorch's; give a TensorFlow checkpoint "
        "by its prefix, .../model.ckpt-N"
    )


def _open_safetensors(path: pathlib.Path) -> Tensors:
    safetensors = require_module("safetensors", "safetensors")
    try:
        file = safetensors.safe_open(str(path), framework="numpy")
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    except (safetensors.SafetensorError, OSError) as error:
        raise PretrainedError(f"{path} is a corrupted safetensors file ({error}); download it again") from None

    def read(name):
        try:
            return file.get_tensor(name)
        except Exception as error:  # bfloat16 and narrower types, which NumPy may not have
            raise PretrainedError(
                f"{path}: {name} cannot be read ({str(error)[:100]}); convert it to float32"
            ) from None

    return Tensors("safetensors", shapes, read, file.metadata())


def save_tensors(tensors: Mapping[str, np.ndarray], path: pathlib.Path, metadata: Mapping[str, str]) -> None:
    """Writes a safetensors file completely or not at all. Raises: PretrainedError, OSError."""
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    try:
        with atomic_write(path) as temporary:
            save_file(dict(tensors), temporary, dict(metadata))
    except SafetensorError as error:
        raise PretrainedError(f"{path} cannot be written: {error}") from None


def _open_torch(path: pathlib.Path) -> Tensors:
    torch = require_module("torch", "PyTorch")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about files that it then rejects
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zipfile and PyTorch raise many types
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if "Weights only load failed" in str(error) and "Unsupported" in str(error):
            reason = "it contains more than tensors, and a pickle can run any code; save a plain state dict"
        raise PretrainedError(f"{path} cannot be read as PyTorch weights: {reason[:200]}") from None
    if isinstance(loaded, Mapping) and isinstance(loaded.get("state_dict"), Mapping):
        loaded = loaded["state_dict"]
    has_names = isinstance(loaded, Mapping) and all(isinstance(name, str) for name in loaded)
    if not has_names or not all(isinstance(value, torch.Tensor) for value in loaded.values()):
        raise PretrainedError(f"{path} contains a {type(loaded).__name__}, not a state dict (tensors by name)")

    shapes = {name: tuple(value.shape) for name, value in loaded.items()}
    loaded = dict(loaded)

    def read(name):
        value = loaded.pop(name)  # so that memory holds the weights only once
        return (value.detach().float() if value.is_floating_point() else value).numpy()

    return Tensors("PyTorch", shapes, read)


_EMA_SUFFIX = "/ExponentialMovingAverage"


def _open_tensorflow(path: pathlib.Path, ema: bool) -> Tensors:
    tf = require_module("tensorflow", "TensorFlow")
    try:
        reader = tf.train.load_checkpoint(str(path))
        shapes = reader.get_variable_to_shape_map()
    except Exception as error:  # tf.errors and its base classes
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise PretrainedError(f"{path} cannot be read as a TensorFlow checkpoint: {reason[:200]}") from None
    averages = {name for name in shapes if name.endswith(_EMA_SUFFIX)}
    if ema and not averages:
        raise PretrainedError(f"{path} contains no moving average; load the raw weights with ema=False")
    # A checkpoint also contains Adam's moments and the step; a weight has a moving average, or is no optimizer variable.
    variables = {name.removesuffix(_EMA_SUFFIX): name for name in averages}
    if not ema:
        variables = {
            name: name for name in shapes if name in variables or (not averages and not _is_optimizer_variable(name))
        }

    def read(name):
        try:
            return reader.get_tensor(variables[name])
        except Exception as error:
            raise PretrainedError(f"{path}: {name} cannot be read ({str(error)[:100]}); is a file missing?") from None

    return Tensors("TensorFlow", {name: tuple(shapes[variable]) for name, variable in variables.items()}, read)


def _is_optimizer_variable(name: str) -> bool:
    return name.split("/")[-1].startswith("Adam") or "/" not in name


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """A JSON object. Raises: PretrainedError."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise PretrainedError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(content, dict):
        raise PretrainedError(f"{path} is not a JSON object")
    return content


def require_module(module: str, name: str):
    """The imported module, which only some files need. Raises: PretrainedError if it is not installed."""
    try:
        return __import__(module)
    except ImportError:
        raise PretrainedError(f"reading this file needs {name}: pip install {module}") from None
