"""The sections of the page about one run, each an element or None if the run has nothing to show there."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from diffusion_jax.config import flatten
from diffusion_jax.evaluation import named_metrics
from diffusion_jax.report import commands, gallery
from diffusion_jax.report.collect import RunFiles, sample_files
from diffusion_jax.report.curves import make_series, training_charts
from diffusion_jax.report.embed import Budget
from diffusion_jax.report.gallery import Captioned, Frames
from diffusion_jax.report.markup import Markup, definitions, element, join, table
from diffusion_jax.runs.metric_records import add_likelihood, table_cells
from diffusion_jax.runs.sample import read_settings

__all__ = [
    "LIKELIHOOD_TERMS",
    "PageData",
    "chart_grid",
    "examples_of",
    "format_value",
    "metrics_table",
    "run_sections",
    "section",
]

PageData = dict[str, Any]  # for report.js: {"charts": {id: chart}, "frames": {id: frames}}
_MAX_RECORDS, _MAX_COMMANDS = 20, 3
LIKELIHOOD_TERMS = {
    "bits_per_dim": "total bound, upper bound of the negative log-likelihood",
    "nats_per_dim": "the same in nats",
    "prior": "KL of q(x_T | x_0) from the standard normal, in bits per dimension",
    "transitions": "sum of the terms of the steps between, in bits per dimension",
    "decoder": "L_0, the code of x_0 given x_1, in bits per dimension",
    "ode_bits_per_dim": "by the probability-flow ODE, no bound",
    "ode_nats_per_dim": "the same in nats",
}


def section(identifier: str, title: str, *content: Any) -> tuple[str, str, Markup]:
    """(id, title, element) of a section; the heading has its own id, so that the element is a named region."""
    heading = element("h2", title, id=f"{identifier}-title")
    return (
        identifier,
        title,
        element("section", heading, *content, id=identifier, aria_labelledby=f"{identifier}-title"),
    )


def run_sections(run: RunFiles, data: PageData, num_bytes: int) -> list[tuple[str, str, Markup]]:
    """The sections of a run that have something to show. num_bytes: of all pictures together."""
    training, denoising, samples, others = (Budget(int(num_bytes * share)) for share in (0.28, 0.2, 0.12, 0.4))
    parts = [
        _curves(run, data),
        _training_samples(run, data, training),
        _denoising(run, data, denoising),
        _samples(run, samples, others),
        _likelihood(run, data),
        _metrics(run),
        _memorization(run, others),
        _other_pictures(run, others),
        _events(run),
        _config(run),
        _environment(run),
        _commands(run),
    ]
    return [part for part in parts if part is not None]


def _curves(run: RunFiles, data: PageData) -> tuple[str, str, Markup] | None:
    charts = training_charts(run.lines)
    if not charts:
        return section("curves", "Curves", element("p", "Nothing is logged yet: the run has no line of metrics."))
    longest = max(series["values"] for chart in charts for series in chart["series"])
    points = max(len(series["x"]) for chart in charts for series in chart["series"])
    text = f"{longest:,} lines of the log."
    if points < longest:
        text += f" They are shown as {points} means, with a band from the lowest to the highest value of each interval."
    return section("curves", "Curves", element("p", text), chart_grid("curve", charts, data))


def chart_grid(prefix: str, charts: Iterable[dict[str, Any]], data: PageData) -> Markup:
    """The places of charts, which report.js fills, each with its numbers as a table."""
    figures = []
    for number, chart in enumerate(charts):
        identifier = f"{prefix}{number}"
        data["charts"][identifier] = chart
        figures.append(
            element(
                "figure",
                element("figcaption", chart["title"]),
                element("div", id=identifier, class_="chart", data_chart=identifier),
                element("details", element("summary", "Numbers"), _numbers(chart)),
            )
        )
    return element("div", *figures, class_="charts")


def _numbers(chart: Mapping[str, Any], rows: int = 12) -> Markup:
    """Some values of a chart as a table, for those who do not see the drawing."""
    parts = []
    for series in chart["series"]:
        chosen = gallery.even_subset(len(series["x"]), rows)
        bounds = ("low", "high") if "low" in series else ()
        header = [chart["x"], chart["y"], *({"low": "lowest", "high": "highest"}[name] for name in bounds)]
        lines = [[_number(series[name][i]) for name in ("x", "mean", *bounds)] for i in chosen]
        parts.append(table(f"{chart['title']}: {series['label']}", header, lines))
    return join(parts)


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.5g}"


def _frames(identifier: str, frames: Frames, data: PageData, start: int) -> Markup:
    """Pictures with a slider. The first is in the page itself, so that it is seen without scripts, too."""
    shown_caption, shown = frames.frames[start]
    data["frames"][identifier] = {
        "start": start,
        "captions": [caption for caption, _ in frames.frames],
        "names": frames.names,
        "images": [[None if i == start else p.src for p in drawn] for i, (_, drawn) in enumerate(frames.frames)],
    }
    images = [
        element(
            "figure",
            element("img", src=picture.src, alt=f"{name}, {shown_caption}", width=picture.width, height=picture.height),
            element("figcaption", name),
        )
        for name, picture in zip(frames.names, shown, strict=True)
    ]
    label = f"{identifier}-caption"
    controls = [
        element("button", "Previous", type="button", data_move=-1),
        element("input", type="range", min=0, max=len(frames.frames) - 1, step=1, value=start, aria_labelledby=label),
        element("button", "Next", type="button", data_move=1),
        element("button", "Play", type="button", data_play=True, aria_pressed="false"),
    ]
    return element(
        "div",
        element("div", *images, class_="pictures"),
        element("p", shown_caption, id=label, class_="frame-caption", aria_live="polite"),
        element("div", *controls, class_="controls"),
        element("p", frames.note) if frames.note else "",
        data_frames=identifier,
        class_="frames",
    )


def _training_samples(run: RunFiles, data: PageData, budget: Budget) -> tuple[str, str, Markup] | None:
    frames = gallery.training_samples(run, budget)
    if frames is None:
        return None
    text = "The same noise at every step, so that only the network changes."
    body = _frames("training-frames", frames, data, len(frames.frames) - 1)
    return section("training-samples", "Samples during training", element("p", text), body)


def _denoising(run: RunFiles, data: PageData, budget: Budget) -> tuple[str, str, Markup] | None:
    frames, picture = gallery.denoising(run, budget)
    if frames and frames.frames:
        return section("denoising", "Denoising, step by step", _frames("denoising-frames", frames, data, 0))
    if picture:
        return section("denoising", "Denoising", _figures([picture]))
    return None


def _figures(captioned: Iterable[Captioned], class_: str = "gallery") -> Markup:
    figures = []
    for picture, caption in captioned:
        image = element("img", src=picture.src, alt=caption, width=picture.width, height=picture.height)
        text = f"{caption} ({picture.note})" if picture.note else caption
        figures.append(element("figure", image, element("figcaption", text)))
    return element("div", *figures, class_=class_)


def _is_sample_picture(run: RunFiles) -> Callable[[str], bool]:
    names = {f"{path.stem}.png" for path in sample_files(run.directory)}
    return lambda name: name in names


def _samples(run: RunFiles, budget: Budget, others: Budget) -> tuple[str, str, Markup] | None:
    rows, note = gallery.class_rows(run, budget)
    content: list[Any] = [element("p", note), _figures(rows, "classes")] if rows else []
    files, left_out = gallery.other_pictures(run, Budget(others.left // 2), _is_sample_picture(run))
    others.left -= others.left // 2
    if files:
        content += [_figures(files), _left_out(left_out)]
    return section("samples", "Samples", *content) if content else None


def _left_out(names: Sequence[str]) -> Markup:
    if not names:
        return Markup("")
    shown = ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
    return element("p", f"Left out, because this file stays small: {shown}.")


def _likelihood(run: RunFiles, data: PageData) -> tuple[str, str, Markup] | None:
    report, terms = run.likelihood, run.terms
    rows = []
    for name, meaning in LIKELIHOOD_TERMS.items():
        if isinstance(report.get(name), int | float):
            rows.append([name, format_value(report[name], report.get(f"{name}_standard_error")), meaning])
    content: list[Any] = []
    if rows:
        of = {name: report.get(name) for name in ("num_examples", "weights", "step")}
        of["examples"] = examples_of(report)
        caption = "{num_examples} examples of {examples}, the {weights} weights of step {step}".format(**of)
        content.append(table(caption, ["quantity", "value ± standard error", "meaning"], rows))
    if {"t", "vlb", "rate", "distortion"} <= terms.keys():
        nats = "nats_per_dim" in report
        scale, unit = (math.log(2), "nats per dimension") if nats else (1.0, "bits per dimension")
        error = terms.get("vlb_standard_error")
        vlb = make_series(
            "mean ± standard error",
            terms["t"] + 1,
            scale * terms["vlb"],
            error=None if error is None else scale * error,
        )
        order = terms["rate"].argsort()
        coded = make_series("progressive code", scale * terms["rate"][order], terms["distortion"][order])
        charts = [
            {
                "title": "Terms of the bound",
                "x": "timestep t (1 is the cleanest)",
                "y": unit,
                "log": True,
                "xlog": True,
                "series": [vlb],
            },
            {
                "title": "Rate and distortion",
                "x": f"rate ({unit})",
                "y": "distortion (RMSE, " + ("standardized data)" if nats else "0-255)"),
                "log": False,
                "series": [coded],
            },
        ]
        content.append(chart_grid("likelihood", charts, data))
    return section("likelihood", "Likelihood", *content) if content else None


def examples_of(likelihood: Mapping[str, Any]) -> str:
    """The data set of likelihood.json and its split, if it has one."""
    return " ".join(str(likelihood[name]) for name in ("dataset", "split") if likelihood.get(name))


def format_value(value: float, error: float | None = None) -> str:
    """A number with its standard error."""
    return f"{value:.4g}" + (f" ± {error:.1g}" if error is not None else "")


def metrics_table(runs: Mapping[str, RunFiles]) -> Markup | None:
    """The metrics of all records of runs by name, and what they mean; None if nothing was measured."""
    pairs = []
    for run in runs.values():
        records = add_likelihood(run.records, run.likelihood) if run.likelihood else run.records
        pairs += [(run.directory, record) for record in records[-_MAX_RECORDS:]]
    if not pairs:
        return None
    columns, rows = table_cells(pairs)
    names = {str(run.directory): name for name, run in runs.items()}
    texts = [[names[row["run"]], *(row.get(column, "") for column in columns[1:])] for row in rows]
    body = table("A row for each measurement, ± one standard error", columns, texts, class_="numbers")
    meanings = named_metrics.DEFINITIONS | LIKELIHOOD_TERMS
    return join([body, definitions((name, meanings[name]) for name in columns if name in meanings)])


def _metrics(run: RunFiles) -> tuple[str, str, Markup] | None:
    body = metrics_table({run.name: run})
    return None if body is None else section("metrics", "Metrics", body)


def _memorization(run: RunFiles, budget: Budget) -> tuple[str, str, Markup] | None:
    reports = [record["memorization"] for record in run.records if isinstance(record.get("memorization"), dict)]
    wanted = {str(report.get("picture")) for report in reports}
    shown, left_out = gallery.other_pictures(run, Budget(budget.left // 2), wanted.__contains__)
    budget.left -= budget.left // 2
    if not reports:
        return None
    names = list(
        dict.fromkeys(name for report in reports for name, value in report.items() if isinstance(value, float))
    )
    rows = [[report.get("picture", ""), *(_cell(report.get(name)) for name in names)] for report in reports]
    text = "The samples nearest to examples of the reference, each before its nearest examples, with their distances."
    header = ["picture", *(name.replace("_", " ") for name in names)]
    content = [element("p", text), _figures(shown), _left_out(left_out), table("Distances", header, rows)]
    return section("memorization", "Memorization", *content)


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)


def _other_pictures(run: RunFiles, budget: Budget) -> tuple[str, str, Markup] | None:
    is_sample = _is_sample_picture(run)

    def is_wanted(name: str) -> bool:
        known = ("train_step", "memorization_", "likelihood_terms", "rate_distortion")
        return not (is_sample(name) or name.startswith(known) or name.endswith(f"{gallery.TRAJECTORY}.png"))

    shown, left_out = gallery.other_pictures(run, budget, is_wanted)
    if not shown and not left_out:
        return None
    return section("pictures", "Other pictures", _figures(shown), _left_out(left_out))


def _events(run: RunFiles) -> tuple[str, str, Markup] | None:
    if not run.events:
        return None
    return section(
        "events", "Events", table("Times are in UTC", ["time", "event", "what happened"], run.events, "times")
    )


def _config(run: RunFiles) -> tuple[str, str, Markup] | None:
    if run.config is None:
        return None
    changed = commands.differences_from_defaults(run.config)
    rows = [[name, str(value), str(default), text] for name, (value, default, text) in changed.items()]
    body = table("Leaves that differ from the defaults", ["leaf", "value", "default", "meaning"], rows)
    every = [[name, str(value)] for name, value in flatten(run.config).items()]
    return section(
        "config",
        "Config",
        body,
        element("details", element("summary", "All leaves"), table("All leaves", ["leaf", "value"], every)),
    )


def _environment(run: RunFiles) -> tuple[str, str, Markup] | None:
    rows: list[tuple[str, str]] = []
    found = [launch["environment"] for launch in run.launches if launch.get("environment")]
    different = list({json.dumps(each, sort_keys=True): each for each in found}.values())
    for number, each in enumerate(different, 1):
        suffix = f" ({number})" if len(different) > 1 else ""
        versions = ", ".join(f"{name} {version}" for name, version in each.get("versions", {}).items())
        rows += [(f"versions{suffix}", versions), (f"system{suffix}", f"{each.get('system')}, {each.get('cpus')} CPUs")]
        devices = f"{each.get('devices')} x {each.get('device_kind')} ({each.get('backend')})"
        rows.append((f"devices{suffix}", f"{devices}, {each.get('processes')} processes"))
    if run.data:
        rows.append(
            ("data", f"{run.data.get('images', 0):,} examples, SHA-256 of some: {run.data.get('sha256_of_some')}")
        )
        if run.data.get("classes"):
            rows.append(("classes", ", ".join(map(str, run.data["classes"]))))
    return section("environment", "Environment and data", definitions(rows)) if rows else None


def _commands(run: RunFiles) -> tuple[str, str, Markup] | None:
    config = run.config
    if config is None:
        return None
    lines = ["# Train, in a new directory DIR.", commands.train_command(config)]
    for path in list(sample_files(run.directory))[:_MAX_COMMANDS]:
        stored = read_settings(path)
        if stored:
            lines += [f"# Draw {path.name}.", commands.sampling_command(config, stored)]
    for record in run.records[-_MAX_COMMANDS:]:
        lines += ["# Measure samples.", commands.evaluation_command(config, record)]
    if run.likelihood:
        lines += ["# Measure the likelihood.", commands.likelihood_command(config, run.likelihood)]
    text = join(_breakable(line) for line in dict.fromkeys(lines))
    return section("reproduce", "Commands to reproduce", element("pre", text, tabindex=0, aria_label="Commands"))


def _breakable(command: str) -> Markup:
    """A line whose words a narrow window keeps whole: browsers would break it after hyphens."""
    words = command.split(" ")
    return join([part for word in words for part in (element("span", word, class_="word"), " ")][:-1] + ["\n"])
