"""The stored results of mutants, and the section of docs/results/reliability.md that reports them."""

from __future__ import annotations

import json
import pathlib
import tomllib
from typing import NamedTuple

from scipy.stats import binomtest

from benchmarks.mutant_drawing import ROOT, Mutant

BEGIN, END = "<!-- make mutants: begin -->", "<!-- make mutants: end -->"


class Results:
    """A JSON lines file with one line for each mutant that ran. Lines of other sources or other tests are ignored."""

    def __init__(self, path: pathlib.Path):
        self.path, self.rows = path, {}
        if path.exists():
            for line in path.read_text().splitlines():
                row = json.loads(line)
                self.rows[row["file"], row["diff"], row["tests"]] = row

    def find(self, mutant: Mutant, tests: str, keep_killed: bool = False) -> dict | None:
        """The row of a mutant under these tests, else with `keep_killed` a row of other tests that killed it, else None."""
        result = self.rows.get((mutant.file, mutant.diff, tests))
        if result is None and keep_killed:
            earlier = (row for row in self.rows.values() if (row["file"], row["diff"]) == (mutant.file, mutant.diff))
            result = next((row for row in earlier if row["outcome"] != "passed"), None)
        return result

    def add(self, mutant: Mutant, tests: str, outcome: str, output: str, seconds: float) -> None:
        """Appends a row to the file."""
        row = {"file": mutant.file, "name": mutant.name, "diff": mutant.diff, "tests": tests, "outcome": outcome}
        row |= {"output": output if outcome == "passed" else output[-500:], "seconds": round(seconds, 1)}
        self.rows[mutant.file, mutant.diff, tests] = row
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")


class Reason(NamedTuple):
    """Why no test can detect a mutant: an entry of equivalent_mutants.toml, by the lines that the mutant removes and adds."""

    file: str
    removed: str
    added: str
    why: str


def read_reasons(path: pathlib.Path = ROOT / "benchmarks" / "equivalent_mutants.toml") -> list[Reason]:
    """The entries of the file."""
    return [Reason(**entry) for entry in tomllib.loads(path.read_text()).get("mutant", [])]


def equivalence_reason(row: dict, known: list[Reason]) -> str | None:
    """The recorded reason why a survivor is equivalent; None if there is none."""
    lines = row["diff"].splitlines()[2:]
    removed, added = ("\n".join(line[1:].strip() for line in lines if line.startswith(sign)) for sign in "-+")
    change = row["file"], removed, added
    return next((reason.why for reason in known if (reason.file, reason.removed, reason.added) == change), None)


def report(rows: list[dict], num_places: dict[str, int], seed: int, known: list[Reason]) -> str:
    """The section of docs/results/reliability.md, between its markers."""
    lines = [
        f"Seed {seed}; the interval is Clopper and Pearson's, 95%. No test can detect an equivalent mutant.",
        "",
        "| file | places | drawn | killed | killed by the time limit | equivalent | killed of the rest | interval |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for file in [*dict.fromkeys(row["file"] for row in rows), "all"]:
        own = [row for row in rows if file in ("all", row["file"])]
        killed = sum(row["outcome"] != "passed" for row in own)
        late = sum(row["outcome"] == "timeout" for row in own)
        equivalent = sum(row["outcome"] == "passed" and equivalence_reason(row, known) is not None for row in own)
        counted = len(own) - equivalent
        low, high = binomtest(killed, counted).proportion_ci(0.95, "exact") if counted else (0.0, 1.0)
        total = sum(num_places.values()) if file == "all" else num_places[file]
        share = f"{killed / counted:.1%}" if counted else ""
        lines.append(
            f"| {file} | {total} | {len(own)} | {killed} | {late} | {equivalent} | {share} | {low:.1%} to {high:.1%} |"
        )
    survivors = [row for row in rows if row["outcome"] == "passed"]
    lines += ["", f"Survivors: {len(survivors) or 'none'}."]
    for row in survivors:
        reason = equivalence_reason(row, known)
        lines += ["", "```diff", row["diff"], "```", *([f"Equivalent: {reason}"] if reason else [])]
    return "\n".join(lines)


def write_report(text: str, path: pathlib.Path) -> None:
    """Replaces the text between the markers; a page without markers gets them at its end."""
    page = path.read_text()
    if BEGIN not in page:
        page = f"{page.rstrip()}\n\n## Mutants\n\n{BEGIN}\n{END}\n"
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    path.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")
