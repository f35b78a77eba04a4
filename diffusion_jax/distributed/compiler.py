"""Compiler options of the outermost programs: the train step and the sampler.

XLA's CPU backend hands single convolutions to a library whose weight gradient is slow (a train step of the 35.7M-parameter
network took 1.5 times as long); leaving that one fusion out gives Eigen's convolutions back, in the same float32.
"""

from __future__ import annotations

import functools
import os

import jax

_CONVOLUTIONS = {
    "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT,LIBRARY_FUSION_TYPE_REDUCE"
}
_QUICK = {"xla_backend_optimization_level": 1}
_LEAST_MEMORY = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}

# Kernels that add in a fixed order, chosen by rule and not by which was fastest when the program was compiled.
DETERMINISTIC = {"xla_gpu_exclude_nondeterministic_ops": True, "xla_gpu_autotune_level": 0}


@functools.cache
def options(deterministic: bool = False) -> dict:
    """`compiler_options` for `jax.jit`, without those that a user's XLA_FLAGS set or that this jaxlib does not know.

    A program that carries options cannot be called inside another jit.

    deterministic: the same numbers to the bit from run to run on GPUs. CPUs and TPUs need nothing for that: their programs
    add in the order in which they were compiled.
    """
    if jax.default_backend() == "gpu":
        return _not_set(DETERMINISTIC) if deterministic else {}
    return _usable(_CONVOLUTIONS)


@functools.cache
def quick() -> dict:
    """Options of a program that runs once, such as the initialization: CPUs compile it in less than half the time."""
    return _usable(_QUICK)


@functools.cache
def least_memory() -> dict:
    """Options of a program that is compiled to see what memory it needs: CPUs' own order is for speed alone."""
    return _usable(_LEAST_MEMORY)


def _not_set(chosen: dict) -> dict:
    return {name: value for name, value in chosen.items() if name not in os.environ.get("XLA_FLAGS", "")}


def _usable(chosen: dict) -> dict:
    """Options of the CPU backend, there and where they are known."""
    chosen = _not_set(chosen)
    if jax.default_backend() != "cpu":
        return {}
    try:
        jax.jit(lambda x: x, compiler_options=chosen).lower(0.0).compile()
    except Exception:  # the error's type differs between versions; all that matters is that the option is unknown
        return {}
    return chosen
