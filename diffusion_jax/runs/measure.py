"""Measuring samples: one comparison of two sets of images, with all that is needed to repeat it, into metrics.json."""

from __future__ import annotations

import hashlib
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

import diffusion_jax
from diffusion_jax.evaluation import compare
from diffusion_jax.evaluation.extract import Extraction, Features, cache_directory
from diffusion_jax.evaluation.features import Extractor
from diffusion_jax.evaluation.images import ImageSet
from diffusion_jax.runs import pictures
from diffusion_jax.runs import workdir as work
from diffusion_jax.runs.console import Bar, say

_SHOWN = 10  # samples in the picture of neighbours
_NEIGHBOURS = 5


def measure(
    reference: ImageSet,
    samples: ImageSet,
    extractor: Extractor,
    wanted: Sequence[str],
    mesh,
    batch_size: int,
    output: pathlib.Path,
    about: Mapping[str, Any],
    cache: pathlib.Path | None = None,
) -> dict[str, Any] | None:
    """Compares two sets and adds the record to `output`, a JSON list; beside it the picture of memorisation.

    about: what else to say in the record. cache: of the features, the user's cache directory unless given. Returns the
    record, None but on process 0. Raises: ValueError for sets that cannot be compared.
    """
    check_comparable(reference, samples)
    if samples.images is None:
        raise ValueError(f"{samples.name} holds statistics alone, and samples are images; swap the two?")
    extraction = Extraction(extractor, mesh, batch_size, Bar)
    cache = cache or cache_directory()
    if extractor.name == "inception" and not extractor.published:
        say("Note: these are not the published weights of FID's Inception; no figure of theirs is called FID.")
    known = _features(extraction, reference, cache)
    judged = _features(extraction, samples, cache)
    if jax.process_index() != 0:
        return None
    say("Comparing ...")
    found = compare.compare(known, judged, extractor, wanted, say)
    settings = {
        "reference": reference.name,
        "reference_sha256": known.digest,
        "num_reference": known.moments.count or None,
        "samples": samples.name,
        "samples_sha256": judged.digest,
        "num_samples": judged.moments.count,
        "features": extractor.name,
        "features_sha256": extractor.digest.split("_")[0],
        "resize": extractor.resize,
        **about,
        "versions": {"diffusion_jax": diffusion_jax.__version__, "jax": jax.__version__, "numpy": np.__version__},
        "backend": jax.default_backend(),
    }
    if "memorisation" in wanted and known.pool is not None:
        found["memorisation"], near = compare.memorisation(known.pool, judged.pool, _NEIGHBOURS)
        suspects = np.argsort(near.distances[:, 0])[:_SHOWN]
        picture = output.with_name("memorisation.png")
        pictures.save_png(picture, _neighbours_picture(reference, samples, suspects, near.indices[suspects]))
        say(f"The samples nearest to reference images, each before its {_NEIGHBOURS} nearest: {picture}")
    add_record(output, found | settings)
    extraction.forget(judged, cache)
    for name, value in found.items():
        if isinstance(value, float) and not name.endswith(("_std", "_standard_error")):
            error = found.get(f"{name}_standard_error")
            say(f"{name:28} {value:.6g}" + (f" ± {error:.2g}" if error is not None else ""))
    if "memorisation" in found:
        say(f"{'closer than the reference':28} {found['memorisation']['close_share']:.4f} (0.01 of fresh images)")
    say(f"Written to {output}")
    return found | settings


def check_comparable(reference: ImageSet, samples: ImageSet) -> None:
    """Raises: ValueError for images of another size or number of channels than the others'."""
    if reference.images is None or samples.images is None:
        return
    shapes = [images.read(np.arange(1))[0].shape[1:] for images in (reference.images, samples.images)]
    if shapes[0] != shapes[1]:
        kinds = ["x".join(map(str, shape[:2])) + (" grey" if shape[2] == 1 else " colour") for shape in shapes]
        raise ValueError(
            f"{reference.name} holds {kinds[0]} images and {samples.name} {kinds[1]} ones: they are not comparable"
        )


def _features(extraction: Extraction, images: ImageSet, cache: pathlib.Path) -> Features:
    """Statistics that a file has go before those of the images beside them, which may be fewer."""
    statistics = images.statistics
    if images.images is None:
        content = hashlib.sha256(
            statistics.moments.mean.tobytes() + statistics.moments.covariance.tobytes()
        ).hexdigest()
        return Features(None, statistics.moments, statistics.spatial, content)
    found = extraction.of(pathlib.Path(images.name).name, images.images, cache)
    if statistics:
        found = found._replace(moments=statistics.moments, spatial=statistics.spatial)
    return found


def _neighbours_picture(reference: ImageSet, samples: ImageSet, suspects, neighbours) -> np.ndarray:
    """Rows: a sample, and the reference images nearest to it."""
    rows = []
    for sample, nearest in zip(suspects, neighbours, strict=True):
        rows += [samples.images.read(np.array([sample]))[0], reference.images.read(nearest)[0]]
    images = np.concatenate(rows)
    return pictures.grid(images, columns=len(images) // len(suspects))


def add_record(path: pathlib.Path, record: Mapping[str, Any]) -> None:
    """Appends to a JSON list, in place of an earlier record of the same comparison."""
    same = ("reference_sha256", "samples", "samples_sha256", "features_sha256", "resize")
    records = [old for old in read_records(path) if any(old.get(key) != record.get(key) for key in same)]
    work.write_text(path, json.dumps([*records, dict(record)], indent=2, allow_nan=False) + "\n")


def read_records(path: pathlib.Path) -> list[dict[str, Any]]:
    """The records of a metrics.json; none where there is no such file. Raises: ValueError for one that is none."""
    if not path.exists():
        return []
    try:
        records = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is no metrics.json ({error}); move it away") from None
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise ValueError(f"{path} is no metrics.json (a list of records); move it away")
    return records
