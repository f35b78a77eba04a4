"""PyTorch's files and EDM's pickles, read without running them; files that would run code are refused and do nothing."""

import collections
import functools
import gc
import io
import json
import pickle
import struct
import types
import weakref
import zipfile

import flax.traverse_util
import numpy as np
import pytest

from diffusion_jax import pretrained
from diffusion_jax.pretrained import PretrainedError, parameters, pickles
from helpers import torch_files
from helpers.published_files import NARROW_FLAGS, stored
from helpers.torch_files import Storage, Tensor


def read(path):
    tensors = parameters.open_tensors(path)
    return {name: tensors.read(name) for name in tensors.shapes}


def write(path, content):
    path.write_bytes(content)
    return path


ARRAYS = {
    "a": np.arange(12, dtype=np.float32).reshape(3, 4),
    "half": np.array([0.5, -3.25], np.float16),
    "double": np.array(1 / 3),
    "count": np.array([3, 2**40]),
    "empty": np.zeros((0, 4), np.float32),
    "flag": np.array([True, False]),
}


@pytest.mark.parametrize("write_bytes", [torch_files.archive_bytes, torch_files.legacy_bytes, torch_files.dumps])
@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: {"epoch": 3, "state_dict": x}])
def test_every_container_gives_the_same_tensors(tmp_path, write_bytes, wrap):
    found = read(write(tmp_path / "x.pt", write_bytes(wrap(torch_files.tensors(ARRAYS)))))
    assert found.keys() == ARRAYS.keys()
    for name, value in ARRAYS.items():
        assert found[name].shape == value.shape
        assert found[name].dtype == (np.float32 if value.dtype.kind == "f" else value.dtype)
        np.testing.assert_array_equal(found[name], value.astype(found[name].dtype))


def test_bfloat16_and_views(tmp_path):
    values = np.arange(24, dtype=np.float32)
    storage = Storage(values)
    views = {
        "transposed": Tensor(values[:12].reshape(3, 4).T, storage, 0, (1, 4)),
        "part": Tensor(values[5:9], storage, 5, (1,)),
        "every_other": Tensor(values[1:20:2].reshape(2, 5), storage, 1, (10, 2)),
    }
    found = read(write(tmp_path / "x.pt", torch_files.archive_bytes(views)))
    for name, view in views.items():
        np.testing.assert_array_equal(found[name], view.values)
    bits = np.array([0x3F80, 0xC040], "<u2")  # 1 and -3
    kind = pickles.Storage(
        pickles._DTYPES["torch.BFloat16Storage"], 2, lambda: bits.view(pickles._DTYPES["torch.BFloat16Storage"])
    )
    np.testing.assert_array_equal(pickles.Tensor(kind, 0, (2,), (1,)).numpy(), [1.0, -3.0])


class View(Tensor):
    """A tensor of a shape that NumPy may not have."""

    def __init__(self, shape, storage, offset, strides):
        self.values, self.storage = types.SimpleNamespace(shape=shape), storage
        self.offset, self.strides = offset, strides


def test_strides_that_no_number_uses_have_any_size(tmp_path):
    storage = Storage(np.arange(4, dtype=np.float32))
    views = {"one": View((1, 2), storage, 2, (2**62, 1)), "none": View((0, 2), storage, 2**62, (2**62, 2**62))}
    found = read(write(tmp_path / "x.pt", torch_files.archive_bytes(views)))
    np.testing.assert_array_equal(found["one"], [[2, 3]])
    assert found["none"].shape == (0, 2)


def test_storage_is_read_once_and_released_with_its_last_tensor(tmp_path, monkeypatch):
    storage, names = Storage(np.arange(4, dtype=np.float32)), []
    views = {str(i): View((1,), storage, i, (1,)) for i in range(4)}
    archive_read = zipfile.ZipFile.read
    monkeypatch.setattr(zipfile.ZipFile, "read", lambda *args: names.append(args[1]) or archive_read(*args))
    value, _ = pickles.open_pickle(write(tmp_path / "x.pt", torch_files.archive_bytes(views)))
    gc.disable()
    try:
        released = weakref.ref(value["0"].storage)
        assert [value.pop(str(i)).numpy().item() for i in range(4)] == [0, 1, 2, 3]
        assert released() is None
    finally:
        gc.enable()
    assert [getattr(name, "filename", name) for name in names].count("model/data/0") == 1


@pytest.mark.parametrize("write_bytes", [torch_files.archive_bytes, torch_files.legacy_bytes])
def test_tensors_may_be_tied_but_not_multiply_the_file(tmp_path, write_bytes):
    tensor = Tensor(np.zeros(1000, np.float32))
    assert len(read(write(tmp_path / "x.pt", write_bytes({"a": tensor, "b": tensor})))) == 2
    with pytest.raises(PretrainedError, match="40,000 bytes, more than 4 times"):
        read(write(tmp_path / "x.pt", write_bytes({str(i): tensor for i in range(10)})))


@pytest.mark.parametrize(
    "offset, shape, strides",
    [
        (0, (5,), (1,)),
        (1, (4,), (1,)),
        (0, (2, 3), (2, 1)),
        (0, (1,), (1, 1)),
        (-1, (1,), (1,)),
        (0, (2,), (-1,)),
        (0, (9,), (0,)),
        (0, (0, 2**63), (1, 1)),
        (0, (1,), (2**63,)),
        (0, (1,) * 33, (1,) * 33),
    ],
)
def test_views_outside_of_their_storage_are_refused(tmp_path, offset, shape, strides):
    tensor = View(shape, Storage(np.zeros(4, np.float32)), offset, strides)
    with pytest.raises(PretrainedError, match="tensor"):
        read(write(tmp_path / "x.pt", torch_files.archive_bytes({"a": tensor})))


def test_weights_load_without_pytorch(tmp_path):
    weights = stored("openai_narrow")[0]
    net = pretrained.load(
        write(tmp_path / "m.pt", torch_files.archive_bytes(torch_files.tensors(weights))), NARROW_FLAGS
    )
    flat = flax.traverse_util.flatten_dict(net.params, sep="/")
    np.testing.assert_array_equal(flat["conv_in/kernel"], weights["input_blocks.0.0.weight"].transpose(2, 3, 1, 0))


# ---- What is refused


class Calls:
    """An object whose pickle calls a function."""

    def __init__(self, function, *arguments):
        self.result = function, arguments

    def __reduce__(self):
        return self.result


def _program(*operations):
    return b"\x80\x02" + b"".join(operations) + b"."


def _global(name):
    return b"c%s\n%s\n" % tuple(name.encode().rsplit(b".", 1))


def _touch(marker):
    return b"X" + struct.pack("<I", len(str(marker))) + str(marker).encode()


DANGEROUS = {
    "posix.system": lambda m: pickle.dumps({"a": Calls(__import__("os").system, f"touch {m}")}),
    "builtins.eval": lambda m: pickle.dumps(Calls(eval, f"open({str(m)!r}, 'w')")),
    "builtins.exec": lambda m: pickle.dumps({"ema": Calls(exec, f"open({str(m)!r}, 'w')")}, 4),
    "builtins.getattr": lambda m: pickle.dumps([Calls(getattr, "a", "upper")], 2),
    "io.open": lambda m: torch_files.archive_bytes({"a": Calls(open, str(m), "w")}),
    "pathlib.Path.touch": lambda m: pickle.dumps(Calls(__import__("pathlib").Path.touch, m), 4),
    "numpy.load": lambda m: pickle.dumps(Calls(np.load, str(m))),
    "importlib.import_module": lambda m: pickle.dumps(Calls(__import__("importlib").import_module, "os"), 2),
    "torch.load": lambda m: _program(_global("torch.load"), _touch(m), b"\x85R"),
    "torch.jit.load": lambda m: _program(_global("torch.jit.load")),
    "torch.hub.load": lambda m: _program(b"X\x09\0\0\0torch.hub", b"X\x04\0\0\0load", b"\x93"),
    "torch.nn.functional.relu": lambda m: _program(_global("torch.nn.functional.relu")),
    "collections.deque": lambda m: pickle.dumps(collections.deque([1])),
    "a call of torch.nn.modules.linear.Linear": lambda m: _program(_global("torch.nn.modules.linear.Linear"), b")R"),
    "a call of str": lambda m: _program(_touch(m), b")R"),
    "an object of torch._utils._rebuild_tensor": lambda m: _program(_global("torch._utils._rebuild_tensor"), b")\x81"),
    "an object of list": lambda m: _program(b"])\x81"),
    "a state of _Name": lambda m: _program(_global("collections.OrderedDict"), b"}b"),
    "a state of list": lambda m: _program(b"]}b"),
    "the operation INST": lambda m: _program(b"(" + _touch(m) + b"iposix\nsystem\n"),
    "the operation OBJ": lambda m: _program(b"(" + _global("collections.OrderedDict") + b"o"),
    "the operation EXT1": lambda m: _program(b"\x82\x01"),
    "items of _Name": lambda m: _program(_global("collections.OrderedDict"), b"K\x01K\x02s"),
    "an array of O": lambda m: pickle.dumps({"a": np.array([Calls(open, str(m), "w")], object)}),
}


@pytest.mark.parametrize("words", DANGEROUS)
@pytest.mark.parametrize("inside_a_storage", [False, True])
def test_dangerous_pickles_are_refused_by_name_and_do_nothing(tmp_path, words, inside_a_storage):
    marker = tmp_path / "marker"
    content = DANGEROUS[words](marker)
    if inside_a_storage:
        if content[:2] == b"PK":
            return  # an archive is no storage
        header = b"".join(pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, {}))
        content = _program(
            _global("torch.storage._load_from_bytes"),
            b"B" + struct.pack("<I", len(header + content)) + header + content,
            b"\x85R",
        )
    for load in (pretrained.load, lambda path: pretrained.load(path, "adm_imagenet64")):
        with pytest.raises(PretrainedError) as caught:
            load(write(tmp_path / "x.pkl", content))
        message = str(caught.value).replace("pathlib._local.", "pathlib.")  # the module's name in Python 3.13
        assert words in message and "\n" not in message
    assert not marker.exists()


def test_values_that_contain_others_many_times_end_in_one_line(tmp_path):
    """A small file may describe a value with 2^60 parts; printing, comparing or hashing the value would not end."""
    large = 1
    for _ in range(60):
        large = (large, large)
    edm = torch_files.edm_pickle("EDMPrecond", {"model.a": ARRAYS["a"]}, {"sigma_data": large}, tmp_path / "marker")
    value = b"K\x01" + b"2\x86" * 60  # pairs of the same value
    for content, words in (
        (edm, "more than 200 arguments"),
        (_program(b"}", value, b"K\x01s"), "a tuple as a key"),
        (_program(_global("builtins.set"), b"](", value, b"e\x85R"), "a tuple as a key"),
        (_program(b"(", value, b"\x91"), "a tuple as a key"),
        (_program(_global("collections.OrderedDict"), b"](", value, b"K\x01\x86e\x85R"), "a tuple as a key"),
        (_program(value), "contains a tuple"),
        (_program(_global("torch.Size"), b"(", value, b"t\x85R"), "contains a tuple"),
        (_program(value, b"K\x01\x93"), "a tuple in place of a printable text"),
        (HEADER + _program(b"}") + _program(b"](", value, b"e"), "a tuple in place of a printable text"),
    ):
        with pytest.raises(PretrainedError, match=words):
            pretrained.load(write(tmp_path / "x.pkl", content))


def _repeat(name, content, count=20):
    """A list of the results of one call, made `count` times. content: operations that make the argument."""
    return _program(_global(name), b"q\0" + content + b"\x85q\1(", b"h\0h\1R" * count, b"l")


def _bytes(content):
    return b"B" + struct.pack("<I", len(content)) + content


def _number(value):
    return b"\x8a\x0a" + value.to_bytes(10, "little")


HEADER = b"".join(pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, {}))
LONG, NUMBERS = b"X\xe9\x03\0\0" + b"a" * 1001, b"(" + b"K\1K\2K\3K\4\x86\x86\x86" * 50
NESTED = "torch.storage._load_from_bytes"
WASTEFUL = {
    "_codecs.encode": (
        "copies",
        _program(_global("_codecs.encode"), b"q\0" + LONG + b"X\0\0\0\0\x86q\1(", b"h\0h\1R" * 20, b"l"),
    ),
    "bytes of a storage": ("copies", _repeat(NESTED, _bytes(HEADER + _program(_bytes(b"a" * 1000)) + _program(b"]")))),
    "operations of a storage": (
        "operations",
        _repeat(NESTED, _bytes(HEADER + _program(b"N0" * 99, b"N") + _program(b"]"))),
    ),
    "storages without numbers": (
        "operations",
        _repeat(NESTED, _bytes(HEADER + _program(b"N") + _program(b"]"))),
    ),
    "storages in storages": ("a call of torch.storage", _repeat(NESTED, _bytes(HEADER + _repeat(NESTED, _bytes(b""))))),
    "operations": ("operations", _program(b"]0" * 1000)),
    "set": ("operations", _repeat("builtins.set", b"(" + b"K\1" * 200 + b"l")),
    "set of a text": ("concatenate", _repeat("builtins.set", LONG)),
    "OrderedDict": ("operations", _repeat("collections.OrderedDict", b"(" + b"K\1K\2\x86" * 100 + b"l")),
    "torch.Size": ("concatenate", _repeat("torch.Size", LONG)),
    "torch.device": (
        "operations",
        _program(_global("torch.device"), b"q\0(" + b"N" * 200 + b"tq\1(", b"h\0h\1R" * 20, b"l"),
    ),
    "name": ("printable", _program(b"X\x10\0\0\0torch.nn.modules", LONG, b"\x93")),
    "name of two lines": ("printable", _program(b"X\x10\0\0\0torch.nn.modules", b"X\2\0\0\0\na", b"\x93")),
    "text as a key": ("a key of more than 1,000", _program(b"}", LONG, b"Ns")),
    "number as a key": ("a number of 2\\^60", _program(b"}", _number(2**61 - 1), b"Ns")),
    "place in the memo": ("a number of 2\\^60", _program(b"Np%d\n" % (2**61 - 1))),
    "size of bytes": ("expected 1099511627776 bytes", _program(b"\x8e" + struct.pack("<Q", 2**40))),
}


@pytest.mark.parametrize("what", WASTEFUL)
def test_small_files_neither_fill_the_memory_nor_take_long(tmp_path, monkeypatch, what):
    """Each program does little work here; the same program repeated a million times would take gigabytes or hours."""
    monkeypatch.setattr(pickles, "_Budget", functools.partial(pickles._Budget, operations=1500))
    words, content = WASTEFUL[what]
    with pytest.raises(PretrainedError, match=words) as caught:
        pickles.open_pickle(write(tmp_path / "x.pkl", content))
    assert "\n" not in str(caught.value)


def module(parameters=(), modules=()):
    state = {"_parameters": dict(parameters), "_buffers": {}, "_modules": dict(modules)}
    return pickles.Record("Block", state)


def test_modules_that_are_shared_or_too_deep_are_refused():
    shared = deep = module({"x": 1})
    with_parameters = pickles.Record("Block", module().state | {"_parameters": shared.state["_parameters"]})
    for i in range(101):
        deep = module(modules={"a": deep})
        shared = module(modules={"a": shared, "b": shared}) if i < 60 else shared
    for twice in (shared, module(modules={"a": module(modules={"b": with_parameters}), "b": with_parameters})):
        with pytest.raises(ValueError, match="the module [ab.]+ occurs twice"):
            list(pickles.module_tensors(twice))
    with pytest.raises(ValueError, match="at most 200 characters"):
        list(pickles.module_tensors(deep))


def test_arguments_that_contain_themselves_are_refused():
    value = []
    value.append(value)
    with pytest.raises(ValueError, match="200 arguments"):
        pickles.format_json(value)


def test_a_call_that_is_allowed_changes_nothing_outside(tmp_path):
    """A pickle may set attributes of what it made, never of this package's functions and classes."""
    program = _program(_global("torch.nn.modules.linear.Linear"), b"}X\x01\0\0\0aK\x01sb")
    with pytest.raises(PretrainedError, match="a state of _Name"):
        pickles.open_pickle(write(tmp_path / "x.pkl", program))


def damaged(name, size=None, value=b"1234"):
    """An archive in which one member is replaced."""
    source, file = zipfile.ZipFile(io.BytesIO(torch_files.archive_bytes(torch_files.tensors(ARRAYS)))), io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for member in source.namelist():
            archive.writestr(member, value if member == name else source.read(member))
    return file.getvalue()


def _archive(*members):
    """An archive of (name, content), in which the last member is listed ten times."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members:
            archive.writestr(name, content)
        archive.filelist.extend(archive.filelist[-1:] * 9)
    return file.getvalue()


def _two_types():
    storage, other = Storage(np.zeros(2, np.float32)), Storage(np.zeros(2, np.int64))
    content = torch_files.legacy_bytes({"a": Tensor(storage.values, storage), "b": Tensor(other.values, other)})
    return content.replace(b"X\1\0\0\0" + b"1", b"X\1\0\0\0" + b"0")


CORRUPTED = {
    "parts of it overlap": lambda: _archive(("model/data.pkl", _program(b"}")), ("model/data/0", b"a" * 1000)),
    "the storage 0 has two types": _two_types,
    "big-endian": lambda: damaged("model/byteorder", value=b"big"),
    "the storage 0 has 4 bytes": lambda: damaged("model/data/0"),
    "parts of it are compressed": lambda: torch_files.archive_bytes(torch_files.tensors(ARRAYS), zipfile.ZIP_DEFLATED),
    "cannot be read as PyTorch weights": lambda: torch_files.archive_bytes(torch_files.tensors(ARRAYS))[:-50],
    "truncated": lambda: torch_files.legacy_bytes(torch_files.tensors(ARRAYS))[:-1],
    "not a file of PyTorch": lambda: b"".join(pickle.dumps(v, 2) for v in (0x1950A86A20F9469CFC6C, 1000, {}, {}, [])),
    "before seeing STOP": lambda: pickle.dumps({"a": 1}, 2)[:-1],
    "not a state dict": lambda: torch_files.archive_bytes([Tensor(np.zeros(3))]),
    "contains a dict, not a state dict": lambda: torch_files.archive_bytes({"a": Tensor(np.zeros(3)), "b": 5}),
}


@pytest.mark.parametrize("words", CORRUPTED)
def test_corrupted_files_are_one_line(tmp_path, words):
    path = write(tmp_path / "x.pt", CORRUPTED[words]())
    with pytest.raises((PretrainedError, ValueError), match=words) as caught:
        read(path)
    assert "\n" not in str(caught.value)


def test_edm_pickle_gives_tensors_and_arguments_and_its_source_does_not_run(tmp_path):
    arrays = {"model.enc.8x8_conv.weight": ARRAYS["a"], "model.map_label.weight": ARRAYS["half"]}
    arguments = {"img_resolution": 8, "sigma_data": 0.5, "channel_mult": [1, 2], "nested": {"a": None}}
    for protocol in (2, 4):
        content = torch_files.edm_pickle("EDMPrecond", arrays, arguments, tmp_path / "marker", protocol)
        tensors = parameters.open_tensors(write(tmp_path / "edm.pkl", content))
        assert tensors.metadata["class"] == "EDMPrecond"
        assert json.loads(tensors.metadata["arguments"]) == arguments
        assert set(tensors.shapes) == set(arrays)
        for name, value in arrays.items():
            np.testing.assert_array_equal(tensors.read(name), value)
    assert not (tmp_path / "marker").exists()


def test_values_of_numpy(tmp_path):
    values = {"scalar": np.float64(0.25), "big": np.array([1, 2], ">i4"), "order": np.asfortranarray(np.eye(2, 3))}
    for protocol in (2, 4):
        found, _ = pickles.open_pickle(write(tmp_path / "x.pkl", pickle.dumps(values, protocol)))
        assert found["scalar"] == 0.25
        np.testing.assert_array_equal(found["big"].value, values["big"])
        np.testing.assert_array_equal(found["order"].value, values["order"])
