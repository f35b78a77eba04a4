"""TFDS data sets in array_record or tfrecord format, as sources; missing data sets are downloaded first."""

from __future__ import annotations

import functools
import importlib.util
import io
import mmap
import os
import pathlib
import struct
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from diffusion_jax.data.images import EncodedImages, fit
from diffusion_jax.data.sources import readable, size_and_channels
from diffusion_jax.errors import DataError, print_text, shorten
from diffusion_jax.files import with_urls
from diffusion_jax.storage.downloads import cached_files, local_path
from diffusion_jax.storage.objects import ObjectInfo, ObjectStore, is_url, open_store
from diffusion_jax.untrusted import read_image

_ANSWER_SECONDS = 10.0  # for name resolution, connection and a server's answer
_RECORD_HEADER = struct.Struct("<Q4x")  # a TFRecord's header: data length and checksum
_CHECKSUM_BYTES = 4  # after the data
_SHARDS_LOCK = threading.Lock()
_METADATA = (".json", ".txt")  # descriptions of a data set


def make_builder(name: str, data_dir: str | None, *, must_be_prepared: bool = False) -> Any:
    """Returns TFDS's builder for a data set.

    Raises: DataError for an unknown name, without TFDS, or if the data set must be prepared and is not in the directory.
    """
    if importlib.util.find_spec("tensorflow_datasets") is None:
        raise DataError(
            f"data.dataset={name!r} is a data set of TFDS, and tensorflow_datasets is not installed: pip install '.[tfds]'; "
            "'digits', 'folder' and 'arrays' do not need it"
        )
    import tensorflow_datasets as tfds  # takes half a second, and only this source needs it

    _refuse_imports(tfds.features.FeatureConnector)
    try:
        builder = tfds.builder(name, data_dir=data_dir)
    except (tfds.core.DatasetNotFoundError, ValueError, AssertionError) as error:
        reason = "" if isinstance(error, tfds.core.DatasetNotFoundError) else f": {str(error).partition(chr(10))[0]}"
        raise DataError(
            f"data.dataset={name!r} must be a TFDS data set, 'digits', or 'folder' (with data.data_dir){reason}"
        ) from None
    if must_be_prepared and not builder.is_prepared():
        raise DataError(
            f"the data set {name!r} is not in {builder.data_path.parent}; set data.data_dir, or prepare it with: "
            f"{_preparation_command(name, data_dir)}"
        )
    return builder


@functools.cache
def _refuse_imports(base: Any) -> None:
    """Makes TFDS refuse feature types in features.json, except TFDS's own types and types that are already imported."""
    find = base.cls_from_name.__func__

    def find_type(cls, name: str) -> Any:
        if not name.startswith("tensorflow_datasets.") and name not in cls._registered_features:
            raise DataError(
                f"features.json names the type {name}, whose module would be imported; to allow this, import the module in a "
                "function of your own, data.dataset=FILE.py:function"
            )
        return find(cls, name)

    base.cls_from_name = classmethod(find_type)


def local_data_dir(name: str, data_dir: str | None, suffixes: tuple[str, ...] = ("",)) -> str | None:
    """Returns the TFDS directory; for a bucket, a local copy of the data set's files with these suffixes."""
    below = f"{name.split('/')[0].split(':')[0]}/"
    return str(local_path(data_dir, below, suffixes)) if data_dir else None


def natural_shape(name: str, data_dir: str | None) -> tuple[tuple[int, int] | None, int]:
    """Returns ((H, W), channels) of a TFDS data set's images, (None, channels) if sizes differ. Raises: DataError."""
    features = make_builder(name, local_data_dir(name, data_dir, _METADATA)).info.features
    _check_has_images(name, features)
    height, width, channels = features["image"].shape
    return (height, width) if height and width else None, channels or 3


def _check_has_images(name: str, features: Iterable[str]) -> None:
    if "image" not in features:
        raise DataError(f"the data set {name!r} has no feature 'image', only {', '.join(features)}")


def _preparation_command(name: str, data_dir: str | None) -> str:
    """Returns the shell command that prepares a data set."""
    return (
        'python -c "import tensorflow_datasets as tfds; '
        f"tfds.builder('{name}', data_dir={data_dir!r}, file_format='array_record').download_and_prepare()\""
    )


def prepare(name: str, data_dir: str | None) -> None:
    """Downloads and prepares a missing data set with TFDS's progress, or waits for another process that prepares it.

    Raises: DataError with the reason in one line.
    """
    builder = make_builder(name, data_dir)
    if builder.is_prepared():
        return
    problem, path, root = "", builder.data_path, builder.data_dir_root
    elsewhere = f"prepare it on another machine with: {_preparation_command(name, data_dir)}"
    if importlib.util.find_spec("tensorflow") is None:
        problem = "TFDS needs TensorFlow to prepare a data set: pip install '.[tfds]'"
    elif path.exists():
        problem = f"{path} is incomplete (dataset_info.json or features.json is missing): remove the folder"
    elif unanswered := _unanswered_host(builder):
        problem = f"cannot be downloaded: {unanswered}; set data.data_dir to its directory, or {elsewhere}"
    if problem:
        raise DataError(f"the data set {name!r} is not in {root}, and {problem}")
    print_text(f"The data set {name!r} is not in {root}: it is downloaded and prepared, once for all processes.")
    try:
        import tensorflow as tf  # builders use TensorFlow
        from filelock import FileLock

        tf.config.set_visible_devices([], "GPU")  # TensorFlow would reserve the GPU's memory
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / ".prepare.lock", fallback_to_soft=False):
            builder = make_builder(name, data_dir)
            if not builder.is_prepared():
                builder.download_and_prepare(file_format="array_record")
    except Exception as error:  # a builder may raise any error
        reason = shorten(" ".join(f"{type(error).__name__}: {error}".split()), 400)
        raise DataError(
            f"the data set {name!r} cannot be prepared in {root}: {reason}; rerun the same command, set data.data_dir to "
            f"another directory, or {elsewhere}"
        ) from error


def _unanswered_host(builder: Any) -> str:
    """Returns "HOST does not answer (REASON)" for a data set's first URL, "" if it answers. TFDS would try for minutes."""
    import requests

    url = next((url for url in builder.url_infos or () if url.startswith("http")), None)
    failures = []

    def request():
        try:
            requests.head(url or "", timeout=_ANSWER_SECONDS)
            failures.append("")
        except requests.RequestException as error:
            failures.append(type(error).__name__)

    if url is None:
        return ""
    thread = threading.Thread(target=request, daemon=True)  # because name resolution has no timeout
    thread.start()
    thread.join(_ANSWER_SECONDS)
    reason = failures[0] if failures else f"no answer in {_ANSWER_SECONDS:.0f} s"
    return f"{urlsplit(url).netloc} does not answer ({reason})" if reason else ""


class Tfds(EncodedImages):
    """A TFDS data set in array_record or tfrecord format (random access, no TensorFlow at run time)."""

    @classmethod
    def from_config(cls, config: Mapping) -> Tfds:
        return cls(config)

    def __init__(self, config: Mapping):
        self._size, self._channels = size_and_channels(config)
        name, split, data_dir = config["dataset"], config["split"], config["data_dir"]
        if config["download"] and not is_url(data_dir):
            prepare(name, local_data_dir(name, data_dir))
        self._name, self._split = name, split
        self._data_dir = local_data_dir(name, data_dir, _METADATA)
        builder = make_builder(name, self._data_dir, must_be_prepared=True)
        directory = builder.data_path.parent
        file_format = builder.info.file_format.value
        if file_format not in ("array_record", "tfrecord"):
            other = f"{data_dir or '~/tensorflow_datasets'}_array_record"  # TFDS keeps one format in a directory
            raise DataError(
                f"the data set {name!r} in {directory} is in {file_format} format, not array_record or tfrecord; "
                f"prepare it with: {_preparation_command(name, other)} and set data.data_dir={other}"
            )
        try:
            info = builder.info.splits[split]
            self._length, instructions = info.num_examples, info.file_instructions
        except (KeyError, ValueError):
            raise DataError(f"data.split={split!r}: {name!r} has {', '.join(builder.info.splits)}") from None
        features = builder.info.features
        _check_has_images(name, features)
        self.num_classes = getattr(features["label"], "num_classes", 0) or 0 if "label" in features else 0
        self.class_names = tuple(features["label"].names) if self.num_classes else ()
        self._shards: _TfRecords | _BucketShards | None = None
        if is_url(data_dir):  # an array_record data set above data.disk_mb is streamed; others are copied as a whole
            if file_format == "array_record" and builder.info.dataset_size > config["disk_mb"] * 2**20:
                self._shards = _BucketShards(instructions, config["disk_mb"])
                self.block_lengths = self._shards.lengths
                return
            local_data_dir(name, data_dir)
        if file_format == "tfrecord":
            self._shards = _TfRecords(instructions)
        shards = {pathlib.Path(instruction.filename) for instruction in instructions}
        self._files = sorted(shards | set(pathlib.Path(builder.data_path).glob("*.json")))

    def encoded_files(self) -> list[tuple[str, pathlib.Path]]:
        return [(path.name, path) for path in self._files]

    def __len__(self) -> int:
        return self._length

    def __getstate__(self):
        return {key: value for key, value in self.__dict__.items() if key != "_read_records"}

    @functools.cached_property
    def _read_records(self) -> Callable[[list[int]], Sequence[dict]]:
        """Returns a function that reads examples with encoded images; each process opens the files itself."""
        import tensorflow_datasets as tfds

        builder, encoded = make_builder(self._name, self._data_dir), {"image": tfds.decode.SkipDecoding()}
        if self._shards is None:
            return builder.as_data_source(self._split, decoders=encoded).__getitems__
        read, parse = self._shards.read, builder.info.features.deserialize_example_np
        return lambda indices: [parse(record, decoders=encoded) for record in read(indices)]

    def read(self, indices: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
        with readable(f"examples {indices[0]} ... {indices[-1]} of {self._name!r} {self._split!r}"):
            records = self._read_records([int(i) for i in indices])
            images = [fit(read_image(io.BytesIO(r["image"])), self._size, self._channels) for r in records]
        batch = {"image": np.stack(images)}
        if self.num_classes:
            batch["label"] = np.array([record["label"] for record in records], np.int32)
        return batch


class _TfRecords:
    """The records that TFDS's file instructions select in tfrecord files, in order. Picklable.

    The offsets of all records are computed once from the record lengths. Raises: DataError for files that are missing or do
    not contain the expected records. The checksums of the data are not verified.
    """

    def __init__(self, instructions: Sequence):
        with ThreadPoolExecutor() as pool:
            spans = list(pool.map(_find_records, instructions))
        self._files = [instruction.filename for instruction in instructions]
        self._file_index = np.repeat(np.arange(len(spans)), [len(span) for span in spans])
        self._spans = np.concatenate(spans)  # offset, length

    def read(self, indices: Sequence[int]) -> list[bytes]:
        """Returns the records at these indices."""
        records = []
        for index in indices:
            offset, length = self._spans[index].tolist()
            with open(self._files[self._file_index[index]], "rb") as file:
                file.seek(offset)
                records.append(file.read(length))
        return records


class _BucketShards:
    """The records that TFDS's file instructions select in a bucket's array_record files, in order. Picklable.

    A file is downloaded when one of its records is read. disk_mb: `max_bytes` of `downloads.cached_files`, in megabytes.
    lengths: the number of records in each file.
    """

    def __init__(self, instructions: Sequence, disk_mb: int):
        self._instructions, self._max_bytes = instructions, disk_mb * 2**20
        self.lengths = [instruction.take for instruction in instructions]

    def __getstate__(self):
        return {key: value for key, value in self.__dict__.items() if key != "_opened"}

    @functools.cached_property
    def _opened(self) -> tuple[ObjectStore, dict[str, ObjectInfo], dict[int, Any]]:
        """Returns (the bucket's folder, its objects by name, {position of a file: reader} for the files of the last read)."""
        store = open_store(with_urls(str(pathlib.Path(self._instructions[0].filename).parent)))
        return store, store.list(), {}

    def read(self, indices: Sequence[int]) -> list[bytes]:
        """Returns the records at these indices. Raises: DataError, OSError."""
        ends = np.cumsum(self.lengths)
        shards = np.searchsorted(ends, indices, "right")
        records: dict[int, bytes] = {}
        with _SHARDS_LOCK:  # decoding into memory reads in several threads
            for shard, reader in self._open(np.unique(shards).tolist()).items():
                wanted, first = np.asarray(indices)[shards == shard], ends[shard] - self.lengths[shard]
                places = (wanted - first + self._instructions[shard].skip).tolist()
                with readable(self._instructions[shard].filename):
                    records |= zip(wanted.tolist(), reader.read(places), strict=True)
        return [records[index] for index in indices]

    def _open(self, shards: Sequence[int]) -> dict[int, Any]:
        """Downloads and opens files, and closes the readers of all other files. Raises: DataError for corrupted files."""
        from array_record.python.array_record_module import ArrayRecordReader

        store, objects, opened = self._opened
        names = {shard: pathlib.Path(self._instructions[shard].filename).name for shard in shards}
        missing = [name for name in names.values() if name not in objects]
        if missing:
            raise DataError(f"{store.url}/{missing[0]} does not exist; copy the whole data set to the bucket")
        paths = cached_files(store, {name: objects[name] for name in names.values()}, self._max_bytes)
        for shard, path in zip(names, paths, strict=True):
            if shard in opened:
                continue
            expected = self._instructions[shard].examples_in_shard
            try:
                reader = ArrayRecordReader(str(path), "readahead_buffer_size:0,max_parallelism:0")
                found = f"{reader.num_records():,} records" if reader.num_records() != expected else ""
            except RuntimeError as error:
                reader, found = None, str(error)
            if found:
                path.unlink(missing_ok=True)  # the next launch downloads the file again
                raise DataError(
                    f"{store.url}/{names[shard]} is corrupted: {found}, expected {expected:,}; copy the data set again"
                )
            opened[shard] = reader
        for shard in opened.keys() - set(shards):  # a deleted file's space is freed only when its reader is closed
            del opened[shard]
        return opened


def _find_records(instruction) -> np.ndarray:
    """Returns int64 [n, 2]: data offset and length for each record that a TFDS instruction reads from its file."""
    spans, position = [], 0
    with readable(instruction.filename), open(instruction.filename, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else memoryview(b"") as data:
            while position + _RECORD_HEADER.size <= size:
                (length,) = _RECORD_HEADER.unpack_from(data, position)
                spans.append((position + _RECORD_HEADER.size, length))
                position += _RECORD_HEADER.size + length + _CHECKSUM_BYTES
    if position != size or len(spans) != instruction.examples_in_shard:
        end = "" if position == size else ", the last of them truncated"
        raise DataError(
            f"{instruction.filename} is corrupted: it has {len(spans):,} records{end}, not "
            f"{instruction.examples_in_shard:,}; remove the data set, and prepare it again"
        )
    return np.array(spans, np.int64).reshape(-1, 2)[instruction.skip :][: instruction.take]
