"""The annotations of the core: resolvable, checked in these tests, and free without them."""

import importlib
import inspect
import pkgutil
import subprocess
import sys
import typing

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

import diffusion_jax
from diffusion_jax import process, sampling, schedules, timesteps, types
from helpers.paths import ROOT
from helpers.type_checks import CORE

FULL = schedules.from_betas(schedules.betas("linear", 20))
X, T = jnp.zeros((2, 3)), jnp.array([0, 7])

WRONG_CALLS = {
    "a shape": "process.q_sample(schedule, jnp.zeros((2, 3)), jnp.array([0, 7]), jnp.zeros((2, 4)))",
    "a number of indices": "process.q_sample(schedule, jnp.zeros((2, 3)), jnp.array([0, 7, 8]), jnp.zeros((2, 3)))",
    "a dtype": "process.q_sample(schedule, jnp.zeros((2, 3), int), jnp.array([0, 7]), jnp.zeros((2, 3)))",
    "a key": "timesteps.uniform(jnp.zeros((2,), 'uint32'), 4, 20)",
    "a clip": "process.clip_x_0(jnp.zeros((2, 3)), 'yes')",
}


def modules():
    for name in CORE:
        module = importlib.import_module(f"diffusion_jax.{name}")
        yield module
        for info in pkgutil.iter_modules(getattr(module, "__path__", [])):
            yield importlib.import_module(f"{module.__name__}.{info.name}")


def functions():
    """Every function and method that a module of the core defines, by its full name."""
    for module in modules():
        for name, value in vars(module).items():
            members = vars(value).items() if inspect.isclass(value) else [(None, value)]
            for member, function in members:
                if inspect.isfunction(function) and function.__module__ == module.__name__:
                    yield f"{module.__name__}.{name}" + (f".{member}" if member else ""), function


def test_every_annotation_of_the_core_resolves():
    """jaxtyping does not check an annotation that it cannot evaluate, and does not tell."""
    names = [name for name, function in functions() if typing.get_type_hints(function, include_extras=True) is not None]
    assert len(names) > 100


def test_every_public_function_of_the_core_has_annotations():
    missing = []
    for name, function in functions():
        parts = name.removeprefix("diffusion_jax.").split(".")
        if any(part.startswith("_") for part in parts) or "<" in function.__qualname__:
            continue
        signature = inspect.signature(function)
        unannotated = [
            p.name
            for p in signature.parameters.values()
            if p.name != "self" and p.annotation is inspect.Parameter.empty
        ]
        if unannotated or signature.return_annotation is inspect.Signature.empty:
            missing.append((name, unannotated))
        assert typing.Any not in typing.get_type_hints(function).values(), name
    assert not missing


@pytest.mark.parametrize("name", WRONG_CALLS)
def test_the_tests_check_annotations(name):
    scope = {"process": process, "timesteps": timesteps, "jnp": jnp, "schedule": FULL}
    with pytest.raises(jaxtyping.TypeCheckError, match="Type-check error"):
        eval(WRONG_CALLS[name], scope)


def test_a_program_checks_nothing():
    code = (
        "from diffusion_jax import schedules\n"
        "schedule = schedules.from_betas([0.1, 0.2], timesteps=[0, 5])\n"
        "print(schedule.log_snr([[0.0, 5.0]]).shape)\n"  # a list, which the annotation does not allow
    )
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert out.strip() == "(1, 2)"


def test_checks_hold_under_the_transformations_of_jax():
    draw = lambda x, t, eps: process.q_sample(FULL, x, t, eps)  # noqa: E731
    eps = jnp.ones((2, 3))
    expected = draw(X, T, eps)
    np.testing.assert_allclose(jax.jit(draw)(X, T, eps), expected, rtol=1e-6)
    np.testing.assert_allclose(jax.vmap(draw)(X, T, eps), expected, rtol=1e-6)
    jax.grad(lambda x: draw(x, T, eps).sum())(X)
    jax.lax.scan(lambda x, t: (draw(x, t, eps), None), X, T)
    for transformed in (jax.jit(draw), jax.vmap(draw), jax.grad(lambda x, t, eps: draw(x, t, eps).sum())):
        with pytest.raises((jaxtyping.TypeCheckError, ValueError)):
            transformed(X, T, jnp.ones((2, 4)))


def test_the_types_accept_what_users_write():
    class Network:
        def __call__(self, x, time):
            return x

    assert isinstance(lambda x_t, t: x_t, types.DenoiseFn) and isinstance(Network(), types.DenoiseFn)
    assert isinstance(timesteps.uniform, types.TimestepSampler) and not isinstance(0.5, types.DenoiseFn)
    assert diffusion_jax.DenoiseFn is types.DenoiseFn
    x = sampling.sample(jax.random.key(0), FULL, Network(), X, sampling.ddim(1, clip=process.dynamic_threshold()))
    assert x.shape == X.shape
