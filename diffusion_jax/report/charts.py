"""Curves for the page: the log of a run, thinned to the mean, the lowest and the highest value of each interval."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from diffusion_jax.report.gallery import even_subset
from diffusion_jax.report.markup import Markup, element, join, table

__all__ = ["MAX_POINTS", "Chart", "chart_grid", "make_series", "training_charts"]

Chart = dict[str, Any]  # as report.js draws it
MAX_POINTS = 600  # of a line

# Title, unit, names of the log's values with their labels, whether the axis is logarithmic at first.
_CHARTS: tuple[tuple[str, str, dict[str, str], bool], ...] = (
    ("Loss", "loss", {"loss": "loss"}, True),
    (
        "Loss by noise level",
        "loss",
        {
            "loss_q1": "least noisy quarter of the timesteps",
            "loss_q2": "second quarter",
            "loss_q3": "third quarter",
            "loss_q4": "noisiest quarter",
        },
        True,
    ),
    ("Squared error of the prediction", "mse", {"mse": "mse"}, True),
    ("Terms of the variational bound", "bits per dimension", {"vlb": "vlb"}, True),
    ("Accuracy of the classifier", "fraction", {"accuracy": "accuracy"}, False),
    ("Learning rate", "learning rate", {"learning_rate": "learning rate"}, False),
    ("Gradient norm", "L2 norm", {"grad_norm": "gradient"}, True),
    ("Parameter norm", "L2 norm", {"param_norm": "parameters"}, False),
    ("Speed", "examples per second", {"images_per_second": "examples per second"}, False),
    ("Seconds per step", "seconds", {"step_seconds": "seconds per step"}, False),
    (
        "Where the time goes",
        "fraction of the time",
        {"compute": "train steps", "data_wait": "waiting for data", "logging": "lines, pictures and checkpoints"},
        False,
    ),
    ("Goodput", "fraction of the wall time", {"goodput": "steps that count, since the first launch"}, False),
)
_NOT_DRAWN = {"step", "seconds_left"}
_MAX_OTHER_CHARTS = 12


def training_charts(lines: Sequence[Mapping[str, Any]], max_points: int = MAX_POINTS) -> list[Chart]:
    """The charts of a log. Values that `_CHARTS` does not list have a chart each."""
    known = {name for _, _, labels, _ in _CHARTS for name in labels}
    others = [name for name in dict.fromkeys(key for line in lines for key in line) if name not in known | _NOT_DRAWN]
    wanted = [*_CHARTS, *((name.replace("_", " "), name, {name: name}, False) for name in others[:_MAX_OTHER_CHARTS])]
    charts = []
    for title, unit, labels, is_log in wanted:
        drawn = [make_series(label, *_values(lines, name), max_points) for name, label in labels.items()]
        drawn = [series for series in drawn if series["x"]]
        if drawn:
            charts.append({"title": title, "x": "training step", "y": unit, "log": is_log, "series": drawn})
    return charts


def _values(lines: Sequence[Mapping[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    pairs = [(line["step"], line[name]) for line in lines if isinstance(line.get(name), int | float)]
    x, y = np.array(pairs, np.float64).reshape(-1, 2).T
    order = np.argsort(x, kind="stable")
    return x[order], y[order]


def make_series(label: str, x: np.ndarray, y: np.ndarray, max_points: int = MAX_POINTS) -> dict[str, Any]:
    """A line of at most `max_points` points: x, the mean, and the lowest and highest value of each interval.

    x: increasing. Values that are not finite are left out.
    """
    finite = np.isfinite(x) & np.isfinite(y)
    x, y = np.asarray(x, np.float64)[finite], np.asarray(y, np.float64)[finite]
    low, high = y, y
    series: dict[str, Any] = {"label": label, "values": len(x)}
    if len(x) > max_points:
        starts = np.unique(np.linspace(0, len(x), max_points, endpoint=False).astype(int))
        counts = np.diff([*starts, len(x)])
        x, y = np.add.reduceat(x, starts) / counts, np.add.reduceat(y, starts) / counts
        low, high = np.minimum.reduceat(low, starts), np.maximum.reduceat(high, starts)
    series |= {"x": _rounded(x, 8), "mean": _rounded(y)}
    if (low < high).any():
        series |= {"low": _rounded(low), "high": _rounded(high)}
    return series


def _rounded(values: np.ndarray, digits: int = 5) -> list[float]:
    """Numbers with so many digits, which the JSON of the page stores."""
    return [float(f"{value:.{digits}g}") for value in values]


def chart_grid(prefix: str, charts: Iterable[dict[str, Any]], data: dict[str, Any]) -> Markup:
    """The places of charts, which report.js fills, each with its numbers as a table. data: of the page, gets the charts."""
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
        chosen = even_subset(len(series["x"]), rows)
        lines = [[f"{series[name][i]:,.8g}" for name in ("x", "mean")] for i in chosen]
        parts.append(table(f"{chart['title']}: {series['label']}", [chart["x"], chart["y"]], lines))
    return join(parts)
