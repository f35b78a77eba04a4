"""Downloads a TFDS data set and prepares it in array_record format, once for all processes that share its directory."""

from __future__ import annotations

import contextlib
import errno
import functools
import importlib.util
import io
import os
import pathlib
import re
import shutil
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

from diffusion_jax.errors import DataError, shorten

__all__ = ["exclusive_lock", "preparation_command", "prepare", "request_address"]

_CONNECT_SECONDS = 6.0  # for name resolution and connection, so that an offline machine shows its error within 15 s
_READ_SECONDS = 60.0  # a download fails after this time without a byte
_RETRIES = 2  # after a failed request; TFDS itself retries for minutes
_REPORT_SECONDS = 10.0


class _UnreachableError(OSError):
    """The machine has no connection to a server."""


def preparation_command(name: str, data_dir: str | None) -> str:
    """The shell command that prepares a data set."""
    return (
        'python -c "import tensorflow_datasets as tfds; '
        f"tfds.builder('{name}', data_dir={data_dir!r}, file_format='array_record').download_and_prepare()\""
    )


def prepare(name: str, make_builder: Callable, data_dir: str | None) -> None:
    """Downloads and prepares a TFDS data set that is missing, or waits for the process that does so. Prints progress.

    make_builder: returns a new TFDS builder of the set, which reads the directory again.
    Raises: DataError with the reason in one line. Partial files are removed, so that the command can be rerun.
    """
    builder = make_builder()
    if builder.is_prepared():
        return
    if builder.data_path.exists():
        raise DataError(
            f"{builder.data_path} is not a complete data set (dataset_info.json or features.json is missing): remove that "
            "folder, and rerun the same command"
        )
    root = builder.data_dir_root
    if importlib.util.find_spec("tensorflow") is None:
        raise DataError(
            f"the data set {name!r} is not in {root}, and TFDS needs TensorFlow to prepare it: pip install '.[tfds]'; "
            "reading a prepared one does not need it"
        )
    log = functools.partial(print, file=sys.stdout, flush=True)  # bound here, because sys.stdout is redirected below
    try:
        root.mkdir(parents=True, exist_ok=True)
        with exclusive_lock(pathlib.Path(root) / ".prepare.lock", log) as killed_at:
            builder = make_builder()
            if not builder.is_prepared():
                _download_and_prepare(builder, name, killed_at, log)
    except DataError:
        raise
    except Exception as error:  # a builder may raise any error
        if make_builder().is_prepared():  # by another process, on a file system without locks
            return
        raise DataError(_error_message(error, name, data_dir, builder)) from error


def _download_and_prepare(builder, name: str, killed_at: float | None, log: Callable[[str], None]) -> None:
    import tensorflow_datasets as tfds

    tfds.disable_progress_bar()
    meter, start = _DownloadMeter(), time.monotonic()
    files = {} if builder.BUILDER_CONFIGS else builder.url_infos or {}  # of all configs together
    size = f" ({_megabytes(sum(info.size for info in files.values()))} to download)" if files else ""
    with (
        _remove_partial_files(builder, killed_at),
        _limited_requests(meter),
        _progress_reports(builder, name, meter, log),
    ):
        log(f"The data set {name!r} is not in {builder.data_dir_root}: downloading and preparing it{size}.")
        with contextlib.redirect_stdout(io.StringIO()):
            builder.download_and_prepare(file_format="array_record")
    count = sum(split.num_examples for split in builder.info.splits.values())
    log(
        f"Prepared {name!r}: {count:,} examples, {builder.info.dataset_size}, in {builder.data_path} "
        f"({time.monotonic() - start:.0f} s)."
    )


@contextlib.contextmanager
def exclusive_lock(path: pathlib.Path, log: Callable[[str], None]) -> Iterator[float | None]:
    """Waits for a lock on a file and holds it. Yields the start time of a holder that was killed, else None.

    On a file system without locks no lock is taken.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield None
        return
    with path.open("a+") as file:
        has_logged = False
        while True:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if error.errno not in (errno.EACCES, errno.EAGAIN):
                    yield None
                    return
            if not has_logged:
                file.seek(0)
                holder = file.read().strip() or "another process"
                log(f"Waiting for {holder}, which prepares a data set in {path.parent}.")
                has_logged = True
            time.sleep(0.5)
        killed_at = os.path.getmtime(path) if os.path.getsize(path) else None
        file.truncate(0)
        file.write(f"process {os.getpid()} of {socket.gethostname()}")
        file.flush()
        try:
            yield killed_at
        finally:
            file.truncate(0)


class _DownloadMeter:
    """Counts downloaded and expected bytes, and can end all downloads."""

    def __init__(self):
        self.downloaded, self.expected, self.stopped = 0, 0, False
        self._open: set = set()

    def count(self, response) -> None:
        """Counts the bytes of a response while they are read."""
        self.expected += int(response.headers.get("Content-Length", 0))
        self._open.add(response)
        read = response.iter_content

        def counted(*args, **kwargs):
            try:
                for block in read(*args, **kwargs):
                    self.check()
                    self.downloaded += len(block)
                    yield block
            finally:
                self._open.discard(response)

        response.iter_content = counted

    def check(self) -> None:
        """Raises: _UnreachableError after `stop`."""
        if self.stopped:
            raise _UnreachableError("stopped")

    def stop(self) -> None:
        """Ends all downloads, also those that wait for a server."""
        self.stopped = True
        for response in list(self._open):
            # A response may have finished, or an old urllib3 has no shutdown; then the timeout ends it.
            with contextlib.suppress(Exception):
                response.raw.shutdown()


@contextlib.contextmanager
def _limited_requests(meter: _DownloadMeter) -> Iterator[None]:
    """Gives TFDS's requests timeouts, few retries and a meter, for which TFDS has no options."""
    import requests

    connected: set[tuple[str, int]] = set()
    original: Any = requests.Session

    class Session(original):
        def mount(self, prefix, adapter):
            adapter.max_retries = adapter.max_retries.new(total=min(_RETRIES, adapter.max_retries.total or 0))
            super().mount(prefix, adapter)

        def request(self, method, url, *args, **kwargs):
            meter.check()
            address = request_address(url)
            if address not in connected:
                _connect(*address)
                connected.add(address)
                _hide_accelerators()
            kwargs["timeout"] = (_CONNECT_SECONDS, _READ_SECONDS)
            response = super().request(method, url, *args, **kwargs)
            meter.count(response)
            return response

    requests.Session = Session
    try:
        yield
    finally:
        requests.Session = original
        meter.stop()  # the interpreter waits for TFDS's threads before it exits


@functools.cache
def _hide_accelerators() -> None:
    """Prevents TensorFlow, which builders use, from reserving the accelerator's memory."""
    import tensorflow as tf  # takes seconds, so it is imported only after a connection

    tf.config.set_visible_devices([], "GPU")


def request_address(url: str) -> tuple[str, int]:
    """(host, port) to which a request connects: the proxy of the environment, else the server."""
    from requests.utils import get_environ_proxies, select_proxy

    proxy = select_proxy(url, get_environ_proxies(url))
    target = urlsplit(url if not proxy else proxy if "://" in proxy else f"http://{proxy}")
    return target.hostname or "", target.port or (443 if target.scheme == "https" else 80)


def _connect(host: str, port: int) -> None:
    """Raises: _UnreachableError without a connection in time. A thread connects, because name resolution has no timeout."""
    outcome: list[str] = []

    def connect():
        try:
            socket.create_connection((host, port), _CONNECT_SECONDS).close()
            outcome.append("")
        except OSError as error:
            outcome.append(error.strerror or str(error))

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(_CONNECT_SECONDS)
    failure = outcome[0] if outcome else f"no answer in {_CONNECT_SECONDS:.0f} s"
    if failure:
        raise _UnreachableError(f"no connection to {host}:{port} ({failure})")


@contextlib.contextmanager
def _progress_reports(builder, name: str, meter: _DownloadMeter, log: Callable[[str], None]) -> Iterator[None]:
    """Prints a line about the progress every ten seconds."""
    ended = threading.Event()

    def report():
        while not ended.wait(_REPORT_SECONDS):
            if meter.downloaded < meter.expected or not meter.expected:
                expected = f" of {_megabytes(meter.expected)}" if meter.expected else ""
                log(f"Downloading {name!r}: {_megabytes(meter.downloaded)}{expected}")
            else:
                written = sum(map(_size, _incomplete_sets(builder)))
                log(f"Preparing {name!r}: {_megabytes(written)} written")

    thread = threading.Thread(target=report, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


def _incomplete_sets(builder) -> list[pathlib.Path]:
    """The folders in which TFDS prepares a data set, before it renames them."""
    return list(pathlib.Path(builder.data_path).parent.glob("incomplete.*"))


def _temporary_folders(builder) -> set[pathlib.Path]:
    """The folders of TFDS's incomplete downloads, extracted archives and data sets."""
    downloads = pathlib.Path(builder.data_dir_root) / "downloads"
    folders = [*downloads.glob("extracted/incomplete.*"), *_incomplete_sets(builder)]
    for folder in downloads.glob("*"):
        if folder.name not in ("extracted", "manual"):  # which may hold millions of files
            folders += folder.rglob("*.tmp.*")
    return {path for path in folders if path.is_dir()}


def _created_folders(builder) -> set[pathlib.Path]:
    """The folders that TFDS creates before it writes files into them."""
    root, downloads = pathlib.Path(builder.data_dir_root), pathlib.Path(builder.data_dir_root) / "downloads"
    parents = [parent for parent in pathlib.Path(builder.data_path).parents if root in parent.parents]
    return {path for path in (downloads, *downloads.glob("*"), *parents) if path.is_dir()}


def _files(folder: pathlib.Path) -> Iterator[os.stat_result]:
    for path in (folder, *folder.rglob("*")):
        with contextlib.suppress(OSError):  # another process may rename or remove it
            yield path.stat()


def _size(folder: pathlib.Path) -> int:
    return sum(file.st_size for file in _files(folder))


@contextlib.contextmanager
def _remove_partial_files(builder, killed_at: float | None) -> Iterator[None]:
    """Removes the partial files of a launch that was killed, and of this one, because TFDS cannot resume a download.

    Empty folders that this launch created are removed, too. killed_at: the start time of the killed launch; older temporary
    folders are kept, because they may belong to programs that do not use the lock.
    """
    earlier, folders = _temporary_folders(builder), _created_folders(builder)
    for folder in earlier:
        if killed_at is not None and max((file.st_mtime for file in _files(folder)), default=0.0) >= killed_at:
            shutil.rmtree(folder, ignore_errors=True)
    try:
        yield
    finally:
        for folder in _temporary_folders(builder) - earlier:
            shutil.rmtree(folder, ignore_errors=True)
        for folder in sorted(_created_folders(builder) - folders, reverse=True):  # the inner ones first
            with contextlib.suppress(OSError):  # it is not empty
                folder.rmdir()


def _error_message(error: Exception, name: str, data_dir: str | None, builder) -> str:
    """The reason of an error and advice, in one line."""
    import requests

    root = builder.data_dir_root
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    kinds = {type(link).__name__ for link in chain}
    unreachable = next((link for link in chain if isinstance(link, _UnreachableError)), None)
    reason = _one_line(_innermost(unreachable or error))
    is_damaged = "NonMatchingChecksumError" in kinds
    if is_damaged:  # TFDS names the local path before the reason, which may then be cut
        url = re.search(r"https?://[^\s,]+", str(error))
        reason = f"wrong checksum of {url[0] if url else 'a file'}"
    failed = f"the data set {name!r} is not in {root}, and its download failed: {reason}"
    if unreachable:
        return (
            f"the data set {name!r} is not in {root} and cannot be downloaded: {reason}. Set data.data_dir to its directory, "
            f"or prepare it on a machine with a network, with: {preparation_command(name, data_dir)}"
        )
    if is_damaged:
        return f"{failed}: the file is corrupted or has changed; rerun the same command"
    if kinds & {"DownloadError"} or any(isinstance(link, requests.exceptions.RequestException) for link in chain):
        return f"{failed}; rerun the same command, or prepare it elsewhere with: {preparation_command(name, data_dir)}"
    if any(isinstance(link, OSError) for link in chain) or "ResourceExhaustedError" in kinds:
        return f"the data set {name!r} cannot be prepared in {root}: {reason}; set data.data_dir to another directory"
    if isinstance(error, ImportError):
        return f"preparing the data set {name!r} needs another package: {reason}"
    if builder.MANUAL_DOWNLOAD_INSTRUCTIONS and isinstance(error, AssertionError):
        return (
            f"the data set {name!r} must be downloaded by hand, into {root}/downloads/manual: "
            f"{_one_line(builder.MANUAL_DOWNLOAD_INSTRUCTIONS)}"
        )
    return f"the data set {name!r} cannot be prepared in {root}: {type(error).__name__}: {reason}"


def _innermost(error: Exception) -> object:
    """The error that requests and urllib3 wrap in errors of their own."""
    while True:
        wrapped = getattr(error, "reason", None) or (error.args[0] if error.args else None)
        if not isinstance(wrapped, Exception):
            break
        error = wrapped
    return wrapped if isinstance(wrapped, str) and len(error.args) > 1 else error


def _one_line(value: object) -> str:
    """An error or text without line breaks and addresses of objects, at most 300 characters."""
    return shorten(" ".join(re.sub(r"<[^<>]* object at 0x[0-9a-f]+>[:,]? ?", "", str(value)).split()), 300)
