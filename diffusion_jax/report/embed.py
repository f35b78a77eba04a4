"""Pictures as data URIs, made smaller where they would exceed the size that the page has for them."""

from __future__ import annotations

import base64
import io
import pathlib
from typing import NamedTuple

import numpy as np
from PIL import Image, features

__all__ = ["Budget", "Picture"]

_MAX_SIDE = 2000  # pixels
_QUALITY = 82


class Picture(NamedTuple):
    """A picture inside the page. src: a data URI. note: how it differs from its file, or ""."""

    src: str
    width: int
    height: int
    note: str = ""


class Budget:
    """The bytes that the pictures of a section may have together."""

    def __init__(self, num_bytes: int):
        self.left = num_bytes

    def embed(self, source: pathlib.Path | np.ndarray, limit: int | None = None) -> Picture | None:
        """A file, or uint8 [H, W, C], as a picture of at most `limit` bytes; None if no room is left.

        Raises: OSError, ValueError for a file that is not a picture.
        """
        limit = min(self.left, limit or self.left)
        image, data = _open(source)
        note = ""
        if len(data) > limit or max(image.size) > _MAX_SIDE:
            smaller = _shrink(image, limit)
            if smaller is None:
                return None
            data, size = smaller
            note = "" if size == image.size else f"shown with {size[0]} of {image.size[0]} columns of pixels"
            image = Image.open(io.BytesIO(data))
        self.left -= len(data)
        kind = (image.format or "PNG").lower()
        return Picture(f"data:image/{kind};base64,{base64.b64encode(data).decode()}", *image.size, note)


def _open(source: pathlib.Path | np.ndarray) -> tuple[Image.Image, bytes]:
    if isinstance(source, np.ndarray):
        image = Image.fromarray(source[..., 0] if source.shape[-1] == 1 else source)
        return image, _encode(image, "PNG")
    data = source.read_bytes()
    image = Image.open(io.BytesIO(data))
    image.load()
    return image, data


def _encode(image: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    if kind == "JPEG":
        image = image.convert("RGB")
    image.save(buffer, kind, **({} if kind == "PNG" else {"quality": _QUALITY}))
    return buffer.getvalue()


def _shrink(image: Image.Image, limit: int) -> tuple[bytes, tuple[int, int]] | None:
    """(the bytes, the size) of a picture with as many pixels as the limit allows; None if it is too small for any."""
    kind = "WEBP" if features.check("webp") else "JPEG"
    image = image.convert("L" if image.mode == "L" else "RGB")
    scale = min(1.0, _MAX_SIDE / max(image.size))
    while scale * min(image.size) >= 16 or scale == 1.0:
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        resized = image if size == image.size else image.resize(size, Image.Resampling.LANCZOS)
        data = _encode(resized, kind)
        if len(data) <= limit:
            return data, size
        scale *= min(0.85, (limit / len(data)) ** 0.5)
    return None
