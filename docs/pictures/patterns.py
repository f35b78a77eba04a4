"""Draws docs/images/first_arrays.png from the data and the run of docs/start/first_arrays.md, in half a minute on two cores.

python docs/pictures/patterns.py
"""

import pathlib
import sys

import jax
import numpy as np
from matplotlib.figure import Figure

sys.path.append(str(pathlib.Path(__file__).parents[2] / "examples"))

import reaction_diffusion

from diffusion_jax import pretrained, sampling

IMAGE = pathlib.Path(__file__).parents[1] / "images" / "first_arrays.png"
NUM_COLUMNS = 8
COLORS = "black", "#0072B2"


def main() -> None:
    """Draws simulations and samples of the same kill rates, and the spots minus holes of all."""
    with np.load("patterns/test.npz") as arrays:
        fields, kill = arrays["x"], arrays["condition"]
    net = pretrained.load("runs/patterns")
    samples = net.sample(
        jax.random.key(1), len(kill), condition=kill, sampler=sampling.dpm_solver_pp(), steps=50, spacing="log_snr"
    )
    sets = {"simulation": fields, "sample": np.asarray(samples)}
    shown = [np.abs(kill[:, 0] - wanted).argmin() for wanted in np.linspace(*reaction_diffusion.KILL, NUM_COLUMNS)]
    figure = Figure((8, 5.2), layout="constrained", dpi=110)
    figure.suptitle("Concentration v by kill rate", fontsize=11)
    top, bottom = figure.subfigures(2, 1, height_ratios=(2.4, 2.8))
    panels = top.subplots(2, NUM_COLUMNS)
    for panel, i in zip(panels[0], shown, strict=True):
        panel.set_title(f"{kill[i, 0]:.4f}", fontsize=9)
    for row, (name, x) in zip(panels, sets.items(), strict=True):
        for panel, i in zip(row, shown, strict=True):
            picture = panel.imshow(x[i, :, :, 1], vmin=0, vmax=0.4)
            panel.set(xticks=[], yticks=[])
        row[0].set_ylabel(name, fontsize=9)
    top.colorbar(picture, ax=panels, shrink=0.8, label="v")
    axes = bottom.subplots()
    for (name, x), color, marker in zip(sets.items(), COLORS, "ox", strict=True):
        spots = reaction_diffusion.statistics(x)["spots_minus_holes"]
        axes.plot(kill[:, 0], spots, marker, color=color, markersize=4, fillstyle="none", label=f"{len(x)} {name}s")
    axes.set(xlabel="kill rate", ylabel="spots minus holes", yticks=range(-6, 10, 3))
    axes.grid(color="0.9")
    axes.legend()
    figure.savefig(IMAGE)


if __name__ == "__main__":
    main()
