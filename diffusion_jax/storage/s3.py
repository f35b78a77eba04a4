"""A bucket of S3, or of a service with its interface, through s3fs."""

from __future__ import annotations

import asyncio
import pathlib
from collections.abc import Sequence
from typing import Any

import aiohttp
import botocore.exceptions
from botocore.parsers import ResponseParserError
from s3fs import S3FileSystem

from diffusion_jax.storage.bucket import (
    CONNECT_TIMEOUT,
    READ_TIMEOUT,
    RETRIED_STATUSES,
    ChangedError,
    ObjectInfo,
    TemporaryError,
    content_type,
    find_causes,
)

__all__ = ["S3Bucket"]

_RETRIED = RETRIED_STATUSES | {409}  # another conditional write is in progress
_NO_CREDENTIALS = (
    botocore.exceptions.NoCredentialsError,
    botocore.exceptions.PartialCredentialsError,
    botocore.exceptions.CredentialRetrievalError,
    botocore.exceptions.SSOError,
)
_RETRIED_CODES = {"RequestTimeout", "SlowDown", "BadDigest", "IncompleteBody", "XAmzContentSHA256Mismatch"}


class S3Bucket:
    """A bucket of S3; tags are ETags."""

    delete_limit = 1000
    wrong_tag = f'"{"0" * 32}"'
    advice = {  # noqa: RUF012
        "credentials": "type: aws configure, or set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
        "bucket": "aws s3 mb",
    }

    def __init__(self, name: str):
        self._name = name
        self._fs = S3FileSystem(
            config_kwargs={
                "connect_timeout": CONNECT_TIMEOUT,
                "read_timeout": READ_TIMEOUT,
                "max_pool_connections": 32,  # for the threads of ObjectStore, and parts of large files
                "retries": {"mode": "standard", "max_attempts": 2},
            },
            use_listings_cache=False,
            skip_instance_cache=True,
        )
        self._fs.retries = (
            1  # one of botocore, which also resends a part of a large file, and those of ObjectStore remain
        )

    @property
    def loop(self) -> Any:
        return self._fs.loop

    async def _call(self, method: str, **options: Any) -> dict[str, Any]:
        return await self._fs._call_s3(method, Bucket=self._name, **options)

    async def list_page(self, prefix: str, token: str | None, limit: int) -> tuple[dict[str, ObjectInfo], str | None]:
        options = {"ContinuationToken": token} if token else {}
        page = await self._call("list_objects_v2", Prefix=prefix, MaxKeys=limit, **options)
        found = {
            item["Key"]: ObjectInfo(item["Size"], item["ETag"], item["LastModified"].timestamp())
            for item in page.get("Contents", ())
        }
        return found, page.get("NextContinuationToken")

    async def find(self, key: str) -> ObjectInfo:
        found = await self._call("head_object", Key=key)
        return ObjectInfo(found["ContentLength"], found["ETag"], found["LastModified"].timestamp())

    async def read(self, key: str) -> tuple[bytes, str]:
        answer = await self._call("get_object", Key=key)
        async with answer["Body"] as body:
            return await body.read(), answer["ETag"]

    async def write(self, key: str, data: bytes, tag: str | None = None) -> str:
        condition = {} if tag is None else {"IfMatch": tag} if tag else {"IfNoneMatch": "*"}
        try:
            answer = await self._call("put_object", Key=key, Body=data, ContentType=content_type(key), **condition)
        except OSError as error:
            if self.status(error) == 412 or (tag and isinstance(error, FileNotFoundError)):
                raise ChangedError(key) from None
            raise
        return answer["ETag"]

    async def upload_large(self, path: pathlib.Path, key: str) -> None:
        await self._fs._put_file(str(path), f"{self._name}/{key}", ContentType=content_type(key), max_concurrency=4)

    async def download(self, key: str, path: pathlib.Path) -> None:
        await self._fs._get_file(f"{self._name}/{key}", str(path), max_concurrency=4)

    async def delete(self, keys: Sequence[str]) -> None:
        answer = await self._call("delete_objects", Delete={"Objects": [{"Key": key} for key in keys], "Quiet": True})
        for failure in answer.get("Errors", ()):
            code = failure.get("Code")
            if code != "NoSuchKey":
                kind = PermissionError if code == "AccessDenied" else TemporaryError
                raise kind(f"{failure.get('Key')} was not deleted: {failure.get('Message', code)}")

    async def delete_version(self, key: str, tag: str) -> None:
        try:
            await self._call("delete_object", Key=key, IfMatch=tag)
        except OSError as error:
            if self.status(error) in (404, 412):
                raise ChangedError(key) from None
            raise

    async def copy(self, key: str, new_key: str) -> None:
        await self._call("copy_object", Key=new_key, CopySource={"Bucket": self._name, "Key": key})

    def is_transient(self, error: BaseException) -> bool:
        response = _response(error)
        if self.status(error) in _RETRIED or response.get("Error", {}).get("Code") in _RETRIED_CODES:
            return True
        kinds = (
            TemporaryError,
            botocore.exceptions.HTTPClientError,
            botocore.exceptions.FlexibleChecksumError,
            ResponseParserError,
            aiohttp.ClientError,
            asyncio.TimeoutError,
            ConnectionError,
        )
        return any(isinstance(cause, kinds) for cause in find_causes(error))

    def lacks_credentials(self, error: BaseException) -> bool:
        return self.status(error) == 401 or isinstance(error, _NO_CREDENTIALS)

    def status(self, error: BaseException) -> int | None:
        return _response(error).get("ResponseMetadata", {}).get("HTTPStatusCode")


def _response(error: BaseException) -> dict[str, Any]:
    """The service's answer that an error reports; {} if it reports none."""
    for cause in find_causes(error):
        if isinstance(cause, botocore.exceptions.ClientError):
            return dict(cause.response)
    return {}
