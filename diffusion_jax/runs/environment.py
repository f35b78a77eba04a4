"""The machine and the versions that a launch runs with."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
from typing import Any

import jax

import diffusion_jax

__all__ = ["describe_environment"]

_PACKAGES = ("jax", "jaxlib", "numpy", "flax", "optax", "orbax-checkpoint")


def describe_environment() -> dict[str, Any]:
    """The versions of the libraries, the system, the devices and the number of processes, as JSON values."""
    versions = {"diffusion_jax": diffusion_jax.__version__, "python": platform.python_version()}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {
        "versions": versions,
        "system": platform.platform(),
        "cpus": os.cpu_count(),
        "devices": jax.device_count(),
        "device_kind": jax.devices()[0].device_kind,
        "backend": jax.default_backend(),
        "processes": jax.process_count(),
    }
