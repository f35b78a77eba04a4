"""Provenance: the settings that made a file. The settings name the file, are stored in it, and decide on its reuse."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import pathlib
import subprocess
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

import diffusion_jax
from diffusion_jax.config import flatten
from diffusion_jax.errors import list_differences, shorten
from diffusion_jax.untrusted import open_npz, parse_json

_ARRAY, _BYTES = "provenance", 2**20  # the record in an .npz: its name and largest size


@dataclasses.dataclass(frozen=True)
class Provenance:
    """The settings that made a file or weights.

    name: a readable text for file names: the weights' name, then the settings that change most often. settings: JSON values
    that determine the content, up to rounding. details: facts that do not determine the content, such as paths and versions.
    arrays_sha256: the digest of the file's other arrays (`params_digest`); None in files of version 0.3.
    """

    name: str
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    details: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    arrays_sha256: str | None = None

    @property
    def digest(self) -> str:
        """Returns the settings' hash, as 12 hexadecimal digits."""
        return settings_digest(self.settings)

    def differences(self, stored: Provenance) -> str:
        """Lists the settings that differ between a stored record and this record, in one line; "" if all are equal."""
        old, new = flatten(stored.settings), flatten(json.loads(json.dumps(self.settings)))
        return shorten("; ".join(list_differences(old, new)), 300)

    def add_to(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Returns the content of an .npz: the arrays, and this record with their digest."""
        record = dataclasses.replace(self, arrays_sha256=params_digest(dict(arrays)))
        return {**arrays, _ARRAY: np.array(json.dumps(dataclasses.asdict(record)))}

    def describes(self, path: pathlib.Path) -> bool:
        """Returns whether this record, read from an .npz, has the digest of the file's arrays."""
        try:
            with open_npz(path, limit=math.inf) as arrays:
                return self.arrays_sha256 == params_digest({name: arrays[name] for name in arrays if name != _ARRAY})
        except (OSError, ValueError):
            return False

    @classmethod
    def read(cls, path: pathlib.Path) -> Provenance | None:
        """Reads the record from an .npz; None for a file without a record, or whose record is unreadable or above 1 MiB."""
        try:
            with open_npz(path, limit=math.inf) as arrays:
                member = f"{_ARRAY}.npy"
                if arrays.zip.getinfo(member).file_size > _BYTES:
                    return None
                return cls(**parse_json(str(arrays[member])))
        except (OSError, ValueError, TypeError):
            return None


@functools.cache
def code_version() -> str:
    """Returns the version, and in a clone the commit, with "+" if tracked files differ: "0.4.0 (1a2b3c4d+)"."""
    root = pathlib.Path(__file__).parent.parent
    if not (root / ".git").exists():  # installed, perhaps into a folder of another project's clone
        return diffusion_jax.__version__
    command = ["git", "--no-optional-locks", f"--git-dir={root}/.git", f"--work-tree={root}", "describe"]
    options = ["--always", "--dirty=+", "--exclude=*", "--abbrev=8"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run([*command, *options], capture_output=True, text=True, check=True, timeout=10)
        return f"{diffusion_jax.__version__} ({done.stdout.strip()})"
    return diffusion_jax.__version__


def settings_digest(*settings: Any) -> str:
    """Returns a hash of JSON values, as 12 hexadecimal digits."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=dict).encode()).hexdigest()[:12]


def array_digest(*arrays: np.ndarray | None) -> str | None:
    """Returns the SHA-256 of the values in arrays, one array after another; None without an array."""
    given = [np.ascontiguousarray(array).tobytes() for array in arrays if array is not None]
    return hashlib.sha256(b"".join(given)).hexdigest() if given else None


def params_digest(params: Any) -> str:
    """Returns the SHA-256 of the names, shapes, dtypes and values in a tree of arrays on any devices."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        array = np.ascontiguousarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.shape} {array.dtype}".encode())
        digest.update(array.view(np.uint8).data if array.size else b"")
    return digest.hexdigest()
