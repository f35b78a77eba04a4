"""Plots: every point inside the axes, every line told apart, and what the axes are."""

import numpy as np
import pytest

from diffusion_jax import pictures
from diffusion_jax.images import to_uint8
from diffusion_jax.pictures import samples
from diffusion_jax.pictures.grids import GAP, LINE


def labeled(figure):
    """The lines of a figure with one pair of axes by their labels."""
    (axes,) = figure.axes
    assert figure.get_suptitle() and axes.get_xlabel() and axes.get_ylabel()
    return dict(zip(legend(figure), axes.get_lines(), strict=True))


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


@pytest.mark.parametrize("decoder", [1.8, 40.0, 1e-3, 3.4e-5, 1e-12, 0.0, -1e-9])
def test_the_decoder_term_is_inside_the_axes(decoder):
    """If it is far below the other terms, it is at the bottom of the axis, and the legend has its value."""
    terms = np.concatenate([[decoder], np.geomspace(2.0, 1e-4, 999)])
    figure = pictures.draw_bound_terms(terms, "digits")
    (axes,), lines = figure.axes, labeled(figure)
    (label,) = (label for label in lines if "decoder" in label)
    assert f"{decoder:.3g}" in label and ("below the axis" in label) == (decoder < 1e-5)
    (x,), (y,) = lines[label].get_data()
    assert x == 1 and y == pytest.approx(max(decoder, 1e-4 / 3))
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    assert left < x < right and low < y < high and low <= 1e-4 and high >= 2


def test_the_plot_of_one_step_has_only_the_decoder_term():
    for decoder in (3.0, 0.0):
        figure = pictures.draw_bound_terms(np.array([decoder]), "digits")
        assert figure.axes[0].get_ylim()[0] > 0


def test_neighbors_have_captions(monkeypatch):
    """Images and other arrays: each sample before its nearest examples."""
    drawn = []
    for module, name in ((samples, "draw_grid"), (samples, "draw_samples")):
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


def test_grids_and_text_show_the_images():
    images = np.zeros((5, 2, 3, 1), np.uint8)
    images[4] = 255
    picture = pictures.draw_grid(images, columns=3)
    assert picture.shape == (2 * (2 * 32 + 4) + 4, 3 * (3 * 32 + 4) + 4, 1)
    assert (picture[72:136, 104:200] == 255).all() and (picture == 255).sum() == 64 * 96
    assert pictures.draw_grid(np.zeros((2, 70, 70, 3), np.uint8)).shape == (78, 152, 3)
    np.testing.assert_array_equal(to_uint8(np.array([-1.0, 0.0, 1.0, 3.0, -0.999], np.float32)), [0, 128, 255, 255, 0])
    text = pictures.as_text(np.array([[[[0], [255]]], [[[255], [0]]]], np.uint8))
    assert text == "  @@    @@"


@pytest.mark.parametrize("channels", [1, 3])
def test_a_grid_with_text(channels):
    """The images are where they are without text, but for the rows of text; every tile's text is its own."""
    images = np.random.default_rng(0).integers(0, 256, (5, 8, 8, channels), dtype=np.uint8)
    captions, headers = ["1 cat", "", "2 cats", "1 cat", 50 * "d"], ["t = 999", "t = 0", "image"]
    plain, captioned = pictures.draw_grid(images), pictures.draw_grid(images, captions=captions)
    assert len(captioned) == len(plain) + 2 * LINE and captioned.shape[1:] == plain.shape[1:]
    texts = []
    for i in range(5):
        top, left = i // 3 * (100 + LINE) + GAP, i % 3 * 100 + GAP
        np.testing.assert_array_equal(captioned[top : top + 96, left : left + 96 : 12][::12], images[i])
        texts.append(captioned[top + 96 : top + 96 + LINE, left : left + 96])
    assert (texts[0] == texts[3]).all() and (texts[0] != texts[4]).any() and (texts[1] == texts[1][0, 0]).all()
    gaps = np.concatenate([captioned[:, :GAP].ravel(), captioned[:, -GAP:].ravel()])
    assert (gaps == captioned[0, 0, 0]).all()  # nothing runs over
    headed = pictures.draw_grid(images, " ".join(3 * [25 * "w"]), headers=headers)
    np.testing.assert_array_equal(headed[4 * LINE :], plain)
    texts.append(headed[3 * LINE : 4 * LINE, GAP:100])
    assert all((text > 150).any() for text in (texts[0], texts[2], texts[4], texts[5], headed[:LINE]))
