"""Before the first array: processes, devices, the compilation cache, and the libraries' chatter."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import pathlib
import warnings

import absl.logging
import jax

from diffusion_jax.runs.console import say


def quiet() -> None:
    """Silences what libraries log below an error; must come before TensorFlow is imported."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault(
        "TF_ENABLE_ONEDNN_OPTS", "0"
    )  # TensorFlow only writes event files here; oneDNN greets on stderr
    absl.logging.set_verbosity(absl.logging.ERROR)
    absl.logging.set_stderrthreshold("error")
    for name in ("jax", "orbax", "grain", "tensorflow", "absl"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="(orbax|flax|tensorflow|tensorflow_datasets|keras).*")


def start() -> None:
    """Joins the other processes where there are any, and says what the run computes on.

    Processes are joined where JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID say so, in a SLURM job of several
    tasks, or where jax itself finds a TPU pod.
    """
    if "JAX_COORDINATOR_ADDRESS" in os.environ:
        jax.distributed.initialize(
            os.environ["JAX_COORDINATOR_ADDRESS"],
            int(os.environ["JAX_NUM_PROCESSES"]),
            int(os.environ["JAX_PROCESS_ID"]),
        )
    elif os.environ.get("SLURM_NTASKS", "1") != "1":
        jax.distributed.initialize()
    elif importlib.util.find_spec("libtpu"):
        with contextlib.suppress(ValueError, RuntimeError):  # no pod: a single TPU host, or none
            jax.distributed.initialize()
    _use_cache()
    backend, count = jax.default_backend(), jax.device_count()
    say(f"jax {jax.__version__} on {count} {jax.devices()[0].device_kind} device{'s' * (count > 1)} ({backend})")
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
