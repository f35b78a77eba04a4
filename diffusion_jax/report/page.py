"""The page about one run, and the page that compares several."""

from __future__ import annotations

import datetime
import importlib.resources
from collections.abc import Mapping, Sequence
from typing import Any

import diffusion_jax
from diffusion_jax.config import flatten
from diffusion_jax.report import gallery
from diffusion_jax.report.collect import RunFiles
from diffusion_jax.report.curves import MAX_POINTS, training_charts
from diffusion_jax.report.embed import Budget
from diffusion_jax.report.markup import Markup, definitions, element, join, json_script, table
from diffusion_jax.report.sections import PageData, chart_grid, metrics_table, run_sections, section

__all__ = ["comparison_page", "run_page"]

PICTURE_BYTES = 3_000_000  # before base64, which makes them a third larger
# Nothing is loaded from anywhere, even if a text were not escaped.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def run_page(run: RunFiles) -> str:
    """The page of a run."""
    data: PageData = {"charts": {}, "frames": {}}
    parts = run_sections(run, data, PICTURE_BYTES)
    status = {name: value for name, value in run.status.items() if name != "directory"}
    head = (
        definitions(status.items())
        if status
        else element("p", "The directory holds no run yet: it has no config.json.")
    )
    return _page(f"Run {run.name}", [head, _notes(run)], parts, data)


def comparison_page(runs: Sequence[RunFiles]) -> str:
    """One page about several runs: their states, curves, differing leaves, metrics and newest pictures."""
    data: PageData = {"charts": {}, "frames": {}}
    names = unique_names(runs)
    parts = [
        _states(runs, names),
        _common_curves(runs, names, data),
        _differing_leaves(runs, names),
        _common_metrics(runs, names),
        _newest_pictures(runs, names),
    ]
    notes = [_notes(run, f"{name}: ") for run, name in zip(runs, names, strict=True)]
    return _page(f"{len(runs)} runs: {', '.join(names)}", notes, [part for part in parts if part is not None], data)


def unique_names(runs: Sequence[RunFiles]) -> list[str]:
    """The names of the directories, with a number where two are equal."""
    names: list[str] = []
    for run in runs:
        count = sum(name == run.name or name.startswith(f"{run.name} (") for name in names)
        names.append(f"{run.name} ({count + 1})" if count else run.name)
    return names


def _notes(run: RunFiles, prefix: str = "") -> Markup:
    if not run.notes:
        return Markup("")
    return element("ul", *(element("li", f"{prefix}{note}") for note in run.notes), class_="notes", aria_label="Notes")


def _static(name: str) -> str:
    return (importlib.resources.files("diffusion_jax.report") / "static" / name).read_text()


def _page(title: str, head: Sequence[Any], parts: Sequence[tuple[str, str, Markup]], data: Mapping[str, Any]) -> str:
    written = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    links = [element("li", element("a", name, href=f"#{identifier}")) for identifier, name, _ in parts]
    style = Markup(f"<style>{_static('uPlot.min.css')}{_static('report.css')}</style>")
    license_text = Markup(f"<!-- uPlot, which draws the charts:\n{_static('uPlot.LICENSE')}-->")
    scripts = Markup(f"<script>{_static('uPlot.iife.min.js')}</script><script>{_static('report.js')}</script>")
    document = element(
        "html",
        element(
            "head",
            element("meta", charset="utf-8"),
            element("meta", http_equiv="Content-Security-Policy", content=_POLICY),
            element("meta", name="viewport", content="width=device-width, initial-scale=1"),
            element("meta", name="color-scheme", content="light dark"),
            element("title", title),
            license_text,
            style,
        ),
        element(
            "body",
            element("a", "Skip to the content", href="#content", class_="skip"),
            element(
                "header",
                element("h1", title),
                element("p", f"Written {written} by diffusion_jax {diffusion_jax.__version__}."),
            ),
            element("nav", element("ul", *links), aria_label="Sections"),
            element(
                "main",
                element("noscript", element("p", "Charts and sliders need scripts, which this browser does not run.")),
                *head,
                *(part for _, _, part in parts),
                id="content",
            ),
            json_script("data", data),
            scripts,
        ),
        lang="en",
    )
    return f"<!doctype html>\n{document}\n"


def _states(runs: Sequence[RunFiles], names: Sequence[str]) -> tuple[str, str, Markup]:
    keys = list(dict.fromkeys(key for run in runs for key in run.status if key != "directory"))
    rows = [[name, *(run.status.get(key, "") for key in keys)] for run, name in zip(runs, names, strict=True)]
    return section("states", "Runs", table("The state of each run", ["run", *keys], rows))


def _common_curves(runs: Sequence[RunFiles], names: Sequence[str], data: PageData) -> tuple[str, str, Markup]:
    """A chart for each value of the logs, with a line for each run."""
    charts: dict[tuple[str, str], dict[str, Any]] = {}
    for run, name in zip(runs, names, strict=True):
        for chart in training_charts(run.lines, max(MAX_POINTS // len(runs), 60)):
            several = len(chart["series"]) > 1
            for series in chart["series"]:
                title = f"{chart['title']}: {series['label']}" if several else chart["title"]
                joint = charts.setdefault((title, chart["y"]), chart | {"title": title, "series": []})
                joint["series"].append(series | {"label": name})
    if not charts:
        return section("curves", "Curves", element("p", "Nothing is logged yet."))
    return section("curves", "Curves", chart_grid("curve", charts.values(), data))


def _differing_leaves(runs: Sequence[RunFiles], names: Sequence[str]) -> tuple[str, str, Markup] | None:
    leaves = [{} if run.config is None else flatten(run.config) for run in runs]
    keys = dict.fromkeys(key for each in leaves for key in each)
    differing = [key for key in keys if len({str(each.get(key)) for each in leaves}) > 1]
    rows = [[key, *(str(each[key]) if key in each else "" for each in leaves)] for key in differing]
    if not rows:
        return section("config", "Config", element("p", "The configs are equal."))
    return section("config", "Config", table("Leaves in which the runs differ", ["leaf", *names], rows))


def _common_metrics(runs: Sequence[RunFiles], names: Sequence[str]) -> tuple[str, str, Markup] | None:
    body = metrics_table(dict(zip(names, runs, strict=True)))
    return None if body is None else section("metrics", "Metrics", body)


def _newest_pictures(runs: Sequence[RunFiles], names: Sequence[str]) -> tuple[str, str, Markup] | None:
    """The newest picture of samples during training, or of samples, of each run."""
    figures = []
    for run, name in zip(runs, names, strict=True):
        budget = Budget(PICTURE_BYTES // len(runs))
        frames = gallery.training_samples(run, Budget(budget.left), newest_only=True)
        if frames:
            caption, (picture,) = frames.frames[-1]
            text = f"{name}, {caption}"
            image = element("img", src=picture.src, alt=text, width=picture.width, height=picture.height)
            figures.append(element("figure", image, element("figcaption", text)))
    if not figures:
        return None
    return section("samples", "Newest samples during training", element("div", join(figures), class_="gallery"))
