"""Converts this project's docstrings, plain text with a few conventions, to reStructuredText.

Conventions: `name` is code; **bold**; a paragraph that is indented is shown as written; "Args:", "Returns:" and "Raises:"
start a section, on a line of their own or before their text; lines "name: meaning" of equal indentation are a list.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Sequence

_SECTION = re.compile(r"^(Args|Returns|Raises|Yields):\s*(.*)$")
_ENTRY = re.compile(r"^([A-Za-z_*][\w*{}.-]*(?:, [A-Za-z_*][\w*{}.-]*)*): +(\S.*)$")
_INLINE = re.compile(r"``[^`]+``|`[^`]+`|\*\*[^*\s][^*]*\*\*|https?://[^\s,;)]+")
_FIELDS = {"Args": "Parameters", "Returns": "Returns", "Raises": "Raises", "Yields": "Yields"}
_EXCEPTION = re.compile(r"^([A-Z]\w+)\s+(.*)$", re.DOTALL)


def to_rst(docstring: str) -> list[str]:
    """Converts a docstring without common indentation to lines of reStructuredText."""
    blocks: list[list[str]] = []
    for block in _blocks(docstring.strip("\n").splitlines()):
        if blocks and _is_verbatim(block) and _is_verbatim(blocks[-1]):
            blocks[-1] += ["", *block]  # empty lines inside of an example
        else:
            blocks.append(block)
    return [line for block in blocks for line in (*_block_lines(block), "")]


def _is_verbatim(block: list[str]) -> bool:
    return block[0].startswith(" ")


def _blocks(lines: Sequence[str]) -> Iterator[list[str]]:
    """Paragraphs, and sections with everything below them; a line that starts a section ends the paragraph before it."""
    block: list[str] = []
    for line in [*lines, ""]:
        starts_section = _SECTION.match(line) is not None
        if block and (starts_section or not line.strip()):
            yield block
            block = []
        if line.strip():
            block.append(line)


def _block_lines(block: list[str]) -> list[str]:
    section = _SECTION.match(block[0])
    if section:
        return _section_lines(section[1], section[2], block[1:])
    if _is_verbatim(block):
        text = textwrap.dedent("\n".join(block)).splitlines()
        return [".. code-block:: text", "", *(f"   {line}" for line in text)]
    if re.match(r"^[-*] ", block[0]):
        return [("  " if line.startswith(" ") else "- ") + inline(line.lstrip("-* ")) for line in block]
    entries = _entries(block)
    if len(entries) > 1:
        return _list_lines(entries)
    if entries and entries[0][0].islower():
        return [line.removeprefix("- ") for line in _list_lines(entries)]
    return _paragraph_lines(block)


def _paragraph_lines(block: list[str]) -> list[str]:
    """A paragraph; entries that follow its text become a list."""
    for i in range(1, len(block)):
        entries = _entries(block[i:])
        if len(entries) > 1 and block[i - 1].rstrip().endswith((".", ":", "and")):
            return [*inline("\n".join(block[:i])).splitlines(), "", *_list_lines(entries)]
    return inline("\n".join(line.strip() for line in block)).splitlines()


def _section_lines(name: str, text: str, rest: list[str]) -> list[str]:
    body = textwrap.dedent("\n".join(rest)).splitlines()
    entries = [] if text else _entries(body)
    if entries:
        return [f":{_FIELDS[name]}:", *(f"   {line}" for line in _list_lines(entries))]
    joined = " ".join([text, *(line.strip() for line in rest)]).strip()
    exception = _EXCEPTION.match(joined) if name == "Raises" else None
    if exception:
        return [f":raises {exception[1]}: {inline(exception[2])}"]
    return [f":{_FIELDS[name]}: {inline(joined)}"]


def _entries(lines: Sequence[str]) -> list[tuple[str, str]]:
    """(names, meaning) of lines "names: meaning" with indented continuations; empty where a line is anything else."""
    entries: list[tuple[str, str]] = []
    for line in lines:
        match = _ENTRY.match(line)
        if match:
            entries.append((match[1], match[2]))
        elif entries and line.startswith(" "):
            entries[-1] = (entries[-1][0], f"{entries[-1][1]} {line.strip()}")
        else:
            return []
    return entries


def _list_lines(entries: Sequence[tuple[str, str]]) -> list[str]:
    lines = []
    for names, meaning in entries:
        shown = ", ".join(f"``{name}``" for name in names.split(", "))
        lines.append(f"- {shown}: {inline(meaning)}")
    return lines


def inline(text: str) -> str:
    """Text with its code and bold words as reStructuredText, and every other character as itself."""
    parts, end = [], 0
    for match in _INLINE.finditer(text):
        parts += [_escape(text[end : match.start()]), _markup(match[0], text[match.end() : match.end() + 1])]
        end = match.end()
    return "".join([*parts, _escape(text[end:])])


def _markup(text: str, following: str) -> str:
    if text.startswith("`"):
        text = f"``{text.strip('`')}``"
    return text + ("\\ " if following and re.match(r"\w", following) else "")


def _escape(text: str) -> str:
    return re.sub(r"([\\*_|`])", r"\\\1", text)
