"""Measures how many small errors in the core the tests notice, and writes the result to docs/results/reliability.md.

    make mutants [MUTANTS="--count=40 --files=losses,sampling/driver --jobs=2"]

For each file of TESTS, `--count` places in its code are drawn at random (`--seed`). At each place one operator of
cosmic-ray makes a mutant: another arithmetic operator or comparison, a number that is one more or less, a condition
negated, a loop without iterations, a decorator removed. Each mutant runs in a fresh process against the file's own tests,
up to the first failure. A mutant is killed if a test fails or the tests do not end within the time limit. The work tree is
never changed: mutants are written to a copy of it. Results are stored in `--output`, so the same command resumes an
interrupted run.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import hashlib
import os
import pathlib
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from benchmarks.mutant_drawing import PACKAGE, ROOT, Mutant, draw, places
from benchmarks.mutant_records import Results, read_reasons, report, write_report

MEMORY = 8 * 2**30  # limit of each process, in bytes: a mutant can allocate any amount

# Each file's own tests, in the order in which they run: those most likely to fail first.
_REFUSALS, _SAMPLING = "test_refusals.py", "sampling/test_sampling.py"
_PROCESS = ("test_process.py", _REFUSALS, _SAMPLING)
_STEPS, _VALUES = "sampling/test_sampler_steps.py", "sampling/test_sampler_values.py"
_ORDERS = (
    "sampling/test_solvers.py",
    "sampling/test_stochastic_samplers.py",
    "sampling/test_published_numbers.py",
    "sampling/test_inversion.py",
)
_SAMPLERS = (_VALUES, _SAMPLING, _STEPS, *_ORDERS)
_SOLVERS = (_STEPS, *_ORDERS, _VALUES, _SAMPLING)
TESTS = {
    "process/arrays": _PROCESS,
    "process/forward": _PROCESS,
    "process/predictions": _PROCESS,
    "process/reverse": _PROCESS,
    "schedules/beta_schedules": ("test_schedules.py", _REFUSALS),
    "schedules/respacing": ("test_schedules.py", _REFUSALS),
    "schedules/schedule": ("test_schedules.py", _REFUSALS),
    "losses": (
        "test_losses.py",
        _REFUSALS,
        "test_dtypes.py",
        "models/test_classifier.py::test_classify_is_the_cross_entropy_at_x_t",
    ),
    "likelihood": ("test_decoder.py", "test_likelihood.py", _REFUSALS, "test_dtypes.py"),
    "guidance": ("test_guidance.py", _REFUSALS),
    "timesteps": ("test_timesteps.py", _REFUSALS, "test_losses.py"),
    "labels": ("test_losses.py", "test_guidance.py", _REFUSALS),
    "editing": ("test_editing.py", _REFUSALS),
    "sampling/ancestral": _SAMPLERS,
    "sampling/driver": _SAMPLERS,
    "sampling/exponential": _SOLVERS,
    "sampling/inversion": _SOLVERS,
    "sampling/noise_levels": _SOLVERS,
    "sampling/runge_kutta": _SOLVERS,
    "sampling/spacing": ("sampling/test_spacing.py",),
    "training/step": ("training/test_train_step.py", "training/test_training.py", "models/test_upsampling.py"),
}


def copy_tree(target: pathlib.Path, root: pathlib.Path = ROOT) -> None:
    """Copies the work tree without the files that git ignores."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout
    for name in filter(None, names.split("\0")):
        if (root / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, target / name)


def run_tests(tree: pathlib.Path, tests: tuple[str, ...], limit: float, cache: pathlib.Path) -> tuple[str, str, float]:
    """("passed", "failed" or "timeout", the last lines of the output, seconds) of the tests in a copy of the tree."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=line", "-p", "no:cacheprovider"]
    command += [f"tests/{test}" for test in tests]
    variables = os.environ | {
        "PYTHONPATH": str(tree),
        "PYTHONDONTWRITEBYTECODE": "1",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
    }
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
            outcome = "failed" if process.wait(timeout=limit) else "passed"
        except subprocess.TimeoutExpired:
            outcome = "timeout"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        output.seek(0)
        return outcome, "\n".join(output.read().splitlines()[-15:]), time.monotonic() - start


def digest_of_tests(file: str, root: pathlib.Path = ROOT) -> str:
    """A digest of the file's tests: it changes with a new test, and then survivors are run again."""
    digest = hashlib.sha256()
    for name in ("conftest.py", *TESTS[file]):
        digest.update((root / "tests" / name.partition("::")[0]).read_bytes())
    return digest.hexdigest()[:12]


def duration(seconds: float) -> str:
    """Seconds as text: 1 h 05 min, or 40 s."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min"


def prepare(tree: pathlib.Path, cache: pathlib.Path) -> None:
    """Copies the work tree. Raises: SystemExit if its tests would not import the package of the copy."""
    copy_tree(tree)
    code = f"import {PACKAGE}; print({PACKAGE}.__file__)"
    variables = os.environ | {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tree, env=variables, capture_output=True, text=True)
    if not done.stdout.startswith(str(tree)):
        raise SystemExit(f"error: the tests would not import the mutated package: {done.stdout}{done.stderr}")


def run_all(pending: list[Mutant], results: Results, digests: dict, jobs: int, work: pathlib.Path) -> None:
    """Runs the mutants and records each under its digest. Raises: SystemExit if tests fail without any mutant."""
    cache = work / "cache"
    trees = [work / f"tree{i}" for i in range(jobs)]
    for tree in trees:
        prepare(tree, cache)
    print(f"{len(pending)} mutants to run", flush=True)
    limits, lock, free = {}, threading.Lock(), list(trees)
    start, done = time.monotonic(), 0

    def time_limit(tests, tree) -> float:
        """The time limit in seconds, from a run without a mutant, which also fills the compilation cache."""
        with lock:
            if tests not in limits:
                outcome, output, seconds = run_tests(tree, tests, 3600, cache)
                if outcome != "passed":
                    raise SystemExit(f"error: {', '.join(tests)}: {outcome} without any mutant\n{output}")
                limits[tests] = 60 + 4 * seconds
                print(f"{', '.join(tests)}: {seconds:.0f} s without a mutant", flush=True)
            return limits[tests]

    def run_mutant(mutant: Mutant):
        tree, tests = free.pop(), TESTS[mutant.file]
        path = tree / PACKAGE / f"{mutant.file}.py"
        original = path.read_text()
        try:
            limit = time_limit(tests, tree)
            path.write_text(mutant.source)
            return mutant, run_tests(tree, tests, limit, cache)
        finally:
            path.write_text(original)
            free.append(tree)

    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(run_mutant, mutant) for mutant in pending]
        try:
            for future in concurrent.futures.as_completed(futures):
                mutant, (outcome, output, seconds) = future.result()
                results.add(mutant, digests[mutant.file], outcome, output, seconds)
                done += 1
                left = (time.monotonic() - start) / done * (len(pending) - done)
                verdict = {"passed": "SURVIVED", "failed": "killed", "timeout": "killed by the time limit"}[outcome]
                print(
                    f"[{done}/{len(pending)}] {mutant.file}, {mutant.name}: {verdict}, {seconds:.0f} s; "
                    f"about {duration(left)} left",
                    flush=True,
                )
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            print("Stopping after the mutants that are running. Rerun the same command to resume.", flush=True)
            raise


def main() -> None:
    """Draws the mutants, runs those without a result and writes the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=40, help="mutants of each file (40)")
    parser.add_argument(
        "--files", default=",".join(TESTS), help="modules of the package, comma-separated (losses,sampling/driver)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, help="mutants at a time (1)")
    parser.add_argument("--output", type=pathlib.Path, default=ROOT / "runs" / "mutants.jsonl", help="stored results")
    parser.add_argument(
        "--report",
        type=pathlib.Path,
        default=ROOT / "docs" / "results" / "reliability.md",
        help="the page that gets the report",
    )
    parser.add_argument(
        "--keep_killed", action="store_true", help="do not run killed mutants again; valid if tests were only added"
    )
    parser.add_argument("--list", action="store_true", help="print the mutants' diffs and run nothing")
    options = parser.parse_args()
    files = options.files.split(",")
    unknown = [file for file in files if file not in TESTS]
    if unknown:
        parser.error(f"--files={','.join(unknown)} is unknown; known: {', '.join(TESTS)}")
    mutants = [mutant for file in files for mutant in draw(file, options.count, options.seed)]
    if options.list:
        print("\n\n".join(mutant.diff for mutant in mutants))
        return
    options.output.parent.mkdir(parents=True, exist_ok=True)
    results, digests = Results(options.output), {file: digest_of_tests(file) for file in files}

    def stored_row(mutant: Mutant) -> dict | None:
        return results.find(mutant, digests[mutant.file], options.keep_killed)

    pending = [mutant for mutant in mutants if stored_row(mutant) is None]
    if pending:
        with tempfile.TemporaryDirectory(prefix="mutants") as work:
            run_all(pending, results, digests, options.jobs, pathlib.Path(work))
    rows = [stored_row(mutant) for mutant in mutants]
    num_places = {file: len(places((ROOT / PACKAGE / f"{file}.py").read_text())) for file in files}
    text = report(rows, num_places, options.seed, read_reasons())
    write_report(text, options.report)
    print(text)


if __name__ == "__main__":
    main()
