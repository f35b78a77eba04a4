"""The code of README.md and of the pages: Python blocks run, shell blocks are parsed by the command line.

```python   runs, from top to bottom in one namespace for each page; a block that starts with "# FILE.py" is added to FILE.py;
            an example of an API page (docs/reference/api/examples) runs in a namespace of its own
```output   the exact output of the Python block above
```py does not run; a sentence above the block names what is missing
```sh       lines that start with `python main.py` or `diffusion-jax` are parsed; PATH, DIR, NAME and ... are placeholders
```console  and other languages: only shown
"""

import ast
import contextlib
import functools
import importlib.util
import io
import json
import re
import shlex

import jax
import numpy as np
import pytest

import configs.digits
from diffusion_jax import cli, config, schedules
from diffusion_jax.runs import plan, workdir
from helpers import published_files
from helpers.pages import COMMAND, blocks, commands, name, pages, parse_subcommand
from helpers.paths import ROOT

EXAMPLES = ROOT / "docs" / "reference" / "api" / "examples"
WITH_PYTHON = [page for page in pages() if any(block.kind == "python" for block in blocks(page))]
WITH_SHELL = [page for page in pages() if any(block.kind == "sh" for block in blocks(page))]


def run_python(page):
    """Runs the Python blocks of a page; returns their namespace and the text that the last block printed."""
    namespace, printed = {"__name__": "__main__"}, io.StringIO()
    for block in blocks(page):
        if block.kind == "output":
            assert printed.getvalue() == block.text, f"{page}, line {block.line}"
        if block.kind == "python":
            if match := re.match(r"# (\w+\.py)\n", block.text):
                with open(match[1], "a") as file:
                    file.write(block.text)
            if page.parent == EXAMPLES:
                namespace = {"__name__": "__main__"}
            # The empty lines give tracebacks the page's line numbers.
            program = compile("\n" * (block.line - 1) + block.text, str(page), "exec")
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(program, namespace)
    return namespace, printed.getvalue()


@pytest.mark.whole
@pytest.mark.parametrize("page", [page for page in WITH_PYTHON if page.name != "README.md"], ids=name)
def test_python_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_python(page)


@pytest.mark.parametrize("page", sorted(EXAMPLES.glob("*.md")), ids=name)
def test_an_example_belongs_to_a_public_function_and_calls_it(page):
    spec = importlib.util.spec_from_file_location("api_examples", ROOT / "docs" / "_extensions" / "api_examples.py")
    extension = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(extension)
    sections = extension.sections(page)
    assert list(sections) == re.findall(r"^## `(.*)`$", page.read_text(), re.MULTILINE)
    for function, text in sections.items():
        assert callable(getattr(importlib.import_module(f"diffusion_jax.{page.stem}"), function)), function
        (program,) = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
        assert re.search(rf"\b{function}\(", program), function
        assert "assert" in program or "```output" in text, function
        assert re.search(r"^\w+: \[[^\]]+\]\([^)]+\)$", text, re.MULTILINE), f"{function} has no link to its guide"


@pytest.mark.thorough
def test_the_samples_of_readme_have_the_moments_of_the_data():
    """10,000 samples: the standard errors are 0.2% of the mean, 0.7% of the deviation and 0.004 of the correlation."""
    namespace, printed = run_python(ROOT / "README.md")
    data, samples = (np.asarray(namespace[name], np.float64) for name in ("data", "samples"))
    assert samples.shape == (10_000, 2)
    np.testing.assert_allclose(samples.mean(0), data.mean(0), rtol=0.04)
    np.testing.assert_allclose(samples.std(0), data.std(0), rtol=0.04)
    assert abs(np.corrcoef(samples.T)[0, 1] - np.corrcoef(data.T)[0, 1]) < 0.04
    assert [line.split()[0] for line in printed.splitlines()] == ["data", "samples"]


@pytest.mark.parametrize("interval", [(400.0, 600.0), (300.0, 550.0)])
def test_the_draw_of_the_guide_has_the_density_that_it_returns(interval):
    """Draws divided by their density integrate 1 and exp(log SNR) over the path's log SNRs."""
    (text,) = [each.text for each in blocks(ROOT / "docs/guides/extending.md") if "def laplace(" in each.text]
    exec(text, namespace := {})
    path = schedules.path(lambda time: 8 - 0.016 * time, lambda log_snr: (8 - log_snr) / 0.016, interval=interval)
    time, log_density = namespace["laplace"](jax.random.key(0), 20_000, path)
    log_snr, weight = np.asarray(8 - 0.016 * time, np.float64), np.exp(-np.asarray(log_density, np.float64))
    high, low = (8 - 0.016 * end for end in interval)
    assert low - 1e-5 <= log_snr.min() and log_snr.max() <= high + 1e-5  # float32 times
    for values, exact in ((weight, high - low), (weight * np.exp(log_snr), np.exp(high) - np.exp(low))):
        assert abs(values.mean() - exact) < 4 * values.std() / np.sqrt(values.size)


def test_the_story_fits_a_phone():
    """47 characters are the width of a code block in a window of 390 pixels (docs/_static/site.css)."""
    for block in blocks(ROOT / "docs" / "concepts" / "ddpm.md"):
        if block.kind in ("python", "output"):
            assert max(len(line) for line in block.text.splitlines()) <= 47, block.line


@functools.cache
def benchmark_objectives():
    """The settings of `diffusion` that benchmarks/compare_objectives.py compares; importing the file would add a path."""
    nodes = ast.parse((ROOT / "benchmarks" / "compare_objectives.py").read_text()).body
    wanted = [
        n for n in nodes if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) in ("EDM", "FLOW", "OBJECTIVES")
    ]
    exec(compile(ast.Module(wanted, []), "compare_objectives.py", "exec"), namespace := {})
    return namespace["OBJECTIVES"]


@pytest.mark.parametrize(
    "name, experiment, objective, num_steps, sampling",
    [
        ("images", "digits", "v", 1500, ("dpm_solver_pp", 20, "trailing", 1000)),
        ("series", "series", None, 3000, ("dpm_solver_pp", 50, "log_snr", 1000)),
        ("vectors", "vectors", "v", 8000, ("dpm_solver_pp", 50, "log_snr", 4000)),
        ("likelihood", "digits", "edm", 1500, None),
        ("classes", "digits_conditional", None, 3000, ("dpm_solver_pp", 50, "log_snr", 500)),
        ("few", "digits", None, 7000, ("ddpm", 250, None, 512)),
    ],
)
def test_commands_to_choose_from_do_what_was_measured(name, experiment, objective, num_steps, sampling, tmp_path):
    """Numbers are from docs/results (objectives, known_distributions, benchmarks) and docs/guides/conditional.md."""
    text = "".join(block.text for block in blocks(ROOT / "docs/guides/choosing.md") if block.kind == "sh")
    found = [shlex.split(COMMAND.sub("", each)) for each in commands(text) if f"--workdir=runs/{name} " in f"{each} "]
    train, *sample = ([word.replace("runs/", f"{tmp_path}/") for word in words] for words in found)
    expected = config.experiment(experiment)
    expected.diffusion.update(benchmark_objectives()[objective] if objective else {})
    expected.training.num_steps = num_steps
    trained = cli.parse(train).config
    assert config.flatten(trained) == config.flatten(config.resolve(expected))
    workdir.write_config(trained, tmp_path / name)
    drawn = [cli.parse(words).config.sampling for words in sample]
    wanted = [sampling] if sampling else []
    assert [(each.sampler, each.steps, each.spacing, each.num_samples) for each in drawn] == wanted


@pytest.fixture(scope="module")
def placeholders(tmp_path_factory):
    """A work directory that holds a config, and weights in a diffusers folder."""
    folder = tmp_path_factory.mktemp("documents")
    run = folder / "run"
    run.mkdir()
    workdir.write_config(configs.digits.get_config(), run)
    weights, arrays = published_files.stored("unet_ddpm_cifar10_narrow")
    published_files.write_folder(folder / "weights", json.loads(str(arrays["config"])), weights)
    return {"workdir": str(run), "pretrained": str(folder / "weights")}


def arguments(command, placeholders, empty):
    """A command's arguments, with a value for every placeholder."""
    words = shlex.split(COMMAND.sub("", command), comments=True)
    given = {word.partition("=")[0] for word in words}
    replaced = []
    for word in words:
        if word == "...":
            replaced += ["--config=digits", f"--workdir={empty}"]
            continue
        flag, equals, value = word.partition("=")
        if flag == "--workdir":
            value = placeholders["workdir"] if not given & {"--config", "--pretrained"} else str(empty)
        if flag == "--pretrained":
            value = placeholders["pretrained"]
        if flag == "--config" and value in ("NAME", "configs/NAME.py"):
            value = "digits"
        if re.search(r"\$\{?\w+", value):
            value = re.sub(r"\$(\w+|\{[^}]*\}|\([^)]*\))", "1", value)
        replaced.append(flag + equals + value)
    return replaced


@pytest.mark.parametrize("page", WITH_SHELL, ids=name)
def test_the_command_line_parses_shell_blocks(page, placeholders, tmp_path):
    for block in blocks(page):
        if block.kind != "sh":
            continue
        for command in commands(block.text):
            try:
                words = arguments(command, placeholders, tmp_path)
                if words[0] in cli.COMMANDS:
                    parse_subcommand(words)
                    continue
                parsed = cli.parse(words)
                cli.check_mode(parsed.mode, parsed.config)
                assert parsed.mode != "train" or not plan.notes(parsed.config)
            except Exception as error:
                raise AssertionError(f"{page}, block of line {block.line}: {command}\n{error}") from error
