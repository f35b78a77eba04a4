"""Before the first array: processes, devices, the compilation cache, and the libraries' chatter."""

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
from diffusion_jax.runs.console import say

_HEARTBEAT = 30  # seconds of silence after which a process counts as lost


def quiet() -> None:
    """Silences what libraries log; must come before TensorFlow is imported. Their errors reach us as exceptions, too."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault(
        "TF_ENABLE_ONEDNN_OPTS", "0"
    )  # TensorFlow only writes event files here; oneDNN greets on stderr
    # Python's process that frees the shared memory of one that was ended says so on stderr: it reads this where it starts.
    told = os.environ.get("PYTHONWARNINGS", "")
    if "resource_tracker" not in told:
        os.environ["PYTHONWARNINGS"] = f"{told},ignore:resource_tracker:UserWarning".lstrip(",")
    absl.logging.set_verbosity(absl.logging.FATAL)
    absl.logging.set_stderrthreshold("fatal")
    for name in ("jax", "orbax", "grain", "tensorflow", "absl"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", module="(orbax|flax|tensorflow|tensorflow_datasets|keras).*")


def join(coordinator: str | None, num_processes: int | None, process_id: int | None, timeout: int) -> None:
    """Joins the other processes of the run, before anything touches a device.

    They are told of by the arguments, else by JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, by srun, or by a
    TPU pod, which jax knows itself. timeout: seconds to wait for them; where one does not come, the program ends.
    Raises: UserError.
    """
    told = {
        "coordinator_address": coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS"),
        "num_processes": _number("--num_processes", num_processes, "JAX_NUM_PROCESSES"),
        "process_id": _number("--process_id", process_id, "JAX_PROCESS_ID"),
    }
    limits = {
        "initialization_timeout": timeout + 60,  # of jax, which would abort without a word that a person understands
        "heartbeat_timeout_seconds": _HEARTBEAT,
        "shutdown_timeout_seconds": 2 * _HEARTBEAT,
    }
    by_address = any(value is not None for value in told.values())
    if by_address and (None in told.values() or ":" not in told["coordinator_address"]):
        raise UserError("--coordinator_address=HOST:PORT, --num_processes and --process_id go together")
    slurm = os.environ.get("SLURM_STEP_NUM_TASKS", "1") != "1"  # srun's, in each of its tasks
    if not (by_address or slurm or importlib.util.find_spec("libtpu")):
        return
    who = told["process_id"] if by_address else os.environ.get("SLURM_PROCID", "")
    late = threading.Timer(
        timeout, end, (f"process {who}: the others did not come within {timeout} s (--join_timeout)", LOST)
    )
    late.daemon = True
    late.start()
    try:
        if by_address:
            jax.distributed.initialize(**told, cluster_detection_method="deactivate", **limits)
        else:
            jax.distributed.initialize(**limits)
    except jax.errors.JaxRuntimeError as error:
        end(f"process {who} cannot join the others: {error}", LOST)
    except (ValueError, RuntimeError) as error:
        if by_address or slurm:
            raise UserError(f"cannot join the other processes: {error}") from None
        # libtpu on a single TPU host, or on none: no pod's directory knows this machine
    finally:
        late.cancel()


def _number(flag: str, given: int | None, variable: str) -> int | None:
    text = os.environ.get(variable)
    try:
        return given if given is not None else None if text is None else int(text)
    except ValueError:
        raise UserError(f"{variable}={text!r} is no number (nor is {flag} given)") from None


def start(verbose: bool = False) -> None:
    """Sets up the compilation cache and prints what the run computes on; verbose: also the options given to XLA."""
    _use_cache()
    backend, count = jax.default_backend(), jax.device_count()
    say(f"jax {jax.__version__} on {count} {jax.devices()[0].device_kind} device{'s' * (count > 1)} ({backend})")
    if verbose and backend == "cpu":
        chosen = " ".join(f"--{name}={value}" for name, value in compiler.options().items())
        say(f"For XLA: {chosen or 'no options of this program'} (XLA_FLAGS override them)")
    if backend == "cpu" and os.environ.get("JAX_PLATFORMS", "") != "cpu":
        card = "an NVIDIA GPU" if os.path.exists("/dev/nvidia0") else "a TPU" if os.path.exists("/dev/accel0") else None
        if card:
            extra = "tpu" if card == "a TPU" else "cuda"
            say(f"This machine has {card} but jax runs on the CPU; for the accelerator's jax: make setup EXTRA={extra}")


def start_virtual(count: int) -> None:
    """Starts on `count` virtual CPU devices, whatever else there is: to compile for them."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", count)
    _use_cache()


def _use_cache() -> None:
    if not jax.config.jax_compilation_cache_dir:
        cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "diffusion_jax"
        jax.config.update("jax_compilation_cache_dir", str(cache))
