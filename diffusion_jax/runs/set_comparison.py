"""Metrics of one set of images against another, named on a command line."""

from __future__ import annotations

import dataclasses
import difflib
import pathlib

from diffusion_jax.distributed import sharding
from diffusion_jax.errors import UserError
from diffusion_jax.evaluation import feature_extractors
from diffusion_jax.evaluation.image_sets import open_image_set
from diffusion_jax.evaluation.metric_suite import METRICS
from diffusion_jax.pretrained.inception import DOWNLOAD_SOURCES
from diffusion_jax.runs import devices
from diffusion_jax.runs.set_metrics import check_comparable, measure

__all__ = ["Comparison", "compare_sets"]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The options of a comparison, as `python -m diffusion_jax.evaluation` describes them."""

    reference: str
    samples: str
    inception: str = ""
    features: str | None = None
    metrics: str | None = None
    resize: str = "tf1"
    batch_size: int = 64
    data_dir: str = ""
    image_size: int | None = None
    channels: int | None = None
    output: str = "metrics.json"


def compare_sets(options: Comparison) -> None:
    """Measures the samples against the reference and adds a record to the output file.

    Raises: DiffusionJaxError, ValueError, OSError: one line.
    """
    metric_names = [name.strip() for name in options.metrics.split(",")] if options.metrics else METRICS
    unknown = sorted(set(metric_names) - set(METRICS))
    if unknown:
        near = difflib.get_close_matches(unknown[0], METRICS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"--metrics: {unknown[0]!r} is unknown; known: {', '.join(METRICS)}{hint}")
    if options.batch_size < 1:
        raise UserError(f"--batch_size={options.batch_size} must be at least 1")
    output = _output_file(options.output)
    reference, samples = (
        open_image_set(location, options.data_dir, options.image_size, options.channels)
        for location in (options.reference, options.samples)
    )
    check_comparable(reference, samples)
    features = options.features or ("digits" if reference.name.startswith("digits:") else "inception")
    if features == "inception" and not options.inception:
        raise UserError(
            f"--inception=PATH is needed: the weights of FID's network ({DOWNLOAD_SOURCES}); or --features=digits, or "
            "module:function"
        )
    extractor = feature_extractors.from_name(features, options.inception, options.resize)
    output.parent.mkdir(parents=True, exist_ok=True)
    devices.start()
    mesh = sharding.make_mesh({"data": -1, "fsdp": 1})
    measure(reference, samples, extractor, metric_names, mesh, options.batch_size, output, {})


def _output_file(output: str) -> pathlib.Path:
    """The JSON file of --output, a file or its folder. Raises: UserError if a file has the folder's name."""
    path = pathlib.Path(output).expanduser()
    if output.endswith("/") or path.suffix != ".json" or path.is_dir():
        path = path / "metrics.json"
    for folder in path.parents:
        if folder.exists() and not folder.is_dir():
            raise UserError(f"--output={output}: {folder} is a file; name a folder, or a file that ends in .json")
    return path
