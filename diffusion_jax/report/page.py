"""The page about one run, and the page that compares several runs.

A section is a function that returns the content under a title; without content, the page omits the section.
"""

from __future__ import annotations

import datetime
import html
import importlib.resources
import json
import string
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import diffusion_jax
from diffusion_jax.config import SETTINGS, defaults, flatten
from diffusion_jax.console import format_duration
from diffusion_jax.errors import list_names, shorten
from diffusion_jax.evaluation.features import sample_files
from diffusion_jax.metrics import MEANINGS, find_meaning, format_value, heading
from diffusion_jax.provenance import Provenance
from diffusion_jax.report import figures
from diffusion_jax.report.collect import RunFiles, sample_command, table_cells, train_command
from diffusion_jax.report.figures import MAX_POINTS, Budget, Chart, Frames, Picture, even_subset, training_charts

__all__ = ["Markup", "comparison_page", "element", "json_script", "run_page", "table"]

# ---- HTML


class Markup(str):
    """HTML. Any other string is text, which is escaped."""


def _escape(content: Any) -> str:
    return content if isinstance(content, Markup) else html.escape(str(content))


def join(parts: Iterable[Any]) -> Markup:
    """Concatenates parts, and escapes text."""
    return Markup("".join(map(_escape, parts)))


def element(name: str, /, *content: Any, **attributes: Any) -> Markup:
    """<name attributes>content</name>; without content, a void element such as <img> where HTML has one.

    attributes: `class_` is class, and other underscores are hyphens. True is an attribute without a value; None and False
    are left out.
    """
    written = ""
    for key, value in attributes.items():
        key = key.rstrip("_").replace("_", "-")
        if value is True:
            written += f" {key}"
        elif value is not None and value is not False:
            written += f' {key}="{html.escape(str(value))}"'
    if name in ("img", "input", "meta", "link", "br"):
        return Markup(f"<{name}{written}>")
    return Markup(f"<{name}{written}>{join(content)}</{name}>")


def table(caption: str, header: Sequence[Any], rows: Iterable[Sequence[Any]], class_: str | None = None) -> Markup:
    """Returns a table that scrolls sideways if wider than the page; the first cell of each row is the row's heading."""
    head = element("tr", *(element("th", cell, scope="col") for cell in header))
    body = (
        element("tr", element("th", row[0], scope="row"), *(element("td", cell) for cell in row[1:])) for row in rows
    )
    return element(
        "div",
        element("table", element("caption", caption), element("thead", head), element("tbody", *body), class_=class_),
        class_="scroll",
        role="region",
        aria_label=caption,
        tabindex=0,
    )


def definitions(entries: Iterable[tuple[Any, Any]]) -> Markup:
    """Returns a list of terms and descriptions."""
    return element("dl", *(join([element("dt", term), element("dd", text)]) for term, text in entries))


def json_script(value: Any) -> Markup:
    """Returns JSON that report.js reads. "<" is escaped, so that no text in the JSON can end the element."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    return Markup(f'<script type="application/json">{text}</script>')


# ---- Pages

Sections = Mapping[tuple[str, str], Callable[[], Any]]  # {(id, title): function that returns the content}
PICTURE_BYTES = 3_000_000  # before base64, which adds a third
_MAX_RECORDS, _NUMBERS_OF_A_CHART = 20, 12


def run_page(run: RunFiles) -> str:
    """Returns the page of one run."""
    training, denoising, others = (Budget(int(PICTURE_BYTES * share), run.notes) for share in (0.4, 0.15, 0.45))
    sections: Sections = {
        ("curves", "Curves"): lambda: _curves(run),
        ("training-samples", "Samples during training"): lambda: _frames(
            figures.training_samples(run, training), "training-samples", -1
        ),
        ("denoising", "Denoising, step by step"): lambda: _frames(figures.denoising(run, denoising), "denoising", 0),
        ("likelihood", "Likelihood"): lambda: _likelihood(run),
        ("metrics", "Metrics"): lambda: _metrics({run.name: run}),
        ("pictures", "Pictures"): lambda: _pictures(run, others),
        ("launches", "Launches"): lambda: _launches(run),
        ("config", "Config"): lambda: _config(run),
        ("environment", "Environment and data"): lambda: _environment(run),
        ("reproduce", "Command to reproduce"): lambda: _command(run),
    }
    head = definitions((name, value) for name, value in run.status.items() if name != "directory")
    if not run.status:
        head = element("p", "The directory holds no run yet: it has no config.json.")
    return _page(f"Run {run.name}", head, {run.name: run}, sections)


def comparison_page(runs: Sequence[RunFiles]) -> str:
    """Returns one page about several runs: states, curves, differing settings, metrics and newest pictures."""
    named: dict[str, RunFiles] = {}
    for run in runs:  # equal names get a number
        count = sum(name == run.name or name.startswith(f"{run.name} (") for name in named)
        named[f"{run.name} ({count + 1})" if count else run.name] = run

    def states():
        keys = list(dict.fromkeys(key for run in runs for key in run.status if key != "directory"))
        rows = [[name, *(run.status.get(key, "") for key in keys)] for name, run in named.items()]
        return table("The state of each run", ["run", *keys], rows)

    def config():
        settings = [{} if run.config is None else flatten(run.config) for run in runs]
        keys = dict.fromkeys(key for each in settings for key in each)
        rows = [[key, *(str(each.get(key, "")) for each in settings)] for key in keys]
        rows = [row for row in rows if len(set(row[1:])) > 1]
        if not rows:
            return element("p", "The configs are equal.")
        return table("Settings in which the runs differ", ["setting", *named], rows)

    def samples():
        newest = []
        for name, run in named.items():
            frames = figures.training_samples(run, Budget(PICTURE_BYTES // len(runs), run.notes), most=1)
            for caption, (picture,) in frames.frames if frames else ():
                newest.append(picture._replace(caption=f"{name}, {caption}"))
        return _gallery(newest) if newest else ""

    def curves():
        logs = {name: run.lines for name, run in named.items()}
        return _chart_grid(training_charts(logs, max(MAX_POINTS // len(runs), 60)))

    sections: Sections = {
        ("states", "Runs"): states,
        ("curves", "Curves"): curves,
        ("config", "Config"): config,
        ("metrics", "Metrics"): lambda: _metrics(named),
        ("samples", "Newest samples during training"): samples,
    }
    return _page(f"{len(runs)} runs: {', '.join(named)}", "", named, sections)


def _page(title: str, head: str, runs: Mapping[str, RunFiles], sections: Sections) -> str:
    """Returns a page whose notes list the files that cannot be read, and the sections that fail on invalid values."""
    links, shown, problems = [], [], []
    for (identifier, name), make in sections.items():
        try:
            content = make()
        except Exception as error:  # a stranger's file may hold any values
            reason = shorten(str(error), 200)
            problems.append(f"A section is left out, because a file holds invalid values ({reason})")
            continue
        if content:
            title_id = f"{identifier}-title"  # the title makes the section a named region
            shown.append(
                element("section", element("h2", name, id=title_id), content, id=identifier, aria_labelledby=title_id)
            )
            links.append(element("li", element("a", name, href=f"#{identifier}")))
    notes = [f"{name}: {note}" if len(runs) > 1 else note for name, run in runs.items() for note in run.notes]
    static = importlib.resources.files("diffusion_jax.report") / "static"
    files = {path.name.replace(".", "_"): path.read_text() for path in static.iterdir() if path.name != "model_card.md"}
    return string.Template(files.pop("page_html")).substitute(
        files,
        title=_escape(title),
        written=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC"),
        version=diffusion_jax.__version__,
        links=join(links),
        content=join([head, _notes([*notes, *problems], aria_label="Notes"), *shown]),
    )


def _notes(notes: Iterable[str], **attributes: str) -> Markup:
    items = [element("li", note) for note in notes]
    return element("ul", *items, class_="notes", **attributes) if items else Markup("")


def _chart_grid(charts: Sequence[Chart]) -> Markup:
    """Returns the values of charts, which report.js draws, and for screen readers some numbers of each chart as tables."""
    if not charts:
        return element("p", "Nothing is logged yet.")
    shown = []
    for chart in charts:
        tables = []
        for series in chart["series"]:
            chosen = even_subset(len(series["x"]), _NUMBERS_OF_A_CHART)
            rows = [[f"{series[name][i]:,.8g}" for name in ("x", "mean")] for i in chosen]
            tables.append(table(f"{chart['title']}: {series['label']}", [chart["x"], chart["y"]], rows))
        drawing = element("div", json_script(chart), class_="chart")
        numbers = element("details", element("summary", "Numbers"), *tables)
        shown.append(element("figure", element("figcaption", chart["title"]), drawing, numbers))
    return element("div", *shown, class_="charts")


# ---- Sections of one run


def _curves(run: RunFiles) -> Markup:
    charts = training_charts({run.name: run.lines})
    drawn = [series for chart in charts for series in chart["series"]]
    longest = max((series["values"] for series in drawn), default=0)
    points = max((len(series["x"]) for series in drawn), default=0)
    text = f"{longest:,} lines of the log."
    if points < longest:
        text += f" They are shown as {points} means, with a band from the lowest to the highest value of each interval."
    return join([element("p", text) if charts else "", _chart_grid(charts)])


def _frames(frames: Frames | None, identifier: str, start: int) -> str:
    """Returns pictures with a slider. The first picture is an HTML element, so that it is visible without scripts, too."""
    if frames is None:
        return ""
    start %= len(frames.frames)
    shown_caption, shown = frames.frames[start]
    data = {
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
        json_script(data),
        class_="frames",
    )
    return join([slider, element("p", frames.note)])


def _figure(picture: Picture, caption: str) -> Markup:
    image = element("img", src=picture.src, alt=picture.caption, width=picture.width, height=picture.height)
    return element("figure", image, element("figcaption", caption))


def _gallery(pictures: Iterable[Picture]) -> Markup:
    return element("div", *(_figure(picture, picture.caption) for picture in pictures), class_="gallery")


def _likelihood(run: RunFiles) -> str:
    report = run.likelihood
    rows = [
        [heading(name), format_value(report[name], report.get(f"{name}_standard_error")), meaning.text]
        for name, meaning in MEANINGS.items()
        if isinstance(report.get(name), int | float)
    ]
    examples = " ".join(str(report[name]) for name in ("dataset", "split") if report.get(name))
    caption = f"{report.get('num_examples')} examples of {examples}, "
    caption += f"the {report.get('weights')} weights of step {report.get('step')}"
    return table(caption, ["quantity", "value ± standard error", "meaning"], rows) if rows else ""


def _metrics(runs: Mapping[str, RunFiles]) -> str:
    """Returns a table of all metrics, with explanations. runs: {name: run}."""
    records: list[dict[str, Any]] = [
        {"run": name} | record for name, run in runs.items() for record in run.measurements()[-_MAX_RECORDS:]
    ]
    if not records:
        return ""
    columns, header, rows = table_cells(records)
    body = table("A row for each measurement, ± one standard error", header, rows, class_="numbers")
    notes = dict.fromkeys(
        f"{record['run']}, {name}: {note}" for record in records for name, note in record.get("notes", {}).items()
    )
    meanings = {column: meaning for column in columns if (meaning := find_meaning(column))}
    explained = definitions((f"{m.name}, {key} in files", m.text) for key, m in meanings.items())
    return join([body, _notes(notes), explained])


def _pictures(run: RunFiles, budget: Budget) -> str:
    shown, left_out = figures.other_pictures(run, budget)
    text = f"Left out, because this file stays small: {list_names(left_out, 10)}."
    return join([_gallery(shown), element("p", text) if left_out else ""]) if shown or left_out else ""


def _launches(run: RunFiles) -> str:
    """Returns a table with a row for each launch, and a list of unused checkpoints."""
    if not run.launches:
        return ""
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
    text = f"Damaged or unfinished checkpoints, which are not used: {', '.join(unused)}."
    return join([table("Launches", header, rows, "times"), element("p", text) if unused else ""])


def _config(run: RunFiles) -> str:
    if run.config is None:
        return ""
    values = flatten(run.config)
    rows = [
        [name, str(values[name]), str(default), SETTINGS[name].description]
        for name, default in defaults(values).items()
        if values[name] != default
    ]
    every = table("All settings", ["setting", "value"], [[name, str(value)] for name, value in values.items()])
    changed = table("Settings that differ from the defaults", ["setting", "value", "default", "meaning"], rows)
    return join([changed, element("details", element("summary", "All settings"), every)])


def _environment(run: RunFiles) -> str:
    """Describes the environment of the last launch, and the data."""
    rows: list[tuple[str, str]] = []
    environment = run.launches[-1].get("environment") if run.launches else None
    if environment:
        rows.append(("versions", ", ".join(f"{name} {version}" for name, version in environment["versions"].items())))
        rows.append(("system", "{system}, {cpus} CPUs".format(**environment)))
        devices = "{devices} x {device_kind} ({backend}), {processes} processes".format(**environment)
        rows.append(("devices", devices))
    if run.data:
        digest = run.data.get("sha256_of_some")
        rows.append(("data", f"{run.data.get('images', 0):,} examples, SHA-256 of some: {digest}"))
        if run.data.get("classes"):
            rows.append(("classes", ", ".join(map(str, run.data["classes"]))))
    return definitions(rows) if rows else ""


def _command(run: RunFiles) -> str:
    if run.config is None:
        return ""
    text = f"# Train again, in a new directory DIR.\n{train_command(run.config)}"
    provenance = next(filter(None, map(Provenance.read, sample_files(run.directory))), None)
    if provenance is not None:
        text += f"\n# Draw the newest samples again.\n{sample_command(run.config, provenance)}"
    return element("pre", text, tabindex=0, aria_label="Command")
