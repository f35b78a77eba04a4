"""Arrays in files that cannot be used are refused in one line."""

import pathlib
import sys

import numpy as np
import pytest

from diffusion_jax.data.array_files import ArrayFiles
from diffusion_jax.errors import DataError
from helpers.array_files import LABEL, SHAPE, X, message, save_npy, save_store


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"label": LABEL[:6]}, "label has the shape [6], and the examples [7, 3, 4, 2]; every example needs a row"),
        ({"label": LABEL.astype(float)}, "label is float64 [7], not integers [7]"),
        ({"label": LABEL - 1}, "label contains -1; labels are the numbers 0"),
        ({"label": LABEL.astype(np.uint64) + 2**32}, "label contains 4294967300; labels"),
    ],
)
def test_labels_that_do_not_fit(tmp_path, arrays, words):
    path = save_store(tmp_path / "a.npz", x=X, **arrays)
    found = message(path)
    assert words in found and path in found


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (X > 0, '"x" as bool; give real numbers'),
        (X.astype(object), "Python objects"),
        (X[:0], "has no examples"),
        (X[0, 0, 0, 0], "x has the shape [], and the examples []; every example needs a row"),
        (X[..., [0, 0, 0]], "--config.data.image_size=(3,4) --config.data.channels=3"),
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
    np.savez(tmp_path / "a.npz", x=X[:3], label=values)
    np.savez_compressed(tmp_path / "b.npz", x=values)
    for name in ("a.npy", "a.npz", "b.npz"):
        assert f"cannot read {tmp_path / name}: " in message(tmp_path / name)


def test_missing_truncated_and_corrupted_files(tmp_path):
    assert "data.data_dir='' is empty; set it to an .npy, .npz" in message("")
    assert "data.data_dir='nowhere.npy' is no such file or folder" in message("nowhere.npy")
    (tmp_path / "a.csv").write_text("1,2")
    assert "is a file of another kind; set it to an .npy" in message(tmp_path / "a.csv")
    path = pathlib.Path(save_npy(tmp_path / "a.npy", X))
    whole = path.read_bytes()
    for content in (whole[:-1], whole[:40], b"", b"PK" + whole, whole.replace(b"'shape': (7", b"'shape': 7(", 1)):
        path.write_bytes(content)
        assert f"cannot read {path}: " in message(path)
        assert f"cannot read {path}: " in message(tmp_path)  # the folder with this file


def test_truncated_and_corrupted_stores(tmp_path):
    for name in ("a.npz", "a.h5"):
        path = pathlib.Path(save_store(tmp_path / name, x=X))
        path.write_bytes(path.read_bytes()[:-100])
        assert f"cannot read {path}: " in message(path)
    path = pathlib.Path(save_store(tmp_path / "b.zarr", x=X))
    for file in path.rglob("zarr.json"):
        file.write_text("{")
    assert f"cannot read {path}: " in message(path)
    np.savez(tmp_path / "d.npz")
    assert "d.npz has no array 'x' or 'image', and no others; save them under" in message(tmp_path / "d.npz")


@pytest.mark.parametrize("suffix", [".h5", ".zarr"])
def test_arrays_in_groups_are_not_read(tmp_path, suffix):
    path = save_store(tmp_path / f"a{suffix}", **{"train/x": X, "test/x": X[:3]})
    assert f"{path} has no array 'x' or 'image', and no others; save them under these names, outside groups" in message(
        path
    )
    source = ArrayFiles(save_store(tmp_path / f"b{suffix}", x=X, **{"meta/time": X}), "train", SHAPE)
    np.testing.assert_array_equal(source.read([1])["x"], X[[1]])


def test_files_that_are_damaged_or_removed_later(tmp_path):
    path = pathlib.Path(save_store(tmp_path / "a.zarr", x=X))
    source = ArrayFiles(str(path), "train", SHAPE)
    for file in (path / "x" / "c").rglob("*"):
        if file.is_file():
            file.write_bytes(b"none")
    with pytest.raises(DataError, match=f"cannot read {path}: ") as info:
        source.read([0])
    assert "\n" not in str(info.value)
    (tmp_path / "folder").mkdir()
    save_npy(tmp_path / "folder" / "a.npy", X)
    source = ArrayFiles(str(tmp_path / "folder"), "train", SHAPE)
    (tmp_path / "folder" / "a.npy").unlink()
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
    np.save(tmp_path / "a.npy", X[:0])
    assert "has no examples" in message(tmp_path)
    np.save(tmp_path / "b.npy", X[:, :2])
    found = message(tmp_path)
    assert f"{tmp_path / 'b.npy'} is float32 [7, 2, 4, 2]; every file must be an example [3, 4, 2]" in found
    np.save(tmp_path / "b.npy", X.astype(float))
    assert f"{tmp_path / 'b.npy'} is float64, but {tmp_path / 'a.npy'} is float32; save all files" in message(tmp_path)


def test_paths_without_splits_have_train_only(tmp_path):
    (tmp_path / "data").mkdir()
    path = save_npy(tmp_path / "data" / "a.npy", X)
    for location in (path, tmp_path / "data"):
        found = message(location, "test")
        assert f"data.split='test': {location} has only 'train'; use data.split='train', or a folder that" in found
        assert "train.npy and test.npy" in found and "set evaluation.data_dir to other examples" in found
    save_npy(tmp_path / "data" / "test.npy", X)
    assert "has the splits a, test; use one of them" in message(tmp_path / "data")  # never trains on the test split
