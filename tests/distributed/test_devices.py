"""The setup of a process before its first array."""

import ctypes
import os
import subprocess
import sys
import types

import pytest

from diffusion_jax.distributed import devices

_FAULTS = """
import resource, sys
from diffusion_jax.distributed import devices
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


def test_freed_memory_is_kept_on_cpus(calls):
    devices.start()
    # M_ARENA_MAX, M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
    assert dict(calls) == {-8: 1, -3: 2**30, -1: 2**31 - 1}


def test_a_c_library_that_refuses_a_threshold_keeps_its_others(monkeypatch, calls):
    library = types.SimpleNamespace(mallopt=lambda *arguments: calls.append(arguments) or 0)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    devices.start()
    assert dict(calls) == {-3: 2**30}


@pytest.mark.parametrize("platforms", ["", "cuda,cpu"])
def test_freed_memory_is_returned_where_an_accelerator_may_be_used(calls, monkeypatch, platforms):
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


def test_variables_of_the_environment_take_precedence(calls, monkeypatch):
    monkeypatch.setenv("GLIBC_TUNABLES", "1")
    devices.start()
    assert not calls


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: types.SimpleNamespace())
    devices.start()
