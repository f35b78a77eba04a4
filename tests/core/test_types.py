"""The core's annotations: resolvable, checked in these tests, and without cost outside the tests."""

import importlib
import inspect
import pkgutil
import subprocess
import sys
import typing

import jax
import jax.numpy as jnp
import jaxtyping
import pytest

import diffusion_jax
from diffusion_jax import Denoiser, process, sampling, schedules, timesteps, types
from diffusion_jax.denoiser import dynamic_threshold
from helpers.paths import ROOT
from helpers.type_checks import CORE

FULL = schedules.from_betas(schedules.betas("linear", 20))
X, T = jnp.zeros((2, 3)), jnp.array([0, 7])


def functions():
    """Every function and method that a module of the core defines."""
    for name in CORE:
        package = importlib.import_module(f"diffusion_jax.{name}")
        infos = pkgutil.iter_modules(getattr(package, "__path__", []))
        for module in [package, *(importlib.import_module(f"{package.__name__}.{info.name}") for info in infos)]:
            for value in vars(module).values():
                members = vars(value).values() if inspect.isclass(value) else [value]
                members = [
                    getattr(f, "fget", getattr(f, "__func__", f)) for f in members
                ]  # properties and class methods
                yield from (f for f in members if inspect.isfunction(f) and f.__module__ == module.__name__)


def test_every_annotation_of_the_core_resolves():
    """jaxtyping silently skips an annotation that cannot be evaluated."""
    hints = [typing.get_type_hints(function, include_extras=True) for function in functions()]
    assert len(hints) > 100


def test_the_tests_check_annotations():
    for call in (
        lambda: process.q_sample(FULL, X, T, jnp.zeros((2, 4))),
        lambda: process.q_sample(FULL, X.astype(int), T, X),
        lambda: timesteps.uniform(jnp.zeros(2, "uint32"), 4, 20),
    ):
        with pytest.raises(jaxtyping.TypeCheckError, match="Type-check error"):
            call()


def test_a_program_checks_nothing():
    code = (
        "from diffusion_jax import schedules\n"
        "schedule = schedules.from_betas([0.1, 0.2], timesteps=[0, 5])\n"
        "print(schedule.path.log_snr([[0.0, 5.0]]).shape)\n"  # a list, which the annotation does not allow
    )
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert out.strip() == "(1, 2)"


def test_the_types_accept_what_users_write():
    class Network:
        def __call__(self, x, time):
            return x

    assert isinstance(lambda x_t, t: x_t, types.DenoiseFn) and isinstance(Network(), types.DenoiseFn)
    assert isinstance(timesteps.uniform, types.TimestepSampler) and not isinstance(0.5, types.DenoiseFn)
    assert diffusion_jax.DenoiseFn is types.DenoiseFn
    clipped = Denoiser(Network(), clip=dynamic_threshold())
    x = sampling.sample(jax.random.key(0), FULL, clipped, X, sampling.ddim(1))
    assert x.shape == X.shape
