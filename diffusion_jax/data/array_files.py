"""Arrays in files as a source: `data.dataset="arrays"`."""

from __future__ import annotations

import collections
import os
import pathlib
import zipfile
from collections.abc import Callable, Sequence

import numpy as np

from diffusion_jax.data.array_rows import FileRows, Hdf5Rows, NumpyRows, Rows, ZarrRows, import_extra, readable
from diffusion_jax.errors import DataError, list_names
from diffusion_jax.storage.downloads import local_path

__all__ = ["ArrayFiles", "has_splits"]

_KINDS = (".npy", ".npz", ".zarr", ".h5", ".hdf5")
_ALLOWED = "an .npy, .npz, .zarr, .h5 or .hdf5, or a folder of .npy files"
_NAMES = ("x", "image", "label", "condition")
_SPLIT_NAMES = {"train", "test", "validation", "valid", "val", "eval", "dev"}
_MAX_LOADED_BYTES = 2**30  # of a compressed array, which every process holds in memory


class ArrayFiles:
    """Examples [*spatial, C] in files, read by index; the files may be larger than memory. Picklable: it holds paths.

    path: one of

    - `.npy`, an array [N, *spatial, C], memory-mapped.
    - `.npz` with "x" or "image", optionally "label" and "condition". What `np.savez` writes is memory-mapped; a compressed
      array is loaded, up to 1 GiB.
    - `.h5`, `.hdf5` or `.zarr` with arrays of these names. They need the extra `arrays`. Each chunk that a batch touches is
      decoded, so small chunks are fastest.
    - a folder with `.npy` files, searched recursively in order of their paths without hidden ones. Each is one example
      [*spatial, C] or several [n, *spatial, C]. If all are in subfolders, each subfolder is a class.
    - a folder with one of these for each split, such as `train.npy` and `test.npy`, or `train/` and `test/`. Everything else
      has the split "train" only.

    shape: (*spatial, C), of `data.image_size` and `data.channels`. With C = 1 the files may lack the axis of channels.
    "image" is uint8 and "x" any other real type; in .npy files uint8 is "image".

    num_classes: the largest label + 1, or the number of subfolders; 0 without labels. class_names: the subfolders, or ().
    Raises: DataError. `data.check_examples` checks shapes and types.
    """

    def __init__(self, path: str, split: str, shape: tuple[int, ...]):
        self._shape, location = tuple(shape), _find_split(path, split)
        self._unknown: list[str] = []
        self._labels: np.ndarray | None = None
        self.class_names: tuple[str, ...] = ()
        self._arrays: dict[str, FileRows | Rows]
        if location.is_dir() and not _is_zarr(location):
            examples, self._labels, self.class_names = _open_folder(location, self._shape)
            self._arrays = {_key(examples): examples}
        else:
            self._arrays, self._unknown = _open_file(location)
        self.num_classes = len(self.class_names)
        if "label" in self._arrays:
            self._labels, self.num_classes = _read_labels(f"{location}: label", self._arrays.pop("label"), len(self))

    def __len__(self) -> int:
        return next(iter(self._arrays.values())).shape[0]

    def read(self, indices: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
        """The examples at n indices in [0, N), in any order, also repeated.

        Either "image" uint8 or "x" (real numbers as they are in the files) [n, *spatial, C]; if the files have them, "label"
        int32 [n] and "condition" [n, D] or [n, *spatial, K]. Raises: DataError for files that cannot be read.
        """
        rows = np.asarray(indices, np.int64)
        batch = {name: array.read(rows) for name, array in self._arrays.items()}
        name = next(iter(batch))
        if (*batch[name].shape[1:], 1) == self._shape:
            batch[name] = batch[name][..., None]
        if self._labels is not None:
            batch["label"] = self._labels[rows]
        return batch

    def notes(self) -> list[str]:
        """A line about arrays that are not read."""
        names = list_names(map(repr, self._unknown), 8)
        return [f"Ignored arrays: {names}; arrays are x or image, label, and condition."] if self._unknown else []


def _key(examples: FileRows | Rows) -> str:
    return "image" if examples.dtype == np.uint8 else "x"


def _is_zarr(path: pathlib.Path) -> bool:
    return path.name.lower().endswith(".zarr")


def _kind(name: str) -> str:
    """The suffix of a file or a store that can be opened; "" for others."""
    return next((kind for kind in _KINDS if name.lower().endswith(kind)), "")


def has_splits(path: str, split: str) -> bool:
    """Whether `split` selects some of the examples at a path: one file, store or folder of files has no splits."""
    root = local_path(path)
    if not root.is_dir() or _is_zarr(root):
        return False
    names = _split_entries(root).keys()
    return split in names or bool(names & _SPLIT_NAMES)


def _find_split(path: str, split: str) -> pathlib.Path:
    """The file or folder of a split. Raises: DataError."""
    root = local_path(path or "")
    if not path or not root.exists():
        what = "no such file or folder" if path else "empty"
        raise DataError(f"data.data_dir={str(path or '')!r} is {what}; set it to {_ALLOWED}")
    if root.is_dir() and not _is_zarr(root):
        entries = _split_entries(root)
        found = entries.get(split, [])
        if len(found) > 1:
            raise DataError(f"data.split={split!r}: {root} has {list_names(found)}; keep one of them")
        if found:
            return root / found[0]
        if entries.keys() & _SPLIT_NAMES:  # a folder with test.npy alone is not training data
            other = "" if split == "train" else ", or set evaluation.data_dir to other examples"
            names = list_names(sorted(entries), 8)
            raise DataError(f"data.split={split!r}: {root} has the splits {names}; use one of them{other}")
    elif root.is_file() and not _kind(root.name):
        raise DataError(f"data.data_dir={path!r} is a file of another kind; set it to {_ALLOWED}")
    if split != "train":
        raise DataError(
            f"data.split={split!r}: {root} has only 'train'; use data.split='train', or a folder that contains train.npy and "
            f"{split}.npy (or other files or folders of these names), or set evaluation.data_dir to other examples, "
            "or train with data.holdout"
        )
    return root


def _split_entries(root: pathlib.Path) -> dict[str, list[str]]:
    """The files and folders that can be a split, by its name, without hidden ones."""
    entries = collections.defaultdict(list)
    with os.scandir(root) as listing:
        for entry in listing:
            kind = _kind(entry.name)
            if not entry.name.startswith(".") and (kind or entry.is_dir()):
                entries[entry.name[: len(entry.name) - len(kind)]].append(entry.name)
    return {name: sorted(files) for name, files in entries.items()}


def _open_file(path: pathlib.Path) -> tuple[dict[str, FileRows | Rows], list[str]]:
    """(the arrays of a file or store, the examples first; the names of arrays that are not read). Raises: DataError."""
    location = str(path)
    if path.suffix.lower() == ".npy":
        names, examples = [], NumpyRows(location)
        found: dict[str, FileRows | Rows] = {_key(examples): examples}
    else:
        with readable(path):
            names, open_rows = _list_arrays(path)
        chosen = [name for name in ("x", "image") if name in names]
        if len(chosen) == 2:
            raise DataError(f"{path} has 'x' and 'image'; keep one: 'image' for uint8, 'x' for other numbers")
        if not chosen:
            raise DataError(
                f"{path} has no array 'x' or 'image', {f'only {list_names(names, 8)}' if names else 'and no others'}; save "
                "them under these names, outside groups, and optionally 'label' and 'condition'"
            )
        found = {name: open_rows(location, name) for name in (*chosen, "label", "condition") if name in names}
        examples = found[chosen[0]]
    for name, array in found.items():
        if array.shape[:1] != examples.shape[:1] or not array.shape:
            raise DataError(
                f"{path}: {name} has the shape {list(array.shape)}, and the examples {list(examples.shape)}; every example "
                "needs a row of each array"
            )
    return found, [name for name in names if name not in _NAMES]


def _list_arrays(path: pathlib.Path) -> tuple[list[str], Callable[[str, str], Rows]]:
    """(the names of the arrays of a file, what opens one of them)."""
    if path.suffix.lower() == ".npz":
        with zipfile.ZipFile(path) as archive:
            members = {m.filename.removesuffix(".npy"): m for m in archive.infolist() if m.filename.endswith(".npy")}
        for name, member in members.items():
            if name in _NAMES and member.compress_type != zipfile.ZIP_STORED and member.file_size > _MAX_LOADED_BYTES:
                raise DataError(
                    f"{path}: {name} is compressed and has {member.file_size / 2**30:.1f} GiB, more than the 1 GiB that are "
                    "loaded; save it with np.savez instead of np.savez_compressed, or as .npy"
                )
        return list(members), NumpyRows
    if _is_zarr(path):
        store = import_extra("zarr", path).open(str(path), mode="r")
        return sorted(store.array_keys()) if hasattr(store, "array_keys") else [], ZarrRows
    h5py = import_extra("h5py", path)
    with h5py.File(path, "r", locking="best-effort") as file:
        return [name for name, item in file.items() if isinstance(item, h5py.Dataset)], Hdf5Rows


def _read_labels(where: str, array: FileRows | Rows, length: int) -> tuple[np.ndarray, int]:
    """(labels int32 [N], the largest + 1). Raises: DataError for labels that are not integers from 0 on."""
    if array.dtype.kind not in "iu" or array.shape != (length,):
        raise DataError(f"{where} is {array.dtype} {list(array.shape)}, not integers [{length}], one for each example")
    labels = array.read(np.arange(length))
    low, high = (int(labels.min()), int(labels.max())) if length else (0, 0)
    if low < 0 or high >= 2**31 - 1:
        wrong = low if low < 0 else high
        raise DataError(f"{where} contains {wrong}; labels are the numbers 0 ... num_classes - 1")
    return labels.astype(np.int32), high + 1


def _open_folder(root: pathlib.Path, shape: tuple[int, ...]) -> tuple[FileRows, np.ndarray | None, tuple[str, ...]]:
    """(the examples of the .npy files below a folder, their labels, the names of the classes). Raises: DataError."""
    paths = [path.relative_to(root) for path in root.rglob("*") if path.suffix.lower() == ".npy"]
    files = sorted(path.parts for path in paths if not any(part.startswith(".") for part in path.parts))
    if not files:
        raise DataError(f"no .npy files below {str(root)!r}; set data.data_dir to {_ALLOWED}")
    lengths, dtypes = [], []
    for file in files:
        array = NumpyRows(str(root.joinpath(*file)))
        lengths.append(1 if _is_example(array.shape, shape) else array.shape[0] if array.shape else 0)
        dtypes.append(array.dtype)
        if not _is_example(array.shape, shape) and not _is_example(array.shape[1:], shape):
            raise DataError(
                f"{root.joinpath(*file)} is {array.dtype} {list(array.shape)}; every file must be an example {list(shape)} "
                "(data.image_size and data.channels), or several of them along a first axis"
            )
        if array.dtype != dtypes[0]:
            raise DataError(
                f"{root.joinpath(*file)} is {array.dtype}, but {root.joinpath(*files[0])} is {dtypes[0]}; save all files as "
                "one type"
            )
    examples = FileRows(str(root), [os.path.join(*file) for file in files], lengths, shape, dtypes[0])
    if any(len(file) == 1 for file in files):
        return examples, None, ()
    classes = sorted({file[0] for file in files})
    index = {name: i for i, name in enumerate(classes)}
    return examples, np.repeat(np.array([index[file[0]] for file in files], np.int32), lengths), tuple(classes)


def _is_example(found: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    return found == shape or (shape[-1] == 1 and found == shape[:-1])
