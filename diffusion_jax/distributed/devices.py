"""Sets up a process before its first array: devices, compilation cache, log output of libraries, compiler options."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import importlib.metadata
import importlib.util
import logging
import os
import platform
import warnings
from typing import Any

import absl.logging
import jax

from diffusion_jax.distributed.processes import log
from diffusion_jax.files import user_cache
from diffusion_jax.provenance import code_version

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # constants from glibc's malloc.h
_CACHE_OPTION = "jax_compilation_cache_dir"

# XLA's CPU backend calls a library for single convolutions, and the library's weight gradient is slow: a train step of the
# 35.7M-parameter network took 1.5 times as long. Without this fusion, Eigen computes convolutions, also in float32.
_CONVOLUTIONS = {
    "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT,LIBRARY_FUSION_TYPE_REDUCE"
}
_FAST_COMPILE = {"xla_backend_optimization_level": 1}

# Selects GPU kernels that add in a fixed order, and selects them by rule, not by measurements during compilation.
DETERMINISTIC = {"xla_gpu_exclude_nondeterministic_ops": True, "xla_gpu_autotune_level": 0}

_PACKAGES = ("jax", "jaxlib", "numpy", "flax", "optax", "orbax-checkpoint")


def silence_libraries() -> None:
    """Silences the log output of libraries; errors are still raised. Call this before TensorFlow is imported."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    # oneDNN prints a line on stderr, and is not needed, because no model runs in TensorFlow.
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    # When a data worker is killed, Python's resource tracker warns on stderr. The tracker reads this variable when it starts.
    filters = os.environ.get("PYTHONWARNINGS", "")
    if "resource_tracker" not in filters:
        os.environ["PYTHONWARNINGS"] = f"{filters},ignore:resource_tracker:UserWarning".lstrip(",")
    absl.logging.set_verbosity(absl.logging.FATAL)
    absl.logging.set_stderrthreshold("fatal")
    for name in ("jax", "orbax", "grain", "tensorflow", "absl"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", module="(orbax|flax|tensorflow|tensorflow_datasets|keras).*")


def collect_garbage_rarely() -> None:
    """Runs garbage collection every 100,000 new objects; Python's default is 700 or 2,000.

    During tracing, nearly no object is garbage, and collection took over a third of the time. Every third collection or so
    includes older generations, so that garbage in cycles, such as figures, does not accumulate.
    """
    gc.set_threshold(100_000, 1, 1)


def start() -> None:
    """Sets up the compilation cache and prints the devices."""
    collect_garbage_rarely()
    _use_compilation_cache()
    if _must_use_cpu():
        _keep_freed_memory()  # before XLA starts its threads
    backend, count = jax.default_backend(), jax.device_count()
    log(f"jax {jax.__version__} on {count} {jax.devices()[0].device_kind} device{'s' * (count > 1)} ({backend})")
    extra = "cuda" if os.path.exists("/dev/nvidia0") else "tpu" if os.path.exists("/dev/accel0") else None
    if extra and backend == "cpu" and _platforms() != "cpu":
        device = {"cuda": "an NVIDIA GPU", "tpu": "a TPU"}[extra]
        log(
            f"This machine has {device} but jax runs on the CPU; to install jax for it: "
            f"pip install -r requirements/{extra}.txt, or make setup EXTRA={extra}"
        )


def describe_environment() -> dict[str, Any]:
    """Returns library versions, the system, the devices and the number of processes, as JSON values."""
    versions = {"diffusion_jax": code_version(), "python": platform.python_version()}
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


def peak_memory() -> int | None:
    """Returns the most bytes that the first local device has held; None where the backend does not report them (CPUs)."""
    return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def _platforms() -> str | None:
    """Returns the platforms that JAX_PLATFORMS or JAX's configuration selects."""
    return getattr(jax.config, "jax_platforms")  # noqa: B009


def _must_use_cpu() -> bool:
    """Returns whether JAX can only use the CPU: the CPU was selected, or no accelerator plugin is installed."""
    if _platforms():
        return _platforms() == "cpu"
    has_plugin = any(importlib.util.find_spec(name) for name in ("jax_plugins", "libtpu"))
    return not has_plugin and not importlib.metadata.entry_points(group="jax_plugins")


def _keep_freed_memory() -> None:
    """Makes glibc reuse freed blocks of up to 1 GB. Environment variables that configure glibc take precedence.

    By default, glibc returns freed blocks to the system, and each step spends a tenth to a fifth of its time on new pages.
    This function also makes all threads without a heap share one heap, because a separate heap holds at most 64 MB.
    """
    if any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # the C library is not glibc
        return
    if mallopt(_M_MMAP_THRESHOLD, 2**30):  # versions before 2.35 accept 32 MB at most
        mallopt(_M_ARENA_MAX, 1)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def start_virtual(num_devices: int) -> None:
    """Starts JAX on virtual CPU devices, even if other devices are present, to compile for `num_devices` devices."""
    collect_garbage_rarely()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", num_devices)
    _use_compilation_cache()


def _use_compilation_cache() -> None:
    if not getattr(jax.config, _CACHE_OPTION):
        jax.config.update(_CACHE_OPTION, str(user_cache()))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        # Evaluation compiles many programs in less than a second, and by default JAX does not cache these.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


# ---- Compiler options


@functools.cache
def compiler_options(
    deterministic: bool = False, fast_compile: bool = False, platform: str | None = None
) -> dict[str, Any]:
    """Returns compiler options for outermost programs, such as the train step.

    Options that XLA_FLAGS sets are left out. On CPUs, all options are left out if jaxlib does not know one of them. Another
    jit cannot call a program with options.

    deterministic: makes GPU results bit-identical between runs. Programs of CPUs and TPUs always add in the compiled order.
    fast_compile: halves the compile time on CPUs, for a program that runs once, such as initialization. platform: "cpu",
    "gpu" or "tpu"; by default the platform of the present devices.
    """
    backend = platform or jax.default_backend()
    on_cpu, on_gpu = _FAST_COMPILE if fast_compile else _CONVOLUTIONS, DETERMINISTIC if deterministic else {}
    chosen = {"cpu": on_cpu, "gpu": on_gpu}.get(backend, {})
    chosen = {name: value for name, value in chosen.items() if name not in os.environ.get("XLA_FLAGS", "")}
    if backend == "cpu":
        try:
            jax.jit(lambda x: x, compiler_options=chosen).lower(0.0).compile()
        except Exception:  # the error type for an unknown option differs between JAX versions
            return {}
    return chosen
