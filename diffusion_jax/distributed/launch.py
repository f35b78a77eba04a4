"""Joins the processes of a run with `jax.distributed`."""

from __future__ import annotations

import importlib.util
import os
import threading

import jax

from diffusion_jax.distributed.termination import EXIT_PEER_LOST, exit_now
from diffusion_jax.errors import UserError

__all__ = ["join_processes"]

_HEARTBEAT_TIMEOUT = 30  # seconds without a heartbeat after which a process counts as lost


def join_processes(
    coordinator_address: str | None, num_processes: int | None, process_id: int | None, timeout: int
) -> None:
    """Joins the other processes of the run; must be called before anything uses a device.

    An argument that is None is read from JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES or JAX_PROCESS_ID. Without all of them,
    JAX itself detects the processes of srun and of TPU pods; anything else is a single process, and nothing is done.

    coordinator_address: HOST:PORT of process 0. timeout: seconds to wait for the others, after which the program ends.
    Raises: UserError.
    """
    address = coordinator_address or os.environ.get("JAX_COORDINATOR_ADDRESS")
    count = _read_number("--num_processes", num_processes, "JAX_NUM_PROCESSES")
    index = _read_number("--process_id", process_id, "JAX_PROCESS_ID")
    arguments = (address, count, index)
    has_address = any(value is not None for value in arguments)
    if has_address and (None in arguments or ":" not in str(address)):
        raise UserError("--coordinator_address=HOST:PORT, --num_processes and --process_id must be given together")
    is_slurm = os.environ.get("SLURM_STEP_NUM_TASKS", "1") != "1"  # srun sets it in each of its tasks
    if not (has_address or is_slurm or importlib.util.find_spec("libtpu")):
        return
    name = f"process {index if has_address else os.environ.get('SLURM_PROCID', '')}"
    message = f"{name}: the other processes did not connect within {timeout} s; raise --join_timeout, or start them"
    timer = threading.Timer(timeout, exit_now, (message, EXIT_PEER_LOST))
    timer.daemon = True
    timer.start()
    try:
        _initialize(timeout, *(arguments if has_address else ()))
    except jax.errors.JaxRuntimeError as error:
        exit_now(f"{name} cannot connect to the others: {error}", EXIT_PEER_LOST)
    except (ValueError, RuntimeError) as error:
        if has_address or is_slurm:
            raise UserError(f"cannot connect to the other processes: {error}") from None
        # Otherwise libtpu is installed, but this machine is a single TPU host or has no TPU.
    finally:
        timer.cancel()


def _initialize(timeout: int, *arguments) -> None:
    """jax.distributed.initialize with the given (coordinator address, number of processes, process id), or detected ones."""
    jax.distributed.initialize(
        *arguments,
        cluster_detection_method="deactivate" if arguments else None,
        initialization_timeout=timeout + 60,  # longer than the timer's, whose message is clearer
        heartbeat_timeout_seconds=_HEARTBEAT_TIMEOUT,
        shutdown_timeout_seconds=2 * _HEARTBEAT_TIMEOUT,
    )


def _read_number(flag: str, value: int | None, variable: str) -> int | None:
    """The value of a flag, or else of an environment variable. Raises: UserError."""
    if value is not None or variable not in os.environ:
        return value
    try:
        return int(os.environ[variable])
    except ValueError:
        raise UserError(
            f"{variable}={os.environ[variable]!r} must be a whole number; correct it, or give {flag}=N"
        ) from None
