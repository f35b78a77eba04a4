"""Pictures of float arrays: what is drawn equals what is given, what is left out is stated, and nothing finite is lost."""

import numpy as np
import pytest
from PIL import Image

from diffusion_jax.pictures import (
    draw_examples,
    draw_neighbors,
    panels,
    save,
    to_array,
)
from diffusion_jax.pictures.samples import draw_array_trajectory

SHAPES = [(3,), (40, 2), (6, 9, 2), (4, 5, 6, 2)]  # of examples, by their number of spatial axes


def drawn(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def lines(axes):
    """The data of the lines, without the marks of values that are not finite."""
    return [line.get_ydata() for line in axes.get_lines() if line.get_gid() != "invalid"]


def images(figure):
    """The axes with images, without color bars, and their images."""
    shown = [axes for axes in figure.axes if axes.get_images()]
    return shown, [axes.get_images()[0] for axes in shown]


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()] if figure.legends else []


def count_marked(figure):
    """Pixels of the color that only values that are not finite have."""
    return int((to_array(figure) == [255, 0, 255]).all(axis=-1).sum())


# ---- Series


def test_series_are_lines_of_all_channels():
    x = drawn(0, 5, 40, 3)
    figure = draw_examples(x, title="samples", captions=["0: a", "1: b"])
    assert [axes.get_title() for axes in figure.axes] == ["0: a", "1: b", "example 2", "example 3", "example 4"]
    for example, axes in zip(x, figure.axes, strict=True):
        np.testing.assert_array_equal(np.stack(lines(axes), axis=-1), example)
        low, high = axes.get_ylim()
        assert low < x.min() and x.max() < high
    assert len({axes.get_ylim() for axes in figure.axes}) == 1  # one scale
    assert legend(figure) == ["channel 0", "channel 1", "channel 2"] and figure.get_suptitle() == "samples"
    assert [axes.get_xlabel() for axes in figure.axes] == ["", "", "position", "position", "position"]
    assert [axes.get_ylabel() for axes in figure.axes] == [panels.VALUE, "", "", panels.VALUE, ""]


@pytest.mark.parametrize("factors", [np.ones(7), [1, 1000]])
def test_series_have_a_panel_for_each_of_many_or_unlike_channels(factors):
    x = drawn(1, 4, 40, len(factors)) * np.float32(factors)
    figure = draw_examples(x, title="samples")
    assert [axes.get_title() for axes in figure.axes] == [f"channel {c}" for c in range(len(factors))]
    for c, axes in enumerate(figure.axes):
        np.testing.assert_array_equal(lines(axes), x[..., c])
        low, high = axes.get_ylim()
        assert high - low < 1.2 * np.ptp(x[..., c])
    assert legend(figure) == [f"example {i}" for i in range(4)]


def test_a_sample_and_its_nearest_series_are_side_by_side():
    x = drawn(1, 5, 40, 1)
    figure = draw_neighbors(x, range(5), x[:, None], np.ones((5, 1)), "series")
    tops = [round(axes.get_position().y1, 6) for axes in figure.axes]
    assert len(tops) == 10 and tops[0::2] == tops[1::2]
    assert [axes.get_title() for axes in figure.axes[:2]] == ["sample 0", "distance 1"]


@pytest.mark.parametrize("length", [601, 100_000, 99_999])
def test_long_series_keep_their_extremes(length):
    """An interval without a finite value has no line; one with some has its finite extremes."""
    x = drawn(4, 1, length, 1)
    x[0, 3, 0], x[0, 500, 0], x[0, length - 1, 0] = 50, -60, 70
    x[0, 600, 0] = np.nan
    figure = draw_examples(x, title="samples")
    (values,) = lines(figure.axes[0])
    (positions,) = (line.get_xdata() for line in figure.axes[0].get_lines() if line.get_gid() != "invalid")
    assert len(values) <= 602 and (np.diff(positions) >= 0).all()
    np.testing.assert_array_equal(values, x[0, positions, 0])
    width = -(-length // 300)
    starts = np.arange(0, length, width)
    for reduce, ours in ((np.fmin, values.reshape(-1, 2).min(axis=1)), (np.fmax, values.reshape(-1, 2).max(axis=1))):
        np.testing.assert_array_equal(ours, reduce.reduceat(x[0, :, 0], starts))


# ---- Fields and volumes


def test_fields_have_a_row_for_each_example_and_a_column_for_each_channel():
    x = drawn(5, 3, 6, 9, 2)
    x[..., 1] = np.abs(x[..., 1]) + 280
    figure = draw_examples(x, title="fields", captions=["0: a", "1: b", "2: c"])
    shown, pictures = images(figure)
    assert len(shown) == 6 and len(figure.axes) == 6 + 2  # a color bar for each channel
    for i, picture in enumerate(pictures):
        example, channel = divmod(i, 2)
        np.testing.assert_array_equal(picture.get_array(), x[example, ..., channel])
        low, high = picture.get_clim()
        values = x[..., channel]
        if channel == 0:
            np.testing.assert_allclose([low, high], [-np.abs(values).max(), np.abs(values).max()], rtol=1e-7)
        else:
            assert (low, high) == (values.min(), values.max())
    assert pictures[0].cmap.name == "RdBu_r" and pictures[1].cmap.name == "viridis"
    assert [axes.get_title() for axes in shown[:2]] == ["channel 0", "channel 1"]
    assert [text.get_text() for text in figure.texts][-3:] == ["0: a", "1: b", "2: c"]


def test_a_small_part_below_zero_does_not_center_the_colors():
    x = np.linspace(-0.01, 1, 54).reshape(1, 6, 9, 1)
    _, (picture,) = images(draw_examples(x, title="fields"))
    assert picture.get_clim() == (-0.01, 1) and picture.cmap.name == "viridis"


def test_volumes_are_slices_and_the_values_farthest_from_zero():
    x = drawn(7, 2, 4, 5, 6, 2)
    figure = draw_examples(x, title="volumes")
    shown, pictures = images(figure)
    assert len(shown) == 2 * 2 * 6
    for row in range(4):
        volume = x[row // 2, ..., row % 2]
        expected = [volume[2], volume[:, 2], volume[:, :, 3]]
        for axis in range(3):
            index = np.abs(volume).argmax(axis=axis, keepdims=True)
            expected.append(np.take_along_axis(volume, index, axis).squeeze(axis))
        for picture, array in zip(pictures[6 * row : 6 * row + 6], expected, strict=True):
            np.testing.assert_array_equal(picture.get_array(), array)
        assert len({picture.get_clim() for picture in pictures[row % 2 :: 12]}) == 1
    headers = [axes.get_title() for axes in shown[:6]]
    assert headers[1].startswith("slice: axis 1 at 2") and headers[5] == "farthest from 0\nalong axis 2"
    assert [text.get_text() for text in figure.texts][-1] == "example 1\nchannel 1"
    # All images of a table have the same number of positions per inch.
    assert len({(np.ptp(axes.get_xlim()), np.ptp(axes.get_ylim())) for axes in shown}) == 1


# ---- Vectors


def test_vectors_are_histograms_of_each_entry_beside_those_of_the_reference():
    x, reference = drawn(8, 500, 3), drawn(9, 300, 3) + 1
    figure = draw_examples(x, title="vectors", reference=reference)
    assert [axes.get_xlabel() for axes in figure.axes] == ["entry 0", "entry 1", "entry 2"]
    for entry, axes in enumerate(figure.axes):
        ours, outline = axes.patches
        for patch, values in ((ours, x), (outline, reference)):
            heights, edges, _ = patch.get_data()
            assert (heights * np.diff(edges)).sum() == pytest.approx(1)
            counts = np.histogram(values[:, entry], edges)[0]
            np.testing.assert_allclose(heights * np.diff(edges) * len(values), counts, atol=1e-9)
    assert legend(figure) == ["samples", "data"]


def test_vectors_of_two_entries_are_also_points():
    x, reference = drawn(10, 50, 2), drawn(11, 20, 2)
    figure = draw_examples(x, title="vectors", reference=reference)
    below, above = figure.axes[2].get_lines()
    np.testing.assert_array_equal(np.transpose(above.get_data()), x)
    np.testing.assert_array_equal(np.transpose(below.get_data()), reference)
    assert (figure.axes[2].get_xlabel(), figure.axes[2].get_ylabel()) == ("entry 0", "entry 1")


# ---- Trajectories


@pytest.mark.parametrize("shape", SHAPES)
def test_a_trajectory_has_a_column_for_each_time(shape):
    x = drawn(12, 4, 2, *shape)
    figure = draw_array_trajectory(
        x, ["t = 9", "t = 5", "t = 1", "sample"], title="being denoised", captions=["0: a", "1: b"]
    )
    if len(shape) == 1:
        for axes, points in zip(figure.axes, x, strict=True):
            np.testing.assert_array_equal(
                np.concatenate([line.get_data() for line in axes.get_lines()], 1), points[:, :2].T
            )
        shown = figure.axes
    elif len(shape) == 2:
        for i, axes in enumerate(figure.axes):
            np.testing.assert_array_equal(np.stack(lines(axes), axis=-1), x[i % 4, i // 4])
        shown = figure.axes
        assert [axes.get_ylabel() for axes in shown[::4]] == ["0: a", "1: b"] and legend(figure)
    else:
        shown, pictures = images(figure)
        assert len(shown) == 2 * 2 * 4
        slices = x if len(shape) == 3 else x[:, :, 2]
        for i, picture in enumerate(pictures):
            row, column = divmod(i, 4)
            np.testing.assert_array_equal(picture.get_array(), slices[column, row // 2, ..., row % 2])
        assert len({picture.get_clim() for picture in pictures[:4]}) == 1
    assert [axes.get_title() for axes in shown[:4]] == ["t = 9", "t = 5", "t = 1", "sample"]


def test_a_trajectory_of_numbers_is_histograms():
    figure = draw_array_trajectory(drawn(13, 3, 200, 1), "abc", title="numbers")
    assert [axes.get_title() for axes in figure.axes] == list("abc")
    assert all(len(axes.patches) == 1 for axes in figure.axes)


def test_large_noise_does_not_hide_the_samples():
    """Lines have a scale for each time; the colors of images show the range of the samples and half as much around it."""
    factors = np.array([100, 10, 1]).reshape(3, 1, 1, 1)
    figure = draw_array_trajectory(drawn(14, 3, 2, 40, 1) * factors, "abc", title="lines")
    spans = [np.ptp(axes.get_ylim()) for axes in figure.axes[:3]]
    assert spans[0] > 5 * spans[1] > 25 * spans[2]
    x = drawn(15, 3, 2, 6, 9, 1) * factors[..., None]
    _, pictures = images(draw_array_trajectory(x, "abc", title="fields"))
    last = x[-1]
    limit = max(last.max(), -last.min()) + np.ptp(last) / 2
    np.testing.assert_allclose([picture.get_clim() for picture in pictures], [(-limit, limit)] * 6)
    assert pictures[-1].colorbar.extend == "both"


# ---- Limits, and values that are not finite


@pytest.mark.parametrize(
    ("shape", "num_axes"),
    [
        ((64, 40, 1), 12),
        ((64, 40, 30), 12),
        ((64, 6, 9, 30), 8 * 8 + 8),
        ((2, 6, 900, 1), 2 + 1),
        ((64, 4, 4, 4, 9), 4 * 3 * (6 + 1)),
        ((1, 300, 4, 4, 1), 6 + 1),
        ((100_001, 100), 16),
    ],
)
def test_large_sets_are_drawn_in_part(shape, num_axes):
    figure = draw_examples(np.broadcast_to(drawn(22, *shape[1:]), shape), title="samples")
    title = figure.get_suptitle()
    assert len(figure.axes) == num_axes and ("first" in title or "1 of" in title)


@pytest.mark.parametrize("shape", SHAPES)
def test_large_trajectories_are_drawn_in_part(shape):
    x = np.broadcast_to(drawn(23, *shape[:-1], 9), (50, 40, *shape[:-1], 9))
    figure = draw_array_trajectory(x, [f"t = {49 - i}" for i in range(50)], title="trajectory")
    assert len(figure.axes) <= 70
    titles = [axes.get_title() for axes in figure.axes if axes.get_title()]
    assert titles[0] == "t = 49" and titles[9] == "t = 0"


@pytest.mark.parametrize("shape", SHAPES)
def test_values_that_are_not_finite_are_counted_and_marked(shape):
    x = drawn(24, 4, *shape)
    assert count_marked(draw_examples(x, title="finite")) == 0
    x[0].flat[0], x[1].flat[0], x[2].flat[1] = np.nan, np.inf, -np.inf
    figure = draw_examples(x, title="not finite")
    assert f"3 of {x.size} drawn values are NaN or infinite" in figure.get_suptitle()
    assert (count_marked(figure) > 0) == (len(shape) > 1)  # vectors are counted only
    if len(shape) == 2:  # a gap in the line, and the mark at its position
        assert np.isnan(lines(figure.axes[0])[0][0])
        (marks,) = [line for line in figure.axes[0].get_lines() if line.get_gid() == "invalid"]
        assert list(marks.get_xdata()) == [0]
    to_array(draw_array_trajectory(np.stack([x, x]), "ab", title="not finite"))


@pytest.mark.parametrize("value", [3.0, -1e30, np.nan])
@pytest.mark.parametrize("shape", SHAPES)
def test_one_example_of_one_value(shape, value):
    x = np.full((1, *shape), value, np.float32)
    if x.ndim == 2:
        draw_examples(x, title="constant", reference=x)
    for figure in (draw_examples(x, title="constant"), draw_array_trajectory(x[None], ["sample"], title="constant")):
        assert to_array(figure).dtype == np.uint8


@pytest.mark.parametrize("shape", SHAPES)
def test_text_is_not_mathematical_notation(shape):
    """A name that Matplotlib cannot read as a formula would raise; very long names are shortened."""
    text = "$\\frac{$ a" + 40 * "b"
    options = {"title": text, "captions": [text] * 2}
    figures = [
        draw_examples(drawn(25, 2, *shape), **options),
        draw_array_trajectory(drawn(26, 1, 2, *shape), [text], **options),
    ]
    for figure in figures:
        to_array(figure)
    assert panels.plain_text("a $x$\n" + 40 * "b", 12) == r"a \$x\$ bbb..."


def test_figures_are_files_and_arrays(tmp_path):
    figure = draw_examples(drawn(27, 2, 6, 9, 1), title="fields")
    picture = to_array(figure)
    assert picture.ndim == 3 and picture.shape[2] == 3 and picture.dtype == np.uint8
    save(tmp_path / "fields.png", figure)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "fields.png")), picture)
    assert len(list(tmp_path.iterdir())) == 1


def test_what_cannot_be_drawn_is_refused():
    with pytest.raises(ValueError, match="at most three spatial axes"):
        draw_examples(np.zeros((1, 2, 2, 2, 2, 1)), title="")
    with pytest.raises(ValueError, match="at least 1"):
        draw_examples(np.zeros((0, 2)), title="")
    with pytest.raises(ValueError, match="2 headers"):
        draw_array_trajectory(np.zeros((3, 1, 2)), ["a", "b"], title="")
    with pytest.raises(ValueError, match="at most 3 spatial axes"):
        draw_array_trajectory(np.zeros((3, 2)), ["a", "b", "c"], title="")
