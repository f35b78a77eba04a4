"""What the clients of both services have in common."""

from __future__ import annotations

import dataclasses
import mimetypes
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

__all__ = [
    "CONNECT_TIMEOUT",
    "READ_TIMEOUT",
    "RETRIED_STATUSES",
    "Bucket",
    "ChangedError",
    "ObjectInfo",
    "TemporaryError",
    "content_type",
    "find_causes",
]

RETRIED_STATUSES = {408, 429, 500, 502, 503, 504}
CONNECT_TIMEOUT = 10.0  # seconds
READ_TIMEOUT = 30.0  # seconds without a byte of the answer


@dataclasses.dataclass(frozen=True)
class ObjectInfo:
    """One version of an object. size: bytes. tag: identifies it. modified: seconds since 1970, by the service's clock."""

    size: int
    tag: str
    modified: float


class ChangedError(Exception):
    """A conditional write was refused: the object exists already, or is another version than the expected one."""


class TemporaryError(OSError):
    """The service did not carry out a request, and another attempt may succeed."""


class Bucket(Protocol):
    """One bucket of one service. Keys are full names of objects; every coroutine makes one attempt and runs on `loop`.

    Raises: FileNotFoundError for a missing object; the client's own errors, which `is_transient` and `status` classify.
    """

    @property
    def loop(self) -> Any: ...

    @property
    def wrong_tag(self) -> str:
        """A well-formed tag that no object has."""
        ...

    @property
    def advice(self) -> dict[str, str]:
        """What to type without "credentials", and to create a "bucket"."""
        ...

    async def list_page(self, prefix: str, token: str | None, limit: int) -> tuple[dict[str, ObjectInfo], str | None]:
        """(objects by key, token of the next page or None)."""
        ...

    async def find(self, key: str) -> ObjectInfo: ...

    async def read(self, key: str) -> tuple[bytes, str]:
        """(contents, tag)."""
        ...

    async def write(self, key: str, data: bytes, tag: str | None = None) -> str:
        """Writes an object and returns its tag. tag: the version to replace, "" for a new object, None for any.

        Raises: ChangedError.
        """
        ...

    async def upload_large(self, path: pathlib.Path, key: str) -> None: ...

    async def download(self, key: str, path: pathlib.Path) -> None: ...

    async def delete(self, keys: Sequence[str]) -> None:
        """Deletes at most `delete_limit` objects; missing ones are fine."""
        ...

    @property
    def delete_limit(self) -> int: ...

    async def delete_version(self, key: str, tag: str) -> None:
        """Deletes the version `tag` of an object. Raises: ChangedError if the object is missing or another version."""
        ...

    async def copy(self, key: str, new_key: str) -> None: ...

    def is_transient(self, error: BaseException) -> bool:
        """Whether another attempt may succeed."""
        ...

    def status(self, error: BaseException) -> int | None:
        """The HTTP status of an error; None if it has none, such as errors of the connection and of local files."""
        ...

    def lacks_credentials(self, error: BaseException) -> bool: ...


def content_type(key: str) -> str:
    """The media type that a web browser needs to show the object."""
    return mimetypes.guess_type(key)[0] or "application/octet-stream"


def find_causes(error: BaseException) -> Iterator[BaseException]:
    """The error, its cause, the cause's cause and so on."""
    current: BaseException | None = error
    while current is not None:
        yield current
        current = current.__cause__
