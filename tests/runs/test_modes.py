"""The modules of diffusion_jax.runs: modes, which write files, and what modes share."""

import ast
import importlib
import inspect

import pytest

from helpers.paths import ROOT

MODES = {"train", "sample", "edit", "measure_likelihood", "sample_metrics", "progressive", "plan", "status"}
TREES = {path.stem: ast.parse(path.read_text()) for path in (ROOT / "diffusion_jax" / "runs").glob("*.py")}


def test_the_modes_are_the_modules_with_a_run_function():
    defining = {
        name
        for name, tree in TREES.items()
        if any(isinstance(node, ast.FunctionDef) and node.name == "run" for node in tree.body)
    }
    assert defining == MODES


@pytest.mark.parametrize("mode", sorted(MODES))
def test_a_mode_takes_a_config_first_and_a_work_directory_second(mode):
    module = importlib.import_module(f"diffusion_jax.runs.{mode}")
    parameters = list(inspect.signature(module.run).parameters)
    assert parameters == ["config", "workdir", "source"][: len(parameters)] and parameters
    assert "run" in module.__all__
