"""Classifier two-sample tests: whether a classifier tells samples from data, for all data and for each condition.

The classifier is a linear discriminant of features and their squares, so it finds means and variances that differ. It is
fitted to one half of the examples and judged by the other half. (Two classifiers, one for each half, would err together.)
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
from jaxtyping import Float

from diffusion_jax import covariances
from diffusion_jax.metrics.of_arrays import ValueAndError, as_example_pair

_LEADING = 4  # components with a feature of their own


def components(
    x: Float[np.ndarray, "N *shape"], residual: Float[np.ndarray, "N *shape"], covariance: covariances.Covariance
) -> dict[str, Float[np.ndarray, "N"]]:
    """Returns features by the eigenvectors of a covariance of x_0, in the order of their variances.

    component i: coefficients of x. energy of components i to j: the root mean square of coefficients of the residual, in
    groups of 1, 2, 4, 8 and more; energy of the rest: of what the eigenvectors lack.
    """
    probe = np.random.default_rng(0).standard_normal((1, *x.shape[1:]))
    found: list[Any] = [covariance.to_basis(np.asarray(each, np.float64)) for each in (x, residual, probe)]
    rest = residual - covariance.from_basis(found[1]) if covariance.rest else None
    variances = np.broadcast_to(np.asarray(covariance.variances), found[0].shape[1:]).ravel()
    found = [each.reshape(len(each), -1) for each in found]
    if np.iscomplexobj(found[0]):
        found = [np.concatenate([each.real, each.imag], axis=1) for each in found]
        variances = np.tile(variances, 2)
    features: dict[str, np.ndarray] = {}
    order = np.argsort(-variances, kind="stable")
    order = order[np.abs(found[2][0, order]) > 1e-9]  # the imaginary parts of some frequencies are always 0
    for i, k in enumerate(order[:_LEADING]):
        features[f"component {i + 1}"] = found[0][:, k]
    for start in (2**i - 1 for i in range(len(order).bit_length())):
        group = order[start : 2 * start + 1]
        features[f"energy of components {start + 1} to {start + len(group)}"] = _root_mean_square(found[1][:, group])
    return features if rest is None else features | {"energy of the rest": _root_mean_square(rest)}


def _root_mean_square(x):
    return np.sqrt(np.square(x).reshape(len(x), -1).mean(axis=1))


def classifier_two_sample(reference: Any, samples: Any) -> ValueAndError:
    """Returns the area under a classifier's ROC curve (C2ST, Lopez-Paz and Oquab 2017): 0.5 for equal distributions.

    This is the probability that the classifier scores a sample higher than an example of the reference. The features are
    `components` of both sets together. For a shift by d deviations of one feature, it approaches Phi(d / sqrt(2)).

    Returns: ValueAndError with same_distribution 0.5 and its standard deviation in closed form (Mann and Whitney 1947).
    Raises: ValueError for fewer than eight examples, different example shapes, or values that are not finite.
    """
    reference, samples = (np.asarray(x, np.float64) for x in as_example_pair(reference, samples, 8))
    both = np.concatenate([reference, samples])
    both -= both.mean(axis=0)
    with warnings.catch_warnings():  # only the eigenvectors count, not the shrunk eigenvalues
        warnings.simplefilter("ignore", UserWarning)
        covariance = covariances.principal(both)
    x = _with_squares(np.stack([*components(both, both, covariance).values()], axis=-1))
    is_sample, is_fitted = np.arange(len(both)) >= len(reference), np.arange(len(both)) % 2 == 0
    scores = x @ _discriminant(x[is_fitted & is_sample], x[is_fitted & ~is_sample])
    one, other = np.sort(scores[~is_fitted & is_sample]), np.sort(scores[~is_fitted & ~is_sample])
    above, below = _share_below(one, other), 1 - _share_below(other, one)
    error = math.sqrt(above.var() / len(one) + below.var() / len(other))
    expected = math.sqrt((len(one) + len(other) + 1) / (12 * len(one) * len(other)))
    return ValueAndError(float(above.mean()), error, 0.5, expected)


def classifier_scores(
    truth: Float[np.ndarray, "N Q"], samples: Float[np.ndarray, "L N Q"]
) -> tuple[Float[np.ndarray, "M"], Float[np.ndarray, "L M"]]:
    """Returns scores of every second truth and of its samples, higher if they look like truths.

    This is a local C2ST (Linhart et al. 2023). The classifier, fitted to the other truths, sees the differences from the mean
    of a truth and its samples, and their products with this mean, which stands for the measurement. If the samples are
    posterior samples, the rank of a truth's score among the scores of its samples is uniform.
    """
    both = np.concatenate([truth[None], samples])
    center = both.mean(axis=0)
    difference = both - center
    x = np.concatenate([_with_squares(difference), difference * center], axis=-1)
    scores = x[:, 1::2] @ _discriminant(x[0, ::2], x[1:, ::2].reshape(-1, x.shape[-1]))
    return scores[0], scores[1:]


def _with_squares(x):
    return np.concatenate([x, np.square(x)], axis=-1)


def _discriminant(one, other):
    """Returns the weights of a linear discriminant of features [n, F]; the ridge grows with F / n."""
    centered = np.concatenate([one - one.mean(axis=0), other - other.mean(axis=0)])
    covariance = centered.T @ centered / len(centered)
    scale = np.sqrt(np.maximum(np.diag(covariance), np.finfo(float).tiny))
    ridge = (1e-6 + one.shape[1] / len(one)) * np.eye(len(scale))
    difference = (one.mean(axis=0) - other.mean(axis=0)) / scale
    return np.linalg.solve(covariance / np.outer(scale, scale) + ridge, difference) / scale


def _share_below(x, y):
    """Returns the share of sorted y below each x, where equal numbers count half."""
    return (np.searchsorted(y, x, "left") + np.searchsorted(y, x, "right")) / (2 * len(y))
