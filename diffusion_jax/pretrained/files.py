"""Reading tensors out of files that strangers made, never by running what they hold: safetensors, PyTorch's archives through
its weights-only loader, and TensorFlow's checkpoints.

What a file is, is seen from its first bytes, not from its name.
"""

from __future__ import annotations

import json
import pathlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from diffusion_jax.errors import PretrainedError

_NOT_WEIGHTS = {
    b"version https://git-lfs": "a pointer of git-lfs, not the file itself; run git lfs pull",
    b"<!DOCTYPE": "a web page; was the download refused?",
    b"<html": "a web page; was the download refused?",
}


class Tensors(Mapping):
    """Tensors by name, each read when it is asked for, which may be done once; `shapes` are known at once."""

    def __init__(
        self, source: str, shapes: Mapping[str, tuple[int, ...]], read: Callable[[str], np.ndarray], metadata=None
    ):
        self.source, self.shapes, self.metadata = source, dict(shapes), dict(metadata or {})
        self._read = read

    def __getitem__(self, name: str) -> np.ndarray:
        self.shapes[name]  # a KeyError for a name that is not there
        return self._read(name)

    def __contains__(self, name: object) -> bool:  # a Mapping's own would read it
        return name in self.shapes

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def is_tensorflow(path: pathlib.Path) -> bool:
    """Whether a path is a TensorFlow checkpoint's: .../model.ckpt-N, beside which lies model.ckpt-N.index."""
    return path.with_name(path.name + ".index").is_file()


def open_tensors(path: pathlib.Path, ema: bool = True) -> Tensors:
    """The tensors of a file, or of a TensorFlow checkpoint's prefix. Raises: PretrainedError."""
    if is_tensorflow(path):
        return _open_tensorflow(path, ema)
    if not path.is_file():
        raise PretrainedError(f"{path}: no such file")
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(32)
    for start, what in _NOT_WEIGHTS.items():
        if head.startswith(start):
            raise PretrainedError(f"{path} is {what}")
    length = int.from_bytes(head[:8], "little")  # may begin as a pickle does: this is looked at first
    if head[8:9] == b"{" and length < 2**30:
        if 8 + length > size:
            raise PretrainedError(f"{path} is a truncated safetensors file; download it again")
        return _open_safetensors(path)
    if head[:2] == b"PK" or head[:1] == b"\x80":
        return _open_torch(path)
    raise PretrainedError(
        f"{path} ({size:,} bytes) is no file of weights: neither safetensors nor PyTorch's; a TensorFlow checkpoint is named "
        "by its prefix, .../model.ckpt-N"
    )


def _open_safetensors(path: pathlib.Path) -> Tensors:
    safetensors = import_or_refuse("safetensors", "safetensors")
    try:
        file = safetensors.safe_open(str(path), framework="numpy")
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    except (safetensors.SafetensorError, OSError) as error:
        raise PretrainedError(f"{path} is a damaged safetensors file ({error}); download it again") from None

    def read(name):
        try:
            return file.get_tensor(name)
        except Exception as error:  # bfloat16 and narrower types, which NumPy may not have
            raise PretrainedError(
                f"{path}: {name} cannot be read ({str(error)[:100]}); convert it to float32"
            ) from None

    return Tensors("safetensors", shapes, read, file.metadata())


def save_tensors(tensors: Mapping[str, np.ndarray], path: pathlib.Path, metadata: Mapping[str, str]) -> None:
    """A safetensors file, whole or not at all. Raises: PretrainedError, OSError."""
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    partial = path.with_name(f"{path.name}.partial")
    try:
        save_file(dict(tensors), partial, dict(metadata))
    except SafetensorError as error:
        raise PretrainedError(f"{path} cannot be written: {error}") from None
    partial.replace(path)


def _open_torch(path: pathlib.Path) -> Tensors:
    torch = import_or_refuse("torch", "PyTorch")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what it then refuses
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zipfile and PyTorch raise many types
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if "Weights only load failed" in str(error) and "Unsupported" in str(error):
            reason = "it holds more than tensors, and a pickle can run any code: only plain state dicts are read"
        raise PretrainedError(f"{path} cannot be read as PyTorch weights: {reason[:200]}") from None
    if isinstance(loaded, Mapping) and isinstance(loaded.get("state_dict"), Mapping):
        loaded = loaded["state_dict"]
    plain = isinstance(loaded, Mapping) and all(isinstance(name, str) for name in loaded)
    if not plain or not all(isinstance(value, torch.Tensor) for value in loaded.values()):
        raise PretrainedError(f"{path} holds no state dict (tensors by name), but a {type(loaded).__name__}")

    shapes = {name: tuple(value.shape) for name, value in loaded.items()}
    loaded = dict(loaded)

    def read(name):
        value = loaded.pop(name)  # so that weights are not held twice
        return (value.detach().float() if value.is_floating_point() else value).numpy()

    return Tensors("PyTorch", shapes, read)


_SHADOW = "/ExponentialMovingAverage"


def _open_tensorflow(path: pathlib.Path, ema: bool) -> Tensors:
    tf = import_or_refuse("tensorflow", "TensorFlow")
    try:
        reader = tf.train.load_checkpoint(str(path))
        shapes = reader.get_variable_to_shape_map()
    except Exception as error:  # tf.errors and its base classes
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise PretrainedError(f"{path} cannot be read as a TensorFlow checkpoint: {reason[:200]}") from None
    shadows = {name for name in shapes if name.endswith(_SHADOW)}
    if ema and not shadows:
        raise PretrainedError(f"{path} holds no moving average; load the weights themselves with ema=False")
    # Adam's moments and the step stand beside the weights; a weight is what has a shadow, or lies in the model's scope.
    found = {name.removesuffix(_SHADOW): name for name in shadows}
    if not ema:
        found = {name: name for name in shapes if name in found or (not shadows and not _is_slot(name))}

    def read(name):
        try:
            return reader.get_tensor(found[name])
        except Exception as error:
            raise PretrainedError(f"{path}: {name} cannot be read ({str(error)[:100]}); is a file missing?") from None

    return Tensors("TensorFlow", {name: tuple(shapes[found[name]]) for name in found}, read)


def _is_slot(name: str) -> bool:
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


def import_or_refuse(module: str, name: str):
    """A module that only some files need. Raises: PretrainedError where it is not installed."""
    try:
        return __import__(module)
    except ImportError:
        raise PretrainedError(f"reading this file needs {name}: pip install {module}") from None
