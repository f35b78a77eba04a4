"""The model card of converted weights: a README.md with metadata, filled from the run that trained them."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

import diffusion_jax
from diffusion_jax.files import write_text
from diffusion_jax.pretrained import Pretrained, format_summary
from diffusion_jax.report.collect import RunFiles, collect
from diffusion_jax.report.commands import train_command
from diffusion_jax.run_dir import committed_steps, open_run_dir
from diffusion_jax.runs.metric_records import add_likelihood, table_cells
from diffusion_jax.training.ema import weights_kind

__all__ = ["card_path", "model_card", "write_card"]

_LICENSE = "unknown"  # an identifier that hubs accept, until somebody fills in another


def card_path(to: pathlib.Path) -> pathlib.Path:
    """The card of what `convert` writes: README.md of a folder, NAME.md beside NAME.safetensors."""
    return to.with_suffix(".md") if to.suffix == ".safetensors" else to / "README.md"


def write_card(
    description: Pretrained, to: pathlib.Path, workdir: pathlib.Path | None, ema: bool
) -> pathlib.Path | None:
    """Writes the card of converted weights, and returns its path; None if there is one, which stays. Raises: OSError.

    workdir: of the run whose weights they are. ema: whether they are the moving average.
    """
    path = card_path(to)
    if path.exists():
        return None
    write_text(path, model_card(description, to, workdir, ema))
    return path


def model_card(description: Pretrained, to: pathlib.Path, workdir: pathlib.Path | None, ema: bool) -> str:
    """The card as Markdown that begins with metadata."""
    run = None if workdir is None else collect(open_run_dir(workdir))
    step = None if workdir is None else max(committed_steps(workdir / "checkpoints"), default=None)
    weights = "ema" if ema else "raw"
    if run is not None and run.config is not None and step is not None:
        weights = weights_kind(run.config, step, ema)
    parts = [
        f"---\n{_metadata(description, to, run)}---",
        f"# {to.stem}",
        f"Weights of a diffusion model, written by `diffusion_jax.pretrained convert` (version {diffusion_jax.__version__}).",
        "**Fill in:** the license (here and above), what the model is for, and its limits.",
        "## Use\n\n" + _code(to),
        f"## Network and diffusion\n\n```text\n{format_summary(description)}\n```",
        "" if run is None else _training(run, weights, step),
        "" if run is None else _metrics(run, weights, step),
        "## License\n\nTo be filled in. The license of the data may restrict the use of the weights.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _metadata(description: Pretrained, to: pathlib.Path, run: RunFiles | None) -> str:
    """The lines of metadata; JSON values are YAML, too."""
    fields: dict[str, Any] = {
        "library_name": "diffusion_jax" if to.suffix == ".safetensors" else "diffusers",
        "tags": ["diffusion", "ddpm", "jax", "diffusion_jax"],
    }
    if description.is_images:
        fields["pipeline_tag"] = "unconditional-image-generation"
    if run is not None and run.config is not None:
        fields["datasets"] = [run.config.data.dataset]
    license_line = f"license: {json.dumps(_LICENSE)}  # fill in\n"
    return license_line + "".join(f"{name}: {json.dumps(value)}\n" for name, value in fields.items())


def _code(to: pathlib.Path) -> str:
    lines = [
        "import jax",
        "from diffusion_jax import pretrained, sampling",
        "",
        f"net = pretrained.load({to.name!r})",
        "samples = net.sample(jax.random.key(0), 16, sampler=sampling.ddim(), steps=50)",
    ]
    if to.suffix != ".safetensors":
        lines += ["", "# or", f"images = diffusers.DDPMPipeline.from_pretrained({to.name!r})().images"]
    return "```python\n" + "\n".join(lines) + "\n```"


def _training(run: RunFiles, weights: str, step: int | None) -> str:
    """Data, steps, moving average, sampler and command."""
    config = run.config
    if config is None:
        return ""
    data = f"{config.data.dataset} ({config.data.split})"
    if "images" in run.data:
        data += f", {run.data['images']:,} examples"
    ema = f"decay {config.ema.decay:g}" if weights == "ema" else "not used: these are the raw weights"
    steps = "all" if config.sampling.steps is None else config.sampling.steps
    rows = {
        "data": data,
        "training steps": "unknown" if step is None else f"{step:,} of batch {config.training.batch_size}",
        "optimizer": f"learning rate {config.optimizer.learning_rate:g}, {config.optimizer.warmup_steps:,} steps of warm-up",
        "moving average (EMA)": ema,
        "sampler of the run": f"{config.sampling.sampler}, steps: {steps}",
    }
    command = f"The run, in a new directory DIR:\n\n```sh\n{train_command(config)}\n```"
    return "\n\n".join(["## Training", _table(("what", "value"), rows.items()), command])


def _metrics(run: RunFiles, weights: str, step: int | None) -> str:
    """The metrics of these weights."""
    records = add_likelihood(run.records, run.likelihood) if run.likelihood else run.records
    records = [record for record in records if (record.get("weights"), record.get("step")) == (weights, step)]
    if not records:
        return "## Metrics\n\nNothing was measured of these weights: run `--mode=evaluate`."
    columns, rows = table_cells([(run.directory, record) for record in records])
    rows = [row | {"reference": record.get("reference", "")} for row, record in zip(rows, records, strict=True)]
    columns = [*(column for column in columns if column not in ("run", "reference")), "reference"]
    cells = [[row.get(column, "") for column in columns] for row in rows]
    return "## Metrics\n\nA row for each measurement, ± one standard error:\n\n" + _table(columns, cells)


def _table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    cells = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in row) + " |" for row in cells)


def _cell(value: Any) -> str:
    text = " ".join(str(value).split())
    for symbol in "\\|<>*_`":  # names of data are text
        text = text.replace(symbol, f"\\{symbol}")
    return text
