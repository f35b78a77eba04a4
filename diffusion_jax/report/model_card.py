"""The model card of converted weights: a README.md with metadata, filled in from the run that trained the weights."""

from __future__ import annotations

import copy
import dataclasses
import datetime
import importlib.resources
import json
import pathlib
import re
import string
from collections.abc import Iterable, Sequence
from typing import Any

from ml_collections import ConfigDict

from diffusion_jax import config as configs
from diffusion_jax.errors import visible
from diffusion_jax.pretrained import Model, format_summary, origin
from diffusion_jax.provenance import code_version
from diffusion_jax.report.card import facts
from diffusion_jax.report.collect import RunFiles, collect, table_cells, train_command
from diffusion_jax.run_dir import open_run_dir
from diffusion_jax.storage import hub, objects

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
    if run is not None and run.config is not None:
        run = dataclasses.replace(run, config=_public(run.config))
    net, location = without_folders(net), location if objects.is_url(location) else pathlib.Path(location).name
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
        metadata="".join(f"{name}: {visible(json.dumps(value))}\n" for name, value in metadata.items()),  # JSON is YAML
        license=visible(json.dumps(stated)) if stated else '"unknown"  # fill in',
        origin=made_from,
        name=_escape(to.stem if to.suffix == ".safetensors" else where.rpartition("/")[2]),
        sample="" if net.published_sampling else ", sampler=sampling.ddim(), steps=50",
        version=code_version(),
        file=repr(location or to.name),
        to_fill="" if license else "the license (here and above), ",
        data=f"## Training data\n\n{_escape(data)}\n\n" if data else "",
        samples=f"![samples]({SAMPLES})\n\n" if (to / SAMPLES).is_file() else "",
        diffusers=diffusers if has_diffusers and not objects.is_url(location) else "",
        date=f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}",
        summary=_fence("text", format_summary(net)),
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
    command = f"The run, in a new directory DIR:\n\n{_fence('sh', visible(train_command(config)))}"
    return "\n\n".join(["## Training", _table(("what", "value"), rows.items()), command])


def _metrics(run: RunFiles, net: Model) -> str:
    """Formats the metrics of these weights."""
    weights = {"weights": net.weights, "step": net.step}.items()
    records = [record for record in run.measurements() if weights <= record.items()]
    if not records:
        return "## Metrics\n\nThese weights have no metrics yet: run `--mode=evaluate`."
    _, header, rows = table_cells(records)
    rows = [[re.split(r"[/\\]", cell)[-1] for cell in row] for row in rows]
    return f"## Metrics\n\nA row for each measurement, ± one standard error:\n\n{_table(header, rows)}"


def without_folders(net: Model) -> Model:
    """Returns a model that names each function FILE.py:function without the folder of the file, which may be private."""
    diffusion = None if net.diffusion is None else {name: _short(value) for name, value in net.diffusion.items()}
    kind = getattr(net.model, "kind", None)
    return dataclasses.replace(
        net, diffusion=diffusion, model=net.model.clone(kind=_short(kind)) if kind else net.model
    )


def _public(config: ConfigDict) -> ConfigDict:
    """Returns a config without paths, except names on the Hub, and without the folders of FILE.py:function."""
    public = copy.deepcopy(config)
    with public.ignore_type():
        for name, value in configs.flatten(config).items():
            is_private = isinstance(value, str) and configs.SETTINGS[name].is_path and not hub.is_hub(value)
            public.update_from_flattened_dict({name: "" if is_private else _short(value)})
    return public


def _short(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return type(value)(map(_short, value))
    return configs.short_name(value) if isinstance(value, str) else value


def _fence(kind: str, text: str) -> str:
    """Returns a block of code that its text cannot end."""
    ticks = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{ticks}{kind}\n{text}\n{ticks}"


def _table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    cells = [[_escape(cell) for cell in row] for row in [header, *rows]]
    return "\n".join(f"| {' | '.join(row)} |" for row in [cells[0], ["---"] * len(header), *cells[1:]])


def _escape(text: Any) -> str:
    """Returns a text as one line, with the symbols of Markdown escaped."""
    return visible(" ".join(str(text).split())).translate(
        str.maketrans({symbol: f"\\{symbol}" for symbol in "\\|<>*_`[]"})
    )
