"""Plots and grids: what is drawn equals what is given, and every point is inside the axes."""

import numpy as np
import pytest

from diffusion_jax import pictures
from diffusion_jax.pictures import figures
from diffusion_jax.pictures.grids import GAP, LINE


@pytest.mark.parametrize("decoder", [1.8, 40.0, 1e-3, 1e-12, -1e-9])
def test_the_decoder_term_is_inside_the_axes(decoder):
    """If it is far below the other terms, it is at the bottom of the axis."""
    terms = np.concatenate([[decoder], np.geomspace(2.0, 1e-4, 999)])
    (axes,) = pictures.draw_bound_terms(terms, "digits").axes
    transitions, point = axes.get_lines()
    np.testing.assert_array_equal(transitions.get_ydata(), terms[1:])
    (x,), (y,) = point.get_data()
    assert x == 1 and y == pytest.approx(max(decoder, 1e-4 / 3))
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    assert left < x < right and low < y < high and low <= 1e-4 and high >= 2


def test_the_plot_of_one_step_has_only_the_decoder_term():
    for decoder in (3.0, 0.0):
        assert pictures.draw_bound_terms(np.array([decoder]), "digits").axes[0].get_ylim()[0] > 0


def test_samples_stand_before_their_neighbors(monkeypatch):
    drawn = []
    for name in ("draw_grid", "draw_samples"):
        monkeypatch.setattr(figures, name, lambda x, *more, **options: drawn.append((x, [*more, *options.values()])))
    distances = np.array([[0.5, 1.5], [0.75, 2.5]])
    captions = ["sample 7", "distance 0.5", "distance 1.5", "sample 3", "distance 0.75", "distance 2.5"]
    for x in (np.zeros((2, 8, 8, 3), np.uint8), np.zeros((2, 8, 8, 2), np.float32)):
        nearest = np.ones((2, 2, *x.shape[1:]), x.dtype)
        pictures.draw_neighbors(x, [7, 3], nearest, distances, "samples of x")
        shown, options = drawn.pop()
        assert captions in options and shown.reshape(6, -1).max(axis=1).tolist() == [0, 1, 1, 0, 1, 1]


def test_grids_and_text_show_the_images():
    images = np.zeros((5, 2, 3, 1), np.uint8)
    images[4] = 255
    picture = pictures.draw_grid(images, columns=3)
    assert picture.shape == (2 * (2 * 32 + 4) + 4, 3 * (3 * 32 + 4) + 4, 1)
    assert (picture[72:136, 104:200] == 255).all() and (picture == 255).sum() == 64 * 96
    text = pictures.as_text(np.array([[[[0], [255]]], [[[255], [0]]]], np.uint8))
    assert text == "  @@    @@"


def test_a_grid_with_text_has_the_images_of_one_without():
    images = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)
    plain, captioned = pictures.draw_grid(images), pictures.draw_grid(images, captions=["cat", "", "2", "3", 50 * "d"])
    for i in range(5):
        top, left = i // 3 * (100 + LINE) + GAP, i % 3 * 100 + GAP
        np.testing.assert_array_equal(captioned[top : top + 96, left : left + 96 : 12][::12], images[i])
        text = captioned[top + 96 : top + 96 + LINE, left : left + 96]
        assert (text == text[0, 0]).all() == (i == 1)
    headed = pictures.draw_grid(images, " ".join(3 * [25 * "w"]), headers=["t = 999", "t = 0", "image"])
    np.testing.assert_array_equal(headed[4 * LINE :], plain)  # three lines of the title, and one of headers
    assert (headed[3 * LINE : 4 * LINE, GAP:100] > 150).any()
