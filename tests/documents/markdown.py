"""The pages of the documentation, and their fenced blocks."""

import re
from typing import NamedTuple

from helpers.paths import ROOT

_FENCE = re.compile(r"^ *(`{3,})\s*(\S*)")


class Block(NamedTuple):
    kind: str
    text: str
    line: int  # of its first line of text


def is_notebook(path):
    return path.read_text().startswith("---\njupytext:")


def pages():
    """README.md, CONTRIBUTING.md and the pages of docs/, without notebooks, which Sphinx runs."""
    paths = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return [path for path in paths if "_build" not in path.parts and not is_notebook(path)]


def name(path):
    return path.relative_to(ROOT).as_posix()


def blocks(path):
    """The blocks between fences of backticks, from top to bottom."""
    found, fence, kind, lines, first = [], None, "", [], 0
    for number, line in enumerate(path.read_text().splitlines(), 1):
        match = _FENCE.match(line)
        if fence is None and match:
            fence, kind, lines, first = match[1], match[2], [], number + 1
        elif fence is not None and line.strip() == fence:
            found.append(Block(kind, "\n".join(lines) + "\n", first))
            fence = None
        elif fence is not None:
            lines.append(line)
    assert fence is None, f"{path}: the block of line {first} does not end"
    return found
