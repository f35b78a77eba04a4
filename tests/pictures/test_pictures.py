"""Plots: every point inside the axes, every line told apart, and what the axes are."""

import importlib.util

import numpy as np
import pytest
from matplotlib.figure import Figure

from diffusion_jax import pictures
from diffusion_jax.images import to_uint8
from diffusion_jax.pictures import samples
from diffusion_jax.pictures.grids import GAP, LINE
from helpers.paths import ROOT


def labeled(figure):
    """The lines of a figure with one pair of axes by their labels."""
    (axes,) = figure.axes
    assert figure.get_suptitle() and axes.get_xlabel() and axes.get_ylabel()
    return dict(zip(legend(figure), axes.get_lines(), strict=True))


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


@pytest.mark.parametrize("decoder", [1.8, 40.0, 1e-3, 3.4e-5, 1e-12, 0.0, -1e-9])
def test_the_decoder_term_is_inside_the_axes(decoder):
    """Where it is far below the other terms, an arrow on the axis stands for it, and the legend has its value."""
    terms = np.concatenate([[decoder], np.geomspace(2.0, 1e-4, 999)])
    figure = pictures.draw_bound_terms(terms, "digits")
    (axes,), lines = figure.axes, labeled(figure)
    (label,) = (label for label in lines if "decoder" in label)
    assert f"{decoder:.3g}" in label and ("below the axis" in label) == (decoder < 1e-5)
    (x,), (y,) = lines[label].get_data()
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    assert left < x < right and low <= y < high and x == 1
    assert y == decoder or lines[label].get_marker() == "v"
    assert low <= 1e-4 and high >= 2
    radius = lines[label].get_markersize() / 2 * figure.dpi / 72  # in pixels
    assert axes.transData.transform((x, y))[1] - radius > axes.bbox.y0


def test_the_plot_of_one_step_has_only_the_decoder_term():
    for decoder in (3.0, 0.0):
        figure = pictures.draw_bound_terms(np.array([decoder]), "digits")
        assert figure.axes[0].get_ylim()[0] > 0


def test_grids_have_headers_and_captions():
    images = np.zeros((5, 8, 8, 1), np.uint8)
    plain, headed = (
        pictures.draw_grid(images, columns=3, headers=headers) for headers in (None, ["t = 999", "t = 0", "image"])
    )
    np.testing.assert_array_equal(headed[14:], plain)
    words = [headed[:14, 68 * i + 4 : 68 * i + 68] for i in range(3)]
    assert all(word.max() > 150 for word in words) and (words[0] != words[1]).any()


@pytest.mark.parametrize("channels", [1, 3])
def test_grids_have_titles_of_as_many_lines_as_they_need(channels):
    images = np.random.default_rng(0).integers(0, 256, (6, 8, 8, channels), np.uint8)
    plain = pictures.draw_grid(images, columns=5)
    for title, lines in (
        ("Samples", 1),
        ("Samples after 1,500 training steps, by DDIM with 50 steps of 1000, of seed 0", 2),
        ("x" * 80, 2),
    ):
        picture = pictures.draw_grid(images, title, columns=5)
        np.testing.assert_array_equal(picture[14 * lines :, : plain.shape[1]], plain)
        rows = picture[: 14 * lines].reshape(lines, 14, -1)
        assert all(row.max() > 150 for row in rows)
        assert (picture[: 14 * lines, -GAP:] == plain[0, 0, 0]).all()  # nothing runs over


def test_a_trajectory_of_images_has_its_times_and_the_classes_of_its_rows():
    x = np.random.default_rng(0).integers(0, 256, (3, 2, 8, 8, 1), np.uint8)
    plain, captioned = (
        pictures.draw_trajectory(x, np.array([999.0, 499.0]), "Samples", captions)
        for captions in (None, ["1: cat", "2: dog", "3"])
    )
    assert len(captioned) == len(plain) + 2 * 14
    texts = [captioned[28 + 68 + 82 * row : 28 + 82 + 82 * row, 2 * 68 : 3 * 68] for row in range(2)]
    assert all(text.max() > 150 for text in texts) and (texts[0] != texts[1]).any()


def test_neighbors_have_captions(monkeypatch):
    """Images and other arrays: each sample before its nearest examples."""
    drawn = []
    for module, name in ((samples, "draw_grid"), (samples, "draw_examples")):
        monkeypatch.setattr(module, name, lambda *values, **options: drawn.append((*values, *options.values())))
    distances = np.array([[0.5, 1.5], [0.75, 2.5]])
    captions = ["sample 7", "distance 0.5", "distance 1.5", "sample 3", "distance 0.75", "distance 2.5"]
    for x in (np.zeros((2, 8, 8, 3), np.uint8), np.zeros((2, 8, 8, 2), np.float32)):
        nearest = np.ones((2, 2, *x.shape[1:]), x.dtype)
        pictures.draw_neighbors(x, [7, 3], nearest, distances, "samples of x")
        shown, *rest = drawn.pop()
        assert captions in rest and any(str(value).startswith("samples of x") for value in rest)
        assert shown.reshape(6, -1).max(axis=1).tolist() == [0, 1, 1, 0, 1, 1]
        if x.dtype == np.uint8:
            assert ["sample", "nearest", "nearest no. 2"] in rest and 3 in rest


def test_every_solver_is_in_a_panel_where_no_two_lines_look_alike():
    """In the plot of docs/start/sampler.md."""
    path = ROOT / "benchmarks" / "samplers.py"
    spec = importlib.util.spec_from_file_location("samplers_benchmark", path)
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)

    def lines(axes):
        return dict(zip([text.get_text() for text in axes.get_legend().get_texts()], axes.get_lines(), strict=True))

    figure = benchmark.plot({name: [1.0, 0.5] for name in benchmark.SOLVERS}, [10, 20], "karras")
    assert isinstance(figure, Figure)
    panels = [lines(axes) for axes in figure.axes]
    assert set().union(*panels) == set(benchmark.SOLVERS)
    for panel in panels:
        assert len({line.get_color() for line in panel.values()}) == len(panel)
        assert len({line.get_marker() for line in panel.values()}) == len(panel)
    assert figure.axes[-2].get_xlabel() and figure.axes[-2].get_ylabel()  # below and at the left: the labels of all


def test_grids_and_text_show_the_images():
    images = np.zeros((5, 2, 3, 1), np.uint8)
    images[4] = 255
    picture = pictures.draw_grid(images, columns=3)
    assert picture.shape == (2 * (2 * 21 + 4) + 4, 3 * (3 * 21 + 4) + 4, 1)
    assert (picture[50:92, 71:134] == 255).all() and (picture == 255).sum() == 42 * 63
    assert pictures.draw_grid(np.zeros((2, 70, 70, 3), np.uint8)).shape == (78, 152, 3)
    np.testing.assert_array_equal(to_uint8(np.array([-1.0, 0.0, 1.0, 3.0, -0.999], np.float32)), [0, 128, 255, 255, 0])
    text = pictures.as_text(np.array([[[[0], [255]]], [[[255], [0]]]], np.uint8))
    assert text == "  @@    @@"


@pytest.mark.parametrize("channels", [1, 3])
def test_a_grid_with_captions(channels):
    """The images are where they are without captions, but for the rows of text; every tile's text is its own."""
    images = np.random.default_rng(0).integers(0, 256, (5, 8, 8, channels), dtype=np.uint8)
    captions = ["1 cat", "", "2 cats", "1 cat", "2 dog"]
    plain, captioned = pictures.draw_grid(images), pictures.draw_grid(images, captions=captions)
    rows, columns = 2, 3
    below = (len(captioned) - len(plain)) // rows
    assert captioned.shape[1:] == plain.shape[1:] and below > 8
    tile, width = 64 + GAP, 64 + GAP
    texts = []
    for i in range(5):
        top, left = i // columns * (tile + below) + GAP, i % columns * width + GAP
        np.testing.assert_array_equal(captioned[top : top + 64, left : left + 64 : 8][::8], images[i])
        texts.append(captioned[top + 64 : top + 64 + below, left : left + 64])
    assert (texts[0] == texts[3]).all() and (texts[0] != texts[4]).any() and (texts[1] == texts[1][0, 0]).all()
    assert all((text > 150).any() for text in (texts[0], texts[2], texts[4]))
    gaps = np.concatenate([captioned[:, :GAP].ravel(), captioned[:, -GAP:].ravel()])
    assert (gaps == captioned[0, 0, 0]).all()  # nothing runs over


def test_images_are_enlarged_for_their_captions():
    images = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 1), dtype=np.uint8)
    for caption, size in (("cat", 64), ("distance 0.1234", 88), ("x" * 50, 160)):
        picture = pictures.draw_grid(images, captions=["cat", caption])
        assert picture.shape == (size + 2 * GAP + LINE, 2 * (size + GAP) + GAP, 1)
        assert (picture[:, -GAP:] == picture[0, 0, 0]).all()  # nothing runs over
    large = pictures.draw_grid(np.zeros((1, 90, 90, 1), np.uint8), captions=["x" * 50])
    assert large.shape[1] == 90 + 2 * GAP
