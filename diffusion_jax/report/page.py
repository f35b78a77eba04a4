"""The page about one run, and the page that compares several.

A section is (id, title, element), or None if the run has nothing to show there.
"""

from __future__ import annotations

import datetime
import importlib.resources
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import diffusion_jax
from diffusion_jax.config import flatten
from diffusion_jax.evaluation.example_sets import sample_files
from diffusion_jax.metrics import MEANINGS
from diffusion_jax.provenance import Provenance
from diffusion_jax.report import commands, gallery
from diffusion_jax.report.charts import MAX_POINTS, chart_grid, training_charts
from diffusion_jax.report.collect import RunFiles, format_value, table_cells
from diffusion_jax.report.gallery import Budget, Frames, Picture
from diffusion_jax.report.markup import Markup, definitions, element, join, json_script, table
from diffusion_jax.runs.console import format_duration

__all__ = ["comparison_page", "run_page"]

Section = tuple[str, str, Markup]
PageData = dict[str, Any]  # for report.js: {"charts": {id: chart}, "frames": {id: frames}}
PICTURE_BYTES = 3_000_000  # before base64, which makes them a third larger
_MAX_RECORDS = 20
# Nothing is loaded from anywhere, even if a text were not escaped.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
_LIKELIHOOD_TERMS = {
    "bits_per_dim": "total bound, upper bound of the negative log-likelihood",
    "nats_per_dim": "the same in nats",
    "prior": "KL of q(x_T | x_0) from the standard normal, in bits per dimension",
    "transitions": "sum of the terms of the steps between, in bits per dimension",
    "decoder": "L_0, the code of x_0 given x_1, in bits per dimension",
    "ode_bits_per_dim": "by the probability-flow ODE, no bound",
    "ode_nats_per_dim": "the same in nats",
}


def run_page(run: RunFiles) -> str:
    """The page of a run."""
    data: PageData = {"charts": {}, "frames": {}}
    training, denoising, samples, others = (Budget(int(PICTURE_BYTES * share)) for share in (0.4, 0.15, 0.1, 0.35))
    sections = [
        _curves(run, data),
        _frames("training-samples", "Samples during training", gallery.training_samples(run, training), data, -1),
        _frames("denoising", "Denoising, step by step", gallery.denoising(run, denoising), data, 0),
        _samples(run, samples),
        _likelihood(run),
        _metrics({run.name: run}),
        _pictures(run, others),
        _launches(run),
        _config(run),
        _environment(run),
        _command(run),
    ]
    status = [(name, value) for name, value in run.status.items() if name != "directory"]
    head = definitions(status)
    if not status:
        head = element("p", "The directory holds no run yet: it has no config.json.")
    return _page(f"Run {run.name}", [head, _notes(run)], sections, data)


def comparison_page(runs: Sequence[RunFiles]) -> str:
    """One page about several runs: their states, curves, differing leaves, metrics and newest pictures."""
    data: PageData = {"charts": {}, "frames": {}}
    named: dict[str, RunFiles] = {}
    for run in runs:  # with a number where two names are equal
        count = sum(name == run.name or name.startswith(f"{run.name} (") for name in named)
        named[f"{run.name} ({count + 1})" if count else run.name] = run
    sections = [
        _states(named),
        _common_curves(named, data),
        _differing_leaves(named),
        _metrics(named),
        _newest_samples(named),
    ]
    notes = [_notes(run, f"{name}: ") for name, run in named.items()]
    return _page(f"{len(runs)} runs: {', '.join(named)}", notes, sections, data)


def _page(title: str, head: Sequence[Any], sections: Sequence[Section | None], data: PageData) -> str:
    def static(name: str) -> str:
        return (importlib.resources.files("diffusion_jax.report") / "static" / name).read_text()

    written = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    shown = [section for section in sections if section is not None]
    links = [element("li", element("a", name, href=f"#{identifier}")) for identifier, name, _ in shown]
    document = element(
        "html",
        element(
            "head",
            element("meta", charset="utf-8"),
            element("meta", http_equiv="Content-Security-Policy", content=_POLICY),
            element("meta", name="viewport", content="width=device-width, initial-scale=1"),
            element("meta", name="color-scheme", content="light dark"),
            element("title", title),
            Markup(f"<!-- uPlot, which draws the charts:\n{static('uPlot.LICENSE')}-->"),
            Markup(f"<style>{static('uPlot.min.css')}{static('report.css')}</style>"),
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
                *(content for _, _, content in shown),
                id="content",
            ),
            json_script("data", data),
            Markup(f"<script>{static('uPlot.iife.min.js')}</script><script>{static('report.js')}</script>"),
        ),
        lang="en",
    )
    return f"<!doctype html>\n{document}\n"


def _section(identifier: str, title: str, *content: Any) -> Section:
    """The heading has its own id, so that the element is a named region."""
    heading = element("h2", title, id=f"{identifier}-title")
    body = element("section", heading, *content, id=identifier, aria_labelledby=f"{identifier}-title")
    return identifier, title, body


def _notes(run: RunFiles, prefix: str = "") -> Markup:
    if not run.notes:
        return Markup("")
    return element("ul", *(element("li", f"{prefix}{note}") for note in run.notes), class_="notes", aria_label="Notes")


# ---- Sections of one run


def _curves(run: RunFiles, data: PageData) -> Section:
    charts = training_charts(run.lines)
    if not charts:
        return _section("curves", "Curves", element("p", "Nothing is logged yet: the run has no line of metrics."))
    longest = max(series["values"] for chart in charts for series in chart["series"])
    points = max(len(series["x"]) for chart in charts for series in chart["series"])
    text = f"{longest:,} lines of the log."
    if points < longest:
        text += f" They are shown as {points} means, with a band from the lowest to the highest value of each interval."
    return _section("curves", "Curves", element("p", text), chart_grid("curve", charts, data))


def _frames(identifier: str, title: str, frames: Frames | None, data: PageData, start: int) -> Section | None:
    """Pictures with a slider. The first is in the page itself, so that it is seen without scripts, too."""
    if frames is None:
        return None
    start %= len(frames.frames)
    shown_caption, shown = frames.frames[start]
    data["frames"][identifier] = {
        "start": start,
        "captions": [caption for caption, _ in frames.frames],
        "names": frames.names,
        "images": [[None if i == start else p.src for p in drawn] for i, (_, drawn) in enumerate(frames.frames)],
    }
    images = [
        _figure(picture._replace(caption=f"{name}, {shown_caption}"), name)
        for name, picture in zip(frames.names, shown, strict=True)
    ]
    label = f"{identifier}-caption"
    controls = [
        element("button", "Previous", type="button", data_move=-1),
        element("input", type="range", min=0, max=len(frames.frames) - 1, step=1, value=start, aria_labelledby=label),
        element("button", "Next", type="button", data_move=1),
        element("button", "Play", type="button", data_play=True, aria_pressed="false"),
    ]
    slider = element(
        "div",
        element("div", *images, class_="pictures"),
        element("p", shown_caption, id=label, class_="frame-caption", aria_live="polite"),
        element("div", *controls, class_="controls"),
        data_frames=identifier,
        class_="frames",
    )
    return _section(identifier, title, slider, element("p", frames.note))


def _figure(picture: Picture, caption: str) -> Markup:
    image = element("img", src=picture.src, alt=picture.caption, width=picture.width, height=picture.height)
    return element("figure", image, element("figcaption", caption))


def _figures(pictures: Iterable[Picture], class_: str = "gallery") -> Markup:
    return element("div", *(_figure(picture, picture.caption) for picture in pictures), class_=class_)


def _samples(run: RunFiles, budget: Budget) -> Section | None:
    rows, note = gallery.class_rows(run, budget)
    return _section("samples", "Samples", element("p", note), _figures(rows, "classes")) if rows else None


def _likelihood(run: RunFiles) -> Section | None:
    report = run.likelihood
    rows = [
        [name, format_value(report[name], report.get(f"{name}_standard_error")), meaning]
        for name, meaning in _LIKELIHOOD_TERMS.items()
        if isinstance(report.get(name), int | float)
    ]
    if not rows:
        return None
    examples = " ".join(str(report[name]) for name in ("dataset", "split") if report.get(name))
    caption = f"{report.get('num_examples')} examples of {examples}, "
    caption += f"the {report.get('weights')} weights of step {report.get('step')}"
    return _section("likelihood", "Likelihood", table(caption, ["quantity", "value ± standard error", "meaning"], rows))


def _metrics(runs: Mapping[str, RunFiles]) -> Section | None:
    """The metrics of all records of runs by name, and what they mean."""
    pairs = []
    for run in runs.values():
        pairs += [(run.directory, record) for record in run.measurements()[-_MAX_RECORDS:]]
    if not pairs:
        return None
    columns, rows = table_cells(pairs)
    names = {str(run.directory): name for name, run in runs.items()}
    texts = [[names[row["run"]], *(row.get(column, "") for column in columns[1:])] for row in rows]
    body = table("A row for each measurement, ± one standard error", columns, texts, class_="numbers")
    meanings = MEANINGS | _LIKELIHOOD_TERMS
    return _section("metrics", "Metrics", body, definitions((n, meanings[n]) for n in columns if n in meanings))


def _pictures(run: RunFiles, budget: Budget) -> Section | None:
    shown, left_out = gallery.other_pictures(run, budget)
    if not shown and not left_out:
        return None
    names = ", ".join(left_out[:10]) + (f" and {len(left_out) - 10} more" if len(left_out) > 10 else "")
    text = element("p", f"Left out, because this file stays small: {names}.") if names else ""
    return _section("pictures", "Pictures", _figures(shown), text)


def _launches(run: RunFiles) -> Section | None:
    """A row for each launch, and the checkpoints that were not used."""
    if not run.launches:
        return None
    rows = []
    continued_from = [launch["first_step"] for launch in run.launches[1:]] + [run.launches[-1]["last_step"]]
    for launch, following in zip(run.launches, continued_from, strict=True):
        started = datetime.datetime.fromtimestamp(launch["start"], datetime.UTC).strftime("%Y-%m-%d %H:%M:%S")
        duration, last = format_duration(launch["end"] - launch["start"]), launch["last_step"]
        stopped_by = launch.get("stopped_by", "")
        rows.append([started, duration, launch["first_step"], last, max(last - following, 0), stopped_by])
    header = ["start (UTC)", "duration", "from step", "to step", "steps done again later", "stopped by"]
    checkpoints = run.directory / "checkpoints"
    unused = sorted(path.name for end in ("unreadable", "partial") for path in checkpoints.glob(f"*.{end}"))
    text = (
        element("p", f"Damaged or unfinished checkpoints, which are not used: {', '.join(unused)}.") if unused else ""
    )
    return _section("launches", "Launches", table("Launches", header, rows, "times"), text)


def _config(run: RunFiles) -> Section | None:
    if run.config is None:
        return None
    changed = commands.differences_from_defaults(run.config)
    rows = [[name, str(value), str(default), text] for name, (value, default, text) in changed.items()]
    every = table("All leaves", ["leaf", "value"], [[name, str(value)] for name, value in flatten(run.config).items()])
    return _section(
        "config",
        "Config",
        table("Leaves that differ from the defaults", ["leaf", "value", "default", "meaning"], rows),
        element("details", element("summary", "All leaves"), every),
    )


def _environment(run: RunFiles) -> Section | None:
    """What the last launch ran with, and the data."""
    rows: list[tuple[str, str]] = []
    environment = run.launches[-1].get("environment") if run.launches else None
    if environment:
        versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
        devices = "{devices} x {device_kind} ({backend}), {processes} processes".format(**environment)
        rows += [
            ("versions", versions),
            ("system", "{system}, {cpus} CPUs".format(**environment)),
            ("devices", devices),
        ]
    if run.data:
        digest = run.data.get("sha256_of_some")
        rows.append(("data", f"{run.data.get('images', 0):,} examples, SHA-256 of some: {digest}"))
        if run.data.get("classes"):
            rows.append(("classes", ", ".join(map(str, run.data["classes"]))))
    return _section("environment", "Environment and data", definitions(rows)) if rows else None


def _command(run: RunFiles) -> Section | None:
    if run.config is None:
        return None
    text = f"# Train again, in a new directory DIR.\n{commands.train_command(run.config)}"
    provenance = next(filter(None, map(Provenance.read, sample_files(run.directory))), None)
    if provenance is not None:
        text += f"\n# Draw the newest samples again.\n{commands.sample_command(run.config, provenance)}"
    return _section("reproduce", "Command to reproduce", element("pre", text, tabindex=0, aria_label="Command"))


# ---- Sections of several runs


def _states(runs: Mapping[str, RunFiles]) -> Section:
    keys = list(dict.fromkeys(key for run in runs.values() for key in run.status if key != "directory"))
    rows = [[name, *(run.status.get(key, "") for key in keys)] for name, run in runs.items()]
    return _section("states", "Runs", table("The state of each run", ["run", *keys], rows))


def _common_curves(runs: Mapping[str, RunFiles], data: PageData) -> Section:
    """A chart for each value of the logs, with a line for each run."""
    charts: dict[str, dict[str, Any]] = {}
    for name, run in runs.items():
        for chart in training_charts(run.lines, max(MAX_POINTS // len(runs), 60)):
            for series in chart["series"]:
                title = f"{chart['title']}: {series['label']}" if len(chart["series"]) > 1 else chart["title"]
                joint = charts.setdefault(title, chart | {"title": title, "series": []})
                joint["series"].append(series | {"label": name})
    if not charts:
        return _section("curves", "Curves", element("p", "Nothing is logged yet."))
    return _section("curves", "Curves", chart_grid("curve", charts.values(), data))


def _differing_leaves(runs: Mapping[str, RunFiles]) -> Section:
    leaves = [{} if run.config is None else flatten(run.config) for run in runs.values()]
    keys = dict.fromkeys(key for each in leaves for key in each)
    differing = [key for key in keys if len({str(each.get(key)) for each in leaves}) > 1]
    rows = [[key, *(str(each.get(key, "")) for each in leaves)] for key in differing]
    if not rows:
        return _section("config", "Config", element("p", "The configs are equal."))
    return _section("config", "Config", table("Leaves in which the runs differ", ["leaf", *runs], rows))


def _newest_samples(runs: Mapping[str, RunFiles]) -> Section | None:
    figures = []
    for name, run in runs.items():
        frames = gallery.training_samples(run, Budget(PICTURE_BYTES // len(runs)), most=1)
        if frames:
            ((caption, (picture,)),) = frames.frames
            figures.append(_figure(picture, f"{name}, {caption}"))
    if not figures:
        return None
    return _section("samples", "Newest samples during training", element("div", join(figures), class_="gallery"))
