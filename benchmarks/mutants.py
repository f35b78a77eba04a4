"""Measures how many small errors in the package the tests notice, and writes the result to docs/results/reliability.md.

    make mutants [MUTANTS="--core=40 --elsewhere=40 --seed=0"]

`--core` places in the core and `--elsewhere` places in all other files are drawn at random. At each place, a cosmic-ray
operator makes a mutant: another arithmetic operator or comparison, a number changed by one, a negated condition, a loop
without iterations, or a removed decorator. Each mutant runs in a fresh process against the tests for the changed file until
the first failure: first tests in `make test`, then the remaining tests in `make test-all`. A mutant is killed if a test
fails or the tests do not end within the time limit. Mutants are written to a copy of the checkout `--root`. Results are
stored in `--output`, so the same command resumes an interrupted measurement.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import pathlib
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib

from scipy.stats import binomtest

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.mutant_drawing import PACKAGE, Mutant, draw

MEMORY = 8 * 2**30  # limit of each process, in bytes: a mutant can allocate any amount
NO_TESTS = 5  # pytest's exit status if the marks select no test
_APART = "not slow and not parity and not faults and not browser and not tpu"
QUICK = f"not whole and not thorough and {_APART}"  # `make test`
OTHERS = f"(whole or thorough) and {_APART}"  # the rest of `make test-all`
BEGIN, END = "<!-- make mutants: begin -->", "<!-- make mutants: end -->"

# The tests for a file or folder, below tests/, the most likely to fail first. All other folders use tests/FOLDER.
CORE = {
    "arrays.py": ("core/test_dtypes.py", "core/test_refusals.py"),
    "denoiser.py": (
        "core/test_denoiser.py",
        "core/test_process.py",
        "core/test_refusals.py",
        "core/test_dtypes.py",
        "core/test_guidance.py",
        "sampling/test_consistency.py",
    ),
    "process.py": ("core/test_process.py", "core/test_refusals.py", "core/test_dtypes.py", "sampling"),
    "schedules": (
        "core/test_schedules.py",
        "core/test_paths.py",
        "core/test_process.py",
        "core/test_refusals.py",
        "core/test_path_bounds.py",
        "core/test_coordinates.py",
        "core/test_timesteps.py",
        "core/test_denoiser.py",
        "core/test_losses.py",
        "sampling/test_solvers.py",
    ),
    "sampling": ("sampling", "core/test_refusals.py"),
    "losses.py": (
        "core/test_losses.py",
        "core/test_path_bounds.py",
        "core/test_coordinates.py",
        "core/test_paths.py",
        "core/test_refusals.py",
        "core/test_dtypes.py",
        "models/test_classifier.py",
    ),
    "likelihood.py": (
        "core/test_decoder.py",
        "core/test_likelihood.py",
        "core/test_path_bounds.py",
        "core/test_data_range.py",
        "core/test_refusals.py",
    ),
    "guidance.py": ("core/test_guidance.py", "core/test_refusals.py"),
    "coordinates.py": ("core/test_coordinates.py", "core/test_losses.py", "runs/test_path_runs.py"),
    "timesteps.py": ("core/test_timesteps.py", "core/test_refusals.py", "core/test_losses.py", "core/test_paths.py"),
    "draws.py": ("core/test_timesteps.py", "core/test_losses.py", "core/test_path_bounds.py"),
    "measurements.py": ("core/test_measurements.py", "core/test_posterior.py", "core/test_editing.py"),
    "covariances.py": ("core/test_covariances.py",),
    "posterior.py": ("core/test_posterior.py", "core/test_covariances.py"),
    "labels.py": ("core/test_losses.py", "core/test_guidance.py", "core/test_refusals.py"),
    "editing.py": ("core/test_editing.py", "core/test_refusals.py"),
    "training/step.py": ("training", "models/test_upsampling.py"),
}
ELSEWHERE = {
    "__init__.py": ("test_package.py",),
    "cli.py": ("runs",),
    "config": ("config", "test_installation.py", "runs/test_bad_configs.py", "runs/test_strangers.py"),
    "console.py": ("test_console.py",),
    "data": ("data", "examples"),
    "distributed": ("distributed", "training/test_saves.py"),
    "errors.py": ("runs", "config", "test_installation.py"),
    "evaluation": ("evaluation", "metrics"),
    "files.py": ("test_files.py", "runs"),
    "functions.py": ("models/test_custom.py", "training/test_own_functions.py", "config", "test_installation.py"),
    "images.py": ("core/test_data_range.py", "data", "pictures"),
    "metrics": ("metrics", "evaluation"),
    "models": ("models", "examples"),
    "provenance.py": ("runs",),
    "run_dir.py": ("storage", "runs/test_train.py"),
    "runs/edit.py": ("runs/test_edit.py", "runs/test_edit_arrays.py"),
    "runs/evaluate.py": ("runs/test_sample_metrics.py", "runs/test_evaluate_arrays.py", "runs/test_evaluate.py"),
    "runs/likelihood.py": ("runs/test_evaluate.py", "runs/test_evaluate_arrays.py"),
    "runs/logging.py": ("runs/test_logging.py", "runs/test_goodput.py"),
    "runs/plan.py": ("runs/test_plan.py", "runs/test_path_runs.py"),
    "runs/sample.py": ("runs/test_sample.py", "runs/test_sample_keys.py"),
    "runs/sampling_setup.py": ("runs/test_sampling_setup.py", "runs/test_sampler_config.py", "runs/test_sample.py"),
    "runs/train.py": (
        "runs/test_train.py",
        "runs/test_steps_in_flight.py",
        "runs/test_sample_metrics.py",
        "runs/test_goodput.py",
    ),
    "runs/workdir.py": (
        "runs/test_train.py",
        "runs/test_arrays.py",
        "runs/test_light_refusals.py",
        "models/test_custom.py",
    ),
    "pretrained/model.py": ("pretrained", "runs/test_path_runs.py", "runs/test_sample.py"),
    "training/from_config.py": ("training", "runs/test_path_runs.py"),
    "types.py": ("core/test_types.py",),
    "untrusted.py": ("test_untrusted.py", "runs/test_strangers.py"),
}


def tests_of(file: str, root: pathlib.Path) -> tuple[str, ...]:
    """Returns the tests for a file in the package, as paths below `root`. Raises: SystemExit if a test is missing."""
    table, folder = CORE | ELSEWHERE, file.partition("/")[0]
    tests = tuple(f"tests/{test}" for test in table.get(file) or table.get(folder) or (folder,))
    missing = [test for test in tests if not (root / test).exists()]
    if missing:
        raise SystemExit(f"error: {file}: no {', '.join(missing)}; correct the table of tests in {__file__}")
    return tests


def package_files(root: pathlib.Path) -> tuple[list[str], list[str]]:
    """Returns (core files, all other files) as paths in the package. Raises: SystemExit for a file without tests."""
    files = sorted(path.relative_to(root / PACKAGE).as_posix() for path in (root / PACKAGE).rglob("*.py"))
    for name in CORE:
        if not any(file == name or file.startswith(f"{name}/") for file in files):
            raise SystemExit(f"error: no {PACKAGE}/{name}; correct the table of tests in {__file__}")
    core = [file for file in files if file in CORE or file.partition("/")[0] in CORE]
    for file in files:
        tests_of(file, root)
    return core, [file for file in files if file not in core]


def commit_of(root: pathlib.Path) -> str:
    """Returns the commit of a checkout, with "+" if files differ from the commit."""
    command = ["git", "describe", "--always", "--dirty=+", "--exclude=*", "--abbrev=8"]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout.strip()


def copy_tree(root: pathlib.Path, target: pathlib.Path) -> None:
    """Copies a checkout without ignored files. Raises: SystemExit if the copy's tests would import another package."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout
    for name in filter(None, names.split("\0")):
        if (root / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, target / name)
    code = f"import {PACKAGE}; print({PACKAGE}.__file__)"
    variables = os.environ | {"PYTHONPATH": str(target)}
    done = subprocess.run([sys.executable, "-c", code], cwd=target, env=variables, capture_output=True, text=True)
    if not done.stdout.startswith(str(target)):
        raise SystemExit(f"error: the tests would not import the mutated package: {done.stdout}{done.stderr}")


def run_tests(tree: pathlib.Path, tests: tuple[str, ...], marks: str, limit: float) -> tuple[str, str, float]:
    """Runs tests in a copy of a checkout. Returns: ("passed", "failed" or "timeout"; last lines of the output; seconds)."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=line", "-p", "no:cacheprovider", "-m", marks, *tests]
    folders = {"JAX_COMPILATION_CACHE_DIR": "compiled", "XDG_CACHE_HOME": "cache", "TMPDIR": "tmp"}
    variables = os.environ | {name: f"{tree.parent}/{folder}" for name, folder in folders.items()}
    variables |= {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    (tree.parent / "tmp").mkdir(exist_ok=True)
    start = time.monotonic()
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            command,
            cwd=tree,
            env=variables,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY)),
        )
        try:
            outcome = "passed" if process.wait(timeout=limit) in (0, NO_TESTS) else "failed"
        except subprocess.TimeoutExpired:
            outcome = "timeout"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            shutil.rmtree(tree.parent / "tmp", ignore_errors=True)
        output.seek(0)
        return outcome, "\n".join(output.read().splitlines()[-15:]), time.monotonic() - start


def run_all(mutants: list[Mutant], root: pathlib.Path, output: pathlib.Path) -> dict[Mutant, str]:
    """Returns the outcome of each mutant, from `output` if present; otherwise runs the tests and adds the outcome.

    Lines with an empty diff are test runs without a mutant. Raises: SystemExit if tests without a mutant fail.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in output.read_text().splitlines()] if output.exists() else []
    stored = {(tuple(row["tests"]), row["diff"], row.get("marks", QUICK)): row for row in rows}
    with tempfile.TemporaryDirectory(prefix="mutants") as temporary:
        tree = pathlib.Path(temporary) / "tree"
        copy_tree(root, tree)

        def run(title: str, tests: tuple[str, ...], diff: str, marks: str, limit: float) -> dict:
            if (tests, diff, marks) not in stored:
                outcome, text, seconds = run_tests(tree, tests, marks, limit)
                if not diff and outcome != "passed":
                    raise SystemExit(f"error: {' '.join(tests)}: {outcome} without any mutant\n{text}")
                row = {
                    "title": title,
                    "tests": tests,
                    "diff": diff,
                    "marks": marks,
                    "outcome": outcome,
                    "seconds": seconds,
                    "output": text,
                }
                print(f"{title}, {marks}: {outcome}, {seconds:.0f} s", flush=True)
                with output.open("a") as lines:
                    lines.write(json.dumps(row) + "\n")
                stored[tests, diff, marks] = row
            return stored[tests, diff, marks]

        outcomes = {}
        for index, mutant in enumerate(mutants, 1):
            tests, path = tests_of(mutant.file, root), tree / PACKAGE / mutant.file
            title = f"[{index}/{len(mutants)}] {mutant.file}, {mutant.name}"
            for marks in (QUICK, OTHERS):
                limit = 60 + 3 * run(f"{' '.join(tests)} without a mutant", tests, "", marks, 3600)["seconds"]
                path.write_text(mutant.source)
                outcomes[mutant] = run(title, tests, mutant.diff, marks, limit)["outcome"]
                shutil.copy2(root / PACKAGE / mutant.file, path)
                if outcomes[mutant] != "passed":
                    break
    return outcomes


def read_reasons(
    path: pathlib.Path = ROOT / "benchmarks" / "equivalent_mutants.toml",
) -> dict[tuple[str, str, str], str]:
    """Reads {(file, removed lines, added lines): why no test can detect the mutant}."""
    entries = tomllib.loads(path.read_text()).get("mutant", [])
    return {(entry["file"], entry["removed"], entry["added"]): entry["why"] for entry in entries}


def equivalence_reason(mutant: Mutant, reasons: dict[tuple[str, str, str], str]) -> str | None:
    """Returns why no test can detect a mutant; None without a recorded reason."""
    lines = mutant.diff.splitlines()[2:]
    removed, added = ("\n".join(line[1:].strip() for line in lines if line.startswith(sign)) for sign in "-+")
    return reasons.get((mutant.file, removed, added))


def table_row(title: str, num_places: int, outcomes: list[str], num_equivalent: int) -> str:
    """Returns a table row: counts, and the share of killed mutants with its confidence interval."""
    killed, counted = len(outcomes) - outcomes.count("passed"), len(outcomes) - num_equivalent
    low, high = binomtest(killed, counted).proportion_ci(0.95, "exact") if counted else (0.0, 1.0)
    share = f"{killed / counted:.1%}" if counted else ""
    counts = f"{num_places} | {len(outcomes)} | {killed} | {outcomes.count('timeout')} | {num_equivalent}"
    return f"| {title} | {counts} | {share} | {low:.1%} to {high:.1%} |"


def write_report(page: pathlib.Path, commit: str, rows: list[str], survivors: list[str]) -> None:
    """Writes rows and survivors between the markers of a page; rows of other commits are kept."""
    before, _, rest = page.read_text().partition(BEGIN)
    old, _, after = rest.partition(END)
    kept = [line for line in old.splitlines() if line.startswith("| 2") and f", {commit}, " not in line]
    lines = [
        "The interval is Clopper and Pearson's, 95%. No test can detect an equivalent mutant.",
        "",
        "| date, commit, seed | places | drawn | killed | by the time limit | equivalent | killed of the rest | interval |",
        "|---|---|---|---|---|---|---|---|",
        *kept,
        *rows,
        "",
        f"Survivors at {commit}: {len(survivors) or 'none'}.",
        *survivors,
    ]
    page.write_text("\n".join([before + BEGIN, *lines, END]) + after)


def main() -> None:
    """Draws the mutants, runs mutants without a result, and writes the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--core", type=int, default=40, help="mutants of the core (40)")
    parser.add_argument("--elsewhere", type=int, default=40, help="mutants of all other files (40)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--since", metavar="COMMIT", help="mutate only lines that were added or changed since a commit")
    parser.add_argument("--root", type=pathlib.Path, default=ROOT, help="checkout to measure, by default this checkout")
    parser.add_argument("--output", type=pathlib.Path, help="stored results (runs/mutants/COMMIT.jsonl)")
    parser.add_argument(
        "--report", type=pathlib.Path, default=ROOT / "docs" / "results" / "reliability.md", metavar="PAGE"
    )
    parser.add_argument("--list", action="store_true", help="print the mutants' diffs and run nothing")
    options = parser.parse_args()
    root, commit, reasons = options.root.resolve(), commit_of(options.root), read_reasons()
    areas = {}
    for area, files in zip(("core", "elsewhere"), package_files(root), strict=True):
        areas[area] = draw(files, getattr(options, area), options.seed, root, options.since)
    mutants = [mutant for drawn, _ in areas.values() for mutant in drawn]
    if options.list:
        print("\n\n".join(mutant.diff for mutant in mutants))
        return
    outcomes = run_all(mutants, root, options.output or ROOT / "runs" / "mutants" / f"{commit}.jsonl")
    rows, survivors = [], []
    for area, (drawn, num_places) in areas.items():
        alive = [mutant for mutant in drawn if outcomes[mutant] == "passed"]
        why = [equivalence_reason(mutant, reasons) for mutant in alive]
        title = f"{datetime.date.today()}, {commit}, {options.seed}: {area}"
        title += f", lines since {options.since}" if options.since else ""
        rows.append(table_row(title, num_places, [outcomes[mutant] for mutant in drawn], len(list(filter(None, why)))))
        for mutant, reason in zip(alive, why, strict=True):
            survivors += ["", "```diff", mutant.diff, "```", *([f"Equivalent: {reason}"] if reason else [])]
    write_report(options.report, commit, rows, survivors)
    print("\n".join(rows))


if __name__ == "__main__":
    main()
