"""Compiler options of the outermost programs: the train step and the sampler.

XLA's CPU backend hands single convolutions to a library whose weight gradient is slow (a train step of the 35.7M-parameter
network took 1.5 times as long); leaving that one fusion out gives Eigen's convolutions back, in the same float32.
"""

from __future__ import annotations

import functools
import os

import jax

_OPTION = "xla_cpu_experimental_ynn_fusion_type"
_VALUE = "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT,LIBRARY_FUSION_TYPE_REDUCE"


@functools.cache
def options() -> dict[str, str]:
    """`compiler_options` for `jax.jit`: empty on accelerators, where a user's XLA_FLAGS set the option, or where this
    jaxlib does not know it. A program that carries options cannot be called inside another jit."""
    if jax.default_backend() != "cpu" or _OPTION in os.environ.get("XLA_FLAGS", ""):
        return {}
    chosen = {_OPTION: _VALUE}
    try:
        jax.jit(lambda x: x, compiler_options=chosen).lower(0.0).compile()
    except Exception:  # the error's type differs between versions; all that matters is that the option is unknown
        return {}
    return chosen
