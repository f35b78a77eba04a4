"""Files as PyTorch and EDM's code write them, made without either: the pickles name functions and classes by their places.

`EDM_SOURCE` stands for the module source that EDM's pickles carry. It is harmless, and writes a file if it is ever executed.
"""

import collections
import contextlib
import io
import pickle
import struct
import sys
import types
import zipfile

import numpy as np

_STORAGES = {
    "float64": "Double",
    "float32": "Float",
    "float16": "Half",
    "int64": "Long",
    "uint8": "Byte",
    "bool": "Bool",
}
EDM_SOURCE = "import pathlib\npathlib.Path({marker!r}).write_text('executed')\nclass EDMPrecond: pass\n"


def _stub(module, name):
    def function(*arguments):
        raise AssertionError(f"{module}.{name} was called")

    function.__module__, function.__name__, function.__qualname__ = module, name, name
    return function


def _kind(module, name, bases=(object,)):
    return type(name, bases, {"__module__": module, "__qualname__": name})


_NAMES = {("torch._utils", name): _stub("torch._utils", name) for name in ("_rebuild_tensor_v2", "_rebuild_parameter")}
_NAMES |= {("torch", f"{name}Storage"): _kind("torch", f"{name}Storage") for name in _STORAGES.values()}
_NAMES |= {("torch.storage", "_load_from_bytes"): _stub("torch.storage", "_load_from_bytes")}
_PERSISTENCE = ("torch_utils.persistence", "_reconstruct_persistent_obj")
_NAMES |= {_PERSISTENCE: _stub(*_PERSISTENCE)}
_NAMES |= {("dnnlib.util", "EasyDict"): _kind("dnnlib.util", "EasyDict", (dict,))}
ModuleDict = _kind("torch.nn.modules.container", "ModuleDict")
EasyDict = _NAMES["dnnlib.util", "EasyDict"]
_NAMES |= {("torch.nn.modules.container", "ModuleDict"): ModuleDict}


@contextlib.contextmanager
def _modules():
    """Puts modules with these functions and classes in the place of PyTorch's and EDM's, while a pickle is written."""
    made = {}
    for (module, name), value in _NAMES.items():
        for parent in (".".join(module.split(".")[: n + 1]) for n in range(module.count(".") + 1)):
            made.setdefault(parent, types.ModuleType(parent))
        setattr(made[module], name, value)
    before = {name: sys.modules.get(name) for name in made}
    sys.modules.update(made)
    try:
        yield
    finally:
        for name, value in before.items():
            sys.modules.pop(name) if value is None else sys.modules.__setitem__(name, value)


class Storage:
    """A storage; in a pickle of `torch.save` it is a persistent id, in a plain pickle its bytes."""

    def __init__(self, values):
        self.values = np.ascontiguousarray(values).ravel()

    @property
    def kind(self):
        return _NAMES["torch", f"{_STORAGES[self.values.dtype.name]}Storage"]

    def __reduce__(self):
        return _NAMES["torch.storage", "_load_from_bytes"], (legacy_bytes(self),)


class Tensor:
    """A tensor of PyTorch, whose storage may be larger."""

    def __init__(self, values, storage=None, offset=0, strides=None):
        self.values, self.offset = np.asarray(values), offset
        self.storage = storage or Storage(self.values)
        self.strides = strides or tuple(
            stride // self.values.itemsize for stride in np.empty_like(self.values, order="C").strides
        )

    def __reduce__(self):
        arguments = (self.storage, self.offset, self.values.shape, self.strides, False, collections.OrderedDict())
        return _NAMES["torch._utils", "_rebuild_tensor_v2"], arguments


class Parameter(Tensor):
    """A tensor that is trained."""

    def __reduce__(self):
        tensor = Tensor(self.values, self.storage, self.offset, self.strides)
        return _NAMES["torch._utils", "_rebuild_parameter"], (tensor, True, collections.OrderedDict())


class _Pickler(pickle.Pickler):
    def __init__(self, file, protocol=2):
        super().__init__(file, protocol)
        self.storages = {}

    def persistent_id(self, value):
        if not isinstance(value, Storage):
            return None
        key = self.storages.setdefault(id(value), (str(len(self.storages)), value))[0]
        return ("storage", value.kind, key, "cpu", len(value.values))


def tensors(arrays):
    """A state dict."""
    return collections.OrderedDict((name, Tensor(value)) for name, value in arrays.items())


def dumps(value, protocol=2):
    """A plain pickle, in which each storage is a file of the older format."""
    with _modules():
        return pickle.dumps(value, protocol)


def archive_bytes(value, compression=zipfile.ZIP_STORED):
    """The current format of `torch.save`."""
    pickled, file = io.BytesIO(), io.BytesIO()
    with _modules():
        pickler = _Pickler(pickled)
        pickler.dump(value)
    with zipfile.ZipFile(file, "w", compression) as archive:
        archive.writestr("model/data.pkl", pickled.getvalue())
        archive.writestr("model/byteorder", "little")
        for key, storage in pickler.storages.values():
            archive.writestr(f"model/data/{key}", storage.values.tobytes())
        archive.writestr("model/version", "3\n")
    return file.getvalue()


def legacy_bytes(value):
    """The older format of `torch.save`."""
    file = io.BytesIO()
    with _modules():
        for header in (0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True}):
            pickle.dump(header, file, 2)
        pickler = _LegacyPickler(file)
        pickler.dump(value)
        pickle.dump(sorted(key for key, _ in pickler.storages.values()), file, 2)
    for _, storage in sorted(pickler.storages.values(), key=lambda pair: pair[0]):
        file.write(struct.pack("<q", len(storage.values)) + storage.values.tobytes())
    return file.getvalue()


class _LegacyPickler(_Pickler):
    def persistent_id(self, value):
        saved = super().persistent_id(value)
        return None if saved is None else (*saved, None)


class Persistent:
    """An object of a class whose source is in the pickle, as EDM's persistence writes it."""

    def __init__(self, class_name, state, source):
        self.meta = {"type": "class", "version": 6, "module_src": source, "class_name": class_name, "state": state}

    def __reduce__(self):
        return _NAMES[_PERSISTENCE], (self.meta,)


def module_state(modules=(), parameters=(), buffers=(), **attributes):
    """The attributes of a PyTorch module."""
    state = {"training": False, "_parameters": collections.OrderedDict(parameters), "_buffers": dict(buffers)}
    return state | {"_non_persistent_buffers_set": set(), "_modules": collections.OrderedDict(modules)} | attributes


def edm_pickle(class_name, arrays, arguments, marker, protocol=4, **attributes):
    """EDM's pickle of a network: {"ema": network}. arrays: parameters and buffers by their names in a state dict.

    marker: the file that the source in the pickle would write.
    """
    source = EDM_SOURCE.format(marker=str(marker))
    tree = {}
    for name, value in arrays.items():
        *path, leaf = name.split(".")
        node = tree
        for part in path:
            node = node.setdefault(part, {})
        node[leaf] = value

    def build(node, name, top=()):
        modules = {key: build(value, key) for key, value in node.items() if isinstance(value, dict)}
        leaves = {key: value for key, value in node.items() if not isinstance(value, dict)}
        buffers = {key: Tensor(value) for key, value in leaves.items() if key in ("resample_filter", "freqs")}
        parameters = {key: Parameter(value) for key, value in leaves.items() if key not in buffers}
        state = module_state(modules, parameters | {"bias_that_is_none": None}, buffers, **dict(top))
        if name in ("enc", "dec"):
            made = ModuleDict.__new__(ModuleDict)
            made.__dict__.update(state)
            return made
        return Persistent(name, state, source)

    attributes = {"_init_args": (), "_init_kwargs": EasyDict(arguments), "skip_scale": np.sqrt(0.5), **attributes}
    network = build(tree, class_name, attributes)
    extra = EasyDict(path="data.zip", statistics=np.arange(6.0).reshape(2, 3))
    return dumps({"ema": network, "augment_pipe": None, "dataset_kwargs": extra}, protocol)
