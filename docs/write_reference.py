"""Writes the generated reference pages: `make reference`.

docs/reference/configuration.md lists every config setting, and every named data set and metric;
docs/reference/command_line.md lists the flags of every command. Each page is written completely or not at all, and a test
compares the pages with the code.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
from collections.abc import Iterator, Mapping

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from diffusion_jax import cli, data, files, metrics  # noqa: E402
from diffusion_jax.config import table  # noqa: E402
from diffusion_jax.data.sources import CheckedSource  # noqa: E402
from diffusion_jax.data.tfds import Tfds  # noqa: E402
from diffusion_jax.evaluation import __main__ as evaluation  # noqa: E402
from diffusion_jax.pretrained import __main__ as pretrained  # noqa: E402
from diffusion_jax.report import __main__ as report  # noqa: E402

REFERENCE = ROOT / "docs" / "reference"
_COMPARED = {
    "moments": "mean and covariance of features",
    "spatial": "mean and covariance of Inception's spatial features",
    "pool": "features",
    "logits": "classes of Inception",
    "vectors": "features of images, otherwise the examples",
    "examples": "the examples",
}
_CONFIGURATION = """# Configuration

A config is a nested mapping of settings, `group.setting`. An experiment of `configs/` differs from the defaults in some
settings, and so may any mapping:

    from diffusion_jax import config, training

    cfg = config.experiment("digits")                                   # or config.default(), DDPM on CIFAR-10
    state, train_step = training.create({"data": {"dataset": "digits", "image_size": 8, "channels": 1}})

`config.resolve(mapping)` completes a mapping with the defaults and checks it. On the command line,
`--config.group.setting=VALUE` overrides a setting: whole numbers may be written as 1e4, tuples as `1,2` or `"(1, 2)"`.

The column "identity" shows which settings decide the numbers of a run: a relaunch in the same work directory must not change
these settings. All other settings may change between launches, except `data.data_dir` and `data.disk_mb` where they decide
whether training shuffles by files.

This page is the output of `make reference`.
"""
_COMMAND_LINE = """# Command line

Four commands: training and sampling, weights, evaluation, and reports. This page is the output of `make reference`.

## `diffusion-jax`

`pip install '.[train]'` installs this command; in a clone of the repository, `python main.py` is the same command.

```sh
diffusion-jax --config=NAME --workdir=DIR --mode=train
```

A rerun of the same command resumes the run. `--config` may be left out for a directory that holds a run, and with
`--pretrained`: any mode then starts from these weights.
"""
_EXIT_CODES = """### Exit codes

| code | meaning |
|---|---|
| 0 | the command has finished |
| 1 | the run failed, for example because the disk is full or the loss is not finite |
| 2 | bad input; the message has one line with the value, what is allowed and what to type |
| 69 | another process of the run was lost; rerun the same command to resume |
| 75 | stopped by SIGTERM; training has saved a checkpoint; rerun the same command to resume |
| 130 | interrupted by Ctrl-C; training has saved a checkpoint; rerun the same command to resume |
| 134 | ended by JAX's own service, because another process of the run was lost; rerun the same command to resume |
| 137 | killed by SIGKILL; rerun the same command to resume |
| 141 | the reader of the output ended first, as in `... \\| head`; rerun the same command to resume |
| 143 | stopped by SIGTERM before the program had started; rerun the same command |

[Tested faults and exit codes](../results/reliability.md) lists the faults behind each code, and the tests.
"""


def configuration() -> str:
    """Returns the Markdown page of config settings."""
    lines = [_CONFIGURATION]
    for group, (description, settings) in table.GROUPS.items():
        lines += _settings(group, f"`{group}`" if group else "Settings without a group", description, settings)
    differing = (f"`{name}={value!r}`" for name, value in table.CLASSIFIER_DEFAULTS.items())
    lines += ["## Defaults of a classifier", "", f"With `diffusion.loss=classify`: {', '.join(differing)}.", ""]
    lines += ["## Values of `data.dataset`", "", "| name | examples |", "|---|---|"]
    lines += [f"| `{name}` | {_first_line(source)} |" for name, source in data.SOURCES.items()]
    lines += [f"| any other name | {_first_line(Tfds)} |", f"| `module:function` | {_first_line(CheckedSource)} |", ""]
    lines += ["## Values of `evaluation.metrics`", "", "| name | compares | spatial axes | examples, at least |"]
    lines += ["|---|---|---|---|"]
    for name, metric in metrics.METRICS.items():
        axes = ", ".join(map(str, metric.spatial_axes))
        lines.append(f"| `{name}` | {_COMPARED[metric.needs]} | {axes} | {metric.minimum} |")
    meanings = ["", "The numbers that they report:", "", "| number | name | better | meaning |", "|---|---|---|---|"]
    meanings += [
        f"| `{key}` | {each.name} | {each.better} | {_cell(each.text)} |" for key, each in metrics.MEANINGS.items()
    ]
    return "\n".join(lines + meanings) + "\n"


def _settings(group: str, heading: str, description: str, settings: Mapping[str, table.Setting]) -> Iterator[str]:
    yield f"## {heading}\n\n{description}\n"
    yield "| setting | default | allowed | identity | description |\n|---|---|---|---|---|"
    for name, setting in settings.items():
        identity = "yes" if table.is_identity(f"{group}.{name}" if group else name) else "no"
        cells = (f"`{name}`", f"`{setting.default!r}`", setting.kind.allowed, identity, setting.description)
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
    yield ""


def _first_line(source: type) -> str:
    return _cell((source.__doc__ or "").partition("\n")[0])


def command_line() -> str:
    """Returns the Markdown page of command-line flags."""
    modes = ["### Modes", "", "| mode | what it does |", "|---|---|"]
    modes += [f"| `{name}` | {_cell(meaning)} |" for name, meaning in cli.MODES.items()]
    settings = (
        "`--config.group.setting=VALUE` overrides a setting of the config: `--config.training.num_steps=1e4`,\n"
        '`--config.sampling.label="(cats,dogs)"`. [Configuration](configuration.md) lists all settings.'
    )
    parts = [
        _COMMAND_LINE,
        *_flags(cli.make_parser()),
        "",
        "### Overrides",
        "",
        settings,
        "",
        *modes,
        "",
        _EXIT_CODES,
        *_command("diffusion-jax weights", pretrained.make_parser()),
        *_command("diffusion-jax compare", evaluation.make_parser()),
        *_command("diffusion-jax report", report.make_parser()),
    ]
    return "\n".join(parts).rstrip() + "\n"


def _command(name: str, parser: argparse.ArgumentParser) -> Iterator[str]:
    yield f"## `{name}`"
    yield ""
    for paragraph in (parser.description or "").split("\n\n"):
        if paragraph.startswith("    "):
            yield from ["```console", *(f"$ {line.strip()}" for line in paragraph.splitlines()), "```", ""]
        else:
            yield from [paragraph.strip(), ""]
    yield from _flags(parser)
    yield ""


def _flags(parser: argparse.ArgumentParser) -> Iterator[str]:
    yield "| argument | default | meaning |"
    yield "|---|---|---|"
    for action in parser._actions:
        if isinstance(action, argparse._HelpAction):
            continue
        value = action.metavar or action.dest.upper()
        if action.choices:
            value = "{" + ",".join(map(str, action.choices)) + "}"
        name = action.option_strings[0] if action.option_strings else value
        if action.option_strings and action.nargs != 0:
            name += f"={value}"
        if action.nargs in ("?", "+"):
            name = f"[{name}]" if action.nargs == "?" else f"{name}..."
        default = "" if action.default in (None, "", False) else f"`{action.default}`"
        yield f"| `{name}` | {default} | {_cell(action.help or '')} |"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("[", "\\[")


PAGES = {"configuration.md": configuration, "command_line.md": command_line}

if __name__ == "__main__":
    for page, text in PAGES.items():
        files.write_text(REFERENCE / page, text())
