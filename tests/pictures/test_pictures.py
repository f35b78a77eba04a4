"""Pictures: the drawn values equal the arguments, every point is inside the axes, and omissions are stated."""

import numpy as np
import pytest

from diffusion_jax import pictures
from diffusion_jax.metrics import Curves
from diffusion_jax.metrics.of_arrays import ValueAndError
from diffusion_jax.pictures import Channels, Examples, draw_curves, draw_grid, draw_samples, draw_trajectory, to_array
from diffusion_jax.pictures.grids import GAP, LINE

SHAPES = [(3,), (40, 2), (6, 9, 2), (4, 5, 6, 2)]  # of examples, by number of spatial axes


def drawn(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def lines(axes):
    return [line.get_ydata() for line in axes.get_lines()]


def images(figure):
    """The axes with images, without color bars, and the images."""
    shown = [axes for axes in figure.axes if axes.get_images()]
    return shown, [axes.get_images()[0] for axes in shown]


# ---- Examples


def test_series_are_lines_of_all_channels():
    x = drawn(0, 5, 40, 3)
    figure = draw_samples(x, title="samples", captions=["0: a", "1: b"])
    assert [axes.get_title() for axes in figure.axes] == ["0: a", "1: b", "sample 2", "sample 3", "sample 4"]
    for example, axes in zip(x, figure.axes, strict=True):
        np.testing.assert_array_equal(np.stack(lines(axes), axis=-1), example)
    assert len({axes.get_ylim() for axes in figure.axes}) == 1  # one scale


@pytest.mark.parametrize("factors", [np.ones(7), [1, 1000]])
def test_series_have_a_panel_for_each_of_many_or_unlike_channels(factors):
    x = drawn(1, 4, 40, len(factors)) * np.float32(factors)
    figure = draw_samples(x, title="samples")
    assert len(figure.axes) == len(factors)
    for c, axes in enumerate(figure.axes):
        np.testing.assert_array_equal(lines(axes), x[..., c])
        assert np.ptp(axes.get_ylim()) == pytest.approx(1.2 * np.ptp(x[..., c]))


def test_only_the_lowest_panel_of_a_column_names_its_axis():
    figure = draw_samples(drawn(9, 4, 40, 5) * 10.0 ** np.arange(5), "x")
    panels = [axes.get_subplotspec() for axes in figure.axes]
    for panel, axes in zip(panels, figure.axes, strict=True):
        rows = [other.rowspan.start for other in panels if other.colspan == panel.colspan]
        assert bool(axes.get_xlabel()) == (panel.rowspan.start == max(rows))
    assert len({panel.rowspan.start for panel in panels}) > 1


def test_captions_of_a_trajectory_of_images_are_below_the_samples():
    x = np.random.default_rng(2).integers(0, 256, (3, 2, 8, 8, 1), dtype=np.uint8)
    title = "t; columns: network time t"
    grid = draw_grid(
        x.swapaxes(0, 1).reshape(6, 8, 8, 1), title, 3, ["", "", "a", "", "", "b"], ["t = 9", "t = 5", "sample"]
    )
    np.testing.assert_array_equal(to_array(draw_trajectory(x, [9, 5], "t", ["a", "b"])), to_array(grid))


def test_fields_have_a_column_for_each_example_and_a_row_for_each_channel():
    x = drawn(5, 3, 6, 9, 3)
    x[..., 1] = np.abs(x[..., 1]) + 280
    x[..., 2] = np.linspace(-0.01, 1, 54).reshape(6, 9)
    figure = draw_samples(x, title="fields")
    shown, pictures = images(figure)
    assert len(shown) == 9 and len(figure.axes) == 9 + 3  # a color bar for each channel
    for i, picture in enumerate(pictures):
        channel, example = divmod(i, 3)
        np.testing.assert_array_equal(picture.get_array(), x[example, ..., channel])
        values = x[..., channel]
        low, high = values.min() - 0.1 * np.ptp(values), values.max() + 0.1 * np.ptp(values)
        limits = (-max(-low, high), max(-low, high)) if channel == 0 else (low, high)
        np.testing.assert_allclose(picture.get_clim(), limits, rtol=1e-6)
        assert picture.cmap.name == ("RdBu_r" if channel == 0 else "viridis")


def test_volumes_are_slices_and_the_values_farthest_from_zero():
    x = drawn(7, 2, 4, 5, 6, 2)
    shown, pictures = images(draw_samples(x, title="volumes"))
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


def test_vectors_are_histograms_beside_those_of_the_reference_and_points():
    x, reference = drawn(8, 500, 2), drawn(9, 300, 2) + 1
    figure = draw_samples(x, title="vectors", examples=Examples(reference))
    assert len(figure.axes) == 3
    for entry, axes in enumerate(figure.axes[:2]):
        for patch, values in zip(axes.patches, (x, reference), strict=True):
            heights, edges, _ = patch.get_data()
            assert (heights * np.diff(edges)).sum() == pytest.approx(1)  # no value is outside
            counts = np.histogram(values[:, entry], edges)[0]
            np.testing.assert_allclose(heights * np.diff(edges) * len(values), counts, atol=1e-9)
    below, above = figure.axes[2].get_lines()
    np.testing.assert_array_equal(np.transpose(above.get_data()), x)
    np.testing.assert_array_equal(np.transpose(below.get_data()), reference)


# ---- Training data beside samples


NAMES, UNITS = ("u", "heat", "p", "q", "T"), ("m/s", "W", "hPa", "", "K")


@pytest.mark.parametrize(
    ("shape", "count"), [((2,), 200), ((40, 1), 8), ((40, 5), 8), ((6, 9, 2), 8), ((4, 5, 6, 1), 4)]
)
def test_axes_and_colors_come_from_the_training_data_and_have_names_and_units(shape, count):
    """Samples that differ from the training data change no axis and no color scale."""
    examples, channels = drawn(30, count, *shape), shape[-1]
    fitted = Channels(NAMES[:channels], UNITS[:channels]).fit(examples, quantile=0.01)
    labels = [fitted.label(c) for c in range(channels)]
    assert labels == ["u (m/s)", "heat (W)", "p (hPa)", "q", "T (K)"][:channels]
    for samples in (drawn(31, count, *shape), 7 + drawn(32, count, *shape)):
        figure = draw_samples(samples, "x", examples=Examples(examples), channels=fitted)
        texts = [text for axes in figure.axes for text in (axes.get_xlabel(), axes.get_ylabel())]
        assert set(labels) <= {text.replace("\n", " ") for text in texts}
        first = figure.axes[0]
        if len(shape) > 2:
            assert first.get_images()[0].get_clim() == fitted.colors(0)[1:]
        else:
            assert (first.get_xlim() if len(shape) == 1 else first.get_ylim()) == tuple(fitted.limits[0])
    assert "% of the values are outside the limits" in figure.get_suptitle()


@pytest.mark.parametrize(
    ("shape", "titles"),
    [
        ((40, 2), [f"{word} {i}" for word in ("training data", "sample") for i in range(6)]),
        ((6, 9, 1), [f"{word} {i}" for word in ("training data", "sample") for i in range(4)]),
    ],
)
def test_training_data_precede_the_samples(shape, titles):
    examples, samples = drawn(33, 16, *shape), drawn(34, 16, *shape)
    figure = draw_samples(samples, "x", ["c"], examples=Examples(examples, ["a", "b"]))
    panels = [axes for axes in figure.axes if axes.get_title()]
    titles = titles.copy()
    count = len(titles) // 2
    titles[:2], titles[count] = ["training data\na", "training data\nb"], "samples\nc"
    assert [axes.get_title().split() for axes in panels] == [title.split() for title in titles]
    for i, axes in enumerate(panels):
        shown = axes.get_images()[0].get_array()[..., None] if axes.get_images() else np.stack(lines(axes), axis=-1)
        np.testing.assert_array_equal(shown, [*examples[:count], *samples[:count]][i])


def test_each_field_has_its_training_example_above():
    """With more samples than columns, the picture shows evenly spread samples, and not only the first."""
    examples, samples, pairs = drawn(37, 3, 6, 9, 2), drawn(38, 16, 6, 9, 2), np.arange(16) % 3
    captions = [f"s{i}" for i in range(16)]
    figure = draw_samples(samples, "x", captions, examples=Examples(examples, ["a", "b", "c"], pairs=pairs))
    panels, pictures = images(figure)
    chosen = np.arange(0, 16, 2)
    for i, picture in enumerate(pictures):
        row, column = divmod(i, 8)
        shown = samples[chosen[column]] if row % 2 else examples[pairs[chosen[column]]]
        np.testing.assert_array_equal(picture.get_array(), shown[..., row // 2])
    assert [axes.get_title() for axes in panels[:8]] == ["abc"[pairs[i]] for i in chosen]
    assert [axes.get_title() for axes in panels[8:16]] == [captions[i] for i in chosen]
    names = [f"channel {c}, {name}" for c in range(2) for name in ("training data", "samples")]
    assert [" ".join(axes.get_ylabel().split()) for axes in panels[::8]] == names
    assert "8 of 16 samples" in figure.get_suptitle()


def test_each_channel_of_unlike_series_has_training_data_at_the_left():
    factors = np.float32([1, 1000])
    examples, samples = drawn(35, 4, 40, 2) * factors, drawn(36, 4, 40, 2) * factors
    figure = draw_samples(samples, "x", examples=Examples(examples))
    names = [f"channel {c}, {name}" for c in range(2) for name in ("training data", "samples")]
    assert [axes.get_title() for axes in figure.axes] == names
    for i, axes in enumerate(figure.axes):
        np.testing.assert_array_equal(lines(axes), (examples, samples)[i % 2][..., i // 2])


@pytest.mark.parametrize(
    ("captions", "given", "legend"),
    [
        (["class 0: cat", "class 1"], ["class 0: cat", "class 1"], ["class 0: cat", "class 1"]),
        (["rate 1", "rate 2"], ["rate 1.1"], ["rate 1 (training data: rate 1.1)", "rate 2"]),
        (["class 3", "class 1"], [f"class {i}" for i in range(16)], ["class 3", "class 1"]),
        (None, None, []),
    ],
)
def test_a_legend_has_the_conditions_of_series_in_shared_panels(captions, given, legend):
    """More examples than samples do not belong to the samples: their conditions are those of other rows."""
    x = drawn(39, max(2, len(given or ())), 40, 2) * np.float32([1, 1000])
    figure = draw_samples(x[:2], "x", captions, examples=Examples(x, given))
    assert [text.get_text() for found in figure.legends for text in found.get_texts()] == legend


def test_conditions_and_axes_of_series_being_denoised_are_at_the_edges():
    """Only the lowest panel of each column has positions, and only the first panel of each row has values."""
    channels, x = Channels(("u", "T"), ("m/s", "K")), drawn(40, 3, 2, 40, 2) * [1, 1000]
    figure = draw_trajectory(x, [9, 1], "x", ["condition 1", "condition 2"], channels)
    names = [f"condition {i}\n{channel}" for i in (1, 2) for channel in ("u (m/s)", "T (K)")]
    assert [axes.get_ylabel() for axes in figure.axes] == [text for name in names for text in (name, "", "")]
    assert [axes.get_xlabel() for axes in figure.axes] == 9 * [""] + 3 * ["position"]
    for i, axes in enumerate(figure.axes):
        row, column = divmod(i, 3)
        np.testing.assert_array_equal(lines(axes), [x[column, row // 2, :, row % 2]])
        assert axes.xaxis.get_tick_params()["labelbottom"] == (i >= 9)
        assert axes.yaxis.get_tick_params()["labelleft"] == (i % 3 == 0)


def cell(picture, row, column, left):
    """The pixels of 2x2 images, without their enlargement, below a title and headers of a line each."""
    top, side = 2 * LINE + GAP + row * 100, left + GAP + column * 100
    return picture[top : top + 96 : 48, side : side + 96 : 48]


def test_each_class_has_full_rows_with_its_training_data_at_the_left():
    """Seven samples of one class and six of the other: two rows of three for each class, and one sample is left out."""
    images = np.random.default_rng(1).integers(0, 256, (17, 2, 2, 1), dtype=np.uint8)
    labels, classes = np.arange(13) % 2 + 3, np.array([4, 9, 3, 4])
    captions = [f"class {y}" for y in labels]
    given = Examples(images[13:], ["a", "b", "c", "d"], classes)
    picture = draw_samples(images[:13], "t", captions, labels=labels, examples=given)
    left = picture.shape[1] - GAP - 4 * 100 - 3 * GAP  # four columns in all
    for row, example, samples in (
        (0, 15, (0, 2, 4)),
        (1, None, (6, 8, 10)),
        (2, 13, (1, 3, 5)),
        (3, 16, (7, 9, 11)),
    ):
        if example is None:
            assert (cell(picture, row, 0, left) == picture[-1, -1]).all()  # empty
        else:
            np.testing.assert_array_equal(cell(picture, row, 0, left), images[example])
        for column, i in enumerate(samples):
            np.testing.assert_array_equal(cell(picture, row, column, left + 100 + 3 * GAP), images[i])
    names = picture[2 * LINE + GAP : 2 * LINE + GAP + 400 : 1, :left].max(axis=(1, 2)).reshape(4, 100).max(axis=1)
    assert (names > 150).tolist() == [True, False, True, False]


def test_classes_of_similar_size_have_full_rows_of_the_smallest():
    labels = np.repeat([0, 1], [12, 9])  # rows of nine, not two rows of six
    width = draw_samples(np.zeros((21, 2, 2, 1), np.uint8), "t", labels=labels).shape[1]
    assert 9 * 100 < width < 11 * 100


def test_a_rare_class_does_not_make_rows_of_one():
    images, labels = np.zeros((103, 2, 2, 1), np.uint8), np.array([0] * 100 + [1, 2, 3])
    height, width = draw_samples(images, "t", labels=labels).shape[:2]
    assert (height - LINE) // 100 == 12 and 11 * 100 < width < 13 * 100  # 9 rows of 11, and three rows of one


@pytest.mark.parametrize(("count", "columns"), [(1, 1), (2, 2), (5, 5), (7, 3), (24, 6), (64, 8), (96, 12), (97, 10)])
def test_all_rows_are_full_unless_a_prime_number_would_need_a_long_row(count, columns):
    assert pictures.grids.fit_columns(count) == columns


def test_many_classes_have_a_plain_grid():
    images = np.random.default_rng(2).integers(0, 256, (42, 2, 2, 1), dtype=np.uint8)
    many = draw_samples(images, "t", 42 * ["c"], labels=np.arange(42) % 21)
    np.testing.assert_array_equal(many, draw_grid(images, "t", captions=42 * ["c"]))


@pytest.mark.parametrize("pairs", [None, np.array([1, 0, 1, 0])])
def test_each_image_without_a_class_has_its_training_example_in_the_same_cell(pairs):
    images = np.random.default_rng(2).integers(0, 256, (10, 2, 2, 1), dtype=np.uint8)
    picture = draw_samples(images[:4], "t", examples=Examples(images[4:], pairs=pairs))
    for i, pair in enumerate(range(4) if pairs is None else pairs):
        np.testing.assert_array_equal(cell(picture, i // 2, i % 2, 0), images[4 + pair])
        np.testing.assert_array_equal(cell(picture, i // 2, i % 2, 200 + 3 * GAP), images[i])


# ---- Trajectories


@pytest.mark.parametrize("shape", [(1,), *SHAPES])
def test_a_trajectory_has_a_column_for_each_time(shape):
    """All times have one scale, which suits the samples."""
    x = drawn(12, 4, 2, *shape) * np.array([100, 50, 10, 1]).reshape(-1, *[1] * (len(shape) + 1))
    figure = draw_trajectory(x, [9, 5, 1], title="being denoised")
    if len(shape) == 1:
        for axes, points in zip(figure.axes, x, strict=True):
            if shape[0] == 1:
                assert len(axes.patches) == 1
            else:
                (line,) = axes.get_lines()
                np.testing.assert_array_equal(np.transpose(line.get_data()), points[:, :2])
    elif len(shape) == 2:
        for i, axes in enumerate(figure.axes):
            np.testing.assert_array_equal(np.stack(lines(axes), axis=-1), x[i % 4, i // 4])
        (limits,) = {axes.get_ylim() for axes in figure.axes}
        assert np.ptp(limits) == pytest.approx(1.2 * np.ptp(x[-1]))
    else:
        shown, pictures = images(figure)
        assert len(shown) == 2 * 2 * 4
        slices = x if len(shape) == 3 else x[:, :, 2]
        for i, picture in enumerate(pictures):
            row, column = divmod(i, 4)
            np.testing.assert_array_equal(picture.get_array(), slices[column, row // 2, ..., row % 2])
            last = x[-1, ..., row % 2]
            limit = max(last.max(), -last.min()) + np.ptp(last) / 10
            np.testing.assert_allclose(picture.get_clim(), (-limit, limit), rtol=1e-6)
        assert pictures[0].colorbar.extend == "both"


# ---- Limits, and values that are not finite


@pytest.mark.parametrize(
    ("shape", "num_axes"),
    [
        ((64, 40, 30), 12),
        ((64, 6, 9, 30), 8 * 6 + 6),
        ((2, 6, 900, 1), 2 + 1),
        ((64, 4, 4, 4, 9), 4 * 3 * (6 + 1)),
        ((100_001, 100), 16),
    ],
)
def test_large_sets_are_drawn_in_part(shape, num_axes):
    x = np.broadcast_to(drawn(22, *shape[1:]), shape)
    figure = draw_samples(x, title="samples")
    assert len(figure.axes) == num_axes and ("first" in figure.get_suptitle() or "1 of 4" in figure.get_suptitle())
    figure = draw_trajectory(np.broadcast_to(x[:40], (50, *x[:40].shape)), range(49, 0, -1), title="")
    titles = [axes.get_title() for axes in figure.axes if axes.get_title()]
    assert titles[0] == "t = 49" and titles[-1] == "sample" and len(titles) == 10 and len(figure.axes) <= 66


@pytest.mark.parametrize("shape", SHAPES)
def test_values_that_are_not_finite_are_counted_and_marked(shape):
    x = drawn(24, 4, *shape)
    x[0].flat[0], x[1].flat[0], x[2].flat[1] = np.nan, np.inf, -np.inf
    figure = draw_samples(x, title="not finite")
    counted = "9 of 1184" if len(shape) == 4 else f"3 of {x.size}"  # in slices and projections
    assert f"{counted} drawn values are NaN or infinite" in figure.get_suptitle()
    marked = (to_array(figure) == [255, 0, 255]).all(axis=-1).any()
    assert marked == (len(shape) > 2)  # values of vectors are only counted
    to_array(draw_trajectory(np.stack([x, x]), [1], title="not finite"))


@pytest.mark.parametrize("value", [3.0, np.nan])
@pytest.mark.parametrize("shape", SHAPES)
def test_one_example_of_one_value_with_text_that_is_not_mathematical_notation(shape, value):
    """Matplotlib would raise for a name that is an invalid formula."""
    x, text = np.full((1, *shape), value, np.float32), "$\\frac{$ a" + 40 * "b"
    options = {"title": text, "captions": [text]}
    for figure in (draw_samples(x, **options, examples=Examples(x)), draw_trajectory(x[None], [], **options)):
        assert to_array(figure).dtype == np.uint8


def test_what_cannot_be_drawn_is_refused():
    with pytest.raises(ValueError, match="at most three spatial axes"):
        draw_samples(np.zeros((1, 2, 2, 2, 2, 1)), title="")
    for shape in ((3, 2), (3, 1, 2, 2, 2, 2, 1)):
        with pytest.raises(ValueError, match="at most 3 spatial axes"):
            draw_trajectory(np.zeros(shape), [2, 1], title="")


# ---- Statistics of two sets


@pytest.mark.parametrize(("kind", "length"), [("bins", 50), ("logarithmic", 9), ("linear", 200)])
def test_statistics_have_error_bars_for_both_sets(kind, length):
    rng, every = np.random.default_rng(0), 3 if length == 200 else 1
    pair = [ValueAndError(0.5 + rng.random((length, 2)), 0.1 * rng.random((length, 2))) for _ in range(2)]
    x = np.sort(rng.random((2, length + 1))) if kind == "bins" else 1 + np.arange(length)
    curves = Curves("name", x, *pair, ("x", "value (data units)"), logarithmic=kind == "logarithmic")
    figure = draw_curves(curves, "title", Channels(("u", "v"), ("K", "m")))
    shown = [(axes.get_title(), axes.get_ylabel()) for axes in figure.axes]
    assert shown == [("u", "value (K)"), ("v", "value (m)")]
    for c, axes in enumerate(figure.axes):
        assert (axes.get_xscale() == axes.get_yscale() == "log") == (kind == "logarithmic")
        for container, statistic in zip(axes.containers, pair, strict=True):
            line, _, (bars,) = container.lines
            ends = np.array(bars.get_segments())[:, :, 1]
            np.testing.assert_allclose(ends.mean(axis=1), statistic.value[::every, c])
            np.testing.assert_allclose(np.ptp(ends, axis=1) / 2, statistic.standard_error[::every, c], atol=1e-12)
            if kind != "bins":
                np.testing.assert_array_equal(line.get_data(), [x, statistic.value[:, c]])
        for patch, statistic in zip(axes.patches, pair, strict=kind == "bins"):
            np.testing.assert_array_equal(patch.get_data()[0], statistic.value[:, c])
            np.testing.assert_array_equal(patch.get_data()[1], x[c])


# ---- Plots and grids


@pytest.mark.parametrize("decoder", [1.8, 1e-12, -1e-9])
def test_the_decoder_term_is_inside_the_axes(decoder):
    """If the decoder term is far below the other terms, the term is at the bottom of the axis."""
    terms = np.concatenate([[decoder], np.geomspace(2.0, 1e-4, 999)])
    (axes,) = pictures.draw_bound_terms(terms, "digits").axes
    transitions, point = axes.get_lines()
    np.testing.assert_array_equal(transitions.get_ydata(), terms[1:])
    (x,), (y,) = point.get_data()
    assert x == 1 and y == pytest.approx(max(decoder, 1e-4 / 3))
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    assert left < x < right and low < y < high and low <= 1e-4 and high >= 2


def test_samples_stand_before_their_neighbors():
    x, nearest = np.zeros((2, 8, 2), np.float32), np.ones((2, 2, 8, 2), np.float32)
    figure = pictures.draw_neighbors(x, [7, 3], nearest, np.array([[0.5, 1.5], [0.75, 2.5]]), "samples of x")
    titles = ["sample 7", "distance 0.5", "distance 1.5", "sample 3", "distance 0.75", "distance 2.5"]
    assert [axes.get_title() for axes in figure.axes] == titles
    assert [lines(axes)[0][0] for axes in figure.axes] == [0, 1, 1, 0, 1, 1]


def test_grids_and_text_show_the_images():
    images = np.zeros((5, 2, 3, 1), np.uint8)
    images[4] = 255
    picture = pictures.draw_grid(images, columns=3)
    assert picture.shape == (2 * (2 * 32 + 4) + 4, 3 * (3 * 32 + 4) + 4, 1)
    assert (picture[72:136, 104:200] == 255).all() and (picture == 255).sum() == 64 * 96
    pixels = np.array([[[[0], [255]]], [[[255], [0]]]], np.uint8)
    assert [pictures.as_text(pixels, columns) for columns in (12, 11, 4, 3)] == ["  @@    @@", "  @@", "  @@", ""]


def test_a_grid_with_text_has_the_images_of_one_without():
    images = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)
    plain = pictures.draw_grid(images, columns=3)
    captioned = pictures.draw_grid(images, columns=3, captions=["cat", "", "2", "3", 50 * "d"])
    for i in range(5):
        top, left = i // 3 * (100 + LINE) + GAP, i % 3 * 100 + GAP
        np.testing.assert_array_equal(captioned[top : top + 96, left : left + 96 : 12][::12], images[i])
        text = captioned[top + 96 : top + 96 + LINE, left : left + 96]
        assert (text == text[0, 0]).all() == (i == 1)
    headed = pictures.draw_grid(images, " ".join(3 * [25 * "w"]), 3, headers=["t = 999", "t = 0", "image"])
    np.testing.assert_array_equal(headed[4 * LINE :], plain)  # three title lines and a header line
    assert (headed[3 * LINE : 4 * LINE, GAP:100] > 150).any()
