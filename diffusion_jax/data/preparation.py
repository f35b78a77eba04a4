"""Downloads a TFDS data set and prepares it in array_record format, once for all processes that share its directory."""

from __future__ import annotations

import contextlib
import errno
import functools
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
from urllib.parse import urlsplit

from diffusion_jax.errors import DataError

_CONNECT_SECONDS = 6.0  # for name resolution and connection: offline machines must be told within 15 s of the launch
_READ_SECONDS = 60.0  # without a byte, after which a download has failed
_RETRIES = 2  # after a failed request; TFDS itself retries for minutes
_REPORT_SECONDS = 10.0


class _Unreachable(OSError):
    """The machine has no connection to a server."""


def command(name: str, data_dir: str | None) -> str:
    """The shell command that prepares a data set."""
    return (
        'python -c "import tensorflow_datasets as tfds; '
        f"tfds.builder('{name}', data_dir={data_dir!r}, file_format='array_record').download_and_prepare()\""
    )


def prepare(name: str, make_builder: Callable, data_dir: str | None) -> None:
    """Makes sure that a TFDS data set is in its directory: downloads and prepares it, or waits for the process that does.

    make_builder: returns a new TFDS builder of the set, which looks at the directory anew. Prints progress.
    Raises: DataError with the reason in one line. Partial files are removed, so that the same command can be run again.
    """
    builder = make_builder()
    if builder.is_prepared():
        return
    if builder.data_path.exists():
        raise DataError(
            f"{builder.data_path} is not a complete data set (dataset_info.json or features.json is missing): remove that "
            "folder, and run the same command again"
        )
    root = builder.data_dir_root
    say = functools.partial(print, file=sys.stdout, flush=True)  # TFDS's own lines are dropped from sys.stdout below
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _exclusive(pathlib.Path(root) / ".prepare.lock", say) as killed_at:
            builder = make_builder()
            if not builder.is_prepared():
                _prepare(builder, name, killed_at, say)
    except DataError:
        raise
    except Exception as error:  # a builder is code of others, and may raise anything
        if make_builder().is_prepared():  # by another process, where the file system has no locks
            return
        raise DataError(_explain(error, name, data_dir, builder)) from error


def _prepare(builder, name: str, killed_at: float | None, say: Callable[[str], None]) -> None:
    import tensorflow_datasets as tfds

    tfds.disable_progress_bar()
    meter, start = _Meter(), time.monotonic()
    known = {} if builder.BUILDER_CONFIGS else builder.url_infos or {}  # of all configs together
    size = f" ({_megabytes(sum(info.size for info in known.values()))} to download)" if known else ""
    with _without_leftovers(builder, killed_at), _bounded_requests(meter), _reporting(builder, name, meter, say):
        say(f"The data set {name!r} is not in {builder.data_dir_root}: downloading and preparing it{size}.")
        with contextlib.redirect_stdout(io.StringIO()):
            builder.download_and_prepare(file_format="array_record")
    count = sum(split.num_examples for split in builder.info.splits.values())
    say(
        f"Prepared {name!r}: {count:,} examples, {builder.info.dataset_size}, in {builder.data_path} "
        f"({time.monotonic() - start:.0f} s)."
    )


@contextlib.contextmanager
def _exclusive(path: pathlib.Path, say: Callable[[str], None]) -> Iterator[float | None]:
    """Holds a lock on a file, after whoever holds it; gives the time at which a holder began that was killed, else None.

    Where the file system has no locks, nothing is held.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield None
        return
    with path.open("a+") as file:
        told = False
        while True:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if error.errno not in (errno.EACCES, errno.EAGAIN):
                    yield None
                    return
            if not told:
                file.seek(0)
                say(
                    f"Waiting for {file.read().strip() or 'another process'}, which prepares a data set in {path.parent}."
                )
                told = True
            time.sleep(0.5)
        killed_at = os.path.getmtime(path) if os.path.getsize(path) else None
        file.truncate(0)
        file.write(f"process {os.getpid()} of {socket.gethostname()}")
        file.flush()
        try:
            yield killed_at
        finally:
            file.truncate(0)


class _Meter:
    """Bytes that were downloaded, those that are expected, and a way to end what is being downloaded."""

    def __init__(self):
        self.done, self.total, self.stopped = 0, 0, False
        self._open: set = set()

    def count(self, response) -> None:
        """Counts the bytes of a response while they are read."""
        self.total += int(response.headers.get("Content-Length", 0))
        self._open.add(response)
        read = response.iter_content

        def counted(*args, **kwargs):
            try:
                for block in read(*args, **kwargs):
                    self.check()
                    self.done += len(block)
                    yield block
            finally:
                self._open.discard(response)

        response.iter_content = counted

    def check(self) -> None:
        """Raises: _Unreachable once stopped."""
        if self.stopped:
            raise _Unreachable("stopped")

    def stop(self) -> None:
        """Ends all downloads, also those that wait for a server."""
        self.stopped = True
        for response in list(self._open):
            with contextlib.suppress(
                Exception
            ):  # finished just now, or a urllib3 that cannot; then the timeout ends it
                response.raw.shutdown()


@contextlib.contextmanager
def _bounded_requests(meter: _Meter) -> Iterator[None]:
    """Gives the requests that TFDS makes timeouts, few retries and a meter; it has no options for these."""
    import requests

    reached: set[tuple[str, int]] = set()

    class Session(requests.Session):
        def mount(self, prefix, adapter):
            adapter.max_retries = adapter.max_retries.new(total=min(_RETRIES, adapter.max_retries.total or 0))
            super().mount(prefix, adapter)

        def request(self, method, url, *args, **kwargs):
            meter.check()
            address = _address(url)
            if address not in reached:
                _connect(*address)
                reached.add(address)
                _hide_accelerators()
            kwargs["timeout"] = (_CONNECT_SECONDS, _READ_SECONDS)
            response = super().request(method, url, *args, **kwargs)
            meter.count(response)
            return response

    requests.Session = Session
    try:
        yield
    finally:
        requests.Session = Session.__base__
        meter.stop()  # the interpreter waits at its end for TFDS's threads


@functools.cache
def _hide_accelerators() -> None:
    """Keeps TensorFlow, which builders use, from taking the accelerator's memory."""
    import tensorflow as tf  # takes seconds, which an offline machine need not wait

    tf.config.set_visible_devices([], "GPU")


def _address(url: str) -> tuple[str, int]:
    """(host, port) of what a request connects to: the proxy of the environment, else the server."""
    from requests.utils import get_environ_proxies, select_proxy

    proxy = select_proxy(url, get_environ_proxies(url))
    contacted = urlsplit(url if not proxy else proxy if "://" in proxy else f"http://{proxy}")
    return contacted.hostname or "", contacted.port or (443 if contacted.scheme == "https" else 80)


def _connect(host: str, port: int) -> None:
    """Raises: _Unreachable where no connection comes about in time. A thread, as name resolution has no timeout."""
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
        raise _Unreachable(f"no connection to {host}:{port} ({failure})")


@contextlib.contextmanager
def _reporting(builder, name: str, meter: _Meter, say: Callable[[str], None]) -> Iterator[None]:
    """Prints a line about the progress every ten seconds."""
    ended = threading.Event()

    def report():
        while not ended.wait(_REPORT_SECONDS):
            if meter.done < meter.total or not meter.total:
                of = f" of {_megabytes(meter.total)}" if meter.total else ""
                say(f"Downloading {name!r}: {_megabytes(meter.done)}{of}")
            else:
                written = sum(map(_size, _incomplete_sets(builder)))
                say(f"Preparing {name!r}: {_megabytes(written)} written")

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
    """Where TFDS keeps what is not complete: downloads, extracted archives and data sets."""
    downloads = pathlib.Path(builder.data_dir_root) / "downloads"
    found = [*downloads.glob("extracted/incomplete.*"), *_incomplete_sets(builder)]
    for folder in downloads.glob("*"):
        if folder.name not in ("extracted", "manual"):  # which may hold millions of files
            found += folder.rglob("*.tmp.*")
    return {path for path in found if path.is_dir()}


def _folders(builder) -> set[pathlib.Path]:
    """The folders that TFDS creates before it has any file for them."""
    root, downloads = pathlib.Path(builder.data_dir_root), pathlib.Path(builder.data_dir_root) / "downloads"
    own = [parent for parent in pathlib.Path(builder.data_path).parents if root in parent.parents]
    return {path for path in (downloads, *downloads.glob("*"), *own) if path.is_dir()}


def _files(folder: pathlib.Path) -> Iterator[os.stat_result]:
    for path in (folder, *folder.rglob("*")):
        with contextlib.suppress(OSError):  # it was renamed or removed just now
            yield path.stat()


def _size(folder: pathlib.Path) -> int:
    return sum(file.st_size for file in _files(folder))


@contextlib.contextmanager
def _without_leftovers(builder, killed_at: float | None) -> Iterator[None]:
    """Removes what a launch that was killed left, and what is left of this one: TFDS cannot resume a download. Folders that
    this launch created are removed if they are empty.

    killed_at: when that launch began. Temporary folders that are older may belong to programs that do not know the lock.
    """
    found, folders = _temporary_folders(builder), _folders(builder)
    for folder in found:
        if killed_at is not None and max((file.st_mtime for file in _files(folder)), default=0.0) >= killed_at:
            shutil.rmtree(folder, ignore_errors=True)
    try:
        yield
    finally:
        for folder in _temporary_folders(builder) - found:
            shutil.rmtree(folder, ignore_errors=True)
        for folder in sorted(_folders(builder) - folders, reverse=True):  # the inner ones first
            with contextlib.suppress(OSError):  # it is not empty
                folder.rmdir()


def _explain(error: Exception, name: str, data_dir: str | None, builder) -> str:
    """What to tell a person, in one line."""
    import requests

    root = builder.data_dir_root
    chain, cause = [], error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    kinds = {type(link).__name__ for link in chain}
    offline = next((link for link in chain if isinstance(link, _Unreachable)), None)
    reason = _one_line(_innermost(offline or error))
    failed = f"the data set {name!r} is not in {root}, and its download failed: {reason}"
    if offline:
        return (
            f"the data set {name!r} is not in {root} and cannot be downloaded: {reason}. Set data.data_dir to where it is, "
            f"or prepare it on a machine with a network, with: {command(name, data_dir)}"
        )
    if "NonMatchingChecksumError" in kinds:
        return f"{failed}; the file was changed or damaged on the way: run the same command again"
    if kinds & {"DownloadError"} or any(isinstance(link, requests.exceptions.RequestException) for link in chain):
        return f"{failed}; run the same command again, or prepare it elsewhere with: {command(name, data_dir)}"
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
    """What requests and urllib3 wrapped in errors of their own."""
    while True:
        wrapped = getattr(error, "reason", None) or (error.args[0] if error.args else None)
        if not isinstance(wrapped, Exception):
            break
        error = wrapped
    return wrapped if isinstance(wrapped, str) and len(error.args) > 1 else error


def _one_line(what: object) -> str:
    """An error or text without line breaks and addresses of objects, at most 300 characters."""
    text = " ".join(re.sub(r"<[^<>]* object at 0x[0-9a-f]+>[:,]? ?", "", str(what)).split())
    return text if len(text) <= 300 else text[:297] + "..."
