"""Reads PyTorch's files and EDM's pickles without running code from the files. Needs no PyTorch.

A pickle is a program: loading it in the usual way calls any function that it names, and EDM's pickles (Karras et al. 2022)
carry source code for `exec`. `read_pickle` interprets the program without importing anything. It accepts the names of a
few functions and classes, and makes an inert value for each: a container, `Tensor` or `Record`. Other names raise an error.
"""

from __future__ import annotations

import dataclasses
import io
import json
import math
import pathlib
import pickletools
import struct
import zipfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any, BinaryIO

import jax.numpy as jnp
import numpy as np

from diffusion_jax.errors import PretrainedError, first_line

_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # the first two pickles of torch.save before PyTorch 1.6
_STORAGES = {
    "Double": "<f8", "Float": "<f4", "Half": "<f2", "BFloat16": jnp.bfloat16, "Long": "<i8", "Int": "<i4", "Short": "<i2",
    "Char": "<i1", "Byte": "<u1", "Bool": "?",
}  # fmt: skip
_DTYPES = {f"torch.{name}Storage": np.dtype(dtype) for name, dtype in _STORAGES.items()}
_CONSTANTS = set(
    "INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE "
    "SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8".split()
)


@dataclasses.dataclass
class Record:
    """An object of a class that is not imported. kind: the class's name. state: its attributes, usually a dict."""

    kind: str
    state: Any = None


@dataclasses.dataclass
class Storage:
    """Numbers in a file. read: () -> 1-D array of `size` numbers; None until the position in the file is known."""

    dtype: np.dtype
    size: int
    read: Callable[[], np.ndarray] | None = None


@dataclasses.dataclass
class Tensor:
    """A view of a storage. offset, strides: in numbers, not bytes. Raises: ValueError for a view outside of the storage."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def __post_init__(self):
        numbers = (self.offset, *self.shape, *self.strides)
        if len(self.shape) != len(self.strides) or not all(isinstance(n, int) and n >= 0 for n in numbers):
            raise ValueError("a tensor has a shape or strides that are not whole numbers of at least 0")
        last = self.offset + sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))
        if (math.prod(self.shape) and last >= self.storage.size) or math.prod(self.shape) > self.storage.size:
            raise ValueError(f"a tensor {list(self.shape)} does not fit into its {self.storage.size:,} numbers")

    def numpy(self) -> np.ndarray:
        """Reads the values; float dtypes become float32."""
        if self.storage.read is None:
            raise ValueError("the numbers of a tensor are missing")
        if (values := self.storage.read()).size != self.storage.size:
            raise ValueError("the file is truncated")
        strides = tuple(stride * values.itemsize for stride in self.strides)
        view = np.lib.stride_tricks.as_strided(values[self.offset :], self.shape, strides, writeable=False)
        return np.array(view, np.float32 if jnp.issubdtype(view.dtype, jnp.floating) else view.dtype)


@dataclasses.dataclass(frozen=True)
class _Name:
    """The name of an allowed function or class in a pickle; `_CALLS` and `_CLASSES` implement most of them."""

    name: str


@dataclasses.dataclass
class _Array:
    """A NumPy array or dtype whose state is set by a later operation of the pickle."""

    value: Any = None


def _rebuild_tensor(storage, offset, shape, strides, *gradient) -> Tensor:
    if not isinstance(storage, Storage):
        raise ValueError("a tensor has no storage")
    return Tensor(storage, offset, tuple(shape), tuple(strides))


def _persistent_object(meta) -> Record:
    """Returns a record for an object whose class has its source, meta["module_src"], in the file; the source is not used."""
    return Record(_text(meta["class_name"]), meta["state"])


# Types are checked before values are compared, hashed or printed, because these operations would never end for a chain of
# lists in which each list holds the next list many times.
def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"a {type(value).__name__} in place of a text")
    return value


def _keys(values: Sequence[Any]) -> Sequence[Any]:
    """Returns keys of a dict, or elements of a set. Raises: ValueError for values other than texts and numbers."""
    if wrong := [value for value in values if not isinstance(value, str | bytes | int | float | None)]:
        raise ValueError(f"a {type(wrong[0]).__name__} as a key")
    return values


def _dict(pairs: Sequence[Any] = ()) -> dict[Any, Any]:
    found = [(key, value) for key, value in pairs]
    _keys([key for key, _ in found])
    return dict(found)


def _dtype(name, *options) -> _Array:
    dtype = np.dtype(_text(name))
    if dtype.kind not in "biufSU":
        raise ValueError(f"an array of {name}")
    return _Array(dtype)


def _scalar(dtype, content) -> Any:
    return np.frombuffer(content, dtype.value, 1)[0].item()


def _load_from_bytes(content) -> Any:
    return _read_legacy(io.BytesIO(content), lambda start, count: content[start : start + count])


_CALLS: dict[str, Callable] = {
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_parameter": lambda data, *gradient: data,
    "torch.storage._load_from_bytes": _load_from_bytes,
    "torch.Size": lambda sizes: tuple(sizes),
    "torch.device": lambda *names: Record("torch.device", names),
    "torch_utils.persistence._reconstruct_persistent_obj": _persistent_object,
    "collections.OrderedDict": _dict,
    "builtins.set": lambda items=(): set(_keys(items)),
    "_codecs.encode": lambda text, encoding: text.encode("latin-1"),  # bytes in protocol 2
    "numpy.ndarray": lambda *shape: _Array(),
    "numpy.dtype": _dtype,
    **{f"numpy.{core}.multiarray._reconstruct": lambda *shape: _Array() for core in ("core", "_core")},
    **{f"numpy.{core}.multiarray.scalar": _scalar for core in ("core", "_core")},
    "copyreg._reconstructor": lambda kind, base, state: _new(kind),
}
_CLASSES: dict[str, Callable] = {"dnnlib.util.EasyDict": dict, "collections.OrderedDict": dict}
_PREFIXES = ("torch.nn.modules.",)  # the prefix of classes that become records
_OTHER_NAMES = {
    *_DTYPES,
    "builtins.object",
    *(f"torch.{name}" for name in "float64 float32 float16 bfloat16 int64".split()),
}


def _find(module: str, name: str) -> _Name:
    full = f"{module}.{name}".replace("__builtin__.", "builtins.").replace("copy_reg.", "copyreg.")
    if full in _CALLS or full in _CLASSES or full in _OTHER_NAMES or full.startswith(_PREFIXES):
        return _Name(full)
    raise PretrainedError(
        f"it contains more than tensors: its pickle asks for {full}, which is not read, because a pickle can run any code; "
        "save a plain state dict"
    )


def _call(function, arguments) -> Any:
    if not isinstance(function, _Name) or function.name not in _CALLS or not isinstance(arguments, tuple):
        raise ValueError(f"a call of {getattr(function, 'name', type(function).__name__)}")
    return _CALLS[function.name](*arguments)


def _new(kind) -> Any:
    if not isinstance(kind, _Name) or not (kind.name in _CLASSES or kind.name.startswith(_PREFIXES)):
        raise ValueError(f"an object of {getattr(kind, 'name', type(kind).__name__)}")
    return _CLASSES[kind.name]() if kind.name in _CLASSES else Record(kind.name)


def _set_state(target, state) -> None:
    if isinstance(target, Record):
        target.state = state
    elif isinstance(target, _Array) and isinstance(target.value, np.dtype):  # (version, byte order, ...)
        target.value = target.value.newbyteorder(state[1]) if state[1] in "<>" else target.value
    elif isinstance(target, _Array):
        _, shape, dtype, is_fortran, content = state
        target.value = np.frombuffer(content, dtype.value).reshape(shape, order="F" if is_fortran else "C")
    elif not isinstance(target, dict):  # the attributes of a dict, unlike its items, are left out
        raise ValueError(f"a state of {type(target).__name__}")


def read_pickle(file: BinaryIO, find_storage: Callable[[Any], Storage] | None = None) -> Any:
    """Interprets one pickle of a file and returns its value. find_storage: persistent id -> storage.

    Raises: PretrainedError for a name that is not read; ValueError, IndexError, TypeError and others for a corrupted pickle.
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}

    def take() -> list[Any]:
        """Removes and returns the values above the last mark."""
        start = marks.pop()
        taken = stack[start:]
        del stack[start:]
        return taken

    def pairs(values: list[Any]) -> Iterator[tuple[Any, Any]]:
        return zip(_keys(values[::2]), values[1::2], strict=True)

    def extend(kind: type, values: Any) -> None:
        """Adds values to the container on top of the stack."""
        if type(stack[-1]) is not kind:
            raise ValueError(f"items of {type(stack[-1]).__name__}")
        getattr(stack[-1], "extend" if kind is list else "update")(values)

    operations: dict[str, Callable[[Any], Any]] = {
        **dict.fromkeys(("PROTO", "FRAME"), lambda _: None),
        **{name: stack.append for name in _CONSTANTS},
        "MARK": lambda _: marks.append(len(stack)),
        "POP": lambda _: stack.pop(),
        "POP_MARK": lambda _: take(),
        "DUP": lambda _: stack.append(stack[-1]),
        "NONE": stack.append,
        "NEWTRUE": lambda _: stack.append(True),
        "NEWFALSE": lambda _: stack.append(False),
        "EMPTY_LIST": lambda _: stack.append([]),
        "EMPTY_DICT": lambda _: stack.append({}),
        "EMPTY_TUPLE": lambda _: stack.append(()),
        "EMPTY_SET": lambda _: stack.append(set()),
        "LIST": lambda _: stack.append(take()),
        "DICT": lambda _: stack.append(dict(pairs(take()))),
        "TUPLE": lambda _: stack.append(tuple(take())),
        "FROZENSET": lambda _: stack.append(frozenset(_keys(take()))),
        "TUPLE1": lambda _: stack.append((stack.pop(),)),
        "TUPLE2": lambda _: stack.append(tuple(stack.pop() for _ in "12")[::-1]),
        "TUPLE3": lambda _: stack.append(tuple(stack.pop() for _ in "123")[::-1]),
        "APPEND": lambda _: extend(list, [stack.pop()]),
        "APPENDS": lambda _: extend(list, take()),
        "SETITEM": lambda _: extend(dict, pairs([stack.pop() for _ in "12"][::-1])),
        "SETITEMS": lambda _: extend(dict, pairs(take())),
        "ADDITEMS": lambda _: extend(set, _keys(take())),
        **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT"), lambda place: memo.update({place: stack[-1]})),
        "MEMOIZE": lambda _: memo.update({len(memo): stack[-1]}),
        **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), lambda place: stack.append(memo[place])),
        "GLOBAL": lambda names: stack.append(_find(*names.split(" ", 1))),
        "STACK_GLOBAL": lambda _: stack.append(_find(*tuple(str(stack.pop()) for _ in "12")[::-1])),
        "REDUCE": lambda _: stack.append(_call(*tuple(stack.pop() for _ in "12")[::-1])),
        "NEWOBJ": lambda _: stack.append(_new([stack.pop() for _ in "12"][1])),
        "BUILD": lambda _: _set_state(stack[-2], stack.pop()),
    }
    if find_storage is not None:
        operations["BINPERSID"] = lambda _: stack.append(find_storage(stack.pop()))
    for operation, argument, _ in pickletools.genops(file):
        if operation.name == "STOP":
            return stack.pop()
        if operation.name not in operations:
            raise ValueError(f"the operation {operation.name}, which is not read")
        operations[operation.name](argument)
    raise ValueError("it has no end")


# ---- Files


def open_pickle(path: pathlib.Path) -> Any:
    """Returns the value that `torch.save` (current or older format) or a plain pickle stored, with `Tensor` for tensors.

    Raises: PretrainedError.
    """
    try:
        with path.open("rb") as file:
            if file.read(2) == b"PK":
                return _read_archive(zipfile.ZipFile(path))
            file.seek(0)
            value = read_pickle(file)
            if value == _MAGIC:
                file.seek(0)
                content = np.memmap(path, np.uint8, "r")
                value = _read_legacy(file, lambda start, count: content[start : start + count])
            return value
    except PretrainedError as error:
        raise PretrainedError(f"{path} cannot be read as PyTorch weights: {error}") from None
    except Exception as error:  # a corrupted pickle, and zipfile, raise many types
        raise PretrainedError(f"{path} cannot be read as PyTorch weights: {first_line(error)}") from None


def _storage(saved: Any) -> tuple[str, Storage]:
    """Returns (key, storage without its numbers) for a persistent id. Raises: ValueError."""
    kind, name, key, _, size, *view = saved
    if kind != "storage" or name.name not in _DTYPES or not isinstance(size, int) or size < 0 or any(view):
        raise ValueError("a storage of another form")
    return _text(key), Storage(_DTYPES[name.name], size)


def _read_archive(archive: zipfile.ZipFile) -> Any:
    """Reads a file of `torch.save` since PyTorch 1.6: a pickle and uncompressed storages in a zip file."""
    (root,) = (name.removesuffix("data.pkl") for name in archive.namelist() if name.endswith("/data.pkl"))
    if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):  # could fill the memory
        raise ValueError("parts of it are compressed")
    if f"{root}byteorder" in archive.namelist() and archive.read(f"{root}byteorder") != b"little":
        raise ValueError("its numbers are big-endian")

    def find_storage(saved: Any) -> Storage:
        key, storage = _storage(saved)
        member = archive.getinfo(f"{root}data/{key}")
        if member.file_size != storage.size * storage.dtype.itemsize:
            raise ValueError(f"the storage {key} has {member.file_size:,} bytes")
        storage.read = lambda: np.frombuffer(archive.read(member), storage.dtype)
        return storage

    return read_pickle(io.BytesIO(archive.read(f"{root}data.pkl")), find_storage)


def _read_legacy(file: BinaryIO, read: Callable[[int, int], Any]) -> Any:
    """Reads the older format of `torch.save`: pickles, then the storages. read: (start, number of bytes) -> bytes."""
    if (read_pickle(file), read_pickle(file)) != (_MAGIC, _PROTOCOL):
        raise ValueError("not a file of PyTorch")
    read_pickle(file)  # a description of the machine that wrote the file
    storages: dict[str, Storage] = {}

    def find_storage(saved: Any) -> Storage:
        key, storage = _storage(saved)
        return storages.setdefault(key, storage)

    value = read_pickle(file, find_storage)
    for key in read_pickle(file):
        storage, (size,) = storages[key], struct.unpack("<q", file.read(8))
        start, count = file.tell(), size * storage.dtype.itemsize
        if size != storage.size:
            raise ValueError(f"the storage {key} has {size:,} numbers, not {storage.size:,}")
        storage.read = lambda start=start, count=count, dtype=storage.dtype: np.frombuffer(read(start, count), dtype)
        file.seek(start + count)
    return value


def format_json(value: Any) -> str:
    """Returns a value as JSON, with type names in place of tensors and records. Raises: ValueError for over 500 values."""
    count = 0

    def convert(value):
        nonlocal count
        count += 1
        if count > 500:
            raise ValueError("more than 500 arguments")
        if isinstance(value, dict):
            return {str(name): convert(each) for name, each in value.items()}
        if isinstance(value, list | tuple):
            return [convert(each) for each in value]
        return value if isinstance(value, str | int | float | None) else type(value).__name__

    return json.dumps(convert(value))


def module_tensors(module: Record) -> Iterator[tuple[str, Tensor]]:
    """Yields (name as in a state dict, tensor) for each parameter and buffer of a PyTorch module.

    Raises: ValueError for a module that occurs twice, because a small file could then describe 2^60 modules.
    """
    seen: set[int] = set()

    def visit(module: Record, prefix: str) -> Iterator[tuple[str, Tensor]]:
        if id(module) in seen:
            raise ValueError(f"the module {prefix.removesuffix('.')} occurs twice")
        seen.add(id(module))
        for group in ("_parameters", "_buffers"):
            yield from ((f"{prefix}{name}", value) for name, value in module.state[group].items() if value is not None)
        for name, child in module.state["_modules"].items():
            if child is not None:
                yield from visit(child, f"{prefix}{name}.")

    return visit(module, "")
