"""The pages of the documentation and their code blocks."""

import importlib
import re
from typing import NamedTuple

from diffusion_jax import cli
from helpers.paths import ROOT

COMMAND = re.compile(r"^(?:[A-Z_]+=\S+ )*(?:\.venv/bin/)?(?:python main\.py|diffusion-jax) ")
BLOCK = re.compile(r"^ *(`{3,})[ ]*(\S*)[^\n]*\n(.*?)^ *\1 *$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    kind: str
    text: str
    line: int  # of the block's first line


def pages():
    """README.md, CONTRIBUTING.md and the pages of docs/, without notebooks, which Sphinx runs."""
    paths = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return [path for path in paths if "_build" not in path.parts and not path.read_text().startswith("---\njupytext:")]


def name(path):
    return path.relative_to(ROOT).as_posix()


def blocks(path):
    """The blocks between backtick fences, from top to bottom."""
    text = path.read_text()
    return [Block(m[2], m[3], text.count("\n", 0, m.start(3)) + 1) for m in BLOCK.finditer(text)]


def parse_subcommand(words):
    """Parses the arguments of `diffusion-jax` if the first names a subcommand, such as weights."""
    importlib.import_module(f"diffusion_jax.{cli.COMMANDS[words[0]]}.__main__").make_parser().parse_args(words[1:])


def commands(text):
    """The commands in a shell block that this project's command line parses."""
    for line in text.replace("\\\n", " ").splitlines():
        if COMMAND.match(line.strip()):
            yield line.strip()
