"""All metrics of one set of images against another, each under the name that it has a right to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from diffusion_jax.evaluation import metrics
from diffusion_jax.evaluation.extract import Features
from diffusion_jax.evaluation.features import Extractor

_KID_SUBSETS, _KID_SUBSET_SIZE, _KID_SEED = 100, 1000, 2020
_IS_SPLIT_SIZE = 5000
_MANIFOLD_K, _DENSITY_K = 3, 5
# The fewest images of each set that a metric can be of.
LEAST = {
    "fid": 2,
    "sfid": 2,
    "kid": 8,
    "is": 1,
    "precision_recall": _MANIFOLD_K + 1,
    "density_coverage": _DENSITY_K + 1,
    "memorization": 2,
}
METRICS = tuple(LEAST)


def name_of(metric: str, extractor: Extractor) -> str:
    """What a metric of some features is reported as. FID and its kin are of the published Inception alone, and another resize
    than TensorFlow 1's is part of their names.
    """
    suffix = "" if extractor.resize in (None, "tf1") else f"_{extractor.resize}"
    substitutes = {"fid": "frechet_distance", "sfid": "spatial_frechet_distance", "kid": "kernel_distance"}
    names = {"is": "inception_score"} if extractor.published else substitutes
    return names.get(metric, metric) + suffix


def left_out(statistics_alone: bool, has_spatial: bool, extractor: Extractor, wanted: Sequence[str]) -> dict[str, str]:
    """Which of the wanted metrics there cannot be, and why.

    statistics_alone: whether the reference has no images. has_spatial: whether its statistics are of spatial features, too.
    """
    reasons = {}
    if extractor.name != "inception":
        reasons["sfid"] = "only Inception has spatial features"
    elif not has_spatial:
        reasons["sfid"] = "the reference has no spatial statistics (mu_s, sigma_s)"
    if not extractor.published:
        reasons["is"] = "of the published Inception's classes"
    if statistics_alone:
        others = ("kid", "precision_recall", "density_coverage", "memorization")
        reasons |= dict.fromkeys(others, "the reference is statistics alone")
    return {metric: reasons[metric] for metric in wanted if metric in reasons}


def compare(
    reference: Features, samples: Features, extractor: Extractor, wanted: Sequence[str], say: Callable[[str], None]
) -> dict[str, Any]:
    """The wanted metrics, of METRICS but for those `left_out`, by name, with what they depend on; say: told of doubts.

    Raises: ValueError for features that cannot be compared.
    """
    found: dict[str, Any] = {}

    def named(metric, **values):
        name = name_of(metric, extractor)
        found.update({name if key == "value" else f"{name}_{key}": value for key, value in values.items()})

    if "fid" in wanted:
        named("fid", value=metrics.frechet_distance(reference.moments, samples.moments))
        dimensions = len(samples.moments.mean)
        if samples.moments.count <= dimensions:
            say(
                f"Note: {samples.moments.count:,} samples for {dimensions} dimensions: the distance is larger than that of "
                "more samples would be; compare it at equal numbers only."
            )
    if "sfid" in wanted:
        named("sfid", value=metrics.frechet_distance(reference.spatial, samples.spatial))
    if "is" in wanted:
        score = metrics.inception_score(samples.pool @ extractor.head, _IS_SPLIT_SIZE)
        named("is", value=score.mean, std=score.std, split_size=_IS_SPLIT_SIZE)
    if "kid" in wanted:
        # A quarter of small sets: subsets that are nearly all of a set would not say how much it could vary.
        size = min(_KID_SUBSET_SIZE, min(len(reference.pool), len(samples.pool)) // 4)
        kid = metrics.kid(reference.pool, samples.pool, _KID_SUBSETS, size, _KID_SEED)
        settings = {"subsets": _KID_SUBSETS, "subset_size": size, "seed": _KID_SEED}
        named("kid", value=kid.mean, standard_error=kid.standard_error, std=kid.std, **settings)
    if "precision_recall" in wanted:
        shares = metrics.precision_recall(reference.pool, samples.pool, _MANIFOLD_K)
        found |= shares._asdict() | {"precision_recall_k": _MANIFOLD_K}
    if "density_coverage" in wanted:
        shares = metrics.density_coverage(reference.pool, samples.pool, _DENSITY_K)
        found |= shares._asdict() | {"density_coverage_k": _DENSITY_K}
    return found


def memorization(reference: np.ndarray, samples: np.ndarray, k: int = 5) -> tuple[dict[str, float], metrics.Neighbors]:
    """Whether samples stand closer to reference images than these do to one another: (the report, the samples' neighbors).

    reference, samples: features [N, D]. close_share is the share of samples whose nearest reference image is no farther than
    99% of the reference's own images have their nearest other: about 0.01 of fresh images, near 1 of copies.
    """
    near = metrics.nearest_neighbors(reference, samples, min(k, len(reference)))
    own = metrics.nearest_neighbors(reference, reference, others=True).distances[:, 0]
    limit = np.quantile(own[own > 0], 0.01) if own.any() else 0.0  # duplicates say nothing of what is near
    report = {
        "nearest_distance_median": float(np.median(near.distances[:, 0])),
        "reference_nearest_distance_median": float(np.median(own)),
        "close_distance": float(limit),
        "close_share": float(np.mean(near.distances[:, 0] <= limit)),
    }
    return report, near
