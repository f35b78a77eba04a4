"""Compiler options of the outermost programs: the train step and the sampler.

XLA's CPU backend calls a library for single convolutions, and the library's weight gradient is slow: a train step of the
35.7M-parameter network took 1.5 times as long. Without that one fusion, Eigen computes the convolutions, in the same float32.
"""

from __future__ import annotations

import functools
import os
from typing import Any

import jax

__all__ = ["DETERMINISTIC", "fast_compile_options", "options"]

_CONVOLUTIONS = {
    "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT,LIBRARY_FUSION_TYPE_REDUCE"
}
_FAST_COMPILE = {"xla_backend_optimization_level": 1}

# GPU kernels that add in a fixed order, chosen by rule instead of by a measurement during compilation.
DETERMINISTIC = {"xla_gpu_exclude_nondeterministic_ops": True, "xla_gpu_autotune_level": 0}


@functools.cache
def options(deterministic: bool = False) -> dict[str, Any]:
    """`compiler_options` for `jax.jit`, without those that XLA_FLAGS sets or that this jaxlib does not know.

    A program that has options cannot be called inside another jit.

    deterministic: makes the numbers of GPUs bit-identical from run to run. CPUs and TPUs need no option for that: their
    programs add in the order in which they were compiled.
    """
    if jax.default_backend() == "gpu":
        return _not_set(DETERMINISTIC) if deterministic else {}
    return _supported_on_cpu(_CONVOLUTIONS)


@functools.cache
def fast_compile_options() -> dict[str, Any]:
    """Options of a program that runs once, such as the initialization: CPUs compile it in less than half the time."""
    return _supported_on_cpu(_FAST_COMPILE)


def _not_set(chosen: dict[str, Any]) -> dict[str, Any]:
    """The options that XLA_FLAGS does not set."""
    return {name: value for name, value in chosen.items() if name not in os.environ.get("XLA_FLAGS", "")}


def _supported_on_cpu(chosen: dict[str, Any]) -> dict[str, Any]:
    """The options if the backend is the CPU's and knows them, else none."""
    chosen = _not_set(chosen)
    if jax.default_backend() != "cpu":
        return {}
    try:
        jax.jit(lambda x: x, compiler_options=chosen).lower(0.0).compile()
    except Exception:  # the error for an unknown option has another type in each version of jax
        return {}
    return chosen
