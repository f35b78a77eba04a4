"""Settings of all tests: a persistent compilation cache, shared with the programs that tests start."""

import os
import pathlib
import tempfile

import jax
import pytest

CACHE = os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(pathlib.Path(tempfile.gettempdir()) / "diffusion_jax_tests")
os.environ["JAX_COMPILATION_CACHE_DIR"] = CACHE  # the programs that tests start share it
jax.config.update("jax_compilation_cache_dir", CACHE)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


@pytest.fixture
def x64():
    """float64 for the duration of a test."""
    with jax.enable_x64(True):
        yield
