"""Examples below the entries of API pages: docs/reference/api/examples/MODULE.md has a section for each function.

A section's heading is the function's name in the module. Below the heading are, in this order and partly optional: a formula
between $$, a Python block with the block of its output, and a line with links. tests/documents runs the blocks.
"""

from __future__ import annotations

import pathlib
import re

FOLDER = pathlib.Path(__file__).parent.parent / "reference" / "api" / "examples"
_HEADING = re.compile(r"^## `([\w.]+)`\n", re.MULTILINE)
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$|^\$\$(.*?)\$\$$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\[([^\]]+)\]\(\.\./([^)#]+)\.md(#[^)]*)?\)")


def sections(path: pathlib.Path) -> dict[str, str]:
    """Returns {name: Markdown} of the sections in a file of examples; {} if the file does not exist."""
    parts = _HEADING.split(path.read_text()) if path.exists() else [""]
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def path_of(module: str) -> pathlib.Path:
    """Returns the file with the examples of a module."""
    return FOLDER / f"{module.partition('.')[2]}.md"


def to_rst(markdown: str) -> tuple[list[str], list[str]]:
    """Converts a section to reStructuredText: (the formula, the example with its output and links)."""
    formula, example, end = [], [], 0
    for match in _BLOCK.finditer(markdown):
        end = match.end()
        language, text, equation = match.groups()
        if equation is not None:
            formula += _directive("math", equation)
            continue
        example += [".. rubric:: Example", ""] if language == "python" else []
        example += _directive("code-block", text, language)
    # API pages are one folder above the examples, and link to the pages as built.
    links = _LINK.sub(lambda match: f"`{match[1]} <{match[2]}.html{match[3] or ''}>`__", markdown[end:].strip())
    return formula, [*example, links, ""]


def _directive(name: str, text: str, argument: str = "") -> list[str]:
    lines = ["", *(f"   {line}" for line in text.strip("\n").splitlines()), ""]
    return [f".. {name}:: {argument}".rstrip(), *lines]
