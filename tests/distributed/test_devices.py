"""The setup of a process before its first array."""

import ctypes
import os
import re
import types

import jax
import pytest

from diffusion_jax.distributed import devices

CALLS = [(-3, 2**30), (-8, 1), (-1, 2**31 - 1)]  # M_MMAP_THRESHOLD, M_ARENA_MAX, M_TRIM_THRESHOLD


@pytest.mark.parametrize(
    ("platforms", "variables", "accepts", "expected"),
    [
        ("cpu", {}, 1, CALLS),
        ("cpu", {}, 0, CALLS[:1]),  # a library that refuses the threshold keeps its other values
        ("cpu", {"GLIBC_TUNABLES": "1"}, 1, []),  # the user configures the allocator
        ("", {}, 1, []),
        ("cpu", {}, None, []),  # another C library
    ],
)
def test_freed_memory_is_kept_on_cpus(monkeypatch, platforms, variables, accepts, expected):
    calls = []
    library = types.SimpleNamespace(mallopt=lambda *arguments: calls.append(arguments) or accepts)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: types.SimpleNamespace() if accepts is None else library)
    for name in [name for name in os.environ if name.startswith(("MALLOC_", "GLIBC_TUNABLES"))]:
        monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(devices, "_platforms", lambda: platforms)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name == "jax_plugins")
    devices.start()
    assert calls == expected


def test_the_peak_of_the_memory_of_a_device(monkeypatch):
    assert devices.peak_memory() is None  # on a CPU
    device = types.SimpleNamespace(memory_stats=lambda: {"bytes_in_use": 1, "peak_bytes_in_use": 5})
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    assert devices.peak_memory() == 5


@pytest.mark.parametrize(
    ("present", "words"),
    [("/dev/nvidia0", "an NVIDIA GPU .* make setup EXTRA=cuda"), ("/dev/accel0", "a TPU .* EXTRA=tpu"), ("", None)],
)
def test_an_accelerator_that_jax_does_not_use_is_named(monkeypatch, capsys, present, words):
    exists = os.path.exists
    monkeypatch.setattr("os.path.exists", lambda path: path == present if str(path)[:5] == "/dev/" else exists(path))
    monkeypatch.setattr(devices, "_platforms", lambda: "")
    devices.start()
    shown = capsys.readouterr().out
    assert re.search(words, shown) if words else "This machine has" not in shown
