"""Arrays in files: .npy, .npz, folders, HDF5 and Zarr, read by index."""

import pickle
import tracemalloc

import numpy as np
import pytest

from diffusion_jax.data import array_files
from diffusion_jax.data.array_files import ArrayFiles, has_splits
from helpers.array_files import CONDITION, INDICES, LABEL, SHAPE, X, message, save_npy, save_store


def test_an_npy_file_is_read_in_any_order_and_repeatedly(tmp_path):
    source = ArrayFiles(save_npy(tmp_path / "a.npy", X), "train", SHAPE)
    assert (len(source), source.num_classes, source.class_names) == (7, 0, ())
    batch = source.read(INDICES)
    assert batch.keys() == {"x"} and batch["x"].dtype == np.float32 and type(batch["x"]) is np.ndarray
    np.testing.assert_array_equal(batch["x"], X[INDICES])
    np.testing.assert_array_equal(source.read([6, 1])["x"], X[[6, 1]])
    assert source.read([])["x"].shape == (0, *SHAPE)


@pytest.mark.parametrize("dtype", ["f2", "<f4", ">f8", ">i4", "u1"])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("kind", ["npy", "npz", "folder"])
def test_types_byte_orders_and_fortran_order(tmp_path, dtype, order, kind):
    shape = (3, 7)
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
    (tmp_path / "folder").mkdir()
    for i in range(3):
        np.save(tmp_path / "folder" / f"{i}.npy", fields[i])
    np.save(tmp_path / "folder" / "3.npy", fields[3:])
    found = ArrayFiles(str(tmp_path / "folder"), "train", (3, 4, 1)).read(INDICES)["x"]
    np.testing.assert_array_equal(found, fields[INDICES][..., None])


@pytest.mark.parametrize("name", ["a.npz", "a.h5", "a.hdf5", "a.zarr", "a.v2.zarr"])
def test_labels_and_conditions_are_read_with_the_examples(tmp_path, name):
    path = save_store(tmp_path / name, x=X, label=LABEL, condition=CONDITION, cond=CONDITION)
    source = pickle.loads(pickle.dumps(ArrayFiles(path, "train", SHAPE)))
    assert (len(source), source.num_classes, source.class_names) == (7, 5, ())
    assert source.notes() == ["Ignored arrays: 'cond'; arrays are x or image, label, and condition."]
    for indices in (INDICES, [3], np.arange(1, 6), np.arange(7)[::-1], []):
        batch = source.read(indices)
        assert batch.keys() == {"x", "label", "condition"} and batch["label"].dtype == np.int32
        rows = np.asarray(indices, int)
        for key, values in {"x": X, "label": LABEL, "condition": CONDITION}.items():
            np.testing.assert_array_equal(batch[key], values[rows])


@pytest.mark.parametrize("name", ["a.npz", "a.h5", "a.zarr"])
def test_a_file_has_images_or_other_numbers(tmp_path, name):
    images = np.random.default_rng(0).integers(0, 256, X.shape, dtype=np.uint8)
    batch = ArrayFiles(save_store(tmp_path / name, image=images), "train", SHAPE).read(INDICES)
    assert batch.keys() == {"image"}
    np.testing.assert_array_equal(batch["image"], images[INDICES])
    for folder in ("both", "other", "wrong"):
        (tmp_path / folder).mkdir()
    assert "'x' and 'image'; keep one" in message(save_store(tmp_path / "both" / name, x=X, image=images))
    found = message(save_store(tmp_path / "other" / name, alpha=X, beta=X))
    assert "no array 'x' or 'image', only alpha, beta" in found
    assert '"image" as float32, which must be uint8' in message(save_store(tmp_path / "wrong" / name, image=X))


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
    for indices in (INDICES, np.arange(7), np.arange(7)[::-1], [6, 6], []):
        np.testing.assert_array_equal(source.read(indices)["x"], X[np.asarray(indices, int)])


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
    assert (source.class_names, source.num_classes) == (("apple", "fig", "pear"), 3)
    batch = source.read(INDICES)
    np.testing.assert_array_equal(batch["image"], images[INDICES])
    assert batch["label"].dtype == np.int32 and batch["label"].tolist() == [2, 0, 2, 0, 1, 0]
    np.save(tmp_path / "outside.npy", images)
    source = ArrayFiles(str(tmp_path), "train", (2, 2, 1))
    assert source.num_classes == 0 and "label" not in source.read([0])


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
    expected = f"data.split='validation': {tmp_path} has the splits test, train; use one of them"
    assert found == f"{expected}, or set evaluation.data_dir to other examples"
    (tmp_path / "train.hdf5").write_bytes(b"")
    both = ", ".join(sorted((f"train{kind}", "train.hdf5")))
    assert f"{tmp_path} has {both}; keep one of them" in message(tmp_path)


def test_only_names_of_splits_make_splits(tmp_path, monkeypatch):
    np.save(tmp_path / "a.npy", X)
    assert not has_splits(str(tmp_path), "test") and not has_splits(str(tmp_path / "a.npy"), "train")
    assert has_splits(str(tmp_path), "a")
    (tmp_path / "train").mkdir()
    assert has_splits(str(tmp_path), "test") and not has_splits(str(tmp_path / "nowhere"), "test")
    monkeypatch.setattr(array_files, "local_path", {"gs://bucket/data": tmp_path}.__getitem__)  # a downloaded copy
    assert has_splits("gs://bucket/data", "test")


@pytest.mark.parametrize("name", ["packed.npz", "a.npz", "a.h5", "a.zarr"])
def test_a_pickled_source_has_paths_and_labels_but_no_other_values(tmp_path, name):
    """Also after it was read: another process opens the files itself."""
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
