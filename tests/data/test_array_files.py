"""Arrays in files: .npy, .npz, folders, HDF5 and Zarr, read by index and refused in one line."""

import importlib
import multiprocessing
import os
import pathlib
import pickle
import sys
import zipfile

import numpy as np
import pytest

from diffusion_jax.data.array_files import ArrayFiles
from diffusion_jax.errors import DataError

SHAPE = (3, 4, 2)
INDICES = np.array([5, 0, 5, 2, 3, 2])
X = np.random.default_rng(0).normal(size=(7, *SHAPE)).astype(np.float32)
LABEL = np.array([2, 0, 1, 4, 0, 1, 2])
CONDITION = np.random.default_rng(1).normal(size=(7, 5))


def save_npy(path, array):
    np.save(path, array)
    return str(path)


def save_store(path, **arrays):
    """The arrays as an .npz, HDF5 or Zarr store, according to the suffix; v2.zarr is of format 2."""
    if path.suffix == ".npz":
        np.savez(path, **arrays)
    elif path.suffix in (".h5", ".hdf5"):
        with pytest.importorskip("h5py").File(path, "w") as file:
            for name, array in arrays.items():
                file.create_dataset(name, data=array, chunks=(2, *array.shape[1:]), compression="gzip")
    else:
        zarr = pytest.importorskip("zarr")
        store = zarr.storage.ZipStore(path, mode="w") if path.suffix == ".zip" else path
        group = zarr.open_group(store, mode="w", zarr_format=2 if "v2" in path.name else 3)
        for name, array in arrays.items():
            group.create_array(name, data=array, chunks=(2, *array.shape[1:]))
        if path.suffix == ".zip":
            store.close()
    return str(path)


def message(path, split="train", shape=SHAPE):
    with pytest.raises(DataError) as info:
        ArrayFiles(str(path), split, shape)
    text = str(info.value)
    assert "\n" not in text
    return text


def read_in_child(pickled, indices, queue):
    for source in pickled:
        queue.put(pickle.loads(source).read(indices))


def test_an_npy_file_is_read_in_any_order_and_repeatedly(tmp_path):
    source = ArrayFiles(save_npy(tmp_path / "a.npy", X), "train", SHAPE)
    assert (len(source), source.num_classes, source.class_names) == (7, 0, ())
    batch = source.read(INDICES)
    assert batch.keys() == {"x"} and batch["x"].dtype == np.float32 and type(batch["x"]) is np.ndarray
    np.testing.assert_array_equal(batch["x"], X[INDICES])
    np.testing.assert_array_equal(source.read([6, 1])["x"], X[[6, 1]])
    assert source.read([])["x"].shape == (0, *SHAPE)
    for indices in ([7], [-1]):
        with pytest.raises(IndexError, match=r"\[0, 7\)"):
            source.read(indices)


@pytest.mark.parametrize("shape", [(2,), (1500, 7)], ids=["small rows", "large rows"])
@pytest.mark.parametrize("dtype", ["f2", "<f4", ">f4", ">f8", "i2", ">i4", "u2", "i1", "u1"])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("kind", ["npy", "npz", "folder"])
def test_types_byte_orders_and_fortran_order(tmp_path, shape, dtype, order, kind):
    values = np.random.default_rng(0).integers(0, 100, (5, *shape)).astype(dtype, order=order)
    if kind == "npz":
        np.savez(tmp_path / "a.npz", pad=np.zeros(3, np.uint8), x=values, label=np.arange(5))
    else:
        np.save(tmp_path / "a.npy", values)
    source = ArrayFiles(str(tmp_path if kind == "folder" else tmp_path / f"a.{kind}"), "train", shape)
    found = source.read([4, 1, 4])["image" if dtype == "u1" and kind != "npz" else "x"]
    assert found.dtype == values.dtype.newbyteorder("=") and found.flags.c_contiguous
    np.testing.assert_array_equal(found, values[[4, 1, 4]])


def test_arrays_without_an_axis_of_channels_get_one(tmp_path):
    fields, vectors = X[..., 0], X[:, 0, 0, 0]
    found = ArrayFiles(save_npy(tmp_path / "a.npy", fields), "train", (3, 4, 1)).read(INDICES)["x"]
    np.testing.assert_array_equal(found, fields[INDICES][..., None])
    found = ArrayFiles(save_npy(tmp_path / "b.npy", vectors), "train", (1,)).read(INDICES)["x"]
    np.testing.assert_array_equal(found, vectors[INDICES][:, None])
    save_npy(tmp_path / "c.npy", X[..., :1])
    assert ArrayFiles(str(tmp_path / "c.npy"), "train", (3, 4, 1)).read([0])["x"].shape == (1, 3, 4, 1)


@pytest.mark.parametrize("name", ["a.npz", "a.h5", "a.hdf5", "a.zarr", "a.v2.zarr", "a.zarr.zip"])
def test_labels_and_conditions_are_read_with_the_examples(tmp_path, name):
    path = save_store(tmp_path / name, x=X, label=LABEL, condition=CONDITION)
    source = pickle.loads(pickle.dumps(ArrayFiles(path, "train", SHAPE)))
    assert (len(source), source.num_classes, source.class_names, source.no_labels_reason) == (7, 5, (), "")
    for indices in (INDICES, [3], np.arange(1, 6), np.arange(7)[::-1], []):
        batch = source.read(indices)
        assert batch.keys() == {"x", "label", "condition"} and batch["label"].dtype == np.int32
        rows = np.asarray(indices, int)
        for key, values in {"x": X, "label": LABEL, "condition": CONDITION}.items():
            np.testing.assert_array_equal(batch[key], values[rows])


@pytest.mark.parametrize("name", ["a.npz", "a.h5", "a.zarr", "b.v2.zarr"])
def test_stores_with_images_or_one_array_of_another_name(tmp_path, name):
    images = np.random.default_rng(0).integers(0, 256, X.shape, dtype=np.uint8)
    for key, values, expected in (
        ("image", images, "image"),
        ("rows", images, "image"),
        ("rows", X, "x"),
        ("x", images, "x"),
    ):
        folder = tmp_path / f"{key}_{values.dtype}"
        folder.mkdir()
        source = ArrayFiles(save_store(folder / name, **{key: values}), "train", SHAPE)
        batch = source.read(INDICES)
        assert batch.keys() == {expected} and source.num_classes == 0 and "no array 'label'" in source.no_labels_reason
        np.testing.assert_array_equal(batch[expected], values[INDICES])
    found = message(save_store(tmp_path / name, x=X, image=images))
    assert "'x' and 'image'; keep one" in found
    (tmp_path / "other").mkdir()
    found = message(save_store(tmp_path / "other" / name, alpha=X, beta=X))
    assert "no array 'x' or 'image', only alpha, beta" in found
    (tmp_path / "wrong").mkdir()
    assert "'image' as float32, not uint8; save it under the name 'x'" in message(
        save_store(tmp_path / "wrong" / name, image=X)
    )


def test_a_zarr_or_hdf5_array_in_another_byte_order(tmp_path):
    for name in ("a.h5", "a.v2.zarr", "a.zarr"):
        source = ArrayFiles(save_store(tmp_path / name, x=X.astype(">f8")), "train", SHAPE)
        found = source.read(INDICES)["x"]
        assert found.dtype.isnative and found.dtype == np.float64
        np.testing.assert_array_equal(found, X[INDICES])


def test_a_zarr_array_without_a_group(tmp_path):
    zarr = pytest.importorskip("zarr")
    for zarr_format, name in ((2, "two.zarr"), (3, "three.zarr"), (3, "no_suffix"), (2, "no_suffix_2")):
        zarr.create_array(tmp_path / name, data=X, chunks=(3, 2, 4, 1), zarr_format=zarr_format)
        source = ArrayFiles(str(tmp_path / name), "train", SHAPE)
        np.testing.assert_array_equal(source.read(INDICES)["x"], X[INDICES])


def test_positional_arrays_of_an_npz(tmp_path):
    np.savez(tmp_path / "a.npz", X, LABEL)  # as --mode=sample writes samples
    batch = ArrayFiles(str(tmp_path / "a.npz"), "train", SHAPE).read(INDICES)
    np.testing.assert_array_equal(batch["x"], X[INDICES])
    np.testing.assert_array_equal(batch["label"], LABEL[INDICES])


def test_a_compressed_npz_is_loaded_up_to_a_bound(tmp_path, monkeypatch):
    path = tmp_path / "a.npz"
    np.savez_compressed(path, x=X.astype(">f4"), label=LABEL)
    source = pickle.loads(pickle.dumps(ArrayFiles(str(path), "train", SHAPE)))
    batch = source.read(INDICES)
    assert batch["x"].dtype.isnative
    np.testing.assert_array_equal(batch["x"], X[INDICES])
    np.testing.assert_array_equal(batch["label"], LABEL[INDICES])
    monkeypatch.setattr("diffusion_jax.data.array_files._MAX_LOADED_BYTES", X.nbytes - 1)
    assert "x is compressed and has" in message(path) and "np.savez instead of np.savez_compressed" in message(path)


def test_a_condition_of_the_spatial_shape(tmp_path):
    for suffix, condition in enumerate((X[..., :1], CONDITION, CONDITION[:, :1].astype(np.int16))):
        path = save_store(tmp_path / f"{suffix}.npz", x=X, condition=condition)
        np.testing.assert_array_equal(ArrayFiles(path, "train", SHAPE).read(INDICES)["condition"], condition[INDICES])


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"label": LABEL[:6]}, r"label is int64 [6], not integers [7]"),
        ({"label": LABEL.astype(float)}, r"label is float64 [7], not integers [7]"),
        ({"label": LABEL[:, None]}, r"label is int64 [7, 1], not integers [7]"),
        ({"label": LABEL - 1}, r"label contains -1; labels are the numbers 0"),
        ({"label": LABEL.astype(np.uint64) + 2**32}, r"label contains 4294967300; labels"),
        ({"condition": CONDITION[:6]}, r"condition is float64 [6, 5], not real numbers [7, D] or [7, 3, 4, K]"),
        ({"condition": CONDITION[:, 0]}, r"condition is float64 [7], not real numbers [7, D]"),
        ({"condition": X[:, :2]}, r"condition is float32 [7, 2, 4, 2], not real numbers"),
        ({"condition": CONDITION + 1j}, r"condition is complex128 [7, 5], not real numbers"),
    ],
)
def test_labels_and_conditions_that_do_not_fit(tmp_path, arrays, words):
    assert words in message(save_store(tmp_path / "a.npz", x=X, **arrays))


def test_labels_are_scanned_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr("diffusion_jax.data.array_files._LABELS_PER_READ", 2)
    for i, label in enumerate((LABEL, LABEL[::-1], np.arange(7), np.zeros(7, np.int8))):
        source = ArrayFiles(save_store(tmp_path / f"{i}.npz", x=X, label=label), "train", SHAPE)
        assert source.num_classes == label.max() + 1


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (X > 0, "contains bool, not real numbers; save it as a type such as float32"),
        (X + 1j, "contains complex64, not real numbers"),
        (X.astype(str), "contains strings, not real numbers"),
        (X.astype(object), "contains Python objects, not real numbers"),
        (X[:0], "is float32 [0, 3, 4, 2]: it contains no examples"),
        (X[0, 0, 0, 0], "is one number, not an array of examples"),
        (X[:, 0, 0, 0], "set data.image_size=() data.channels=1"),
        (
            X[..., 0],
            "[3, 4, 2]; set data.image_size=(3,) data.channels=4, or data.image_size=(3, 4) data.channels=1 if",
        ),
        (
            X[..., [0, 0, 0]],
            "is float32 [7, 3, 4, 3], but data.image_size and data.channels give examples of shape [3, 4, 2]",
        ),
        (X[:, 0], "set data.image_size=(4,) data.channels=2"),
        (X[:, :, :, None], "set data.image_size=(3, 4, 1) data.channels=2"),
        (X[:, :, :, None, None], "at most three spatial axes and one of channels are supported, so reshape it"),
        (np.moveaxis(X, -1, 1), "move its axis of channels to the end with np.moveaxis"),
    ],
)
@pytest.mark.parametrize("suffix", ["npy", "npz"])
def test_arrays_of_another_kind_or_shape(tmp_path, values, words, suffix):
    path = tmp_path / f"a.{suffix}"
    if suffix == "npy":
        np.save(path, values)
    else:
        np.savez(path, x=values)
    found = message(path)
    assert words in found and str(path) in found


class _Explodes:
    def __reduce__(self):
        return pytest.fail, ("unpickled",)


def test_nothing_is_unpickled(tmp_path):
    values = np.array([_Explodes()] * 3, dtype=object)
    np.save(tmp_path / "a.npy", values, allow_pickle=True)
    np.savez(tmp_path / "a.npz", x=values)
    np.savez_compressed(tmp_path / "b.npz", x=values)
    np.savez(tmp_path / "c.npz", x=X[:3], label=values)
    for name in ("a.npy", "a.npz", "b.npz"):
        assert "contains Python objects" in message(tmp_path / name, shape=(1,))
    assert "label is object [3], not integers" in message(tmp_path / "c.npz")


def test_missing_truncated_and_corrupted_files(tmp_path):
    assert "data.data_dir='' is empty; set it to an .npy, .npz" in message("")
    assert "data.data_dir='nowhere.npy' is no such file or folder" in message("nowhere.npy")
    (tmp_path / "a.csv").write_text("1,2")
    assert "is a file of another kind; set it to an .npy" in message(tmp_path / "a.csv")
    path = pathlib.Path(save_npy(tmp_path / "a.npy", X))
    whole = path.read_bytes()
    for content, words in (
        (whole[:-1], f"it is truncated: it has {len(whole) - 1:,} bytes, and its header promises {len(whole):,}"),
        (whole[:40], "the header of the array is truncated"),
        (b"", "it is empty"),
        (b"PK" + whole, "it does not start as an .npy array does"),
        (whole.replace(b"'shape': (7", b"'shape': 7(", 1), "the header of the array is corrupted"),
        (whole.replace(b"'shape': (7", b"'shape': -7", 1), "the header of the array is corrupted"),
        (whole.replace(b"NUMPY\x01", b"NUMPY\x09", 1), "version 9"),
    ):
        path.write_bytes(content)
        found = message(path)
        assert words in found and f"cannot read {path}: " in found
        assert words in message(tmp_path)  # the folder with this file


def test_truncated_and_corrupted_stores(tmp_path):
    for name in ("a.npz", "a.h5", "a.zarr.zip"):
        path = pathlib.Path(save_store(tmp_path / name, x=X))
        path.write_bytes(path.read_bytes()[:-100])
        assert f"cannot read {path}: " in message(path)
    path = pathlib.Path(save_store(tmp_path / "b.zarr", x=X))
    for file in path.rglob("zarr.json"):
        file.write_text("{")
    assert f"cannot read {path}: " in message(path)
    (tmp_path / "c.npz").write_bytes(b"")
    assert "cannot read" in message(tmp_path / "c.npz")


def test_a_chunk_that_cannot_be_decoded(tmp_path):
    path = pathlib.Path(save_store(tmp_path / "a.zarr", x=X))
    source = ArrayFiles(str(path), "train", SHAPE)
    for file in (path / "x" / "c").rglob("*"):
        if file.is_file():
            file.write_bytes(b"none")
    with pytest.raises(DataError, match=f"cannot read {path}: ") as info:
        source.read([0])
    assert "\n" not in str(info.value)


def test_a_file_that_becomes_shorter_raises_an_error_for_large_rows(tmp_path):
    values = np.zeros((5, 50_000, 1), np.float32)
    source = ArrayFiles(save_npy(tmp_path / "a.npy", values), "train", (50_000, 1))
    assert source.read([4])["x"].shape == (1, 50_000, 1)
    os.truncate(tmp_path / "a.npy", values.nbytes // 2)
    with pytest.raises(DataError, match=r"cannot read .*a\.npy: it is truncated"):
        source.read([4])
    (tmp_path / "a.npy").unlink()
    with pytest.raises(DataError, match=r"cannot read .*a\.npy: No such file"):
        source.read([0])


def test_missing_packages_are_named_with_the_extra(tmp_path, monkeypatch):
    (tmp_path / "a.zarr").mkdir()
    (tmp_path / "a.h5").write_bytes(b"")
    for module, name in (("zarr", "a.zarr"), ("h5py", "a.h5")):
        monkeypatch.setitem(sys.modules, module, None)
        found = message(tmp_path / name)
        assert f"{name} needs {module} (" in found and found.endswith("pip install '.[arrays]'")


def test_a_folder_of_examples_and_of_several_examples(tmp_path):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / ".hidden").mkdir()
    parts = {
        "a.npy": X[:1],
        "b.npy": X[1],
        "deep/c.npy": X[2:4],
        "deep/d.npy": X[:0],
        "deep/er/e.NPY": X[4].astype(">f4", order="F"),
        "z.npy": np.asfortranarray(X[5:]),
    }
    for name, values in parts.items():
        with (tmp_path / name).open("wb") as file:
            np.save(file, values)
    for name in (".hidden/a.npy", ".b.npy"):
        np.save(tmp_path / name, X[0, 0])
    (tmp_path / "notes.txt").write_text("")
    source = pickle.loads(pickle.dumps(ArrayFiles(str(tmp_path), "train", SHAPE)))
    assert len(source) == 7 and source.num_classes == 0 and source.class_names == ()
    assert source.no_labels_reason.startswith("a.npy, b.npy, z.npy are outside the subfolders")
    assert source.notes() == ["Skipped other files: 1 .txt."]
    for indices in (INDICES, np.arange(7), np.arange(7)[::-1], [6, 6], []):
        np.testing.assert_array_equal(source.read(indices)["x"], X[np.asarray(indices, int)])


def test_a_folder_without_an_axis_of_channels(tmp_path):
    for i in range(3):
        np.save(tmp_path / f"{i}.npy", X[i, ..., 0])
    np.save(tmp_path / "3.npy", X[3:, ..., 0])
    np.testing.assert_array_equal(ArrayFiles(str(tmp_path), "train", (3, 4, 1)).read(INDICES)["x"], X[INDICES][..., :1])


def test_subfolders_are_classes(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (6, 2, 2, 1), dtype=np.uint8)
    for name in ("pear", "apple", "fig/ripe"):
        (tmp_path / name).mkdir(parents=True)
    for name, values in {
        "apple/0": images[0],
        "apple/1": images[1:3],
        "fig/ripe/a": images[3],
        "pear/z": images[4:],
    }.items():
        np.save(tmp_path / f"{name}.npy", values)
    source = pickle.loads(pickle.dumps(ArrayFiles(str(tmp_path), "train", (2, 2, 1))))
    assert (source.class_names, source.num_classes, source.no_labels_reason) == (("apple", "fig", "pear"), 3, "")
    batch = source.read(INDICES)
    np.testing.assert_array_equal(batch["image"], images[INDICES])
    assert batch["label"].dtype == np.int32 and batch["label"].tolist() == [2, 0, 2, 0, 1, 0]
    np.save(tmp_path / "outside.npy", images)
    source = ArrayFiles(str(tmp_path), "train", (2, 2, 1))
    assert source.num_classes == 0 and "label" not in source.read([0])
    assert source.no_labels_reason == "outside.npy is outside the subfolders; move each file into one"


def test_folders_of_files_that_do_not_fit(tmp_path):
    assert "no .npy files below" in message(tmp_path)
    np.savez(tmp_path / "b.npz", x=X)
    assert "it has only 1 .npz; set data.data_dir to a file itself" in message(tmp_path)
    np.save(tmp_path / "a.npy", X[:0])
    assert "contain no examples" in message(tmp_path)
    np.save(tmp_path / "b.npy", X[:, :2])
    found = message(tmp_path)
    assert f"{tmp_path / 'b.npy'} is float32 [7, 2, 4, 2], but {tmp_path / 'a.npy'} is float32 [0, 3, 4, 2]" in found
    np.save(tmp_path / "b.npy", X.astype(float))
    assert f"{tmp_path / 'b.npy'} is float64, but {tmp_path / 'a.npy'} is float32; save all files" in message(tmp_path)
    np.save(tmp_path / "a.npy", X)
    assert "a.npy is float32 [7, 3, 4, 2], but data.image_size" in message(tmp_path, shape=(5, 4, 2))
    assert "set data.image_size=(3, 4) data.channels=2" in message(tmp_path, shape=(5, 4, 2))
    np.save(tmp_path / "a.npy", X > 0)
    assert "a.npy contains bool" in message(tmp_path)


@pytest.mark.parametrize("kind", [".npy", ".npz", ".h5", ".zarr", ""])
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
    assert found == f"data.split='validation': {tmp_path} has the splits test, train; use one of them"
    (tmp_path / "train.hdf5").write_bytes(b"")
    both = ", ".join(sorted((f"train{kind}", "train.hdf5")))
    assert f"{tmp_path} has {both}; keep one of them" in message(tmp_path)


def test_paths_without_splits_have_train_only(tmp_path):
    (tmp_path / "data").mkdir()
    path = save_npy(tmp_path / "data" / "a.npy", X)
    for location in (path, tmp_path / "data"):
        found = message(location, "test")
        assert f"data.split='test': {location} has only 'train'; use data.split='train', or a folder that" in found
        assert "train.npy and test.npy" in found and "set evaluation.data_dir to other examples" in found
    save_npy(tmp_path / "data" / "test.npy", X)
    assert "has the splits a, test; use one of them" in message(tmp_path / "data")  # never trains on the test split


def test_another_process_opens_the_files_itself(tmp_path):
    """A pickled source has paths and no values, even after it was read."""
    x = np.random.default_rng(0).normal(size=(500, 64))
    label, condition = np.arange(500) % 3, x[:, :2]
    np.savez_compressed(tmp_path / "packed.npz", x=x, label=label, condition=condition)
    paths = [str(tmp_path / "packed.npz"), save_store(tmp_path / "a.npz", x=x, label=label, condition=condition)]
    for module, name in (("h5py", "a.h5"), ("zarr", "a.zarr")):
        if importlib.util.find_spec(module):
            paths.append(save_store(tmp_path / name, x=x, label=label, condition=condition))
    pickled = []
    for path in paths:
        source = ArrayFiles(path, "train", (64,))
        source.read(INDICES)
        pickled.append(pickle.dumps(source))
        assert len(pickled[-1]) < 2000, path
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    child = context.Process(target=read_in_child, args=(pickled, INDICES, queue))
    child.start()
    for _ in paths:
        batch = queue.get(timeout=60)
        np.testing.assert_array_equal(batch["x"], x[INDICES])
        np.testing.assert_array_equal(batch["label"], label[INDICES])
    child.join()
    assert child.exitcode == 0


def _rss_anon() -> int:
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("shape", [(256, 256, 5), (5,)], ids=["large rows", "small rows"])
def test_a_file_of_6_gb_is_not_loaded(tmp_path, shape):
    path = tmp_path / "a.npy"
    num_examples = 6 * 10**9 // (4 * int(np.prod(shape)))
    with path.open("wb") as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": (num_examples, *shape)}
        np.lib.format.write_array_header_1_0(file, header)
        start = file.tell()
        file.seek(start + 4 * int(np.prod(shape)) * (num_examples - 1))
        file.write(np.full(shape, 3, np.float32).tobytes())
    assert os.stat(path).st_size > 5.9e9
    source = ArrayFiles(str(path), "train", shape)
    before, rng = _rss_anon(), np.random.default_rng(0)
    for _ in range(20):
        batch = source.read(np.append(rng.integers(0, num_examples - 1, 7), num_examples - 1))["x"]
        assert (batch[-1] == 3).all() and not batch[:-1].any()
    del batch
    assert _rss_anon() - before < 50e6


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_folder_keeps_no_file_open(tmp_path):
    for i in range(300):
        np.save(tmp_path / f"{i:03}.npy", np.full((4, 2), i, np.int16))
    source = ArrayFiles(str(tmp_path), "train", (4, 2))
    before = len(os.listdir("/proc/self/fd"))
    order = np.random.default_rng(0).permutation(300)
    np.testing.assert_array_equal(source.read(order)["x"][:, 0, 0], order)
    assert len(os.listdir("/proc/self/fd")) == before


def test_an_npz_with_a_comment_and_an_offset_is_mapped_where_its_values_are(tmp_path):
    """The local header of a member may have another extra field than the central directory."""
    np.savez(tmp_path / "a.npz", first=np.arange(5), x=X)
    with zipfile.ZipFile(tmp_path / "a.npz", "a") as archive:
        archive.comment = b"comment"
    np.testing.assert_array_equal(ArrayFiles(str(tmp_path / "a.npz"), "train", SHAPE).read(INDICES)["x"], X[INDICES])
