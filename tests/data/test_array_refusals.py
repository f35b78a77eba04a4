"""Arrays in files that cannot be used are refused in one line."""

import os
import pathlib
import pickle
import sys

import numpy as np
import pytest

from diffusion_jax.data.array_files import ArrayFiles
from diffusion_jax.data.array_rows import one_line
from diffusion_jax.errors import DataError
from helpers.array_files import CONDITION, INDICES, LABEL, SHAPE, X, message, save_npy, save_store


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
    np.savez(tmp_path / "d.npz")
    assert "d.npz has no array 'x' or 'image', and no others; save them under" in message(tmp_path / "d.npz")


@pytest.mark.parametrize("suffix", [".h5", ".zarr"])
def test_groups_of_a_store_are_no_splits(tmp_path, suffix):
    path = pathlib.Path(save_store(tmp_path / f"a{suffix}", **{"train/x": X, "test/x": X[:3]}))
    for split in ("train", "test"):
        expected = (
            f"{path} has the groups test, train, which are not read; save each split as a file of its own, such as "
        )
        expected += f"train{suffix} and test{suffix} in one folder, with its arrays outside groups"
        if split == "test":
            expected = f"data.split='test': {path} has only 'train'; use data.split='train', or a folder that"
        assert message(path, split).startswith(expected)
    np.testing.assert_array_equal(
        ArrayFiles(save_store(tmp_path / f"b{suffix}", x=X, **{"meta/time": X}), "train", SHAPE).read([1])["x"], X[[1]]
    )


def test_messages_of_other_packages_become_one_line():
    assert one_line(ValueError("bad\n  header")) == "bad header"
    assert one_line(OSError(2, "No such file", "a")) == "No such file"
    assert one_line(KeyError()) == "KeyError"


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
    values = np.zeros((5, 100_000, 1), np.float32)
    source = ArrayFiles(save_npy(tmp_path / "a.npy", values), "train", (100_000, 1))
    assert source.read([4])["x"].shape == (1, 100_000, 1)
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


def test_paths_without_splits_have_train_only(tmp_path):
    (tmp_path / "data").mkdir()
    path = save_npy(tmp_path / "data" / "a.npy", X)
    for location in (path, tmp_path / "data"):
        found = message(location, "test")
        assert f"data.split='test': {location} has only 'train'; use data.split='train', or a folder that" in found
        assert "train.npy and test.npy" in found and "set evaluation.data_dir to other examples" in found
    save_npy(tmp_path / "data" / "test.npy", X)
    assert "has the splits a, test; use one of them" in message(tmp_path / "data")  # never trains on the test split
