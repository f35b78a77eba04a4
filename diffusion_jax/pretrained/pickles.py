"""Reads PyTorch's files and EDM's pickles without running code from the files. Needs no PyTorch.

A pickle is a program: loading it in the usual way calls any function that it names, and EDM's pickles (Karras et al. 2022)
carry source code for `exec`. `read_pickle` interprets the program without importing anything. It accepts the names of a
few functions and classes, and makes an inert value for each: a container, `Tensor` or `Record`. Other names raise an error.
`_Budget` limits operations and copies, because a small program may build values of any size, or take hours.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import json
import math
import mmap
import pathlib
import pickletools
import struct
import zipfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

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
    "SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8 NONE".split()
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
        is_valid = all(isinstance(n, int) and 0 <= n < 2**63 for n in numbers)
        if not is_valid or not len(self.shape) == len(self.strides) <= 32:  # NumPy's limit
            raise ValueError("a tensor has a shape or strides that are not up to 32 whole numbers in 0 ... 2^63 - 1")
        last = self.offset + sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))
        if (math.prod(self.shape) and last >= self.storage.size) or math.prod(self.shape) > self.storage.size:
            raise ValueError(f"a tensor {list(self.shape)} does not fit into its {self.storage.size:,} numbers")

    def numpy(self) -> np.ndarray:
        """Reads the values; float dtypes become float32. Raises: ValueError."""
        if self.storage.read is None:
            raise ValueError("the numbers of a tensor are missing")
        try:
            values = self.storage.read()
        except Exception as error:  # zipfile raises many types
            raise ValueError(first_line(error)) from None
        if values.size != self.storage.size:
            raise ValueError("the file is truncated")
        dtype = np.float32 if jnp.issubdtype(values.dtype, jnp.floating) else values.dtype
        if not math.prod(self.shape):  # offset and strides may point anywhere
            return np.zeros(self.shape, dtype)
        strides = [(size > 1) * stride * values.itemsize for size, stride in zip(self.shape, self.strides, strict=True)]
        return np.array(np.lib.stride_tricks.as_strided(values[self.offset :], self.shape, strides), dtype)


@dataclasses.dataclass
class _Budget:
    """The bytes that calls in a file's pickles may still read, and the operations, including the elements that calls copy."""

    num_bytes: int
    operations: int = 1_000_000

    def spend(self, operations: int, num_bytes: int) -> None:
        self.operations -= operations
        self.num_bytes -= num_bytes
        if min(self.operations, self.num_bytes) < 0:
            raise ValueError("it needs more than 1,000,000 operations, or copies 4 times the size of the file")


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
    if not isinstance(value, str) or len(value) > 200 or not value.isprintable():
        raise ValueError(f"a {type(value).__name__} in place of a printable text of at most 200 characters")
    return value


def _keys(values: Sequence[Any]) -> Sequence[Any]:
    """Returns keys of a dict, or elements of a set. Raises: ValueError for values other than short texts and numbers."""
    for value in values:
        if not isinstance(value, str | bytes | int | float | None):
            raise ValueError(f"a {type(value).__name__} as a key")
        # Comparisons of long texts take long, and a file may choose larger numbers with equal hashes.
        if len(value) > 1000 if isinstance(value, str | bytes) else abs(value or 0) >= 2**60:
            raise ValueError("a key of more than 1,000 characters, or a number of 2^60 or more")
    return values


def _dict(pairs: Sequence[Any] = ()) -> dict[Any, Any]:
    return {key: value for key, value in pairs if _keys([key])}


def _dtype(name, *options) -> _Array:
    dtype = np.dtype(_text(name))
    if dtype.kind not in "biufSU":
        raise ValueError(f"an array of {name}")
    return _Array(dtype)


def _scalar(dtype, content) -> Any:
    return np.frombuffer(content, dtype.value, 1)[0].item()


_CALLS: dict[str, Callable] = {
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_parameter": lambda data, *gradient: data,
    "torch.Size": lambda sizes: () + sizes,  # a tuple; a text has a large object for each character
    "torch.device": lambda *names: Record("torch.device", names),
    "torch_utils.persistence._reconstruct_persistent_obj": _persistent_object,
    "collections.OrderedDict": _dict,
    "builtins.set": lambda items=[]: set(_keys([] + items)),
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
    "torch.storage._load_from_bytes",  # called only in a plain pickle, outside of these bytes
    "builtins.object",
    *(f"torch.{name}" for name in "float64 float32 float16 bfloat16 int64".split()),
}


def _find(module: str, name: str) -> _Name:
    full = f"{_text(module)}.{_text(name)}".replace("__builtin__.", "builtins.").replace("copy_reg.", "copyreg.")
    if full in _CALLS or full in _CLASSES or full in _OTHER_NAMES or full.startswith(_PREFIXES):
        return _Name(full)
    raise PretrainedError(
        f"it contains more than tensors: its pickle asks for {full}, which is not read, because a pickle can run any code; "
        "save a plain state dict"
    )


def _call(calls: dict[str, Callable], budget: _Budget, function, arguments) -> Any:
    if not isinstance(function, _Name) or function.name not in calls or not isinstance(arguments, tuple):
        raise ValueError(f"a call of {getattr(function, 'name', type(function).__name__)}")
    for value in (arguments, *arguments):
        if isinstance(value, str | bytes | bytearray):
            budget.spend(0, len(value))
        elif isinstance(value, list | tuple | dict | set):
            budget.spend(len(value), 0)
    return calls[function.name](*arguments)


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


def read_pickle(file: Any, budget: _Budget, find_storage: Callable[[Any], Storage] | None = None) -> Any:
    """Interprets one pickle of a file and returns its value.

    find_storage: persistent id -> storage; None for a plain pickle, in which a storage is the bytes of a file.
    Raises: PretrainedError for a name that is not read; ValueError, IndexError, TypeError and others for a corrupted pickle.
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}

    def take(count: int | None = None) -> list[Any]:
        """Removes and returns the last values, by default the values above the last mark."""
        start = marks.pop() if count is None else range(len(stack))[-count]
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
        **{f"TUPLE{n}": lambda _, n=n: stack.append(tuple(take(n))) for n in (1, 2, 3)},
        "APPEND": lambda _: extend(list, take(1)),
        "APPENDS": lambda _: extend(list, take()),
        "SETITEM": lambda _: extend(dict, pairs(take(2))),
        "SETITEMS": lambda _: extend(dict, pairs(take())),
        "ADDITEMS": lambda _: extend(set, _keys(take())),
        **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT"), lambda place: memo.update(pairs([place, stack[-1]]))),
        "MEMOIZE": lambda _: memo.update({len(memo): stack[-1]}),
        **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), lambda place: stack.append(memo[place])),
        "GLOBAL": lambda names: stack.append(_find(*names.split(" ", 1))),
        "STACK_GLOBAL": lambda _: stack.append(_find(*take(2))),
        "REDUCE": lambda _: stack.append(_call(calls, budget, *take(2))),
        "NEWOBJ": lambda _: stack.append(_new(take(2)[0])),
        "BUILD": lambda _: _set_state(stack[-2], stack.pop()),
    }
    calls = dict(_CALLS)
    if find_storage is not None:
        operations["BINPERSID"] = lambda _: stack.append(find_storage(stack.pop()))
    else:
        calls["torch.storage._load_from_bytes"] = lambda x: _read_legacy(io.BytesIO(x), memoryview(x), budget)
    for operation, argument, _ in pickletools.genops(file):
        budget.spend(1, 0)
        if operation.name == "STOP":
            return stack.pop()
        if operation.name not in operations:
            raise ValueError(f"the operation {operation.name}, which is not read")
        operations[operation.name](argument)
    raise ValueError("it has no end")


# ---- Files


def open_pickle(path: pathlib.Path) -> tuple[Any, dict[str, str]]:
    """Returns (value that `torch.save` or a plain pickle stored, with `Tensor` for tensors; {}).

    For a network of EDM, returns (tensors by name, {"class": its name, "arguments": as JSON}). Raises: PretrainedError.
    """
    budget = _Budget(
        4 * path.stat().st_size
    )  # protocol 2 needs up to 3: encodes a text of up to 2, and reads the bytes
    try:
        with path.open("rb") as opened:
            file = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)  # reads at most what the file has
        if file[:2] == b"PK":
            value = _read_archive(zipfile.ZipFile(path), len(file), budget)
        elif (value := read_pickle(file, budget)) == _MAGIC:
            file.seek(0)
            value = _read_legacy(file, memoryview(file), budget)
        if isinstance(value, dict) and isinstance(network := value.get("ema"), Record):
            arguments = format_json(network.state.get("_init_kwargs"))
            return dict(module_tensors(network)), {"class": network.kind, "arguments": arguments}
        return value, {}
    except Exception as error:  # a corrupted pickle, and zipfile, raise many types
        reason = error if isinstance(error, PretrainedError) else first_line(error)
        raise PretrainedError(f"{path} cannot be read as PyTorch weights: {reason}") from None


def _storage(saved: Any, storages: dict[str, Storage]) -> tuple[str, Storage]:
    """Returns (key, storage) for a persistent id, from `storages` or new without its numbers. Raises: ValueError."""
    kind, name, key, _, size, view = saved if len(saved) > 5 else (*saved, None)
    if kind != "storage" or name.name not in _DTYPES or not isinstance(size, int) or not 0 <= size < 2**63 or view:
        raise ValueError("a storage of another form")
    storage = storages.setdefault(_text(key), Storage(_DTYPES[name.name], size))
    if (storage.dtype, storage.size) != (_DTYPES[name.name], size):
        raise ValueError(f"the storage {key} has two types or sizes")
    return key, storage


def _read_archive(archive: zipfile.ZipFile, size: int, budget: _Budget) -> Any:
    """Reads a file of `torch.save` since PyTorch 1.6: a pickle and uncompressed storages in a zip file."""
    (root,) = (name.removesuffix("data.pkl") for name in archive.namelist() if name.endswith("/data.pkl"))
    if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):  # could fill the memory
        raise ValueError("parts of it are compressed")
    if sum(member.file_size for member in archive.infolist()) > size:
        raise ValueError("parts of it overlap")
    if f"{root}byteorder" in archive.namelist() and archive.read(f"{root}byteorder") != b"little":
        raise ValueError("its numbers are big-endian")
    storages: dict[str, Storage] = {}

    def find_storage(saved: Any) -> Storage:
        key, storage = _storage(saved, storages)
        member = archive.getinfo(f"{root}data/{key}")
        if member.file_size != storage.size * storage.dtype.itemsize:
            raise ValueError(f"the storage {key} has {member.file_size:,} bytes")
        read = functools.cache(lambda dtype=storage.dtype: np.frombuffer(archive.read(member), dtype))
        storage.read = storage.read or read  # once for all tensors that share the storage
        return storage

    return read_pickle(io.BytesIO(archive.read(f"{root}data.pkl")), budget, find_storage)


def _read_legacy(file: Any, content: memoryview, budget: _Budget) -> Any:
    """Reads the older format of `torch.save`: pickles, then the storages. content: all bytes of the file."""
    budget.spend(100, 0)  # for the setup of five pickles
    storages: dict[str, Storage] = {}
    read = functools.partial(read_pickle, file, budget, lambda saved: _storage(saved, storages)[1])
    if (read(), read()) != (_MAGIC, _PROTOCOL):
        raise ValueError("not a file of PyTorch")
    read()  # a description of the machine that wrote the file
    value = read()
    for key in read():
        storage, (size,) = storages[_text(key)], struct.unpack("<q", file.read(8))
        start, end = file.tell(), file.tell() + size * storage.dtype.itemsize
        if size != storage.size or end > len(content):
            raise ValueError(f"the file is truncated, or its storage {key} does not have {storage.size:,} numbers")
        storage.read = functools.partial(np.frombuffer, content[start:end], storage.dtype)
        file.seek(end)
    return value


def format_json(value: Any) -> str:
    """Returns a value as JSON, with type names in place of tensors and records. Raises: ValueError for over 200 values."""
    count = 0

    def convert(value):
        nonlocal count
        count += 1
        if count > 200:  # also the deepest nesting, which recursion limits
            raise ValueError("more than 200 arguments")
        if isinstance(value, dict):
            return {_text(name): convert(each) for name, each in value.items()}
        if isinstance(value, list | tuple):
            return [convert(each) for each in value]
        value = value if isinstance(value, str | int | float | None) else type(value).__name__
        return _text(value) if isinstance(value, str) else value

    return json.dumps(convert(value))


def module_tensors(module: Record) -> Iterator[tuple[str, Tensor]]:
    """Yields (name as in a state dict, tensor) for each parameter and buffer of a PyTorch module.

    Raises: ValueError for a module that occurs twice, because a small file could then describe 2^60 modules, or a long name.
    """
    seen: set[int] = set()

    def visit(module: Record, prefix: str) -> Iterator[tuple[str, Tensor]]:
        groups = [module.state[group] for group in ("_parameters", "_buffers", "_modules")]
        if not seen.isdisjoint(map(id, (module, *groups))):
            raise ValueError(f"the module {prefix.removesuffix('.')} occurs twice")
        seen.update(map(id, (module, *groups)))
        for group in groups[:2]:
            yield from ((_text(f"{prefix}{name}"), value) for name, value in group.items() if value is not None)
        for name, child in groups[2].items():
            if child is not None:
                yield from visit(child, _text(f"{prefix}{name}."))

    return visit(module, "")
