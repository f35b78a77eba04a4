"""The setup of a process before its first array."""

import ctypes
import types

import pytest

from diffusion_jax.runs import devices


@pytest.fixture
def calls(monkeypatch):
    made = []
    library = types.SimpleNamespace(mallopt=lambda *arguments: made.append(arguments))
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    for name in ("MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)
    return made


def test_freed_memory_is_kept_on_cpus(calls):
    devices.start()
    assert dict(calls) == {-3: 64 * 2**20, -1: 256 * 2**20}  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD


@pytest.mark.parametrize("name", ["MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"])
def test_variables_of_the_environment_take_precedence(calls, monkeypatch, name):
    monkeypatch.setenv(name, "1")
    devices.start()
    assert not calls


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: types.SimpleNamespace())
    devices.start()
