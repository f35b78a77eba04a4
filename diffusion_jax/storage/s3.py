"""Objects in a bucket on S3 or on an S3-compatible service, through s3fs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import botocore.exceptions
from s3fs import S3FileSystem

from diffusion_jax.storage.objects import ObjectInfo, ObjectStore

_OPTIONS = {
    "connect_timeout": 10,  # seconds
    "read_timeout": 30,
    "max_pool_connections": 32,  # for the threads of ObjectStore, and for multipart uploads
}


class Store(ObjectStore):
    """Objects in an S3 bucket; tags are ETags."""

    _wrong_tag = f'"{"0" * 32}"'
    _no_credentials = (
        botocore.exceptions.NoCredentialsError,
        botocore.exceptions.PartialCredentialsError,
        botocore.exceptions.CredentialRetrievalError,
        botocore.exceptions.SSOError,
    )
    _advice = {  # noqa: RUF012
        "credentials": "type: aws configure, or set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
        "bucket": "aws s3 mb",
    }

    def __init__(self, url: str):
        super().__init__(url, S3FileSystem(config_kwargs=_OPTIONS, use_listings_cache=False, skip_instance_cache=True))

    def _to_info(self, found: Mapping[str, Any]) -> ObjectInfo:
        return ObjectInfo(found["size"], found["ETag"], found["LastModified"].timestamp())

    def _write_if(self, key: str, data: bytes, tag: str) -> str:
        condition = {"IfMatch": tag} if tag else {"IfNoneMatch": "*"}
        return self._fs.call_s3("put_object", Bucket=self._bucket, Key=key, Body=data, **condition)["ETag"]

    def _status(self, error: BaseException) -> int | None:
        current: BaseException | None = error
        while current is not None:
            if isinstance(current, botocore.exceptions.ClientError):
                return current.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
            current = current.__cause__
        return None
