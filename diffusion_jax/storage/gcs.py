"""Objects in a Google Cloud Storage bucket, through gcsfs."""

from __future__ import annotations

import datetime
import json
import logging
import os
import uuid
from collections.abc import Mapping
from typing import Any

import aiohttp
import google.auth.exceptions
from gcsfs.core import GCSFileSystem
from gcsfs.retry import HttpError

from diffusion_jax.errors import StorageError, shorten
from diffusion_jax.storage.objects import ObjectInfo, ObjectStore

_ADVICE = "type: gcloud auth application-default login, or set GOOGLE_APPLICATION_CREDENTIALS to a key file"
_TIMEOUTS = aiohttp.ClientTimeout(sock_connect=10, sock_read=30)  # seconds


class Store(ObjectStore):
    """Objects in a Google Cloud Storage bucket; tags are generations. Raises: StorageError without credentials."""

    _wrong_tag = "1"
    _advice = {"credentials": _ADVICE, "bucket": "gcloud storage buckets create"}  # noqa: RUF012

    def __init__(self, url: str):
        logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # gcsfs logs a traceback for each failed request
        is_emulated = os.environ.get("STORAGE_EMULATOR_HOST", "default") not in ("", "default")
        try:
            filesystem = GCSFileSystem(
                token="anon" if is_emulated else "google_default",
                access="read_write",
                requests_timeout=_TIMEOUTS,
                use_listings_cache=False,
                skip_instance_cache=True,
            )
            filesystem.credentials.maybe_refresh()
        except (google.auth.exceptions.GoogleAuthError, HttpError) as error:
            reason = " ".join(str(error.args[0] if error.args else error).split()).partition(". To set up")[0]
            raise StorageError(f"{url}: no valid credentials ({shorten(reason, 200)}); {_ADVICE}") from None
        super().__init__(url, filesystem)

    def _to_info(self, found: Mapping[str, Any]) -> ObjectInfo:
        modified = datetime.datetime.fromisoformat(found["updated"]).timestamp()
        return ObjectInfo(int(found["size"]), found["generation"], modified)

    def _write_if(self, key: str, data: bytes, tag: str) -> str:
        url, end = f"{self._fs._location}/upload/storage/v1/b/{{}}/o", uuid.uuid4().hex
        metadata = json.dumps({"name": key, "cacheControl": "no-store"})
        parts = [f"--{end}\r\nContent-Type: application/json\r\n\r\n{part}\r\n" for part in (metadata, data.decode())]
        answer = self._fs.call(
            "POST",
            url,
            self._bucket,
            uploadType="multipart",
            ifGenerationMatch=tag or "0",
            headers={"Content-Type": f'multipart/related; boundary="{end}"'},
            data=f"{''.join(parts)}--{end}--\r\n".encode(),
            json_out=True,
        )
        return answer["generation"]

    def _status(self, error: BaseException) -> int | None:
        if isinstance(error, HttpError):
            code = str(error.code)
            return int(code) if code.isdigit() else None
        return 403 if isinstance(error, OSError) and str(error).startswith("Forbidden:") else None
