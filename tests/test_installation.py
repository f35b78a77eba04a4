"""The lists of requirements, and the installed package, a wheel and an editable install in their own environments."""

import os
import shutil
import subprocess
import sys
import tomllib

import pytest
from packaging.requirements import Requirement

from diffusion_jax import config
from helpers.paths import ROOT

SMALL = {"model.channels": 8, "model.num_groups": 4, "training.batch_size": 8, "training.num_steps": 20}
SMALL |= {"training.log_every": 10, "training.sample_every": 0, "training.checkpoint_every": 20}


def project():
    with open(ROOT / "pyproject.toml", "rb") as file:
        return tomllib.load(file)


def test_every_folder_with_modules_is_packaged():
    tool = project()["tool"]["setuptools"]
    folders = {path.parent for path in (ROOT / "diffusion_jax").rglob("*.py")}
    expected = {".".join(folder.relative_to(ROOT).parts) for folder in folders} | {"diffusion_jax.configs"}
    assert set(tool["packages"]) == expected and tool["package-dir"] == {"diffusion_jax.configs": "configs"}
    assert project()["project"]["scripts"] == {"diffusion-jax": "diffusion_jax.cli:main"}


def requirements(name):
    """The requirements of a file, without comments and options."""
    lines = [line.partition(" #")[0] for line in (ROOT / name).read_text().splitlines() if line and line[0] not in "#-"]
    return [Requirement(line) for line in lines]


def test_requirements_are_those_of_the_core_and_of_the_extras_for_training_and_tfds():
    extras = project()["tool"]["setuptools"]["dynamic"]["optional-dependencies"]
    assert [extras[name] for name in ("train", "tfds")] == [
        {"file": [f"requirements/{name}.txt"]} for name in ("train", "tfds")
    ]
    core = [Requirement(line) for line in project()["project"]["dependencies"]]
    parts = [*core, *requirements("requirements/train.txt"), *requirements("requirements/tfds.txt")]
    assert sorted(map(str, requirements("requirements.txt"))) == sorted(map(str, parts))
    # Without this line, only programs in the clone's folder can import the package.
    assert "-e ." in (ROOT / "requirements.txt").read_text().splitlines()


@pytest.mark.whole
@pytest.mark.parametrize("module", ["jaxtyping", "optax"])
def test_a_missing_requirement_is_an_error_of_one_line(module, tmp_path):
    """Of the core, which the command line itself imports, and of a mode."""
    error = f"raise ModuleNotFoundError(\"No module named '{module}'\", name='{module}')"
    packages = tmp_path / "site-packages"
    packages.mkdir()
    (packages / f"{module}.py").write_text(error)
    command = [sys.executable, "main.py", "--config=configs/digits.py", f"--workdir={tmp_path / 'run'}"]
    _, err = run(*command, cwd=ROOT, code=2, PYTHONPATH=str(packages), JAX_PLATFORMS="cpu")
    assert err.startswith(f"error: {module} is not installed") and "pip install -r requirements.txt" in err
    assert err.count("\n") == 1


def run(*command, cwd, code=0, **variables):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env={**environment, **variables}, capture_output=True, text=True, check=False
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout, done.stderr


@pytest.fixture
def installed(tmp_path):
    """A folder, for PYTHONPATH, with a wheel of this package."""
    source, folder = tmp_path / "source", tmp_path / "installed"
    ignored = shutil.ignore_patterns(".*", "build", "*.egg-info", "runs", "tests", "__pycache__")
    shutil.copytree(ROOT, source, ignore=lambda folder, names: ignored(folder, names) if folder == str(ROOT) else [])
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", f"--target={folder}"]
    run(sys.executable, "-m", "pip", "install", *options, source, cwd=tmp_path)
    shutil.rmtree(source)
    return folder


@pytest.mark.whole
def test_an_installed_package_trains_from_any_directory(installed, tmp_path):
    elsewhere, variables = tmp_path / "elsewhere", {"PYTHONPATH": str(installed), "JAX_PLATFORMS": "cpu"}
    elsewhere.mkdir()
    code = "import diffusion_jax.configs.digits as digits; from diffusion_jax import config; "
    code += "print(digits.__file__, *config.experiment_names())"
    out, _ = run(sys.executable, "-c", code, cwd=elsewhere, **variables)
    assert out.split() == [str(installed / "diffusion_jax" / "configs" / "digits.py"), *config.experiment_names()]
    flags = [f"--config.{setting}={value}" for setting, value in SMALL.items()]
    command = [installed / "bin" / "diffusion-jax", "--config=digits", "--workdir=run", *flags]
    out, _ = run(*command, cwd=elsewhere, **variables)
    assert "Done: 20 steps" in out and (elsewhere / "run" / "checkpoints" / "20").is_dir()
