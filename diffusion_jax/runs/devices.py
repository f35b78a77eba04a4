"""Setup of a process before its first array: other processes, devices, the compilation cache, and log output of libraries."""

from __future__ import annotations

import importlib.util
import logging
import os
import pathlib
import threading
import warnings

import absl.logging
import jax

from diffusion_jax.distributed import compiler
from diffusion_jax.distributed.preemption import LOST, end
from diffusion_jax.errors import UserError
from diffusion_jax.runs.console import log

__all__ = ["join_processes", "silence_libraries", "start", "start_virtual"]

_CACHE_OPTION = "jax_compilation_cache_dir"
_HEARTBEAT_SECONDS = 30  # a process that is silent for this long counts as lost


def silence_libraries() -> None:
    """Silences the log output of libraries; call it before TensorFlow is imported. Their errors are raised all the same."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    # TensorFlow only writes event files here, and oneDNN prints a line on stderr.
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    # When a data worker is killed, Python's resource tracker warns on stderr; it reads this variable when it starts.
    filters = os.environ.get("PYTHONWARNINGS", "")
    if "resource_tracker" not in filters:
        os.environ["PYTHONWARNINGS"] = f"{filters},ignore:resource_tracker:UserWarning".lstrip(",")
    absl.logging.set_verbosity(absl.logging.FATAL)
    absl.logging.set_stderrthreshold("fatal")
    for name in ("jax", "orbax", "grain", "tensorflow", "absl"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", module="(orbax|flax|tensorflow|tensorflow_datasets|keras).*")


def join_processes(
    coordinator_address: str | None, num_processes: int | None, process_id: int | None, timeout: int
) -> None:
    """Connects to the other processes of the run, before anything uses a device.

    They are described by the arguments, or by JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, by srun, or by a
    TPU pod, which jax detects itself. timeout: seconds to wait for them, after which the program ends. Raises: UserError.
    """
    address = coordinator_address or os.environ.get("JAX_COORDINATOR_ADDRESS")
    num_processes = _flag_or_variable("--num_processes", num_processes, "JAX_NUM_PROCESSES")
    process_id = _flag_or_variable("--process_id", process_id, "JAX_PROCESS_ID")
    values = (address, num_processes, process_id)
    by_address = any(value is not None for value in values)
    if by_address and (None in values or ":" not in (address or "")):
        raise UserError("--coordinator_address=HOST:PORT, --num_processes and --process_id must be given together")
    by_slurm = os.environ.get("SLURM_STEP_NUM_TASKS", "1") != "1"  # set by srun in each of its tasks
    if not (by_address or by_slurm or importlib.util.find_spec("libtpu")):
        return
    name = f"process {process_id if by_address else os.environ.get('SLURM_PROCID', '')}"
    message = f"{name}: the other processes did not connect within {timeout} s; raise --join_timeout, or start them"
    timer = threading.Timer(timeout, end, (message, LOST))
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(
            address,
            num_processes,
            process_id,
            cluster_detection_method="deactivate" if by_address else None,
            initialization_timeout=timeout + 60,  # jax itself would abort with a message that few users understand
            heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=2 * _HEARTBEAT_SECONDS,
        )
    except jax.errors.JaxRuntimeError as error:
        end(f"{name} cannot connect to the others: {error}", LOST)
    except (ValueError, RuntimeError) as error:
        if by_address or by_slurm:
            raise UserError(f"cannot connect to the other processes: {error}") from None
        # libtpu on a single TPU host, or without a TPU: this machine belongs to no pod
    finally:
        timer.cancel()


def _flag_or_variable(flag: str, value: int | None, variable: str) -> int | None:
    text = os.environ.get(variable)
    try:
        return value if value is not None else None if text is None else int(text)
    except ValueError:
        raise UserError(f"{variable}={text!r} must be a whole number; correct it, or give {flag}") from None


def start(verbose: bool = False) -> None:
    """Sets up the compilation cache and prints the devices; verbose: also the options given to XLA."""
    _use_compilation_cache()
    backend, count = jax.default_backend(), jax.device_count()
    log(f"jax {jax.__version__} on {count} {jax.devices()[0].device_kind} device{'s' * (count > 1)} ({backend})")
    if verbose and backend == "cpu":
        options = " ".join(f"--{name}={value}" for name, value in compiler.options().items())
        log(f"Options for XLA: {options or 'none'} (XLA_FLAGS override them)")
    if backend == "cpu" and os.environ.get("JAX_PLATFORMS", "") != "cpu":
        device = (
            "an NVIDIA GPU" if os.path.exists("/dev/nvidia0") else "a TPU" if os.path.exists("/dev/accel0") else None
        )
        if device:
            extra = "tpu" if device == "a TPU" else "cuda"
            log(f"This machine has {device} but jax runs on the CPU; to install jax for it: make setup EXTRA={extra}")


def start_virtual(num_devices: int) -> None:
    """Starts on virtual CPU devices, whatever other devices there are: to compile for them."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", num_devices)
    _use_compilation_cache()


def _use_compilation_cache() -> None:
    if not getattr(jax.config, _CACHE_OPTION):
        cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "diffusion_jax"
        jax.config.update(_CACHE_OPTION, str(cache))
