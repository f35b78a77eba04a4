"""Plots: every point inside the axes, every line told apart, and what the axes are."""

import importlib.util

import numpy as np
import pytest
from matplotlib.figure import Figure

from diffusion_jax.images import to_uint8
from diffusion_jax.runs import pictures
from diffusion_jax.runs.batch_sampler import SampleTrajectory
from diffusion_jax.runs.sample_pictures import draw_trajectory
from helpers.paths import ROOT


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are drawn, in place of their files."""
    figures = []
    monkeypatch.setattr(pictures, "_save_figure", lambda path, figure: figures.append(figure))
    return figures


def labeled(axes):
    assert axes.get_title() and axes.get_xlabel() and axes.get_ylabel()
    return lines(axes)


def lines(axes):
    return {text.get_text(): line for text, line in zip(axes.get_legend().get_texts(), axes.get_lines(), strict=True)}


@pytest.mark.parametrize("decoder", [1.8, 40.0, 1e-3, 3.4e-5, 1e-12, 0.0, -1e-9])
def test_the_decoder_term_is_inside_the_axes(drawn, decoder):
    """Where it is far below the other terms, an arrow on the axis stands for it, and the legend has its value."""
    terms = np.concatenate([[decoder], np.geomspace(2.0, 1e-4, 999)])
    pictures.plot_terms("", terms, "digits")
    (axes,) = drawn[0].axes
    lines = labeled(axes)
    (label,) = (label for label in lines if "decoder" in label)
    assert f"{decoder:.3g}" in label and ("below the axis" in label) == (decoder < 1e-5)
    (x,), (y,) = lines[label].get_data()
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    assert left < x < right and low <= y < high and x == 1
    assert y == decoder or lines[label].get_marker() == "v"
    assert low <= 1e-4 and high >= 2
    radius = lines[label].get_markersize() / 2 * drawn[0].dpi / 72  # in pixels
    assert axes.transData.transform((x, y))[1] - radius > axes.bbox.y0


def test_the_plot_of_one_step_has_only_the_decoder_term(drawn):
    for decoder in (3.0, 0.0):
        pictures.plot_terms("", np.array([decoder]), "digits")
        assert drawn[-1].axes[0].get_ylim()[0] > 0


def test_grids_have_headers_and_captions():
    images = np.zeros((5, 8, 8, 1), np.uint8)
    plain, headed = (
        pictures.grid(images, columns=3, headers=headers) for headers in (None, ["t = 999", "t = 0", "image"])
    )
    np.testing.assert_array_equal(headed[14:], plain)
    words = [headed[:14, 68 * i + 4 : 68 * i + 68] for i in range(3)]
    assert all(word.max() > 150 for word in words) and (words[0] != words[1]).any()
    assert pictures.time_headers([949.5, 50.0]) == ["t = 949.5", "t = 50", "image"]


@pytest.mark.parametrize("channels", [1, 3])
def test_grids_have_titles_of_as_many_lines_as_they_need(channels):
    images = np.random.default_rng(0).integers(0, 256, (6, 8, 8, channels), np.uint8)
    plain = pictures.grid(images, columns=3)
    for title, lines in (("Samples", 1), ("Samples after 1,500 training steps, by DDIM", 2), ("x" * 100, 3)):
        picture = pictures.grid(images, columns=3, title=title)
        np.testing.assert_array_equal(picture[14 * lines :], plain)
        rows = picture[: 14 * lines].reshape(lines, 14, -1)
        assert all(row.max() > 150 for row in rows)
        assert (picture[: 14 * lines, -pictures.GAP :] == plain[0, 0, 0]).all()  # nothing runs over


def test_a_trajectory_of_images_has_its_times_and_the_classes_of_its_rows():
    x = np.random.default_rng(0).integers(0, 256, (3, 2, 8, 8, 1), np.uint8)
    plain = draw_trajectory(SampleTrajectory(x, np.array([999.0, 499.0])), "Samples")
    captioned = draw_trajectory(SampleTrajectory(x, np.array([999.0, 499.0])), "Samples", ["1: cat", "2: dog", "3"])
    assert len(captioned) == len(plain) + 2 * 14
    texts = [captioned[28 + 68 + 82 * row : 28 + 82 + 82 * row, -68:] for row in range(2)]
    assert all(text.max() > 150 for text in texts) and (texts[0] != texts[1]).any()


def test_lines_against_steps_differ(drawn):
    pictures.plot_against_steps("", {f"sampler {i}": {10: 3.0 + i, 20: 2.0} for i in range(30)}, "FID")
    looks = {(line.get_color(), line.get_marker()) for line in labeled(drawn[0].axes[0]).values()}
    assert len(looks) == 30


def test_neighbors_have_captions(drawn):
    """Gray and color."""
    for channels in (1, 3):
        image = np.zeros((8, 8, channels), np.uint8)
        rows = [("sample 7", image, image[None].repeat(2, axis=0)), ("sample 3", image, image[None].repeat(2, axis=0))]
        pictures.plot_neighbors("", rows, np.array([[0.5, 1.5], [0.75, 2.5]]), "samples of x")
        figure = drawn[-1]
        assert figure.get_suptitle() == "samples of x"
        texts = [text.get_text() for text in figure.axes[0].texts]
        assert texts[:3] == ["sample", "nearest", "nearest no. 2"]
        assert texts[3:] == ["sample 7", "distance 0.5", "distance 1.5", "sample 3", "distance 0.75", "distance 2.5"]


def test_every_solver_is_in_a_panel_where_no_two_lines_look_alike():
    """In the plot of docs/start/sampler.md."""
    path = ROOT / "benchmarks" / "samplers.py"
    spec = importlib.util.spec_from_file_location("samplers_benchmark", path)
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    figure = benchmark.plot({name: [1.0, 0.5] for name in benchmark.SOLVERS}, [10, 20], "karras")
    assert isinstance(figure, Figure)
    panels = [lines(axes) for axes in figure.axes]
    assert set().union(*panels) == set(benchmark.SOLVERS)
    for panel in panels:
        assert len({line.get_color() for line in panel.values()}) == len(panel)
        assert len({line.get_marker() for line in panel.values()}) == len(panel)
    labeled(figure.axes[-2])  # the axes below and at the left have the labels of all


def test_grids_and_text_show_the_images():
    images = np.zeros((5, 2, 3, 1), np.uint8)
    images[4] = 255
    picture = pictures.grid(images, columns=3)
    assert picture.shape == (2 * (2 * 21 + 4) + 4, 3 * (3 * 21 + 4) + 4, 1)
    assert (picture[50:92, 71:134] == 255).all() and (picture == 255).sum() == 42 * 63
    assert pictures.grid(np.zeros((2, 70, 70, 3), np.uint8)).shape == (78, 152, 3)
    np.testing.assert_array_equal(to_uint8(np.array([-1.0, 0.0, 1.0, 3.0, -0.999], np.float32)), [0, 128, 255, 255, 0])
    text = pictures.as_text(np.array([[[[0], [255]]], [[[255], [0]]]], np.uint8))
    assert text == "  @@    @@"
