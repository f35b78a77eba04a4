"""Names, directions and meanings of the numbers in records, and their format. Every text that people read uses this table."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

__all__ = ["MEANINGS", "Meaning", "find_meaning", "format_value", "heading", "reported_values"]


class Meaning(NamedTuple):
    """A number of a record, for people.

    name: with the unit. better: "lower", "higher" or "closer to 0"; "" for a number that does not rank models. text: the
    definition.
    """

    name: str
    better: str
    text: str


_DISTANCE = "distance between Gaussians with the mean and covariance of each set's features; 0 for equal Gaussians"
_FALLS = "it falls with the number of samples"
_MMD = "unbiased squared MMD of the features, with a cubic kernel; about 0 for equal distributions"
_Z = "z-score of the deviation; |z| is below the limit in 19 of 20 measurements of equal distributions"

# By the name in a record, without a resize.
MEANINGS = {
    "fid": Meaning("Frechet Inception distance (FID)", "lower", f"{_DISTANCE}; {_FALLS}"),
    "frechet_distance": Meaning("Frechet distance", "lower", f"{_DISTANCE}; {_FALLS}"),
    "sfid": Meaning("spatial FID (sFID)", "lower", f"the same for Inception's spatial features: {_DISTANCE}"),
    "spatial_frechet_distance": Meaning(
        "spatial Frechet distance", "lower", f"the same for spatial features: {_DISTANCE}"
    ),
    "kid": Meaning("kernel Inception distance (KID)", "lower", _MMD),
    "kernel_distance": Meaning("kernel distance", "lower", _MMD),
    "inception_score": Meaning(
        "Inception Score", "higher", "exp(mean KL(p(class | image) || p(class))), by Inception's class probabilities"
    ),
    "precision": Meaning(
        "precision", "higher", "fidelity: share of samples inside the reference's manifold (nearest-neighbor balls)"
    ),
    "recall": Meaning("recall", "higher", "diversity: share of reference images inside the samples' manifold"),
    "density": Meaning(
        "density",
        "higher",
        "fidelity: mean number of reference balls that contain a sample, divided by k; 1 for equal distributions",
    ),
    "coverage": Meaning("coverage", "higher", "diversity: share of reference images whose ball contains a sample"),
    "close_share": Meaning(
        "share of near copies",
        "lower",
        "share of samples nearer to a reference image than 99% of the reference images are to each other: about "
        "0.01 for new images, near 1 for copies",
    ),
    "energy_distance": Meaning(
        "energy distance",
        "lower",
        "2 E|X - Y| - E|X - X'| - E|Y - Y'| of standardized data, unbiased: 0 for equal distributions, within "
        "a few same_distribution_std",
    ),
    "sliced_wasserstein": Meaning(
        "sliced Wasserstein distance",
        "lower",
        "root of the mean W_2^2 over directions, for standardized data; for equal distributions about same_distribution",
    ),
    "histogram_distance": Meaning(
        "histogram distance",
        "lower",
        "total variation between a channel's histograms, the largest over all channels; for equal distributions about "
        "same_distribution",
    ),
    "mean_deviation": Meaning(
        "deviation of the mean", "closer to 0", "samples minus data, for standardized channels, where |z| is largest"
    ),
    "mean_z": Meaning("z of the mean", "closer to 0", _Z),
    "covariance_deviation": Meaning(
        "deviation of the covariance",
        "closer to 0",
        "samples minus data, for standardized channels at one position, where |z| is largest",
    ),
    "covariance_z": Meaning("z of the covariance", "closer to 0", _Z),
    "power_spectrum_deviation": Meaning(
        "relative deviation of the power spectrum",
        "closer to 0",
        "samples / data - 1, at the frequency and channel where |z| is largest",
    ),
    "power_spectrum_z": Meaning("z of the power spectrum", "closer to 0", _Z),
    "autocorrelation_deviation": Meaning(
        "deviation of the autocorrelation",
        "closer to 0",
        "samples minus data, at the lag and channel where |z| is largest",
    ),
    "autocorrelation_z": Meaning("z of the autocorrelation", "closer to 0", _Z),
    "bits_per_dim": Meaning("bits per dimension", "lower", "total bound, upper bound of the negative log-likelihood"),
    "nats_per_dim": Meaning("nats per dimension", "lower", "the same in nats"),
    "prior": Meaning("prior (bits per dimension)", "", "KL of q(x_T | x_0) from the standard normal"),
    "transitions": Meaning("transitions (bits per dimension)", "", "sum of the terms for the steps between"),
    "decoder": Meaning("decoder (bits per dimension)", "", "L_0, the code of x_0 given x_1"),
    "ode_bits_per_dim": Meaning("bits per dimension of the ODE", "lower", "by the probability-flow ODE, no bound"),
    "ode_nats_per_dim": Meaning("nats per dimension of the ODE", "lower", "the same in nats"),
}
_RESIZES = ("_pytorch", "_clean")
# Suffixes of entries that describe another number.
_DETAILS = ("_std", "_standard_error", "_same_distribution", "_limit", "_frequency")


def find_meaning(key: str) -> Meaning | None:
    """Returns the meaning of a record's entry, also for a resize such as "fid_clean"; None for an unknown entry."""
    if key in MEANINGS:
        return MEANINGS[key]
    for resize in _RESIZES:
        if (found := MEANINGS.get(key.removesuffix(resize))) is not None:
            return found._replace(name=f"{found.name}, {resize[1:]} resize")
    return None


def heading(key: str) -> str:
    """Returns the name and direction of an entry, such as "Frechet distance, lower is better"; other keys unchanged."""
    found = find_meaning(key)
    if found is None:
        return key
    return f"{found.name}, {found.better} is better" if found.better else found.name


def reported_values(record: Mapping[str, Any]) -> dict[str, float]:
    """Returns the metrics of a record, without the entries that describe a metric."""
    values = {key: value for key, value in record.items() if isinstance(value, float) and not key.endswith(_DETAILS)}
    if "memorization" in record:
        values["close_share"] = record["memorization"]["close_share"]
    return values


def format_value(value: float, error: float | None = None) -> str:
    """Formats a number; with an error, rounds both to the first digit of the error, or to two if the first is 1."""
    if not error or not math.isfinite(error):
        return f"{value:.4g}" + ("" if error is None else f" ± {error:.2g}")
    first = math.floor(math.log10(error))  # the place of the error's first digit
    decimals = max(0, -first + (error < 2 * 10**first))  # two digits of an error that begins with 1
    if decimals > 6 or abs(value) >= 1e6:
        return f"{value:.4g} ± {error:.2g}"
    return f"{value:.{decimals}f} ± {error:.{decimals}f}"
