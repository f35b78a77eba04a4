"""The metrics of samples by name: the images that each needs, the names in reports, and their values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from diffusion_jax.evaluation import metrics
from diffusion_jax.evaluation.feature_extraction import SetFeatures
from diffusion_jax.evaluation.feature_extractors import FeatureExtractor

__all__ = [
    "DEFINITIONS",
    "METRICS",
    "MIN_IMAGES",
    "compute_metrics",
    "memorization_report",
    "reported_name",
    "unavailable_metrics",
]

_KID_SUBSETS, _KID_SUBSET_SIZE, _KID_SEED = 100, 1000, 2020
_IS_SPLIT_SIZE = 5000
_MANIFOLD_K, _DENSITY_K = 3, 5
# The smallest number of images in each set, by metric.
MIN_IMAGES = {
    "fid": 2,
    "sfid": 2,
    "kid": 8,
    "is": 1,
    "precision_recall": _MANIFOLD_K + 1,
    "density_coverage": _DENSITY_K + 1,
    "memorization": 2,
}
METRICS = tuple(MIN_IMAGES)
_FRECHET = "distance of Gaussians with the mean and covariance of the features of the two sets; 0 for equal ones"
# What the numbers of a record mean, by their reported names without the name of a resize.
DEFINITIONS = {
    "fid": f"Frechet Inception distance: {_FRECHET}. Lower is better; it falls with the number of samples",
    "frechet_distance": f"{_FRECHET}. Lower is better; it falls with the number of samples",
    "sfid": f"the same for spatial features of Inception: {_FRECHET}",
    "spatial_frechet_distance": f"of spatial features: {_FRECHET}",
    "kid": "kernel Inception distance: unbiased squared MMD of the features, with a cubic kernel; about 0 for equal laws",
    "kernel_distance": "unbiased squared MMD of the features, with a cubic kernel; about 0 for equal laws",
    "inception_score": "exp of the mean divergence of Inception's classes of an image from those of all; higher is better",
    "precision": "share of samples within the manifold of the reference (nearest-neighbor balls): fidelity",
    "recall": "share of reference images within the manifold of the samples: diversity",
    "density": "mean number of reference balls that hold a sample, over k: fidelity, 1 for equal laws",
    "coverage": "share of reference images whose ball holds a sample: diversity",
    "close_share": "share of samples nearer to a reference image than 99% of the reference images are to each other: about "
    "0.01 for new images, near 1 for copies",
    "memorization": "distances of the features of samples to those of the nearest reference images",
}


def reported_name(metric: str, extractor: FeatureExtractor) -> str:
    """The name of a metric in reports.

    FID, sFID and KID are names for the published Inception only, and a resize other than TensorFlow 1's is part of the name.
    """
    suffix = "" if extractor.resize in (None, "tf1") else f"_{extractor.resize}"
    substitutes = {"fid": "frechet_distance", "sfid": "spatial_frechet_distance", "kid": "kernel_distance"}
    names = {"is": "inception_score"} if extractor.published else substitutes
    return names.get(metric, metric) + suffix


def unavailable_metrics(
    statistics_only: bool, has_spatial: bool, extractor: FeatureExtractor, metric_names: Sequence[str]
) -> dict[str, str]:
    """The reason for each of the metrics that cannot be computed.

    statistics_only: whether the reference has no images. has_spatial: whether it has statistics of spatial features.
    """
    reasons = {}
    if extractor.name != "inception":
        reasons["sfid"] = "only Inception has spatial features"
    elif not has_spatial:
        reasons["sfid"] = "the reference has no spatial statistics (mu_s, sigma_s)"
    if not extractor.published:
        reasons["is"] = "it needs the classes of the published Inception"
    if statistics_only:
        others = ("kid", "precision_recall", "density_coverage", "memorization")
        reasons |= dict.fromkeys(others, "the reference has statistics only")
    return {metric: reasons[metric] for metric in metric_names if metric in reasons}


def compute_metrics(
    reference: SetFeatures,
    samples: SetFeatures,
    extractor: FeatureExtractor,
    metric_names: Sequence[str],
    log: Callable[[str], None],
) -> dict[str, Any]:
    """The metrics by their reported names, with the options on which they depend.

    metric_names: of METRICS without the `unavailable_metrics`. log: called with notes about the results.
    Raises: ValueError for features that cannot be compared.
    """
    results: dict[str, Any] = {}

    def add(metric: str, value: float, **options) -> None:
        name = reported_name(metric, extractor)
        results[name] = value
        results.update({f"{name}_{option}": option_value for option, option_value in options.items()})

    if "fid" in metric_names:
        add("fid", metrics.frechet_distance(reference.moments, samples.moments))
        _note_few_samples(samples.moments, log)
    if "sfid" in metric_names:
        assert reference.spatial is not None and samples.spatial is not None
        add("sfid", metrics.frechet_distance(reference.spatial, samples.spatial))
    if "is" in metric_names:
        assert extractor.head is not None
        score = metrics.inception_score(_pool(samples) @ extractor.head, _IS_SPLIT_SIZE)
        add("is", score.mean, std=score.std, split_size=_IS_SPLIT_SIZE)
    if "kid" in metric_names:
        # A quarter of small sets, because the variance over subsets that are nearly a whole set is not informative.
        size = min(_KID_SUBSET_SIZE, min(len(_pool(reference)), len(_pool(samples))) // 4)
        kid = metrics.kid(_pool(reference), _pool(samples), _KID_SUBSETS, size, _KID_SEED)
        settings = {"subsets": _KID_SUBSETS, "subset_size": size, "seed": _KID_SEED}
        add("kid", kid.mean, standard_error=kid.standard_error, std=kid.std, **settings)
    if "precision_recall" in metric_names:
        shares = metrics.precision_recall(_pool(reference), _pool(samples), _MANIFOLD_K)
        results |= shares._asdict() | {"precision_recall_k": _MANIFOLD_K}
    if "density_coverage" in metric_names:
        shares = metrics.density_coverage(_pool(reference), _pool(samples), _DENSITY_K)
        results |= shares._asdict() | {"density_coverage_k": _DENSITY_K}
    return results


def _pool(features: SetFeatures) -> np.ndarray:
    assert features.pool is not None  # `unavailable_metrics` excludes the other metrics for sets without images
    return features.pool


def _note_few_samples(moments: metrics.Moments, log: Callable[[str], None]) -> None:
    dimensions = len(moments.mean)
    if moments.count <= dimensions:
        log(
            f"Note: {moments.count:,} samples for {dimensions} dimensions: the distance is larger than with more samples; "
            "compare it at equal numbers of samples only."
        )


def memorization_report(
    reference: np.ndarray, samples: np.ndarray, k: int = 5
) -> tuple[dict[str, float], metrics.Neighbors]:
    """(a report of whether samples are copies of reference images, the samples' k nearest neighbors).

    reference, samples: features [N, D]. close_distance is the 1% quantile of the distances between reference images and their
    nearest others; close_share is the share of samples at most that far from a reference image: about 0.01 for new images,
    near 1 for copies.
    """
    neighbors = metrics.nearest_neighbors(reference, samples, min(k, len(reference)))
    reference_distances = metrics.nearest_neighbors(reference, reference, others=True).distances[:, 0]
    distinct = reference_distances[reference_distances > 0]  # duplicates do not show which distances are small
    limit = np.quantile(distinct, 0.01) if distinct.size else 0.0
    report = {
        "nearest_distance_median": float(np.median(neighbors.distances[:, 0])),
        "reference_nearest_distance_median": float(np.median(reference_distances)),
        "close_distance": float(limit),
        "close_share": float(np.mean(neighbors.distances[:, 0] <= limit)),
    }
    return report, neighbors
