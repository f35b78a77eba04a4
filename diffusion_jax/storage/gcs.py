"""A bucket of Google Cloud Storage, through gcsfs."""

from __future__ import annotations

import asyncio
import base64
import datetime
import hashlib
import inspect
import json
import logging
import os
import pathlib
import uuid
from collections.abc import Sequence
from typing import Any

import aiohttp
import google.auth
import google.auth.exceptions
import requests
from gcsfs.core import GCSFileSystem
from gcsfs.retry import ChecksumError, HttpError
from google.auth.transport.requests import Request

from diffusion_jax.errors import StorageError, shorten
from diffusion_jax.storage.bucket import (
    CONNECT_TIMEOUT,
    READ_TIMEOUT,
    RETRIED_STATUSES,
    ChangedError,
    ObjectInfo,
    content_type,
)

__all__ = ["GcsBucket"]

# One attempt each: gcsfs's own retries are nested, so that a download fails after minutes, and end with a logged traceback.
_request_once = inspect.unwrap(GCSFileSystem._request)
_download_once = inspect.unwrap(GCSFileSystem._get_file_request)
_SCOPE = "https://www.googleapis.com/auth/devstorage.read_write"
_ADVICE = "type: gcloud auth application-default login, or set GOOGLE_APPLICATION_CREDENTIALS to a key file"


class _ShortRequest(Request):
    """Requests for credentials that do not wait minutes for a metadata server that does not exist."""

    def __call__(self, url: str, method: str = "GET", body=None, headers=None, timeout=None, **options):
        limit = 2 if url.startswith("http:") else 5  # the metadata server, which is tried three times, alone has no TLS
        timeout = min(timeout or limit, limit)
        return super().__call__(url, method=method, body=body, headers=headers, timeout=timeout, **options)


def _find_credentials(url: str) -> Any:
    """Credentials that are valid now; "anon" for an emulator. Raises: StorageError."""
    if os.environ.get("STORAGE_EMULATOR_HOST", "default") not in ("", "default"):
        return "anon"
    try:
        with requests.Session() as session:
            request = _ShortRequest(session)
            credentials, _ = google.auth.default(scopes=[_SCOPE], request=request)
            credentials.refresh(request)
    except google.auth.exceptions.GoogleAuthError as error:
        reason = " ".join(str(error.args[0] if error.args else error).split()).partition(". To set up")[0]
        raise StorageError(f"{url}: no valid credentials ({shorten(reason, 200)}); {_ADVICE}") from None
    return credentials


class GcsBucket:
    """A bucket of Google Cloud Storage; tags are generations. Raises: StorageError without credentials."""

    delete_limit = 1  # one request deletes one object
    wrong_tag = "1"
    advice = {"credentials": _ADVICE, "bucket": "gcloud storage buckets create"}  # noqa: RUF012

    def __init__(self, name: str, url: str):
        logger = logging.getLogger("gcsfs")
        if logger.level == logging.NOTSET:
            logger.setLevel(logging.CRITICAL)  # it logs a traceback of each large upload that ObjectStore tries again
        self._name = name
        self._fs = GCSFileSystem(
            token=_find_credentials(url),
            access="read_write",
            requests_timeout=aiohttp.ClientTimeout(sock_connect=CONNECT_TIMEOUT, sock_read=READ_TIMEOUT),
            use_listings_cache=False,
            skip_instance_cache=True,
        )

    @property
    def loop(self) -> Any:
        return self._fs.loop

    async def _call(self, method: str, path: str, *args: str, **options: Any) -> tuple[Any, bytes]:
        """(headers, body) of the answer to one request. args: fill the braces of `path`, percent-encoded."""
        _, headers, _, body = await _request_once(self._fs, method, path, *args, **options)
        return headers, body

    async def list_page(self, prefix: str, token: str | None, limit: int) -> tuple[dict[str, ObjectInfo], str | None]:
        fields = "nextPageToken,items(name,size,generation,updated)"
        _, body = await self._call(
            "GET", "b/{}/o", self._name, prefix=prefix, pageToken=token, maxResults=limit, fields=fields
        )
        page = json.loads(body)
        return {item["name"]: _object_info(item) for item in page.get("items", ())}, page.get("nextPageToken")

    async def find(self, key: str) -> ObjectInfo:
        _, body = await self._call("GET", "b/{}/o/{}", self._name, key, fields="size,generation,updated")
        return _object_info(json.loads(body))

    async def read(self, key: str) -> tuple[bytes, str]:
        headers, body = await self._call("GET", "b/{}/o/{}", self._name, key, alt="media")
        return body, headers["X-Goog-Generation"]

    async def write(self, key: str, data: bytes, tag: str | None = None) -> str:
        boundary = uuid.uuid4().hex
        md5 = base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()  # compared by the service
        # Objects that anyone may read are cached for an hour by default.
        metadata = json.dumps({"name": key, "md5Hash": md5, "cacheControl": "no-store"})
        head = f"--{boundary}\r\nContent-Type: application/json; charset=UTF-8\r\n\r\n{metadata}\r\n"
        head += f"--{boundary}\r\nContent-Type: {content_type(key)}\r\n\r\n"
        try:
            _, body = await self._call(
                "POST",
                self._fs.base.replace("/storage/v1/", "/upload/storage/v1/") + "b/{}/o",
                self._name,
                uploadType="multipart",
                ifGenerationMatch={None: None, "": "0"}.get(tag, tag),
                headers={"Content-Type": f'multipart/related; boundary="{boundary}"'},
                data=head.encode() + data + f"\r\n--{boundary}--\r\n".encode(),
            )
        except FileExistsError:  # status 412
            raise ChangedError(key) from None
        return json.loads(body)["generation"]

    async def upload_large(self, path: pathlib.Path, key: str) -> None:
        await self._fs._put_file(
            str(path),
            f"{self._name}/{key}",
            content_type=content_type(key),
            chunksize=2**25,
            consistency="md5",
            fixed_key_metadata={"cache_control": "no-store"},
        )

    async def download(self, key: str, path: pathlib.Path) -> None:
        await _download_once(self._fs, f"{self._name}/{key}", str(path))

    async def delete(self, keys: Sequence[str]) -> None:
        for key in keys:
            try:
                await self._call("DELETE", "b/{}/o/{}", self._name, key)
            except FileNotFoundError:
                pass

    async def delete_version(self, key: str, tag: str) -> None:
        try:
            await self._call("DELETE", "b/{}/o/{}", self._name, key, ifGenerationMatch=tag)
        except (FileNotFoundError, FileExistsError):  # status 404 or 412
            raise ChangedError(key) from None

    async def copy(self, key: str, new_key: str) -> None:
        token = None  # of a copy in several requests
        while True:
            _, body = await self._call(
                "POST", "b/{}/o/{}/rewriteTo/b/{}/o/{}", self._name, key, self._name, new_key, rewriteToken=token
            )
            answer = json.loads(body)
            if answer["done"]:
                return
            token = answer["rewriteToken"]

    def is_transient(self, error: BaseException) -> bool:
        if isinstance(error, HttpError):  # 401: the token could not be renewed at the moment
            return self.status(error) in RETRIED_STATUSES | {401}
        kinds = (
            aiohttp.ClientError,
            requests.RequestException,
            asyncio.TimeoutError,
            ConnectionError,
            ChecksumError,
            google.auth.exceptions.TransportError,
        )
        return isinstance(error, kinds)

    def lacks_credentials(self, error: BaseException) -> bool:
        return self.status(error) == 401

    def status(self, error: BaseException) -> int | None:
        if isinstance(error, HttpError):
            code = str(getattr(error, "code", None))
            return int(code) if code.isdigit() else None
        return 403 if isinstance(error, OSError) and str(error).startswith("Forbidden:") else None


def _object_info(item: dict[str, str]) -> ObjectInfo:
    modified = datetime.datetime.fromisoformat(item["updated"]).timestamp()
    return ObjectInfo(int(item.get("size", 0)), item["generation"], modified)
