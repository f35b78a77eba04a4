"""Objects below one URL of a bucket: gs://bucket/run or s3://bucket/run."""

from __future__ import annotations

import concurrent.futures
import contextlib
import importlib
import os
import pathlib
import random
import re
import time
import uuid
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any, NoReturn, TypeVar, cast

from diffusion_jax.errors import StorageError, shorten
from diffusion_jax.storage.bucket import Bucket, ChangedError, ObjectInfo

__all__ = ["PROBE", "ObjectInfo", "ObjectStore", "is_url", "open_store"]

T = TypeVar("T")

_PACKAGES = {"gs": "gcsfs", "s3": "s3fs"}
_EXTRAS = {"gs": "gcs", "s3": "s3"}
_NUM_THREADS = 16
_SINGLE_REQUEST_SIZE = 2**25  # bytes; larger files are uploaded in several requests
_LIST_LIMIT = 1000  # objects in each answer, the most that both services allow
_SLOWEST_UPLOAD = 100_000  # bytes for each second; a slower one is tried again
PROBE = ".write_check-"  # the beginning of the names of small objects that show whether a bucket can be written
_OPEN_TIMEOUT = 10.0  # seconds, after those that the search for credentials takes


def is_url(text: str) -> bool:
    """Whether a location is a URL such as gs://bucket/run, not a local path."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", str(text)) is not None


def open_store(url: str, write: bool = False) -> ObjectStore:
    """The objects below a URL, after a check that the bucket can be listed, and with `write`, that it can be written.

    Raises: StorageError, within 15 seconds.
    """
    scheme, bucket_name, _ = _split_url(url)
    try:
        module = importlib.import_module(f"diffusion_jax.storage.{_EXTRAS[scheme]}")
    except ImportError as error:
        raise StorageError(
            f"{scheme}:// needs {_PACKAGES[scheme]} ({error}): pip install '.[{_EXTRAS[scheme]}]'"
        ) from None
    bucket = module.GcsBucket(bucket_name, url) if scheme == "gs" else module.S3Bucket(bucket_name)
    store = ObjectStore(url, bucket)
    store.check(write)
    return store


def _split_url(url: str) -> tuple[str, str, str]:
    """(scheme, bucket, prefix of names, "" or with "/" at its end). Raises: StorageError."""
    scheme, _, rest = str(url).partition("://")
    if scheme not in _PACKAGES or not is_url(url):
        raise StorageError(f"{url}: the location must be gs://BUCKET/DIR, s3://BUCKET/DIR or a local directory")
    bucket, *folders = rest.rstrip("/").split("/")
    if not bucket or any(folder in ("", ".", "..") for folder in folders):
        raise StorageError(f"{url}: the URL must be {scheme}://BUCKET/DIR, with one slash between names")
    return scheme, bucket, "".join(f"{folder}/" for folder in folders)


class ObjectStore:
    """The objects below `url`. Names are relative to it, with "/" between their parts; nothing is cached.

    Failures of the network are retried for `retry_seconds`. Raises, in every method: FileNotFoundError for a missing object;
    PermissionError; OSError with one line that names the URL. Several threads may call the methods. Another process, such as
    a data worker, must open the URL itself.
    """

    def __init__(self, url: str, bucket: Bucket, retry_seconds: float = 120.0, attempt_seconds: float | None = None):
        scheme, bucket_name, self._prefix = _split_url(url)
        self.url = f"{scheme}://{bucket_name}/{self._prefix}".rstrip("/")
        self.retry_seconds, self._attempt_seconds = retry_seconds, attempt_seconds
        self._bucket = bucket

    def __repr__(self) -> str:
        return f"ObjectStore({self.url!r})"

    def __reduce__(self) -> NoReturn:
        raise TypeError(f"{self!r} cannot be sent to another process; open its URL there")

    def with_limits(self, retry_seconds: float, attempt_seconds: float | None = None) -> ObjectStore:
        """The same objects with another time for retries, and a limit on each attempt; None: enough for a slow connection."""
        return ObjectStore(self.url, self._bucket, retry_seconds, attempt_seconds)

    def list(self, prefix: str = "") -> dict[str, ObjectInfo]:
        """All objects whose names start with `prefix`. Placeholders of folders, whose names end with "/", are left out."""
        found: dict[str, ObjectInfo] = {}
        token = None
        while True:
            page, token = self._call(prefix, self._bucket.list_page, self._prefix + prefix, token, _LIST_LIMIT)
            found |= {key[len(self._prefix) :]: info for key, info in page.items() if not key.endswith("/")}
            if token is None:
                return found

    def find(self, name: str) -> ObjectInfo | None:
        """The current version of an object; None if there is none."""
        try:
            return self._call(name, self._bucket.find, self._key(name))
        except FileNotFoundError:
            return None

    def read(self, name: str) -> bytes:
        """The contents of an object."""
        return self.read_version(name)[0]

    def read_version(self, name: str) -> tuple[bytes, str]:
        """(contents, tag) of the current version of an object."""
        return self._call(name, self._bucket.read, self._key(name))

    def write(self, name: str, data: bytes) -> None:
        """Creates or overwrites an object."""
        self._call(name, self._bucket.write, self._key(name), data, limit=_upload_limit(len(data)))

    def create(self, name: str, data: bytes) -> str | None:
        """Creates an object and returns its tag; None if it exists.

        data: must be unique to the call, for example by a random token: if an answer is lost, the stored contents decide.
        """
        return self._write_if(name, data, "")

    def replace(self, name: str, data: bytes, tag: str) -> str | None:
        """Overwrites the version `tag` of an object and returns the new tag; None if the object is not that version any more.

        data: must be unique to the call, as for `create`.
        """
        return self._write_if(name, data, tag)

    def _write_if(self, name: str, data: bytes, tag: str) -> str | None:
        try:
            return self._call(name, self._bucket.write, self._key(name), data, tag, limit=_upload_limit(len(data)))
        except ChangedError:
            pass
        try:  # an earlier attempt may have succeeded, and its answer may have been lost
            stored, stored_tag = self.read_version(name)
        except FileNotFoundError:
            return None
        return stored_tag if stored == data else None

    def upload(self, path: str | os.PathLike, name: str, before_overwriting: Callable[[], None] | None = None) -> None:
        """Creates or overwrites an object with the contents of a local file.

        before_overwriting: called if the object exists with other contents; may raise. Not called for files above 32 MiB.
        """
        path = pathlib.Path(path)
        size = path.stat().st_size
        if size <= _SINGLE_REQUEST_SIZE:
            data = path.read_bytes()
            if before_overwriting:
                if self.create(name, data) is not None:
                    return
                before_overwriting()
            self.write(name, data)
        else:
            self._call(name, self._bucket.upload_large, path, self._key(name), limit=_upload_limit(size))

    def download(self, name: str, path: str | os.PathLike) -> None:
        """Writes an object to a local file, completely or not at all, and creates its directory if it is missing."""
        path = pathlib.Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.partial")
        try:
            self._call(name, self._bucket.download, self._key(name), partial)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)

    def delete(self, names: Iterable[str]) -> None:
        """Deletes objects; missing ones are fine."""
        keys = [self._key(name) for name in dict.fromkeys(names)]
        limit = self._bucket.delete_limit
        chunks = [keys[start : start + limit] for start in range(0, len(keys), limit)]
        _run_all([lambda chunk=chunk: self._call("", self._bucket.delete, chunk) for chunk in chunks])

    def delete_version(self, name: str, tag: str) -> None:
        """Deletes an object if it is the version `tag`; a missing object and another version are fine."""
        with contextlib.suppress(ChangedError):
            self._call(name, self._bucket.delete_version, self._key(name), tag)

    def move(self, name: str, new_name: str) -> None:
        """Copies an object to another name, then deletes it under the old one. S3 copies at most 5 GB."""
        self._call(name, self._bucket.copy, self._key(name), self._key(new_name))
        self.delete([name])

    def upload_all(
        self,
        files: Mapping[str | os.PathLike, str],
        progress: Callable[[int, int], None] | None = None,
        before_overwriting: Callable[[], None] | None = None,
    ) -> None:
        """Uploads several files at once. files: {path: name}. progress: called with the number of finished files, and of all.

        before_overwriting: as for `upload`. Raises: the first error; other files may have been uploaded.
        """
        _run_all(
            [lambda path=path, name=name: self.upload(path, name, before_overwriting) for path, name in files.items()],
            progress,
        )

    def download_all(
        self, files: Mapping[str, str | os.PathLike], progress: Callable[[int, int], None] | None = None
    ) -> None:
        """Downloads several files at once, as `upload_all` uploads them. files: {name: path}."""
        _run_all([lambda path=path, name=name: self.download(name, path) for name, path in files.items()], progress)

    def check(self, write: bool) -> None:
        """Lists an object; with `write`, also creates and deletes one. Raises: StorageError, within 10 seconds."""
        deadline = time.monotonic() + _OPEN_TIMEOUT
        probe = self._key(f"{PROBE}{uuid.uuid4().hex[:8]}")
        action, ignored = "listed", []
        try:
            self._check_request(deadline, self._bucket.list_page, self._prefix, None, 1)
            if write:
                action = "written to"
                self._check_request(deadline, self._bucket.write, probe, b"1")
                ignored = [tag for tag in ("", self._bucket.wrong_tag) if not self._is_refused(deadline, probe, tag)]
                self._check_request(deadline, self._bucket.delete, [probe])
        except Exception as error:
            raise StorageError(self._explain(error, action)) from error
        if ignored:  # as some services that resemble S3 do
            raise StorageError(
                f"{self.url}: the service ignores If-None-Match or If-Match, which keep two launches apart; use another one"
            )

    def delete_old_probes(self, name: str) -> None:
        """Deletes the small objects of `check` that killed programs left. name: of an object that was just written.

        Both times are of the service's clock. A check ends within 12 seconds.
        """
        now = self.find(name)
        if now is not None:
            probes = self.list(PROBE).items()
            self.delete(probe for probe, info in probes if info.modified < now.modified - _OPEN_TIMEOUT)

    def _check_request(self, deadline: float, function: Callable[..., Awaitable[Any]], *args: Any) -> None:
        self._retry(function, args, None, deadline, stop_at=self._bucket.lacks_credentials)

    def _is_refused(self, deadline: float, key: str, tag: str) -> bool:
        """Whether a conditional write to an existing object is refused, as it must be."""
        try:
            self._check_request(deadline, self._bucket.write, key, b"2", tag)
        except ChangedError:
            return True
        return False

    def _explain(self, error: Exception, action: str) -> str:
        """The message of a StorageError."""
        reason, advice = self._reason(error), self._bucket.advice
        bucket_url = "/".join(self.url.split("/")[:3])
        if self._bucket.lacks_credentials(error):
            return f"{self.url}: no valid credentials ({reason}); {advice['credentials']}"
        if isinstance(error, FileNotFoundError):
            return f"{self.url}: the bucket does not exist; type: {advice['bucket']} {bucket_url}"
        if self._bucket.status(error) == 403:
            return (
                f"{self.url} cannot be {action}: permission denied ({reason}); use other credentials or another bucket"
            )
        return f"{self.url} cannot be {action} ({reason}); check the name of the bucket and the network"

    def _key(self, name: str) -> str:
        if not name or name.startswith("/") or name.endswith("/"):
            raise ValueError(f"{name!r} must be a name relative to {self.url}")
        return self._prefix + name

    def _call(self, name: str, function: Callable[..., Awaitable[T]], *args: Any, limit: float | None = None) -> T:
        """The result of a coroutine of the bucket. limit: seconds for one attempt. Raises: OSError, ChangedError."""
        url = f"{self.url}/{name}".rstrip("/")
        try:
            return self._retry(function, args, self._attempt_seconds or limit)
        except ChangedError:
            raise
        except Exception as error:
            is_transient, status = self._bucket.is_transient(error), self._bucket.status(error)
            if isinstance(error, OSError) and error.errno and status is None and not is_transient:
                raise  # of a local file
            if isinstance(error, FileNotFoundError):
                raise FileNotFoundError(f"{url} does not exist") from error
            kind = PermissionError if status in (401, 403) or isinstance(error, PermissionError) else OSError
            tried = f", tried for {self.retry_seconds:.0f} s" if is_transient else ""
            raise kind(f"{url}: {self._reason(error)}{tried}") from error

    def _retry(
        self,
        function: Callable[..., Awaitable[T]],
        args: tuple,
        attempt_seconds: float | None,
        deadline: float | None = None,
        stop_at: Callable[[Exception], bool] = lambda error: False,
    ) -> T:
        """Calls until an attempt succeeds, fails for good, or fails after the deadline.

        deadline: of the monotonic clock, also for an attempt; None: `retry_seconds` after the first failure.
        """
        from fsspec.asyn import sync

        end, pause = deadline, 0.25
        while True:
            limit = attempt_seconds if deadline is None else max(deadline - time.monotonic(), 0.1)
            try:
                return cast(T, sync(self._bucket.loop, function, *args, timeout=limit))
            except Exception as error:
                if not self._bucket.is_transient(error) or stop_at(error):
                    raise
                now = time.monotonic()
                end = now + self.retry_seconds if end is None else end
                wait = pause * random.uniform(0.5, 1.0)
                if now + wait > end:
                    raise
            time.sleep(wait)
            pause = min(2 * pause, 20.0)

    def _reason(self, error: Exception) -> str:
        """What an error of a client reports, in one line."""
        text = re.sub(r"^(Forbidden|Bad Request): \S+", "", " ".join(str(error).split())).strip()
        if not text and isinstance(error, TimeoutError):
            text = "no answer in time"
        status = self._bucket.status(error)
        if status and str(status) not in text:
            text = f"HTTP status {status}: {text}".rstrip(": ")
        return shorten(text or type(error).__name__, 200)


def _upload_limit(size: int) -> float:
    """Seconds for one attempt to send `size` bytes."""
    return 60.0 + size / _SLOWEST_UPLOAD


def _run_all(tasks: list[Callable[[], None]], progress: Callable[[int, int], None] | None = None) -> None:
    """Calls functions in threads. Raises: the first error, after the running calls have ended."""
    if len(tasks) < 2:
        for task in tasks:
            task()
        if progress:
            progress(len(tasks), len(tasks))
        return
    with concurrent.futures.ThreadPoolExecutor(min(_NUM_THREADS, len(tasks))) as pool:
        futures = [pool.submit(task) for task in tasks]
        try:
            for count, future in enumerate(concurrent.futures.as_completed(futures), 1):
                future.result()
                if progress:
                    progress(count, len(tasks))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
