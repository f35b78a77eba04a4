"""The setup of a process before its first array."""

import ctypes
import os
import types

import pytest

from diffusion_jax.distributed import devices


@pytest.fixture
def calls(monkeypatch):
    made = []
    library = types.SimpleNamespace(mallopt=lambda *arguments: made.append(arguments) or 1)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    for name in [name for name in os.environ if name.startswith(("MALLOC_", "GLIBC_TUNABLES"))]:
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


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: types.SimpleNamespace())
    devices.start()
