"""HTML elements whose text is escaped unless it is marked up already."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Sequence
from typing import Any

__all__ = ["Markup", "definitions", "element", "join", "json_script", "table"]


class Markup(str):
    """HTML. Any other string is text, which is escaped."""


def _escape(content: Any) -> str:
    return content if isinstance(content, Markup) else html.escape(str(content))


def join(parts: Iterable[Any]) -> Markup:
    """Parts one after the other, text among them escaped."""
    return Markup("".join(map(_escape, parts)))


def element(name: str, /, *content: Any, **attributes: Any) -> Markup:
    """<name attributes>content</name>; without content, a void element such as <img> where HTML has one.

    attributes: `class_` is class, and other underscores are hyphens. True is an attribute without a value; None and False
    are left out.
    """
    written = ""
    for key, value in attributes.items():
        key = key.rstrip("_").replace("_", "-")
        if value is True:
            written += f" {key}"
        elif value is not None and value is not False:
            written += f' {key}="{html.escape(str(value))}"'
    if name in ("img", "input", "meta", "link", "br"):
        return Markup(f"<{name}{written}>")
    return Markup(f"<{name}{written}>{join(content)}</{name}>")


def table(caption: str, header: Sequence[Any], rows: Iterable[Sequence[Any]], class_: str | None = None) -> Markup:
    """A table that scrolls sideways where it is wider than the page; the first cell of each row is its heading."""
    head = element("tr", *(element("th", cell, scope="col") for cell in header))
    body = (
        element("tr", element("th", row[0], scope="row"), *(element("td", cell) for cell in row[1:])) for row in rows
    )
    return element(
        "div",
        element("table", element("caption", caption), element("thead", head), element("tbody", *body), class_=class_),
        class_="scroll",
        role="region",
        aria_label=caption,
        tabindex=0,
    )


def definitions(entries: Iterable[tuple[Any, Any]]) -> Markup:
    """A list of terms and what they are."""
    return element("dl", *(join([element("dt", term), element("dd", text)]) for term, text in entries))


def json_script(identifier: str, value: Any) -> Markup:
    """JSON for the page's script. No text in it can end the element, because "<" is written as an escape of JSON."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    return Markup(f'<script type="application/json" id="{html.escape(identifier)}">{text}</script>')
