"""Draws the decisions of docs/guides/choosing.md: `python docs/pictures/choosing.py` writes docs/images/choosing.svg.

The boxes have the settings of the page's first table, which has the measurements.
"""

from __future__ import annotations

import pathlib

from matplotlib.axes import Axes
from matplotlib.figure import Figure

IMAGE = pathlib.Path(__file__).parent.parent / "images" / "choosing.svg"
WIDTH, HEIGHT = 5.2, 6.1  # inches: letters are readable when a phone scales the picture to 360 pixels
LEFT, RIGHT, STEP = 1.0, 3.62, 0.76  # the centers of both columns, and the height of a row
BLUE, GREEN, GRAY = "#0072B2", "#009E73", "0.3"
# The first question with the answer yes decides.
KINDS = (
    (
        "Do you have weights\nof another project?",
        "published weights\n20 steps of dpm_solver_pp: log_snr for\na linear schedule, otherwise trailing",
    ),
    (
        "Are your data vectors?",
        "model.kind=mlp, prediction=v,\nschedule=cosine, data.levels=None\n50 steps of dpm_solver_pp, log_snr",
    ),
    ("Series, fields\nor volumes?", "prediction=v, data.levels=None\n50 steps of dpm_solver_pp, log_snr"),
    (
        "Images, for a good\nlikelihood?",
        "path=edm, draw=log_normal,\npreconditioning=edm, prediction=x_0,\nweighting=edm",
    ),
    ("Other images", "prediction=v, schedule=cosine\n20 steps of dpm_solver_pp, trailing"),
)
# Every question with the answer yes adds settings.
ADDITIONS = (
    (
        "Samples of a class,\nfor a condition?",
        "model.num_classes=N,\nmodel.label_dropout=0.1\nsampling.guidance_scale=2",
    ),
    ("Two thousand examples\nor fewer?", "model.dropout=0.35, a short training"),
)


def row(axes: Axes, y: float, question: str, settings: str) -> None:
    """Draws a question and its settings, with an arrow between them."""
    for x, text, color, family in ((LEFT, question, BLUE, "sans-serif"), (RIGHT, settings, GREEN, "monospace")):
        style = {"boxstyle": "round,pad=0.35", "facecolor": "white", "edgecolor": color, "linewidth": 1.2}
        axes.text(x, y, text, ha="center", va="center", fontsize=7.5, family=family, bbox=style, linespacing=1.3)
    arrow(axes, (1.82, y), (2.18, y), "yes" if "?" in question else "", (1.98, y + 0.1))


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], text: str, at: tuple[float, float]) -> None:
    """Draws an arrow with a text at a place."""
    axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": GRAY, "linewidth": 1})
    axes.text(*at, text, fontsize=7.5, color=GRAY, ha="center", va="center")


def draw() -> Figure:
    """Questions on the left, from top to bottom, and the settings for the answer yes on the right."""
    figure = Figure((WIDTH, HEIGHT))
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, WIDTH), ylim=(0, HEIGHT))
    axes.axis("off")
    y = HEIGHT - 0.2
    for title, rows in (("1. The kind of data: follow the arrows", KINDS), ("2. Add what you need", ADDITIONS)):
        axes.text(0.12, y, title, ha="left", va="center", fontsize=9, weight="bold")
        y -= 0.5
        for i, (question, settings) in enumerate(rows):
            row(axes, y, question, settings)
            if rows is KINDS and i + 1 < len(KINDS):
                arrow(axes, (LEFT, y - 0.22), (LEFT, y - STEP + 0.22), "no", (LEFT + 0.18, y - STEP / 2))
            y -= STEP
        y += STEP - 0.55
    return figure


if __name__ == "__main__":
    draw().savefig(IMAGE, facecolor="white")
