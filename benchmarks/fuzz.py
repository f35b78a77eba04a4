"""Changes one byte or one key of a run's files, many times, and checks what the program does with the run.

    make fuzz [FUZZ="--count=2000 --seed=0"]

A case is a copy of a small run (vectors, standardized, 4 of 6 training steps, samples, metrics, likelihood) and of its
exported weights. One file of the copy is changed: a random byte, or a random key or value of JSON. Then one mode runs:
sample, evaluate, report, status, train (resumes), or `pretrained.load` of the exported file. A case passes if the mode ends
within 20 seconds, writes nothing outside of the run, shows no traceback, and either gives the numbers of the unchanged run
or prints a line that the unchanged run does not print. Report and status show the files' numbers, so these two modes only
have to end without a traceback. Two workers run the cases; a worker that exceeds three times the limit is killed, and a case
above the limit runs again, alone. The summary goes into docs/results/reliability.md; failures are listed with their seeds and
the exit status is 1.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import datetime
import io
import json
import multiprocessing
import os
import pathlib
import random
import re
import shutil
import sys
import tempfile
import time
import traceback
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

SECONDS = 20.0
MODES = ("sample", "evaluate", "report", "status", "train", "load")
BEGIN, END = "<!-- make fuzz: begin -->", "<!-- make fuzz: end -->"
# The command line names the amount of work, which a changed config.json could make any number of hours.
_AMOUNT = [
    "--config.sampling.num_samples=3",
    "--config.evaluation.num_samples=64",
    "--config.evaluation.num_examples=16",
    "--config.training.num_steps=6",
]
_ODD_VALUES = (None, True, -1, 0, 1e308, 10**30, "", "x", "../../outside", [], [[]], {}, "os:system", float("nan"))


# ---- Runs and changes


def make_original(folder: pathlib.Path) -> None:
    """Trains the run, draws samples, evaluates, and exports the weights into `folder`."""
    from diffusion_jax import pretrained
    from diffusion_jax.runs import train
    from helpers.array_configs import array_config, write_arrays

    folder.mkdir(parents=True)
    config = array_config("vectors", write_arrays("vectors", folder / "data.npz", 64))
    config.training.num_steps = 6
    config.evaluation.update(num_samples=64, num_examples=16, batch_size=16)
    config.sampling.batch_size = 64
    train.run(config, folder / "run")
    shutil.rmtree(folder / "run" / "checkpoints" / "6")
    for mode in ("sample", "evaluate", "report"):
        call(folder, mode)
    pretrained.save_safetensors(pretrained.load(folder / "run"), folder / "net.safetensors")


def files_to_change(folder: pathlib.Path) -> list[pathlib.Path]:
    """Lists the JSON, .npz, safetensors and picture files, and the logs; checkpoints' arrays have digests of their own."""
    kinds = {".json", ".jsonl", ".npz", ".png", ".safetensors"}
    found = [path.relative_to(folder) for path in folder.rglob("*") if path.suffix in kinds and path.is_file()]
    return sorted(path for path in found if "compiled" not in path.parts)


def change(path: pathlib.Path, draw: random.Random) -> str:
    """Changes one byte, key or value of a file. Returns: what was changed."""
    content = bytearray(path.read_bytes())
    if path.suffix == ".json" and draw.random() < 0.7:
        value = json.loads(content)
        places = list(_places(value))
        if places:
            group, key = draw.choice(places)
            if draw.random() < 0.3:
                what = f"without {key!r}"
                del group[key]
            else:
                old, group[key] = group[key], draw.choice([*_ODD_VALUES, _near(group[key])])
                what = f"{key!r}: {str(old)[:40]} -> {str(group[key])[:40]}"
            path.write_text(json.dumps(value))
            return what
    position = draw.randrange(len(content))
    old, content[position] = content[position], draw.randrange(256)
    path.write_bytes(content)
    return f"byte {position}: {old} -> {content[position]}"


def _places(value: Any):
    if isinstance(value, dict | list):
        for key, child in value.items() if isinstance(value, dict) else enumerate(value):
            yield value, key
            yield from _places(child)


def _near(value: Any) -> Any:
    return value * 1.01 + 1 if isinstance(value, int | float) else f"{value}x"


# ---- Modes


def call(folder: pathlib.Path, mode: str) -> int:
    """Calls the program, or loads the exported weights. Returns: the exit code."""
    from diffusion_jax import cli

    if mode == "load":
        return _load(folder)
    try:
        cli.main([f"--workdir={folder / 'run'}", f"--mode={mode}", *_AMOUNT])
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def _load(folder: pathlib.Path) -> int:
    import jax
    import numpy as np

    from diffusion_jax import pretrained

    try:
        net = pretrained.load(folder / "net.safetensors")
        np.save(folder / "loaded.npy", np.asarray(net.sample(jax.random.key(0), 2, steps=2)))
    except (pretrained.PretrainedError, ValueError, OSError) as error:
        print(f"error: {error}")
        return 2
    return 0


def numbers(folder: pathlib.Path, mode: str) -> Any:
    """Returns what a mode computed, in a form that can be compared."""
    import numpy as np

    from diffusion_jax import pretrained
    from diffusion_jax.provenance import params_digest

    run = folder / "run"
    if mode == "load":
        return np.load(folder / "loaded.npy").tobytes()
    if mode == "sample":
        newest = max((run / "samples").glob("*.npz"), key=lambda path: path.stat().st_mtime)
        with np.load(newest) as arrays:
            return arrays["arr_0"].tobytes()
    if mode == "evaluate":
        records = json.loads((run / "metrics.json").read_text())[-1], json.loads((run / "likelihood.json").read_text())
        return json.dumps([(key, value) for key, value in _leaves(records) if isinstance(value, int | float)])
    if mode == "train":
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        return json.dumps([rows[-1]["step"], rows[-1]["loss"], params_digest(pretrained.load(run).params)])
    return None


def _leaves(value: Any, name: str = "") -> list[tuple[str, Any]]:
    """Returns the values in JSON, without times."""
    if not isinstance(value, dict | list | tuple):
        return [] if re.search("second|time", name) else [(name, value)]
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return [leaf for key, child in sorted(items) for leaf in _leaves(child, f"{name}.{key}")]


def run_case(original: pathlib.Path, seed: int | None, mode: str) -> dict[str, Any]:
    """Runs a mode on a copy of the original, changed if there is a seed."""
    with tempfile.TemporaryDirectory() as temporary:
        outer = pathlib.Path(temporary)
        folder = pathlib.Path(shutil.copytree(original, outer / "case"))
        result: dict[str, Any] = {"seed": seed, "mode": mode, "file": "", "change": ""}
        if mode == "sample":  # drawn again
            shutil.rmtree(folder / "run" / "samples")
        if mode == "evaluate":
            for name in ("metrics.json", "likelihood.json"):
                (folder / "run" / name).unlink()
        (folder / "loaded.npy").unlink(missing_ok=True)
        _move_paths(folder, original)
        if seed is not None:
            draw = random.Random(seed)
            names = files_to_change(folder)
            if mode == "load":
                names = [pathlib.Path("net.safetensors")]
            name = draw.choice(names)
            result |= {"file": str(name), "change": change(folder / name, draw)}
        outside = sorted(outer.iterdir())
        start, output = time.monotonic(), io.StringIO()
        try:
            with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
                result["code"] = call(folder, mode)
            result["numbers"] = numbers(folder, mode) if result["code"] == 0 else None
        except BaseException:
            result |= {"code": -1, "numbers": None, "traceback": traceback.format_exc()[-1500:]}
        result["seconds"] = time.monotonic() - start
        printed = output.getvalue().replace(str(folder), "")
        result["outside"] = sorted(outer.iterdir()) != outside
        result["lines"] = sorted(
            {re.sub(r"\d[\d.,:e+-]*", "#", line) for line in re.split(r"[\r\n]", printed) if line.strip()}
        )
        return result


def _move_paths(folder: pathlib.Path, original: pathlib.Path) -> None:
    """Points config.json, and its copies in checkpoints, to the copy of the data, with the digests of the new copies."""
    from diffusion_jax.training import checkpoints

    for path in (folder / "run").rglob("config.json"):
        path.write_text(path.read_text().replace(str(original), str(folder)))
        if (table := path.with_name(checkpoints.MANIFEST)).exists():
            entries = json.loads(table.read_text()) | {path.name: list(checkpoints.digest(path))}
            table.write_text(json.dumps(entries))


def judge(case: dict[str, Any], baseline: dict[str, Any]) -> str:
    """Returns "" for a case that passes, or what is wrong."""
    if "traceback" in case or any("Traceback" in line for line in case["lines"]):
        return "traceback"
    if case["seconds"] > SECONDS:
        return "slow"
    if case["outside"]:
        return "file outside"
    if case["code"] and not any(line.startswith("error: ") for line in case["lines"]):
        return "no line"
    new = [line for line in case["lines"] if line not in baseline["lines"]]
    if case["code"] == 0 and case["numbers"] != baseline["numbers"] and not new:
        return "other numbers"
    return ""


def work(original: pathlib.Path, tasks: Any, results: Any) -> None:
    """Runs cases until there are no more, in a process of its own."""
    while (task := tasks.get()) is not None:
        results.put(run_case(original, *task))


# ---- The measurement


def run_all(original: pathlib.Path, tasks: list[tuple[int | None, str]], num_workers: int) -> list[dict[str, Any]]:
    """Runs all cases in worker processes; a case that takes three times the limit is stopped with its worker."""
    context, done, workers = multiprocessing.get_context("spawn"), [], []

    def start() -> dict[str, Any]:
        queues = context.Queue(), context.Queue()
        process = context.Process(target=work, args=(original, *queues), daemon=True)
        process.start()
        return {"process": process, "tasks": queues[0], "results": queues[1], "task": None, "since": 0.0}

    waiting = list(reversed(tasks))
    workers = [start() for _ in range(num_workers)]
    while waiting or any(worker["task"] for worker in workers):
        for i, worker in enumerate(workers):
            if worker["task"] is None and waiting:
                worker["task"], worker["since"] = waiting.pop(), time.monotonic()
                worker["tasks"].put(worker["task"])
            elif worker["task"] is not None and not worker["results"].empty():
                done.append(worker["results"].get())
                worker["task"] = None
                if len(done) % 50 == 0:
                    print(f"{len(done)} of {len(tasks)} cases", flush=True)
            elif worker["task"] is not None:
                limit = 300 if len(done) < 2 * len(MODES) * num_workers else 3 * SECONDS  # the first compile
                if not worker["process"].is_alive() or time.monotonic() - worker["since"] > limit:
                    seed, mode = worker["task"]
                    worker["process"].kill()
                    failed = {"seed": seed, "mode": mode, "file": "?", "change": "?", "code": -1, "numbers": None}
                    done.append(failed | {"seconds": limit, "lines": [], "outside": False, "traceback": "stopped"})
                    workers[i] = start()
        time.sleep(0.005)
    for worker in workers:
        worker["tasks"].put(None)
    return done


def write_report(page: pathlib.Path, row: str, failures: list[str]) -> None:
    """Writes a row, and the failures of this measurement, between the markers of a page."""
    before, _, rest = page.read_text().partition(BEGIN)
    old, _, after = rest.partition(END)
    kept = [line for line in old.splitlines() if line.startswith("| 2")]
    head = [
        "| date, commit, seed | cases | the numbers of the unchanged run | an error of one line | a note | failed | slowest |"
    ]
    lines = [*head, "|---|---|---|---|---|---|---|", *kept, row, "", *failures]
    page.write_text("\n".join([before + BEGIN, *lines, END]) + after)


def main() -> None:
    """Runs the cases, prints the failures, and writes the report."""
    from benchmarks.mutants import commit_of

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--report", type=pathlib.Path, default=ROOT / "docs" / "results" / "reliability.md")
    options = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    with tempfile.TemporaryDirectory() as temporary:
        os.environ["XDG_CACHE_HOME"] = f"{temporary}/cache"
        original = pathlib.Path(temporary) / "original"
        make_original(original)
        baseline_tasks: list[tuple[int | None, str]] = [(None, mode) for mode in MODES for _ in range(2)]
        baselines: dict[str, dict[str, Any]] = {}
        for case in run_all(original, baseline_tasks, options.workers):
            if case["code"] or (
                "numbers" in baselines.get(case["mode"], {}) and baselines[case["mode"]]["numbers"] != case["numbers"]
            ):
                raise SystemExit(f"error: the unchanged run fails, or is not repeatable: {case}")
            lines = sorted({*case["lines"], *baselines.get(case["mode"], {"lines": []})["lines"]})
            baselines[case["mode"]] = case | {"lines": lines}
        tasks = [(options.seed * 1_000_000 + i, MODES[i % len(MODES)]) for i in range(options.count)]
        start, counts, failures = time.monotonic(), collections.Counter[str](), []
        cases = run_all(original, tasks, options.workers)
        slow = [i for i, case in enumerate(cases) if judge(case, baselines[case["mode"]]) == "slow"]
        for i in slow:  # again, alone, because other programs may have taken the time; the first of two compiles
            _, cases[i] = run_all(original, [(cases[i]["seed"], cases[i]["mode"])] * 2, 1)
        for case in cases:
            baseline = baselines[case["mode"]]
            if problem := judge(case, baseline):
                failures.append(f"- {problem}: seed {case['seed']}, {case['mode']}, {case['file']}, {case['change']}")
                print(failures[-1], case.get("traceback", ""), flush=True)
            elif case["code"]:
                counts["error"] += 1
            else:
                counts["same" if case["numbers"] == baseline["numbers"] else "note"] += 1
        slowest = max(case["seconds"] for case in cases)
    cells = [
        f"{datetime.date.today()}, {commit_of(ROOT)}, {options.seed}",
        options.count,
        counts["same"],
        counts["error"],
    ]
    row = " | ".join(map(str, ["", *cells, counts["note"], len(failures), f"{slowest:.1f} s", ""])).strip()
    write_report(options.report, row, failures)
    print(f"{row}\n{time.monotonic() - start:.0f} s")
    raise SystemExit(bool(failures))


if __name__ == "__main__":
    main()
