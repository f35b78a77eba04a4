"""The setup of a process before its first array."""

import ctypes
import os
import subprocess
import sys
import types

import pytest

from diffusion_jax.runs import devices

_FAULTS = """
import resource, sys
from diffusion_jax.runs import devices
sys.stdout, stdout = sys.stderr, sys.stdout
devices.start()
import jax, jax.numpy as jnp
function = jax.jit(lambda x: jnp.tanh(x @ x.T) @ x)
x = jnp.ones((4096, 256))
for _ in range(10):
    x = jax.block_until_ready(function(x))
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    x = jax.block_until_ready(function(x))
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) // 20, file=stdout)
"""


def without_malloc_variables():
    return {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_TUNABLES"))}


@pytest.fixture
def calls(monkeypatch):
    made = []
    library = types.SimpleNamespace(mallopt=lambda *arguments: made.append(arguments) or 1)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    for name in set(os.environ) - set(without_malloc_variables()):
        monkeypatch.delenv(name)
    return made


@pytest.mark.parametrize("accepts", [1, 0])
def test_freed_memory_is_kept_on_cpus(calls, monkeypatch, accepts):
    """A library that refuses the threshold keeps its others."""
    library = types.SimpleNamespace(mallopt=lambda *arguments: calls.append(arguments) or accepts)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    devices.start()
    # M_MMAP_THRESHOLD, M_ARENA_MAX, M_TRIM_THRESHOLD
    assert calls == [(-3, 2**30), (-8, 1), (-1, 2**31 - 1)][: 3 if accepts else 1]


@pytest.mark.parametrize(("platforms", "variables"), [("", {}), ("cuda,cpu", {}), ("cpu", {"GLIBC_TUNABLES": "1"})])
def test_freed_memory_is_returned_for_accelerators_and_if_variables_configure_it(
    calls, monkeypatch, platforms, variables
):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(devices, "_platforms", lambda: platforms)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name == "jax_plugins")
    devices.start()
    assert not calls


def test_steps_get_no_new_pages_from_the_system():
    """In a process of its own, because the heaps of this one's threads exist already."""
    environment = without_malloc_variables() | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", _FAULTS]
    found = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert int(found.stdout) < 5_000  # of 4 kB a call; 20,000 if the buffers were returned after each


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: types.SimpleNamespace())
    devices.start()
