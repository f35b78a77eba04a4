"""The modules of diffusion_jax.runs: modes, which write files, and what modes share."""

import ast
import importlib
import inspect

import pytest

from helpers.paths import ROOT

MODES = {"train", "sample", "edit", "measure_likelihood", "sample_metrics", "progressive", "plan", "status"}
TREES = {path.stem: ast.parse(path.read_text()) for path in (ROOT / "diffusion_jax" / "runs").glob("*.py")}


def imported_modules(tree):
    """The modules of diffusion_jax.runs that a module imports, anywhere in it."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "diffusion_jax.runs":
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("diffusion_jax.runs."):
            names.add(node.module.split(".")[2])
        elif isinstance(node, ast.Import):
            names |= {a.name.split(".")[2] for a in node.names if a.name.startswith("diffusion_jax.runs.")}
    return names


def test_the_modes_are_the_modules_with_a_run_function():
    defining = {
        name
        for name, tree in TREES.items()
        if any(isinstance(node, ast.FunctionDef) and node.name == "run" for node in tree.body)
    }
    assert defining == MODES


@pytest.mark.parametrize("mode", sorted(MODES))
def test_a_mode_takes_a_config_and_a_work_directory(mode):
    module = importlib.import_module(f"diffusion_jax.runs.{mode}")
    parameters = list(inspect.signature(module.run).parameters)
    assert parameters == ["config", "workdir", "source"][: len(parameters)] and len(parameters) >= 2
    assert "run" in module.__all__


def test_no_module_of_the_package_imports_a_mode():
    """Only entry points compose modes; what two modes share has a module of its own."""
    for name, tree in TREES.items():
        assert not imported_modules(tree) & MODES, name
