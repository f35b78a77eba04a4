"""The page about one run, and the page that compares several runs, as JSON values that report.js draws.

A section is a function that returns blocks, {kind of block: its values}; without blocks, the page omits the section.
report.js inserts every text as text, never as HTML.
"""

from __future__ import annotations

import html
import importlib.resources
import json
import string
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from diffusion_jax.config import SETTINGS, defaults, flatten
from diffusion_jax.console import format_time
from diffusion_jax.errors import list_names, shorten
from diffusion_jax.evaluation.features import sample_files
from diffusion_jax.metrics import find_meaning, format_value, reported_values
from diffusion_jax.provenance import Provenance, code_version
from diffusion_jax.report import card, figures
from diffusion_jax.report.collect import RunFiles, sample_command, table_cells, train_command
from diffusion_jax.report.figures import MAX_POINTS, Budget, Picture

__all__ = ["comparison_page", "run_page"]

Blocks = list[dict[str, Any]]
Sections = Mapping[tuple[str, str], Callable[[], Blocks]]  # {(id, title): function}
PICTURE_BYTES = 3_000_000  # before base64, which adds a third
_MAX_RECORDS = 20


def run_page(run: RunFiles) -> str:
    """Returns the page of one run."""
    newest, training, denoising, others = (Budget(int(PICTURE_BYTES * x), run.notes) for x in (0.1, 0.35, 0.15, 0.4))
    runs, shown = {run.name: run}, figures.newest_samples(run, newest)
    sections: Sections = {
        ("summary", "Summary"): lambda: _summary(run, shown),
        ("curves", "Curves"): lambda: _curves(runs),
        ("training-samples", "Samples during training"): lambda: figures.training_samples(runs, training),
        ("denoising", "Denoising, step by step"): lambda: figures.denoising(run, denoising),
        ("metrics", "Metrics"): lambda: _metrics(runs),
        ("calibration", "Calibration"): lambda: _calibration(run),
        ("pictures", "Pictures"): lambda: _pictures(run, others, shown),
        ("launches", "Launches"): lambda: _launches(run),
        ("config", "Config"): lambda: _config(run),
        ("environment", "Environment and data"): lambda: _environment(run),
        ("reproduce", "Command to reproduce"): lambda: _command(run),
    }
    return _page(f"Run {run.name}", runs, sections)


def comparison_page(runs: Sequence[RunFiles]) -> str:
    """Returns one page about several runs: facts, samples, metrics with the best values, curves and differing settings."""
    named: dict[str, RunFiles] = {}
    for run in runs:  # equal names get a number
        count = sum(name == run.name or name.startswith(f"{run.name} (") for name in named)
        named[f"{run.name} ({count + 1})" if count else run.name] = run
    budget = Budget(PICTURE_BYTES, runs[0].notes)

    def by_run(caption: str, values: Sequence[Mapping[str, Any]], least: int = 1) -> Blocks:
        """Returns a table of the rows with at least `least` different values."""
        keys = dict.fromkeys(key for each in values for key in each)
        rows = [[key, *(str(each.get(key, "")) for each in values)] for key in keys]
        return [_table(caption, ["", *named], [row for row in rows if len(set(row[1:])) >= least])]

    settings = [{} if run.config is None else flatten(run.config) for run in runs]
    sections: Sections = {
        ("warnings", "Warnings"): lambda: [{"notes": notes}] if (notes := card.find_differences(named)) else [],
        ("metrics", "Metrics"): lambda: _metrics(named),
        ("samples", "Samples during training"): lambda: figures.training_samples(named, budget),
        ("states", "Runs"): lambda: by_run("What was trained", [card.facts(run) for run in runs]),
        ("curves", "Curves"): lambda: _curves(named),
        ("config", "Config"): lambda: by_run("Settings in which the runs differ", settings, 2),
    }
    return _page(f"{len(runs)} runs: {', '.join(named)}", named, sections)


def _page(title: str, runs: Mapping[str, RunFiles], sections: Sections) -> str:
    """Returns a page whose notes list the files that cannot be read, and the sections that fail on invalid values."""
    shown, problems = [], []
    for (identifier, name), make in sections.items():
        try:
            blocks = make()
            json.dumps(blocks, allow_nan=False)
        except Exception as error:  # an untrusted file may hold any values
            problems.append(f"{name} is left out, because a file holds invalid values ({shorten(str(error), 200)})")
            continue
        if blocks:
            shown.append({"id": identifier, "title": name, "blocks": blocks})
    notes = [f"{name}: {note}" if len(runs) > 1 else note for name, run in runs.items() for note in run.notes]
    title, written = html.escape(title), format_time(time.time())
    report = {"notes": [*notes, *problems], "sections": shown}
    static = importlib.resources.files("diffusion_jax.report") / "static"
    files = {path.name.replace(".", "_"): path.read_text() for path in static.iterdir() if path.name != "model_card.md"}
    # Without "<", no text in the JSON can end the script element around the JSON.
    text = json.dumps(report, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    return string.Template(files.pop("page_html")).substitute(
        files, title=title, written=written, version=code_version(), report=text
    )


def _table(caption: str, header: Sequence[str], rows: Sequence[Sequence[Any]], kind: str = "") -> dict[str, Any]:
    """Returns a block with a table; the first cell of each row is the row's heading."""
    return {"table": {"caption": caption, "header": header, "rows": rows, "kind": kind}}


# ---- Sections


def _summary(run: RunFiles, newest: Picture | None) -> Blocks:
    """Returns the card: the newest result, what was trained, and the newest samples."""
    facts = card.facts(run)
    if not facts:
        return [{"text": "The directory holds no run yet: it has no config.json."}]
    result = card.newest_result(run.measurements(), run.lines)
    return [{"card": {"result": result, "facts": facts, "picture": newest}}]


def _curves(runs: Mapping[str, RunFiles]) -> Blocks:
    """Returns a block with the curves of all runs, or with a text if nothing is logged."""
    points = max(MAX_POINTS // len(runs), 60)
    charts = figures.training_charts({name: run.lines for name, run in runs.items()}, points)
    if not charts:
        return [{"text": "Nothing is logged yet."}]
    clocks = [
        {"name": name, "batch": run.config and run.config.training.batch_size} | figures.run_clock(run.lines, points)
        for name, run in runs.items()
    ]
    lines = max(len(run.lines) for run in runs.values())
    return [{"curves": {"runs": clocks, "charts": charts, "lines": lines, "points": points}}]


def _metrics(runs: Mapping[str, RunFiles]) -> Blocks:
    """Returns a table of all metrics, in which report.js marks the best values, and explanations. runs: {name: run}."""
    records: list[dict[str, Any]] = [
        {"run": name} | record for name, run in runs.items() for record in run.measurements()[-_MAX_RECORDS:]
    ]
    if not records:
        return []
    columns, header, rows = table_cells(records)
    numbers = [
        [[values.get(key), record.get(f"{key}_standard_error")] for key in columns]
        for record, values in zip(records, map(reported_values, records), strict=True)
    ]
    meanings = {column: meaning for column in columns if (meaning := find_meaning(column))}
    better = [meanings[column].better if column in meanings else "" for column in columns]
    protocols = [card.protocol(record) for record in records]
    block = _table("A row for each measurement, ± one standard error", header, rows, "numbers")
    block["table"] |= {"numbers": numbers, "better": better, "protocols": protocols}
    notes = dict.fromkeys(
        f"{record['run']}, {name}: {note}" for record in records for name, note in record.get("notes", {}).items()
    )
    terms = [[f"{m.name}, {key} in files", m.text] for key, m in meanings.items()]
    return [block, *([{"notes": list(notes)}] * bool(notes)), {"details": ["Definitions", [{"terms": terms}]]}]


def _calibration(run: RunFiles) -> Blocks:
    """Returns a table of the calibration tests; their pictures are among the others."""

    def format_with_error(record: Mapping[str, Any], key: str) -> str:
        return format_value(record[key], record[f"{key}_standard_error"]) if key in record else ""

    header = ["samples", "result", "90% intervals hold", "chi-squared", "this test"]
    rows = [
        [
            record["name"],
            record["sentence"],
            *(format_with_error(record, key) for key in ("coverage", "chi_squared")),
            record["power"],
        ]
        for record in run.calibrations[-_MAX_RECORDS:]
    ]
    return [_table("Whether held-out examples look like samples given the same measurement", header, rows)] * bool(rows)


def _pictures(run: RunFiles, budget: Budget, shown: Picture | None) -> Blocks:
    others, left_out = figures.other_pictures(run, budget, shown)
    text = f"Left out to keep this file small: {list_names(left_out, 10)}."
    gallery: Blocks = [{"gallery": others}]
    return gallery * bool(others) + [{"text": text}] * bool(left_out)


def _launches(run: RunFiles) -> Blocks:
    """Returns the launches for a table, and the names of unused checkpoints."""
    checkpoints = run.directory / "checkpoints"
    unused = sorted(path.name for end in ("unreadable", "partial") for path in checkpoints.glob(f"*.{end}"))
    return [{"launches": {"launches": run.launches, "unused": unused}}] if run.launches else []


def _config(run: RunFiles) -> Blocks:
    if run.config is None:
        return []
    values = flatten(run.config)
    rows = [
        [name, str(values[name]), str(default), SETTINGS[name].description]
        for name, default in defaults(values).items()
        if values[name] != default
    ]
    every = _table("All settings", ["setting", "value"], [[name, str(value)] for name, value in values.items()])
    changed = _table("Settings that differ from the defaults", ["setting", "value", "default", "meaning"], rows)
    return [changed, {"details": ["All settings", [every]]}]


def _environment(run: RunFiles) -> Blocks:
    """Describes the environment of the last launch, and the data."""
    known = (run.launches[-1].get("environment", {}) if run.launches else {}) | {
        f"data: {name}": run.data[name] for name in ("sha256_of_some", "classes") if name in run.data
    }
    return [{"environment": known}] if known else []


def _command(run: RunFiles) -> Blocks:
    if run.config is None:
        return []
    text = f"# Train again, in a new directory DIR.\n{train_command(run.config)}"
    provenance = next(filter(None, map(Provenance.read, sample_files(run.directory))), None)
    if provenance is not None:
        text += f"\n# Draw the newest samples again.\n{sample_command(run.config, provenance)}"
    return [{"code": text}]
