"""The model card of converted weights: a README.md with metadata, filled in from the run that trained the weights."""

from __future__ import annotations

import importlib.resources
import json
import pathlib
import string
from collections.abc import Iterable, Sequence
from typing import Any

from diffusion_jax.pretrained import Model, format_summary, origin
from diffusion_jax.provenance import code_version
from diffusion_jax.report.card import facts
from diffusion_jax.report.collect import RunFiles, collect, table_cells, train_command
from diffusion_jax.run_dir import open_run_dir
from diffusion_jax.storage import objects

SAMPLES = "samples.png"  # beside the card


def model_card(
    net: Model,
    to: pathlib.Path,
    workdir: pathlib.Path | None,
    license: str = "",
    data: str = "",
    location: str = "",
) -> str:
    """Returns the card of converted weights as Markdown that begins with metadata.

    to: the file or folder of the weights; the card shows samples.png if the folder has this file. workdir: the work directory
    of the run that trained the weights. license, data, location: for published weights; `pretrained.load` takes the location.
    """
    run = None if workdir is None else collect(open_run_dir(workdir, read_only=True))
    is_converted = not location and to.suffix != ".safetensors"
    has_diffusers = is_converted or (to / "model_index.json").is_file()
    metadata: dict[str, Any] = {
        "library_name": "diffusers" if has_diffusers else "diffusion_jax",
        "tags": ["diffusion", "ddpm", "jax", "diffusion_jax"],
    }
    if net.is_images:
        metadata["pipeline_tag"] = "unconditional-image-generation"
    if run is not None and run.config is not None:
        metadata["datasets"] = [run.config.data.dataset]
    where = location.removeprefix("hf://") or to.name
    diffusers = f"\n\n# or, after import diffusers\nimages = diffusers.DDPMPipeline.from_pretrained({where!r})().images"
    source = origin(net)
    stated = license or source.get("license", "")
    made_from = f"{_escape(license)}." if license else "To be filled in."
    if source:
        made_from = _table(("made from", "license", "page"), [[*source.values()]]) + "\n\n"
    template = importlib.resources.files("diffusion_jax.report") / "static" / "model_card.md"
    return string.Template(template.read_text()).substitute(
        metadata="".join(f"{name}: {json.dumps(value)}\n" for name, value in metadata.items()),  # JSON values are YAML
        license=json.dumps(stated) if stated else '"unknown"  # fill in',
        origin=made_from,
        name=to.stem if to.suffix == ".safetensors" else where.rpartition("/")[2],
        sample="" if net.published_sampling else ", sampler=sampling.ddim(), steps=50",
        version=code_version(),
        file=repr(location or to.name),
        to_fill="" if license else "the license (here and above), ",
        data=f"## Training data\n\n{_escape(data)}\n\n" if data else "",
        samples=f"![samples]({SAMPLES})\n\n" if (to / SAMPLES).is_file() else "",
        diffusers=diffusers if has_diffusers and not objects.is_url(location) else "",
        summary=format_summary(net),
        run="" if run is None else "".join(f"{part}\n\n" for part in (_training(run, net), _metrics(run, net)) if part),
    )


def _training(run: RunFiles, net: Model) -> str:
    """Formats the data, steps, moving average, sampler and command of the run."""
    config = run.config
    if config is None:
        return ""
    ema = f"decay {config.ema.decay:g}" if net.weights == "ema" else "not used: these are the raw weights"
    steps = "all" if config.sampling.steps is None else config.sampling.steps
    rows = {
        **{name: text for name, text in facts(run).items() if name in ("data", "objective", "network", "duration")},
        "training steps": "unknown" if net.step is None else f"{net.step:,} of batch {config.training.batch_size}",
        "optimizer": f"learning rate {config.optimizer.learning_rate:g}, {config.optimizer.warmup_steps:,} steps of warm-up",
        "moving average (EMA)": ema,
        "sampler of the run": f"{config.sampling.sampler}, steps: {steps}",
    }
    command = f"The run, in a new directory DIR:\n\n```sh\n{train_command(config)}\n```"
    return "\n\n".join(["## Training", _table(("what", "value"), rows.items()), command])


def _metrics(run: RunFiles, net: Model) -> str:
    """Formats the metrics of these weights."""
    weights = {"weights": net.weights, "step": net.step}.items()
    records = [record for record in run.measurements() if weights <= record.items()]
    if not records:
        return "## Metrics\n\nThese weights have no metrics yet: run `--mode=evaluate`."
    _, header, rows = table_cells(records)
    return f"## Metrics\n\nA row for each measurement, ± one standard error:\n\n{_table(header, rows)}"


def _table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    cells = [[_escape(cell) for cell in row] for row in [header, *rows]]
    return "\n".join(f"| {' | '.join(row)} |" for row in [cells[0], ["---"] * len(header), *cells[1:]])


def _escape(text: Any) -> str:
    """Returns a text as one line, with the symbols of Markdown escaped."""
    return " ".join(str(text).split()).translate(str.maketrans({symbol: f"\\{symbol}" for symbol in "\\|<>*_`[]"}))
