"""All metrics of one set of images against another, each under the name that it has a right to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from diffusion_jax.evaluation import metrics
from diffusion_jax.evaluation.extract import Features
from diffusion_jax.evaluation.features import Extractor

METRICS = ("fid", "sfid", "kid", "is", "precision_recall", "density_coverage", "memorisation")
_KID_SUBSETS, _KID_SUBSET_SIZE, _KID_SEED = 100, 1000, 2020
_IS_SPLIT_SIZE = 5000
_MANIFOLD_K, _DENSITY_K = 3, 5


def name_of(metric: str, extractor: Extractor) -> str:
    """What a metric of some features is reported as. FID and its kin are of the published Inception alone, and another resize
    than TensorFlow 1's is part of their names.
    """
    if not extractor.published:
        return {"fid": "frechet_distance", "sfid": "spatial_frechet_distance", "kid": "kernel_distance"}.get(
            metric, metric
        )
    suffix = "" if extractor.resize == "tf1" else f"_{extractor.resize}"
    return {"is": "inception_score"}.get(metric, metric) + suffix


def compare(
    reference: Features, samples: Features, extractor: Extractor, wanted: Sequence[str], say: Callable[[str], None]
) -> dict[str, Any]:
    """The wanted metrics, of METRICS, by name, with what they depend on. say: told what is left out, and why.

    Raises: ValueError for features that cannot be compared.
    """
    found: dict[str, Any] = {}
    whole = reference.pool is not None and samples.pool is not None

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
    if "sfid" in wanted and samples.spatial is not None:
        if reference.spatial is None:
            say("Note: no sFID: the reference has no spatial statistics (mu_s, sigma_s).")
        else:
            named("sfid", value=metrics.frechet_distance(reference.spatial, samples.spatial))
    if "is" in wanted and extractor.published and samples.pool is not None:
        score = metrics.inception_score(samples.pool @ extractor.head, _IS_SPLIT_SIZE)
        named("is", value=score.mean, std=score.std, split_size=_IS_SPLIT_SIZE)
    if not whole and {"kid", "precision_recall", "density_coverage"} & set(wanted):
        say("Note: the reference is statistics alone; only what needs no more is measured.")
    if not whole:
        return found
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


def memorisation(reference: np.ndarray, samples: np.ndarray, k: int = 5) -> tuple[dict[str, float], metrics.Neighbours]:
    """Whether samples stand closer to reference images than these do to one another: (the report, the samples' neighbours).

    reference, samples: features [N, D]. close_share is the share of samples whose nearest reference image is nearer than 99%
    of the reference's own images have their nearest other: about 0.01 of fresh images, near 1 of copies.
    """
    near = metrics.nearest_neighbours(reference, samples, min(k, len(reference)))
    own = metrics.nearest_neighbours(reference, reference, others=True).distances[:, 0]
    limit = np.quantile(own, 0.01)
    report = {
        "nearest_distance_median": float(np.median(near.distances[:, 0])),
        "reference_nearest_distance_median": float(np.median(own)),
        "close_distance": float(limit),
        "close_share": float(np.mean(near.distances[:, 0] < limit)),
    }
    return report, near
