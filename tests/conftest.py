"""Settings for all tests: the core's annotations are checked, and only the compilation cache outlives a session.

Programs that tests start share the caches and run without the checks.
"""

import os
import pathlib
import re
import tempfile

import jax
import jaxtyping
import pytest

from helpers import type_checks

type_checks.import_core_with_checks()

pytest_plugins = ["helpers.object_stores"]

CACHE = os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(pathlib.Path(tempfile.gettempdir()) / "diffusion_jax_tests")
os.environ["JAX_COMPILATION_CACHE_DIR"] = CACHE  # programs that tests start share the cache
jax.config.update("jax_compilation_cache_dir", CACHE)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


@pytest.fixture(scope="session", autouse=True)
def cache_of_session(tmp_path_factory):
    """Decoded images and features must not outlive the code that computed them; fonts may."""
    os.environ.setdefault("MPLCONFIGDIR", str(pathlib.Path.home() / ".cache" / "matplotlib"))
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module", autouse=True)
def programs_of_module():
    """Compiled programs are dropped with their module: thousands of them need gigabytes and many memory maps."""
    yield
    jax.clear_caches()


@pytest.fixture
def x64():
    """float64 for the duration of a test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def unchecked_annotations():
    """Calls with wrong types reach the package's own errors for the duration of a test."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """An empty cache of features and an empty current directory."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def sampling_programs():
    """Counts the sampling programs that were compiled since the last call."""
    compiled = []

    def listen(event, duration, fun_name="", **_):
        if event.endswith("backend_compile_duration"):
            compiled.append(fun_name)

    def count():
        number = sum(re.fullmatch(r"jit\(_?draw\)", name) is not None for name in compiled)
        compiled.clear()
        return number

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield count
    jax.monitoring.unregister_event_duration_listener(listen)
