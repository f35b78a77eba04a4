"""Arrays in files: .npy, .npz, folders, HDF5 and Zarr, read by index or refused in one line."""

import pickle
import sys
import tracemalloc

import numpy as np
import pytest

from diffusion_jax.data.array_files import ArrayFiles
from diffusion_jax.errors import DataError
from helpers.array_files import CONDITION, INDICES, LABEL, SHAPE, X, load, message, save_npy, save_store


@pytest.mark.parametrize(("dtype", "order"), [("f2", "C"), ("<f4", "F"), (">f8", "C"), (">i4", "F"), ("u1", "F")])
@pytest.mark.parametrize("kind", ["npy", "npz", "folder"])
def test_types_byte_orders_and_fortran_order(tmp_path, dtype, order, kind):
    shape = (3, 7)
    values = np.random.default_rng(0).integers(0, 100, (5, *shape)).astype(dtype, order=order)
    if kind == "npz":
        np.savez(tmp_path / "a.npz", pad=np.zeros(3, np.uint8), x=values, label=np.arange(5))
    else:
        np.save(tmp_path / "a.npy", values)
    source = ArrayFiles(str(tmp_path if kind == "folder" else tmp_path / f"a.{kind}"), "train", shape)
    (found,) = (values for name, values in source.read([4, 1, 4]).items() if name != "label")
    assert source.read([]).keys() >= {"image" if dtype == "u1" and kind != "npz" else "x"} and type(found) is np.ndarray
    assert found.dtype == values.dtype.newbyteorder("=") and found.flags.c_contiguous
    np.testing.assert_array_equal(found, values[[4, 1, 4]])


def test_arrays_without_an_axis_of_channels_get_one(tmp_path):
    fields, vectors = X[..., 0], X[:, 0, 0, 0]
    (tmp_path / "folder").mkdir()
    np.save(tmp_path / "folder" / "0.npy", fields[0])
    np.save(tmp_path / "folder" / "1.npy", fields[1:])
    for path, values in (
        (save_npy(tmp_path / "a.npy", fields), fields),
        (save_npy(tmp_path / "b.npy", vectors), vectors),
        (str(tmp_path / "folder"), fields),
    ):
        found = ArrayFiles(path, "train", (*values.shape[1:], 1)).read(INDICES)["x"]
        np.testing.assert_array_equal(found, values[INDICES][..., None])


@pytest.mark.parametrize("name", ["a.npz", "a.h5", "a.hdf5", "a.zarr", "a.v2.zarr"])
@pytest.mark.parametrize("kind", ["x", "image"])
def test_labels_and_conditions_are_read_with_the_examples(tmp_path, name, kind):
    examples = {kind: X if kind == "x" else np.random.default_rng(0).integers(0, 256, X.shape, dtype=np.uint8)}
    in_group = {} if name == "a.npz" else {"meta/time": X}  # which is not read
    others = {"label": LABEL, "condition": CONDITION, "condition_missing": LABEL == 2}
    path = save_store(tmp_path / name, **examples, **others, cond=CONDITION, **in_group)
    source = pickle.loads(pickle.dumps(ArrayFiles(path, "train", SHAPE)))
    assert (len(source), source.num_classes, source.class_names) == (7, 5, ())
    assert source.notes() == ["Ignored arrays: 'cond'; arrays are x, image, label, condition, condition_missing."]
    for indices in (INDICES, [3], np.arange(1, 6), np.arange(7)[::-1], []):
        batch = source.read(indices)
        assert batch.keys() == {kind, *others} and batch["label"].dtype == np.int32
        assert batch["condition_missing"].dtype == bool
        rows = np.asarray(indices, int)
        for key, values in {**examples, **others}.items():
            np.testing.assert_array_equal(batch[key], values[rows])


def test_a_folder_of_examples_and_of_several_examples_with_a_class_in_each_subfolder(tmp_path):
    parts = {
        "apple/a.npy": X[:1],
        "apple/b.npy": X[1],
        "fig/c.npy": X[2:4],
        "fig/d.npy": X[:0],
        "fig/ripe/e.NPY": X[4].astype(">f4", order="F"),
        "pear/z.npy": np.asfortranarray(X[5:]),
    }
    for name, values in (parts | {".hidden/a.npy": X[0, 0], "pear/.b.npy": X[0, 0]}).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        with (tmp_path / name).open("wb") as file:
            np.save(file, values)
    (tmp_path / "notes.txt").write_text("")
    source = pickle.loads(pickle.dumps(ArrayFiles(str(tmp_path), "train", SHAPE)))
    assert len(source) == 7 and (source.class_names, source.num_classes) == (("apple", "fig", "pear"), 3)
    for indices in (INDICES, np.arange(7)[::-1], [6, 6], []):
        rows, batch = np.asarray(indices, int), source.read(indices)
        np.testing.assert_array_equal(batch["x"], X[rows])
        assert batch["label"].dtype == np.int32 and (batch["label"] == np.array([0, 0, 1, 1, 1, 2, 2])[rows]).all()
    np.save(tmp_path / "outside.npy", X)
    source = ArrayFiles(str(tmp_path), "train", SHAPE)
    assert source.num_classes == 0 and source.class_names == () and "label" not in source.read([0])


@pytest.mark.parametrize("kind", [".npy", ".zarr", ""])
def test_splits_are_entries_of_a_folder(tmp_path, kind):
    for split, values in (("train", X), ("test", X[::-1])):
        if kind == "":
            (tmp_path / split / "class").mkdir(parents=True)
            np.save(tmp_path / split / "class" / "a.npy", values)
        elif kind == ".npy":
            np.save(tmp_path / f"{split}.npy", values)
        else:
            save_store(tmp_path / f"{split}{kind}", x=values)
    for split, values in (("train", X), ("test", X[::-1])):
        np.testing.assert_array_equal(ArrayFiles(str(tmp_path), split, SHAPE).read(INDICES)["x"], values[INDICES])
    found = message(tmp_path, "validation")
    expected = f"data.split='validation': {tmp_path} has the splits test, train; use one of them"
    assert found == f"{expected}, or set evaluation.data_dir to other examples"
    (tmp_path / "train.hdf5").write_bytes(b"")
    both = ", ".join(sorted((f"train{kind}", "train.hdf5")))
    assert f"{tmp_path} has {both}; keep one of them" in message(tmp_path)


def test_only_names_of_splits_make_splits(tmp_path):
    np.save(tmp_path / "a.npy", X)
    (tmp_path / "train").mkdir()
    for path, split, expected in ((".", "a", 1), (".", "test", 1), ("a.npy", "train", 0), ("nowhere", "test", 0)):
        assert ArrayFiles.has_splits({"data_dir": f"{tmp_path}/{path}", "split": split}) == expected
    (tmp_path / "train").rmdir()
    assert not ArrayFiles.has_splits({"data_dir": str(tmp_path), "split": "test"})


@pytest.mark.parametrize("name", ["packed.npz", "a.npz", "a.h5", "a.zarr"])
def test_a_pickled_source_has_paths_and_labels_but_no_other_values(tmp_path, name):
    """A source that was read before pickling, too: another process opens the files itself."""
    x = np.random.default_rng(0).normal(size=(500, 64))
    arrays = {"x": x, "label": np.arange(500) % 3, "condition": x[:, :2]}
    if name == "packed.npz":
        np.savez_compressed(tmp_path / name, **arrays)
    else:
        save_store(tmp_path / name, **arrays)
    source = ArrayFiles(str(tmp_path / name), "train", (64,))
    source.read(INDICES)
    pickled = pickle.dumps(source)
    assert len(pickled) < 2000 + 500 * 4
    for key, values in pickle.loads(pickled).read(INDICES).items():
        np.testing.assert_array_equal(values, arrays[key][INDICES])


def test_a_file_of_6_gb_is_not_loaded(tmp_path):
    shape = (256, 256, 5)
    num_examples = 6 * 10**9 // (4 * int(np.prod(shape)))
    path = tmp_path / "a.npy"
    np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(num_examples, *shape))[-1] = 3  # a sparse file
    tracemalloc.start()
    batch = ArrayFiles(str(path), "train", shape).read([0, 1000, num_examples - 1])["x"]
    assert (batch[-1] == 3).all() and not batch[:-1].any() and tracemalloc.get_traced_memory()[1] < 50e6
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("name", "arrays", "words"),
    [
        ("a.npz", {"x": X, "label": LABEL[:6]}, "label has the shape [6], and the examples [7, 3, 4, 2]"),
        ("a.npz", {"x": X, "label": LABEL.astype(float)}, "label is float64 [7], not integers [7]"),
        ("a.npz", {"x": X, "label": LABEL - 1}, "label contains -1; labels are the numbers 0"),
        ("a.npz", {"x": X.astype(object)}, "Python objects"),
        ("a.npz", {"x": X[:0]}, "has no examples"),
        ("a.npz", {"x": X[..., [0, 0, 0]]}, "--config.data.image_size=(3,4) --config.data.channels=3"),
        ("a.zarr", {"x": X, "image": X}, "'x' and 'image'; keep one"),
        ("a.h5", {"alpha": X, "beta": X}, "no array 'x' or 'image', only alpha, beta"),
        ("a.h5", {"train/x": X}, "no array 'x' or 'image', and no other arrays; save them under these names"),
    ],
)
def test_arrays_that_cannot_be_used_are_one_line(tmp_path, name, arrays, words):
    path = save_store(tmp_path / name, **arrays)
    found = message(path)
    assert words in found and path in found


class _Explodes:
    def __reduce__(self):
        return pytest.fail, ("unpickled",)


def test_nothing_is_unpickled(tmp_path):
    values = np.array([_Explodes()] * 3, dtype=object)
    np.save(tmp_path / "a.npy", values, allow_pickle=True)
    np.savez(tmp_path / "a.npz", x=X[:3], label=values)
    np.savez_compressed(tmp_path / "b.npz", x=values)
    for name in ("a.npy", "a.npz", "b.npz"):
        assert f"cannot read {tmp_path / name}: " in message(tmp_path / name)


@pytest.mark.parametrize("name", ["a.npy", "a.npz", "a.h5", "a.zarr"])
def test_missing_damaged_and_removed_files(tmp_path, name, monkeypatch):
    path = tmp_path / name
    assert f"data.data_dir='{path}' is no such file or folder" in message(path)
    np.save(path, X) if name == "a.npy" else save_store(path, x=X)
    source = load(path) if path.is_dir() else None
    file = next(f for f in path.rglob("c/**/*") if f.is_file()) if path.is_dir() else path
    whole = file.read_bytes()
    for content in (whole[: len(whole) // 2], b"none"):
        file.write_bytes(content)
        if path.is_dir():  # a chunk
            with pytest.raises(DataError, match=f"cannot read {path}: ") as info:
                source.read(np.arange(7))
            assert "\n" not in str(info.value)
        else:
            assert f"cannot read {path}: " in message(path)
    module = {"a.zarr": "zarr", "a.h5": "h5py"}.get(name)
    if module:
        monkeypatch.setitem(sys.modules, module, None)
        found = message(path)
        assert f"{name} needs {module} (" in found and found.endswith("pip install '.[arrays]'")


def test_folders_of_files_that_do_not_fit(tmp_path):
    assert "data.data_dir='' is empty; set it to an .npy, .npz" in message("")
    assert "no .npy files below" in message(tmp_path)
    path = save_npy(tmp_path / "a.npy", X)
    with pytest.raises(DataError, match="give the shape of one example"):
        ArrayFiles(str(tmp_path))
    for location in (path, tmp_path):
        found = message(location, "test")
        assert f"data.split='test': {location} has only 'train'; use data.split='train', or a folder that" in found
    for values, words in (
        (X[:, :2], "is float32 [7, 2, 4, 2]; every"),
        (X.astype(float), f"is float64, but {path} is"),
    ):
        np.save(tmp_path / "b.npy", values)
        assert f"{tmp_path / 'b.npy'} {words}" in message(tmp_path)
    (tmp_path / "b.npy").rename(tmp_path / "test.npy")
    assert "has the splits a, test; use one of them" in message(tmp_path)  # never trains on the test split
