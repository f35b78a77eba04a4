"""Measures how many small errors in the core the tests notice, and writes the result to docs/reliability.md.

    make mutants [MUTANTS="--count=40 --files=losses,sampling/driver --jobs=2"]

For each file of TESTS, `--count` places in its code are drawn at random (`--seed`). At each place one operator of
cosmic-ray makes a mutant: another arithmetic operator or comparison, a number that is one more or less, a condition
negated, a loop without iterations, a decorator removed. Each mutant runs in a fresh process against the file's own tests,
up to the first failure. A mutant is killed if a test fails or the tests do not end within the time limit. The work tree is
never changed: mutants are written to a copy of it. Results are kept in `--output`, so the same command resumes an
interrupted run.
"""

from __future__ import annotations

import argparse
import ast
import concurrent.futures
import difflib
import json
import os
import pathlib
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from typing import NamedTuple

from scipy.stats import binomtest

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGE = "diffusion_jax"
BEGIN, END = "<!-- make mutants: begin -->", "<!-- make mutants: end -->"
MEMORY = 8 * 2**30  # bytes for each process: a mutant can ask for any amount

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
        "models/test_classifier.py::test_the_loss_is_the_cross_entropy_at_x_t",
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


class Mutant(NamedTuple):
    """One change of one file. name: unique and stable while the file stays as it is."""

    file: str
    name: str
    source: str
    diff: str


def annotations(source: str) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """(begin, end) of every type annotation, as (line, column): they are never evaluated, so no test can see them."""
    found = []
    for node in ast.walk(ast.parse(source)):
        of_class = isinstance(node, ast.ClassDef)
        for name in ("annotation", "returns"):
            inner = getattr(node, name, None)
            if inner is not None and not of_class:
                found.append(((inner.lineno, inner.col_offset), (inner.end_lineno, inner.end_col_offset)))
    return found


def places(source: str) -> dict[tuple[int, int], list[tuple[str, int]]]:
    """{position: [(operator, its occurrence in the file)]} of cosmic-ray's mutations of a source.

    Left out are annotations, and bit operators in place of arithmetic ones and the reverse, which are type errors.
    """
    from cosmic_ray import plugins
    from cosmic_ray.ast import ast_nodes, get_ast

    skipped, found = annotations(source), {}
    nodes = list(ast_nodes(get_ast(source)))
    for operator in plugins.operator_names():
        kind = plugins.get_operator(operator)
        if kind.arguments() or _changes_kind(operator.rpartition("/")[2]):
            continue
        made = (begin for node in nodes for begin, _ in kind().mutation_positions(node))
        for occurrence, begin in enumerate(made):
            if not any(first <= begin < last for first, last in skipped):
                found.setdefault(begin, []).append((operator, occurrence))
    return found


def _changes_kind(name: str) -> bool:
    """Whether a replacement of a binary operator is between arithmetic and bits."""
    words = name.removeprefix("ReplaceBinaryOperator_").split("_")
    bits = {"RShift", "LShift", "BitOr", "BitAnd", "BitXor"}
    return len(words) == 2 and (words[0] in bits) != (words[1] in bits)


def draw(file: str, count: int, seed: int, root: pathlib.Path = ROOT) -> list[Mutant]:
    """`count` mutants of a file at different places, or as many as it has. A larger count begins with the same ones."""
    from cosmic_ray import plugins
    from cosmic_ray.mutating import mutate_code

    path = f"{PACKAGE}/{file}.py"
    source = (root / path).read_text()
    rng, found = random.Random(f"{seed} {file}"), places(source)
    order, mutants = sorted(found), []
    rng.shuffle(order)
    for position in order:
        operator, occurrence = rng.choice(found[position])
        if len(mutants) == count:
            break
        mutated = mutate_code(source, plugins.get_operator(operator)(), occurrence)
        try:
            same = mutated is None or ast.dump(ast.parse(mutated)) == ast.dump(ast.parse(source))
        except SyntaxError:
            continue
        if same:
            continue
        lines = difflib.unified_diff(source.splitlines(), mutated.splitlines(), f"a/{path}", f"b/{path}", "", "", 1, "")
        mutants.append(Mutant(file, f"{operator.rpartition('/')[2]} {occurrence}", mutated, "\n".join(lines)))
    return mutants


def copy_tree(target: pathlib.Path, root: pathlib.Path = ROOT) -> None:
    """A copy of the work tree without what git ignores."""
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
    began = time.monotonic()
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
        return outcome, "\n".join(output.read().splitlines()[-15:]), time.monotonic() - began


class Results:
    """One JSON line for each mutant that has run; those of another source of the file or of other tests are not used."""

    def __init__(self, path: pathlib.Path):
        self.path, self.rows = path, {}
        if path.exists():
            for line in path.read_text().splitlines():
                row = json.loads(line)
                self.rows[row["file"], row["diff"], row["tests"]] = row

    def of(self, mutant: Mutant, tests: str, keep_killed: bool = False) -> dict | None:
        """What is kept of a mutant under these tests; with `keep_killed` also that other tests killed it."""
        found = self.rows.get((mutant.file, mutant.diff, tests))
        if found is None and keep_killed:
            earlier = (row for row in self.rows.values() if (row["file"], row["diff"]) == (mutant.file, mutant.diff))
            found = next((row for row in earlier if row["outcome"] != "passed"), None)
        return found

    def add(self, mutant: Mutant, tests: str, outcome: str, output: str, seconds: float) -> None:
        row = {"file": mutant.file, "name": mutant.name, "diff": mutant.diff, "tests": tests, "outcome": outcome}
        row |= {"output": output if outcome == "passed" else output[-500:], "seconds": round(seconds, 1)}
        self.rows[mutant.file, mutant.diff, tests] = row
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")


def digest_of_tests(file: str, root: pathlib.Path = ROOT) -> str:
    """Changes with the file's tests: a survivor is run again after a new test."""
    import hashlib

    found = hashlib.sha256()
    for name in ("conftest.py", *TESTS[file]):
        found.update((root / "tests" / name.partition("::")[0]).read_bytes())
    return found.hexdigest()[:12]


class Reason(NamedTuple):
    """Why no test can see a mutant: an entry of equivalent_mutants.toml, by the lines that it removes and adds."""

    file: str
    removed: str
    added: str
    why: str


def reasons(path: pathlib.Path = ROOT / "benchmarks" / "equivalent_mutants.toml") -> list[Reason]:
    """The entries of the file."""
    import tomllib

    return [Reason(**entry) for entry in tomllib.loads(path.read_text()).get("mutant", [])]


def why_equivalent(row: dict, known: list[Reason]) -> str | None:
    """The reason on record for a survivor; None where there is none."""
    lines = row["diff"].splitlines()[2:]
    removed, added = ("\n".join(line[1:].strip() for line in lines if line.startswith(sign)) for sign in "-+")
    return next((one.why for one in known if (one.file, one.removed, one.added) == (row["file"], removed, added)), None)


def report(rows: list[dict], sites: dict[str, int], seed: int, known: list[Reason]) -> str:
    """The section of docs/reliability.md, between its markers."""
    lines = [
        f"Seed {seed}; the interval is Clopper and Pearson's, 95%. An equivalent mutant is one that no test can see.",
        "",
        "| file | places | drawn | killed | of them by the time limit | equivalent | killed of the others | interval |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for file in [*dict.fromkeys(row["file"] for row in rows), "all"]:
        own = [row for row in rows if file in ("all", row["file"])]
        killed = sum(row["outcome"] != "passed" for row in own)
        late = sum(row["outcome"] == "timeout" for row in own)
        equal = sum(row["outcome"] == "passed" and why_equivalent(row, known) is not None for row in own)
        counted = len(own) - equal
        low, high = binomtest(killed, counted).proportion_ci(0.95, "exact") if counted else (0.0, 1.0)
        total = sum(sites.values()) if file == "all" else sites[file]
        share = f"{killed / counted:.1%}" if counted else ""
        lines.append(
            f"| {file} | {total} | {len(own)} | {killed} | {late} | {equal} | {share} | {low:.1%} to {high:.1%} |"
        )
    survivors = [row for row in rows if row["outcome"] == "passed"]
    lines += ["", f"Survivors: {len(survivors) or 'none'}."]
    for row in survivors:
        why = why_equivalent(row, known)
        lines += ["", "```diff", row["diff"], "```", *([f"Equivalent: {why}"] if why else [])]
    return "\n".join(lines)


def write_report(text: str, path: pathlib.Path) -> None:
    """Replaces what stands between the markers, or adds both at the end of the page."""
    page = path.read_text()
    if BEGIN not in page:
        page = f"{page.rstrip()}\n\n## Mutants\n\n{BEGIN}\n{END}\n"
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    path.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")


def duration(seconds: float) -> str:
    """As 1 h 05 min, or 40 s."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min"


def prepare(tree: pathlib.Path, cache: pathlib.Path) -> None:
    """A copy of the work tree, whose package is the one that its tests import. Raises: SystemExit."""
    copy_tree(tree)
    code = f"import {PACKAGE}; print({PACKAGE}.__file__)"
    variables = os.environ | {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    found = subprocess.run([sys.executable, "-c", code], cwd=tree, env=variables, capture_output=True, text=True)
    if not found.stdout.startswith(str(tree)):
        raise SystemExit(f"error: the tests would not import the mutated package: {found.stdout}{found.stderr}")


def run_all(pending: list[Mutant], results: Results, digests: dict, jobs: int, work: pathlib.Path) -> None:
    """Runs the mutants and records each under its digest. Raises: SystemExit if tests fail without any mutant."""
    cache = work / "cache"
    trees = [work / f"tree{i}" for i in range(jobs)]
    for tree in trees:
        prepare(tree, cache)
    print(f"{len(pending)} mutants to run", flush=True)
    limits, lock, free = {}, threading.Lock(), list(trees)
    began, done = time.monotonic(), 0

    def limit_of(tests, tree) -> float:
        """Seconds, from a run without a mutant, which also fills the compilation cache."""
        with lock:
            if tests not in limits:
                outcome, output, seconds = run_tests(tree, tests, 3600, cache)
                if outcome != "passed":
                    raise SystemExit(f"error: {', '.join(tests)}: {outcome} without any mutant\n{output}")
                limits[tests] = 60 + 4 * seconds
                print(f"{', '.join(tests)}: {seconds:.0f} s without a mutant", flush=True)
            return limits[tests]

    def one(mutant: Mutant):
        tree, tests = free.pop(), TESTS[mutant.file]
        path = tree / PACKAGE / f"{mutant.file}.py"
        original = path.read_text()
        try:
            limit = limit_of(tests, tree)
            path.write_text(mutant.source)
            return mutant, run_tests(tree, tests, limit, cache)
        finally:
            path.write_text(original)
            free.append(tree)

    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(one, mutant) for mutant in pending]
        try:
            for future in concurrent.futures.as_completed(futures):
                mutant, (outcome, output, seconds) = future.result()
                results.add(mutant, digests[mutant.file], outcome, output, seconds)
                done += 1
                left = (time.monotonic() - began) / done * (len(pending) - done)
                said = {"passed": "SURVIVED", "failed": "killed", "timeout": "killed by the time limit"}[outcome]
                print(
                    f"[{done}/{len(pending)}] {mutant.file}, {mutant.name}: {said}, {seconds:.0f} s; "
                    f"about {duration(left)} left",
                    flush=True,
                )
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            print("Stopping after the mutants that are running; the same command resumes.", flush=True)
            raise


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=40, help="mutants of each file (40)")
    parser.add_argument(
        "--files", default=",".join(TESTS), help="of the package, separated by commas: losses,sampling/driver"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, help="mutants at a time (1)")
    parser.add_argument("--output", type=pathlib.Path, default=ROOT / "runs" / "mutants.jsonl", help="kept results")
    parser.add_argument(
        "--report", type=pathlib.Path, default=ROOT / "docs" / "reliability.md", help="page to write to"
    )
    parser.add_argument(
        "--keep_killed", action="store_true", help="tests were only added: what they killed before is not run again"
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

    def kept(mutant: Mutant) -> dict | None:
        return results.of(mutant, digests[mutant.file], options.keep_killed)

    pending = [mutant for mutant in mutants if kept(mutant) is None]
    if pending:
        with tempfile.TemporaryDirectory(prefix="mutants") as work:
            run_all(pending, results, digests, options.jobs, pathlib.Path(work))
    rows = [kept(mutant) for mutant in mutants]
    sites = {file: len(places((ROOT / PACKAGE / f"{file}.py").read_text())) for file in files}
    text = report(rows, sites, options.seed, reasons())
    write_report(text, options.report)
    print(text)


if __name__ == "__main__":
    main()
