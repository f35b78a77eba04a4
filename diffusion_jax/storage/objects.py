"""Objects below one URL of a bucket: gs://bucket/run or s3://bucket/run, through fsspec."""

from __future__ import annotations

import abc
import concurrent.futures
import contextlib
import copy
import dataclasses
import importlib
import os
import pathlib
import random
import re
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from diffusion_jax.errors import StorageError, needs_extra, shorten

_SERVICES = {"gs": ("gcs", "gcsfs"), "s3": ("s3", "s3fs")}  # scheme: (module, and extra in pyproject.toml; package)
_NUM_THREADS = 16
PROBE = ".write_check-"  # name prefix of small objects that test write access to a bucket
_OPEN_TIMEOUT = 15.0  # seconds for each request of the check
_ATTEMPTS = 4  # the clients retry some requests, but not requests that fail in the middle of a body


def is_url(text: str) -> bool:
    """Returns whether a location is a URL such as gs://bucket/run, not a local path."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", str(text)) is not None


def open_store(url: str, write: bool = False) -> ObjectStore:
    """Opens the objects below a URL, after checking that the bucket can be listed and, with `write`, written.

    Raises: StorageError.
    """
    scheme, *_ = _split_url(url)
    extra, package = _SERVICES[scheme]
    with needs_extra(f"{scheme}:// needs {package}", extra, StorageError):
        module = importlib.import_module(f"diffusion_jax.storage.{extra}")
    store = module.Store(url)
    store.check(write)
    return store


def _split_url(url: str) -> tuple[str, str, str]:
    """Splits a URL into (scheme, bucket, path in the bucket without outer slashes). Raises: StorageError."""
    scheme, _, rest = str(url).partition("://")
    if scheme not in _SERVICES or not is_url(url):
        raise StorageError(f"{url}: the location must be gs://BUCKET/DIR, s3://BUCKET/DIR or a local directory")
    bucket, *folders = rest.rstrip("/").split("/")
    if not bucket or any(folder in ("", ".", "..") for folder in folders):
        raise StorageError(f"{url}: the URL must be {scheme}://BUCKET/DIR, with one slash between names")
    return scheme, bucket, "/".join(folders)


@dataclasses.dataclass(frozen=True)
class ObjectInfo:
    """A version of an object. size: bytes. tag: identifies the version. modified: seconds since 1970 (service's clock)."""

    size: int
    tag: str
    modified: float


class ObjectStore(abc.ABC):
    """The objects below `url`. Names are relative to `url`, with "/" as the separator; nothing is cached.

    Temporary failures are retried for up to two minutes. Every method raises: FileNotFoundError for a missing object;
    PermissionError; OSError with one line that names the URL. Several threads may call the methods. Another process, such as
    a data worker, must open the URL itself.
    """

    _wrong_tag: str  # a well-formed tag that no object has
    _no_credentials: tuple[type[Exception], ...] = ()  # the client's errors for missing credentials
    _advice: dict[str, str]  # what to type if "credentials" are missing, and to create a "bucket"

    def __init__(self, url: str, filesystem: Any):
        scheme, self._bucket, folder = _split_url(url)
        self._root = f"{self._bucket}/{folder}".rstrip("/")
        self.url = f"{scheme}://{self._root}"
        self._fs = filesystem

    def folder(self, name: str) -> ObjectStore:
        """Returns the objects below a folder of this store."""
        store = copy.copy(self)
        store._root, store.url = f"{self._root}/{name}", f"{self.url}/{name}"
        return store

    @abc.abstractmethod
    def _to_info(self, found: Mapping[str, Any]) -> ObjectInfo:
        """Converts the client's description of an object to an ObjectInfo."""

    @abc.abstractmethod
    def _write_if(self, key: str, data: bytes, tag: str) -> str:
        """Overwrites version `tag` of the object `key` in the bucket; with tag "", creates a new object.

        Returns: the tag of the new version. Raises: if `tag` is not the object's current version, an error that `_call`
        converts to a FileExistsError or FileNotFoundError.
        """

    @abc.abstractmethod
    def _status(self, error: BaseException) -> int | None:
        """Returns the HTTP status of an error; None for errors without a status, such as connection and local file errors."""

    def list(self, prefix: str = "") -> dict[str, ObjectInfo]:
        """Lists the objects whose names start with `prefix`, except folder placeholders, whose names end with "/"."""
        found = self._call(prefix, self._fs.find, self._root, prefix=prefix, detail=True)
        start = f"{self._root}/{prefix}"
        return {
            path.removeprefix(f"{self._root}/"): self._to_info(info)
            for path, info in found.items()
            if path.startswith(start) and not path.endswith("/")
        }

    def find(self, name: str) -> ObjectInfo | None:
        """Returns the current version of an object; None if the object does not exist."""
        try:
            found = self._call(name, self._fs.info, self._path(name))
        except FileNotFoundError:
            return None
        return self._to_info(found) if found["type"] == "file" else None

    def read(self, name: str) -> bytes:
        """Reads the contents of an object."""
        return self._call(name, self._fs.cat_file, self._path(name))

    def write(self, name: str, data: bytes) -> None:
        """Creates or overwrites an object."""
        self._call(name, self._fs.pipe_file, self._path(name), data)

    def replace(self, name: str, data: bytes, tag: str) -> str | None:
        """Overwrites version `tag` of an object; with tag "", creates the object. Returns: the new tag.

        Returns None if the version changed, possibly by an earlier attempt of this call whose answer was lost.
        """
        key = self._path(name).removeprefix(f"{self._bucket}/")
        with contextlib.suppress(FileExistsError, FileNotFoundError):
            return self._call(name, self._write_if, key, data, tag)
        return None

    def upload(self, path: str | os.PathLike, name: str, before_overwriting: Callable[[], None] | None = None) -> None:
        """Creates or overwrites an object with the contents of a local file.

        before_overwriting: called if the object exists, and may raise.
        """
        target = os.fspath(path), self._path(name)
        if before_overwriting:
            with contextlib.suppress(FileExistsError):
                return self._call(name, self._fs.put_file, *target, mode="create")
            before_overwriting()
        self._call(name, self._fs.put_file, *target)

    def download(self, name: str, path: str | os.PathLike) -> None:
        """Downloads an object to a local file, completely or not at all; creates a missing directory."""
        path = pathlib.Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.partial")
        try:
            self._call(name, self._fs.get_file, self._path(name), str(partial))
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)

    def delete(self, names: Iterable[str]) -> None:
        """Deletes objects; missing objects are ignored."""

        def delete(name: str) -> None:
            with contextlib.suppress(FileNotFoundError):
                self._call(name, self._fs.rm_file, self._path(name))

        _run_all(delete, zip(dict.fromkeys(names)))

    def move(self, name: str, new_name: str) -> None:
        """Copies an object to a new name, then deletes the old name."""
        self._call(name, self._fs.cp_file, self._path(name), self._path(new_name))
        self.delete([name])

    def upload_all(
        self, files: Mapping[str | os.PathLike, str], before_overwriting: Callable[[], None] | None = None
    ) -> None:
        """Uploads several files in parallel. files: {path: name}. before_overwriting: as for `upload`.

        Raises: the error of one file; other files may have been uploaded.
        """
        _run_all(self.upload, ((path, name, before_overwriting) for path, name in files.items()))

    def download_all(self, files: Mapping[str, str | os.PathLike]) -> None:
        """Downloads several files in parallel, like `upload_all`. files: {name: path}."""
        _run_all(self.download, files.items())

    def check(self, write: bool) -> None:
        """Lists the objects; with `write`, also creates and deletes a small object. Raises: StorageError."""
        from fsspec.asyn import sync

        probe, action = self._path(f"{PROBE}{uuid.uuid4().hex[:8]}"), "listed"
        try:
            sync(self._fs.loop, self._fs._find, self._root, prefix=PROBE, timeout=_OPEN_TIMEOUT)
            if write:
                action = "written to"
                sync(self._fs.loop, self._fs._pipe_file, probe, b"1", timeout=_OPEN_TIMEOUT)
                sync(self._fs.loop, self._fs._rm_file, probe, timeout=_OPEN_TIMEOUT)
        except Exception as error:
            raise StorageError(self._explain(error, action)) from error

    def check_conditions(self, name: str) -> None:
        """Tests a conditional write that must fail. Raises: StorageError if the service overwrites the object."""
        for tag in ("", self._wrong_tag):
            if self.replace(name, b"{}", tag):  # some S3-compatible services overwrite the object
                reason = "the service ignores If-None-Match or If-Match, which keep two launches apart"
                raise StorageError(f"{self.url}: {reason}; use another service")

    def _explain(self, error: Exception, action: str) -> str:
        """Returns the message of a StorageError."""
        reason = self._reason(error)
        if self._status(error) == 401 or isinstance(error, self._no_credentials):
            return f"{self.url}: no valid credentials ({reason}); {self._advice['credentials']}"
        if isinstance(error, FileNotFoundError):
            bucket_url = "/".join(self.url.split("/")[:3])
            return f"{self.url}: the bucket does not exist; type: {self._advice['bucket']} {bucket_url}"
        if self._status(error) == 403:
            return (
                f"{self.url} cannot be {action}: permission denied ({reason}); use other credentials or another bucket"
            )
        return f"{self.url} cannot be {action} ({reason}); check the name of the bucket and the network"

    def _path(self, name: str) -> str:
        """Returns an object's path for fsspec, which includes the bucket."""
        if not name or name.startswith("/") or name.endswith("/"):
            raise ValueError(f"{name!r} must be a name relative to {self.url}")
        return f"{self._root}/{name}"

    def _call(self, name: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Calls a method of the client. Raises: OSError."""
        url = f"{self.url}/{name}".rstrip("/")
        for attempt in range(_ATTEMPTS):
            try:
                return function(*args, **kwargs)
            except FileNotFoundError as error:
                raise FileNotFoundError(f"{url} does not exist") from error
            except Exception as error:
                if isinstance(error, OSError) and error.filename is not None:
                    raise  # the error is from a local file
                status, kind = self._status(error), OSError
                if status in (401, 403) or isinstance(error, PermissionError):
                    kind = PermissionError
                elif status in (409, 412) or isinstance(error, FileExistsError):  # 409: another write is in progress
                    kind = FileExistsError
                elif attempt + 1 < _ATTEMPTS and (status is None or status in (408, 429) or status >= 500):
                    time.sleep(2**attempt * random.uniform(0.5, 1.0))
                    continue
                raise kind(f"{url}: {self._reason(error)}") from error

    def _reason(self, error: Exception) -> str:
        """Returns a client's error as one line."""
        text = re.sub(r"^(Forbidden|Bad Request): \S+", "", " ".join(str(error).split())).strip()
        if not text and isinstance(error, TimeoutError):
            text = "no answer in time"
        status = self._status(error)
        if status and str(status) not in text:
            text = f"HTTP status {status}: {text}".rstrip(": ")
        return shorten(text or type(error).__name__, 200)


def _run_all(function: Callable[..., None], arguments: Iterable[tuple]) -> None:
    """Calls a function in threads. Raises: the error of one call, after all running calls have ended; cancels other calls."""
    with concurrent.futures.ThreadPoolExecutor(_NUM_THREADS) as pool:
        list(pool.map(lambda each: function(*each), arguments))
