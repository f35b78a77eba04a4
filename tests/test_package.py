"""The package as a whole: a light import, layers, configs that build."""

import ast
import graphlib
import importlib
import re
import subprocess
import sys

import jax
import pytest

from diffusion_jax import data, models, training
from diffusion_jax.config import is_classifier
from helpers.paths import ROOT

CONFIGS = sorted(p.stem for p in (ROOT / "configs").glob("*.py") if p.stem != "__init__")


def test_import_loads_only_jax_numpy_and_jaxtyping():
    code = "import jax, sys; before = set(sys.modules); import diffusion_jax; print(*sorted(set(sys.modules) - before))"
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    foreign = (
        {name.split(".")[0] for name in out}
        - {"diffusion_jax", "jax", "jaxlib", "numpy", "jaxtyping", "wadler_lindig"}
        - set(sys.stdlib_module_names)
    )
    assert not foreign
    assert not [
        name
        for name in out
        if name.startswith(("diffusion_jax.models", "diffusion_jax.training", "diffusion_jax.data"))
    ]


LAYERS = [  # lowest first; a module imports from its own layer or a lower layer
    {"errors", "functions", "images", "labels", "types"},
    {"arrays", "schedules"},
    {"denoiser"},
    {"process", "measurements"},
    {"covariances"},
    {
        "losses",
        "timesteps",
        "draws",
        "coordinates",
        "likelihood",
        "metrics",
        "sampling",
        "guidance",
        "editing",
        "posterior",
    },
    {"config"},
    {"untrusted"},
    {"files"},
    {"distributed", "provenance", "storage"},
    {"console"},
    {"run_dir"},
    {"data", "models"},
    {"training"},
    {"pretrained"},
    {"pictures"},
    {"evaluation"},
    {"runs"},
    {"report"},
]


MODULES = {  # name -> file
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in (ROOT / "diffusion_jax").rglob("*.py")
}


def imported_modules(node):
    """The modules of this package that an import statement names; [] for any other node of a syntax tree."""
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, "imports are absolute"
        children = [f"{node.module}.{alias.name}" for alias in node.names]
        names = [child if child in MODULES else node.module for child in children]
    else:
        return []
    return [name for name in names if name.split(".")[0] == "diffusion_jax"]


def module_level_nodes(tree):
    """The syntax tree nodes that run when the module is imported: all nodes outside functions."""
    for node in ast.iter_child_nodes(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield node
            yield from module_level_nodes(node)


def test_nothing_imports_upward():
    level = {name: i for i, names in enumerate(LAYERS) for name in names}
    for module, path in MODULES.items():
        layer = (module.split(".") + ["__init__"])[1]
        if layer in ("__init__", "cli") or path.name == "__main__.py":  # the package itself, and entry points
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            for used in imported_modules(node):
                if used != "diffusion_jax":  # the package itself loads the core alone
                    name = used.split(".")[1]
                    assert level[name] <= level[layer], f"{path} imports {name}"
                    assert {name, layer} != {"distributed", "storage"}, f"{path} imports {name}"


def test_no_modules_import_each_other():
    graph = {
        name: {used for node in module_level_nodes(ast.parse(path.read_text())) for used in imported_modules(node)}
        for name, path in MODULES.items()
    }
    graphlib.TopologicalSorter(graph).prepare()  # a CycleError names the modules


def test_one_function_prints():
    """`errors.print_text` escapes what controls a terminal. Two modules write bytes of their own from a signal's thread."""
    found = set()
    for path in MODULES.values():
        for node in ast.walk(ast.parse(path.read_text())):
            name = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            if re.fullmatch(r"print|os\.write|(sys\.)?std(out|err)\.write\w*|traceback\.print_\w+|.*\.print", name):
                found.add((path.relative_to(ROOT / "diffusion_jax").as_posix(), name))
    writers = {("distributed/processes.py", "os.write"), ("distributed/signals.py", "os.write")}
    assert found == {("errors.py", "print"), *writers}


def test_experiments_import_the_config_package_alone():
    for path in (ROOT / "configs").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            assert not isinstance(node, ast.Import), path
            assert not isinstance(node, ast.ImportFrom) or node.module == "diffusion_jax.config", path


@pytest.mark.thorough
@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_builds(name):
    """The network, schedule and optimizer of each config, by shapes alone."""
    config = importlib.import_module(f"configs.{name}").get_config()
    built = training.build_program(config)
    assert all(leaf.dtype == "float32" for leaf in jax.tree.leaves(built.abstract_state.params))
    classifier, learned = is_classifier(config), config.diffusion.variance.startswith("learned")
    if classifier or learned:  # else the output has the shape of an example
        *spatial, channels = shape = data.example_shape(config.data)
        inputs = models.initial_inputs(built.model, shape)
        out = jax.eval_shape(lambda p: built.model.apply({"params": p}, **inputs), built.abstract_state.params)
        assert out.shape == (1, *((config.model.num_classes,) if classifier else (*spatial, 2 * channels)))
    docstring = importlib.import_module(f"configs.{name}").__doc__
    assert f"python main.py --config=configs/{name}.py --workdir=" in docstring
    assert ("--mode=train_classifier" in docstring) == classifier
