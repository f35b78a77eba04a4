"""Arrays in files as a source: `data.dataset="arrays"`."""

from __future__ import annotations

import collections
import functools
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from diffusion_jax.data.array_rows import (
    FileLabels,
    FileRows,
    Hdf5Rows,
    LoadedRows,
    NumpyRows,
    Rows,
    ZarrRows,
    import_extra,
    one_line,
    open_zarr,
    readable,
)
from diffusion_jax.data.numpy_files import ArrayLayout, npy_layout, npz_layouts
from diffusion_jax.errors import DataError, list_names
from diffusion_jax.storage.downloads import local_path

__all__ = ["ArrayFiles", "has_splits"]

_KINDS = (".npy", ".npz", ".zarr", ".zarr.zip", ".h5", ".hdf5")
_ALLOWED = "an .npy, .npz, .zarr, .h5 or .hdf5, or a folder of .npy files"
_READ_NAMES = ("x", "image", "label", "condition", "arr_0", "arr_1", "settings")  # the last three of --mode=sample
_SPLIT_NAMES = {"train", "test", "validation", "valid", "val", "eval", "dev"}
_ZARR_FILES = ("zarr.json", ".zarray", ".zgroup")
_MAX_LOADED_BYTES = 2**30  # of a compressed array, which every process holds in memory
_LABELS_PER_READ = 2**20


class ArrayFiles:
    """Examples [*spatial, C] in files, read by index; the files may be larger than memory. Picklable: it holds paths.

    path: one of

    - `.npy`, an array [N, *spatial, C], memory-mapped.
    - `.npz` with "x" or "image" (or "arr_0", or one array of any name), optionally "label" (or "arr_1" beside "arr_0") and
      "condition". What `np.savez` writes is memory-mapped; a compressed array is loaded, up to 1 GiB.
    - `.h5` or `.hdf5` with data sets of these names, or one data set; `.zarr` or `.zarr.zip`, a group or an array, in format
      2 or 3. They need the extra `arrays`. Each chunk that a batch touches is decoded, so small chunks are fastest.
    - a folder with `.npy` files, searched recursively in order of their paths without hidden ones. Each is one example
      [*spatial, C] or several [n, *spatial, C]. If all are in subfolders, each subfolder is a class.
    - a folder with one of these for each split, such as `train.npy` and `test.npy`, or `train/` and `test/`. Everything else
      has the split "train" only.

    shape: (*spatial, C), of `data.image_size` and `data.channels`. With C = 1 the files may lack the axis of channels.
    "image" is uint8 and "x" any other real type; under other names uint8 is "image". Big-endian values and Fortran order are
    read, too, but an array in Fortran order that is larger than memory is slow, because its examples are scattered.
    "label": integers [N], at least 0. "condition": real numbers [N, D] or [N, *spatial, K].

    num_classes: the largest label + 1, or the number of subfolders; 0 without labels. class_names: the subfolders, or ().
    Raises: DataError.
    """

    def __init__(self, path: str, split: str, shape: tuple[int, ...]):
        self.class_names: tuple[str, ...] = ()
        self.no_labels_reason, self.no_conditions_reason, self._skipped = "", "", ""
        self._unknown: list[str] = []
        location = _find_split(path, split)
        self._label: Rows | None = None
        self._condition: Rows | None = None
        self._shape = tuple(shape)
        if location.is_dir() and not _is_zarr(location):
            self._open_folder(location)
        else:
            self._open_file(location)
        self.num_classes = len(self.class_names)
        if self._label is not None and not self.class_names:
            self.num_classes = _largest_label(f"{location}: {self._label_name}", self._label, len(self)) + 1

    def __len__(self) -> int:
        return self._examples.shape[0]

    def read(self, indices: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
        """The examples at n indices in [0, N), in any order, also repeated.

        Either "image" uint8 or "x" (real numbers as they are in the files) [n, *spatial, C]; if the files have them, "label"
        int32 [n] and "condition" [n, D] or [n, *spatial, K]. Raises: DataError for files that cannot be read; IndexError.
        """
        rows = np.asarray(indices, np.int64).reshape(-1)
        if len(rows) and not 0 <= rows.min() <= rows.max() < len(self):
            raise IndexError(f"indices from {rows.min()} to {rows.max()} must be in [0, {len(self)})")
        batch = {self._key: self._examples.read(rows).reshape(len(rows), *self._shape)}
        if self._label is not None:
            batch["label"] = self._label.read(rows).astype(np.int32)
        if self._condition is not None:
            batch["condition"] = self._condition.read(rows)
        return batch

    def notes(self) -> list[str]:
        """Lines about skipped files and missing chunks."""
        notes = [f"Skipped other files: {self._skipped}."] if self._skipped else []
        if self._unknown:
            notes.append(
                f"Ignored arrays: {list_names(self._unknown, 8)}; arrays are x or image, label, and condition."
            )
        arrays = [rows for rows in (self._examples, self._label, self._condition) if rows]
        return notes + [note for rows in arrays if (note := rows.note())]

    def _open_file(self, path: pathlib.Path) -> None:
        members, groups = _open_members(path)
        name = _example_name(path, list(members), groups)
        self._unknown = [repr(other) for other in members if other not in (*_READ_NAMES, name)]
        self._examples = members[name]()
        self._key = name if name in ("x", "image") else "image" if self._examples.dtype == np.uint8 else "x"
        where, length = _where(path, name), self._examples.shape[:1]
        _check_type(where, self._key, self._examples.dtype)
        _check_shape(where, self._examples, self._shape)
        self._label_name = "arr_1" if name == "arr_0" and "label" not in members else "label"
        if self._label_name in members:
            self._label = members[self._label_name]()
            if self._label.shape != length or self._label.dtype.kind not in "iu":
                raise DataError(
                    f"{path}: {self._label_name} is {_shown(self._label)}, not integers [{length[0]}]; each of the "
                    f"{length[0]:,} examples needs the number of its class"
                )
        else:
            self.no_labels_reason = self._why_missing("label", path, name)
        if "condition" in members:
            self._condition = members["condition"]()
            _check_condition(f"{path}: condition", self._condition, length[0], self._shape)
        else:
            self.no_conditions_reason = self._why_missing("condition", path, name)

    def _why_missing(self, wanted: str, path: pathlib.Path, name: str) -> str:
        if not name:  # of an .npy
            return f"{path} is one array; use an .npz with x and {wanted}"
        others = f"; its other arrays: {list_names(self._unknown)}" if self._unknown else ""
        return f"{path} has no array {wanted!r}{others}"

    def _open_folder(self, root: pathlib.Path) -> None:
        files, self._skipped = _npy_files(root)
        if not files:
            skipped = f"; it has only {self._skipped}; set data.data_dir to a file itself" if self._skipped else ""
            raise DataError(f"no .npy files below {str(root)!r}{skipped}")
        layouts = _folder_layouts(root, files, self._shape)
        self._examples = FileRows(str(root), files, layouts)
        if not len(self):
            raise DataError(f"the .npy files below {str(root)!r} contain no examples")
        self._key = "image" if self._examples.dtype == np.uint8 else "x"
        folders = [file.split(os.sep)[0] for file in files if os.sep in file]
        if len(folders) == len(files):
            self.class_names, labels = _class_labels(folders)
            self._label = FileLabels(self._examples.ends, labels)
        elif folders:
            outside = [file for file in files if os.sep not in file]
            are = "is" if len(outside) == 1 else "are"
            self.no_labels_reason = f"{list_names(outside, 3)} {are} outside the subfolders; move each file into one"
        else:
            self.no_labels_reason = f"{root} has no subfolders; put the files of each class into a subfolder"


def _is_zarr(path: pathlib.Path) -> bool:
    return path.name.lower().endswith(".zarr") or any((path / name).exists() for name in _ZARR_FILES)


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


def _open_members(path: pathlib.Path) -> tuple[Mapping[str, Callable[[], Rows]], list[str]]:
    """(what opens each array of a file or store, the names of groups, which are not read).

    The name of an array is "" for the only one of a file. Raises: DataError.
    """
    location = str(path)
    with readable(path):
        if path.is_dir() or path.name.lower().endswith(".zarr.zip"):
            store = open_zarr(location)
            is_group = hasattr(store, "array_keys")
            names, groups = (sorted(store.array_keys()), sorted(store.group_keys())) if is_group else ([""], [])
            return {name: functools.partial(ZarrRows, location, name) for name in names}, groups
        kind = path.suffix.lower()
        if kind == ".npy":
            return {"": functools.partial(_numpy_rows, location, "", npy_layout(path))}, []
        if kind == ".npz":
            layouts = npz_layouts(path)
            return {
                name: functools.partial(_numpy_rows, location, name, layout) for name, layout in layouts.items()
            }, []
        h5py = import_extra("h5py", path)
        with h5py.File(path, "r", locking="best-effort") as file:
            names = [name for name, item in file.items() if isinstance(item, h5py.Dataset)]
            groups = [name for name, item in file.items() if isinstance(item, h5py.Group)]
        return {name: functools.partial(Hdf5Rows, location, name) for name in names}, groups


def _numpy_rows(path: str, name: str, layout: ArrayLayout) -> Rows:
    if layout.offset is not None:
        return NumpyRows(path, layout)
    if layout.num_bytes > _MAX_LOADED_BYTES:
        raise DataError(
            f"{path}: {name} is compressed and has {layout.num_bytes / 2**30:.1f} GiB, more than the 1 GiB that are loaded; "
            "save it with np.savez instead of np.savez_compressed, or as .npy"
        )
    return LoadedRows(path, name, layout)


def _example_name(path: pathlib.Path, names: Sequence[str], groups: Sequence[str]) -> str:
    """The name of the array with the examples. Raises: DataError."""
    if "x" in names and "image" in names:
        raise DataError(f"{path} has 'x' and 'image'; keep one of them: 'image' for uint8, 'x' for other numbers")
    preferred = [name for name in ("x", "image", "arr_0") if name in names]
    others = [name for name in names if name not in ("label", "condition")]
    if not preferred and groups:
        kind = _kind(path.name) or ".zarr"
        raise DataError(
            f"{path} has the groups {list_names(groups, 8)}, which are not read; save each split as a file of its own, such "
            f"as train{kind} and test{kind} in one folder, with its arrays outside groups"
        )
    if not preferred and len(others) != 1:
        raise DataError(
            f"{path} has no array 'x' or 'image', {f'only {list_names(names, 8)}' if names else 'and no others'}; save them "
            "under these names, and optionally 'label' and 'condition'"
        )
    return preferred[0] if preferred else others[0]


def _where(path: pathlib.Path, name: str) -> str:
    return f"{path}: {name}" if name else f"{path}"


def _shown(array: Rows | ArrayLayout) -> str:
    return f"{array.dtype} {list(array.shape)}"


def _check_type(where: str, key: str, dtype: np.dtype) -> None:
    """Raises: DataError for an array without real numbers, or an "image" that is not uint8."""
    if dtype.kind not in "iuf":
        name = {"O": "Python objects", "U": "strings", "S": "strings", "T": "strings"}.get(dtype.kind, str(dtype))
        raise DataError(f"{where} contains {name}, not real numbers; save it as a type such as float32 or uint8")
    if key == "image" and dtype != np.uint8:
        raise DataError(
            f"{where} has 'image' as {dtype}, not uint8; save it under the name 'x', or convert it to uint8"
        )


def _is_example(found: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    return found == shape or (shape[-1] == 1 and found == shape[:-1])


def _check_shape(where: str, array: Rows, shape: tuple[int, ...]) -> None:
    if not array.shape:
        raise DataError(f"{where} is one number, not an array of examples [N, *spatial, C]")
    if not array.shape[0]:
        raise DataError(f"{where} is {_shown(array)}: it contains no examples")
    if not _is_example(array.shape[1:], shape):
        raise DataError(f"{where} is {_shown(array)}, {_shape_advice(array.shape[1:], shape)}")


def _shape_advice(found: tuple[int, ...], shape: tuple[int, ...]) -> str:
    """What an error about examples of another shape says after the array: the shape of the config, and what to type."""
    wanted = f"but data.image_size and data.channels give examples of shape {list(shape)}"
    if found == (shape[-1], *shape[:-1]) and len(set(found)) > 1:
        return f"{wanted}; move its axis of channels to the end with np.moveaxis"
    leaves = [f"data.image_size={found[:-1]} data.channels={found[-1]}"] if 1 <= len(found) <= 4 else []
    if len(found) <= 3:
        reason = " if it has no axis of channels" if leaves else ""
        leaves.append(f"data.image_size={found} data.channels=1{reason}")
    if not leaves:
        return f"{wanted}; at most three spatial axes and one of channels are supported, so reshape it"
    return f"{wanted}; set {', or '.join(leaves)}"


def _check_condition(where: str, array: Rows, length: int, shape: tuple[int, ...]) -> None:
    is_field = array.shape[1:-1] == shape[:-1] and len(array.shape) == len(shape) + 1
    if array.dtype.kind in "iuf" and array.shape[:1] == (length,) and (len(array.shape) == 2 or is_field):
        return
    field = f" or [{', '.join(map(str, (length, *shape[:-1], 'K')))}]" if shape[:-1] else ""
    raise DataError(f"{where} is {_shown(array)}, not real numbers [{length}, D]{field}; each example needs one")


def _largest_label(where: str, labels: Rows, length: int) -> int:
    """The largest of the labels, which are read in pieces. Raises: DataError for negative ones."""
    low = high = 0
    for start in range(0, length, _LABELS_PER_READ):
        values = labels.read(np.arange(start, min(start + _LABELS_PER_READ, length)))
        low, high = min(low, int(values.min())), max(high, int(values.max()))
    if low < 0 or high >= 2**31 - 1:
        wrong = low if low < 0 else high
        raise DataError(f"{where} contains {wrong}; labels are the numbers 0 ... num_classes - 1")
    return high


def _npy_files(root: pathlib.Path) -> tuple[list[str], str]:
    """(the .npy files below a folder, relative to it and in order of their paths; a description of the others)."""
    files, others = [], collections.Counter()
    for directory, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if name.startswith("."):
                continue
            if name.lower().endswith(".npy"):
                files.append(os.path.relpath(os.path.join(directory, name), root))
            else:
                others[pathlib.PurePath(name).suffix.lower() or "without a suffix"] += 1
    counts = sorted(others.items(), key=lambda item: (-item[1], item[0]))
    return sorted(files, key=lambda file: file.split(os.sep)), ", ".join(f"{n:,} {suffix}" for suffix, n in counts)


def _folder_layouts(root: pathlib.Path, files: Sequence[str], shape: tuple[int, ...]) -> list[ArrayLayout]:
    """The layout of each file as [n, *shape], from their headers. Raises: DataError."""
    layouts, failures = [], []
    for file in files:
        try:
            layouts.append(npy_layout(os.path.join(root, file)))
        except (OSError, ValueError) as error:
            failures.append(f"{root / file}: {one_line(error)}")
    if failures:
        raise DataError(f"cannot read {list_names(failures, 3)}")
    _check_type(f"{root / files[0]}", "", layouts[0].dtype)
    lengths = [_num_examples(layout.shape, shape) for layout in layouts]
    wrong = next((i for i, length in enumerate(lengths) if length is None), None)
    if wrong is not None:
        found = layouts[wrong].shape
        fitting = next((i for i, length in enumerate(lengths) if length is not None), None)
        if fitting is None:
            example = found if len(found) <= len(shape) else found[1:]
            raise DataError(f"{root / files[wrong]} is {_shown(layouts[wrong])}, {_shape_advice(example, shape)}")
        raise DataError(
            f"{root / files[wrong]} is {_shown(layouts[wrong])}, but {root / files[fitting]} is {_shown(layouts[fitting])}; "
            f"every file must be an example {list(shape)}, or several of them along a first axis"
        )
    for file, layout in zip(files, layouts, strict=True):
        if layout.dtype.newbyteorder("=") != layouts[0].dtype.newbyteorder("="):
            raise DataError(
                f"{root / file} is {layout.dtype}, but {root / files[0]} is {layouts[0].dtype}; save all files as one type"
            )
    return [layout._replace(shape=(n or 0, *shape)) for layout, n in zip(layouts, lengths, strict=True)]


def _num_examples(found: tuple[int, ...], shape: tuple[int, ...]) -> int | None:
    """The number of examples in a file of a folder; None if it has another shape."""
    if _is_example(found, shape):
        return 1
    return found[0] if found and _is_example(found[1:], shape) else None


def _class_labels(folders: Sequence[str]) -> tuple[tuple[str, ...], np.ndarray]:
    """(the names of the classes in order, the label of each file)."""
    names = sorted(set(folders))
    index = {name: i for i, name in enumerate(names)}
    return tuple(names), np.array([index[folder] for folder in folders], np.int32)
