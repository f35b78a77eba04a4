"""Before the first array: devices, the compilation cache, and the libraries' chatter."""

from __future__ import annotations

import logging
import os
import pathlib
import warnings

import absl.logging
import jax

from diffusion_jax.distributed import compiler
from diffusion_jax.runs.console import say


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
