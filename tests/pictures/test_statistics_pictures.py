"""Pictures of statistics of arrays: what is drawn equals what was measured, with its errors."""

import numpy as np

from diffusion_jax.evaluation import array_metrics, array_statistics
from diffusion_jax.pictures import draw_autocorrelation, draw_histograms, draw_spectra, panels, to_array


def drawn(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_histograms_have_error_bars_and_their_distance():
    result = array_metrics.marginal_histograms(drawn(16, 60, 20, 2), drawn(17, 50, 20, 2), bins=10, limits=(-4, 4))
    figure = draw_histograms(result, title="histograms")
    for c, axes in enumerate(figure.axes):
        for patch, bars, statistic in zip(axes.patches, axes.containers, result[1:3], strict=True):
            np.testing.assert_array_equal(patch.get_data()[0], statistic.value[c])
            np.testing.assert_array_equal(patch.get_data()[1], result.edges[c])
            ends = np.array(bars.lines[2][0].get_segments())[:, :, 1]
            np.testing.assert_allclose(ends.mean(axis=1), statistic.value[c])
            np.testing.assert_allclose(np.ptp(ends, axis=1) / 2, statistic.standard_error[c], atol=1e-12)
        assert f"total variation {result.distance.value[c]:.3g}" in axes.get_title()
        assert axes.get_xlabel() == panels.VALUE and axes.get_ylabel() == "share of the values"
    assert legend(figure) == ["data", "samples"] and "standard errors" in figure.get_suptitle()


def curves(axes):
    """(x, value, standard error) of each curve with error bars."""
    for container in axes.containers:
        line, _, (bars,) = container.lines
        ends = np.array(bars.get_segments())[:, :, 1]
        yield line.get_xdata(), line.get_ydata(), np.ptp(ends, axis=1) / 2


def test_spectra_are_on_logarithmic_axes_without_the_frequency_zero():
    one, other = (array_statistics.power_spectrum(drawn(seed, 30, 16, 2)) for seed in (18, 19))
    figure = draw_spectra(one, other, title="spectra")
    for c, axes in enumerate(figure.axes):
        assert axes.get_xscale() == axes.get_yscale() == "log"
        for (x, value, error), spectrum in zip(curves(axes), (one, other), strict=True):
            np.testing.assert_array_equal(x, spectrum.frequencies[1:])
            np.testing.assert_array_equal(value, spectrum.value[1:, c])
            np.testing.assert_allclose(error, spectrum.standard_error[1:, c])
        assert f"at frequency 0: {one.value[0, c]:.3g}" in axes.get_title()
        assert axes.get_xlabel() and "power" in axes.get_ylabel()
    assert legend(figure) == ["data", "samples"]


def test_autocorrelations_have_error_bars():
    one, other = (array_statistics.autocorrelation(drawn(seed, 30, 400, 1)) for seed in (20, 21))
    figure = draw_autocorrelation(one, other, title="autocorrelation")
    chosen = np.unique(np.linspace(0, 200, 120).round().astype(int))
    for (x, value, error), result in zip(curves(figure.axes[0]), (one, other), strict=True):
        np.testing.assert_array_equal(x, chosen)
        np.testing.assert_array_equal(value, result.value[chosen, 0])
        np.testing.assert_allclose(error, result.standard_error[chosen, 0], atol=1e-12)
    assert "120 of 201 lags" in figure.get_suptitle()


def test_spectra_without_power_and_of_one_position_are_drawn():
    for length in (1, 8):
        spectrum = array_statistics.power_spectrum(np.ones((4, length, 1)))
        to_array(draw_spectra(spectrum, spectrum, title="constant"))
