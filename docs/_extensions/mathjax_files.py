"""Copies MathJax and its fonts from the package sphinx-mathjax-offline, so that pages render equations without a network."""

from __future__ import annotations

import importlib.metadata
import pathlib
import shutil

from sphinx.application import Sphinx

_FILES = ("mathjax/tex-chtml.js", "mathjax/output/chtml/fonts/woff-v2/")


def copy_mathjax(app: Sphinx, error: Exception | None) -> None:
    """Copies the two parts that pages load: the program and the fonts."""
    if error is not None or app.builder.format != "html":
        return
    for file in importlib.metadata.files("sphinx-mathjax-offline") or ():
        name = file.as_posix().partition("static/")[2]
        if name.startswith(_FILES):
            target = pathlib.Path(app.outdir, "_static", name)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(str(file.locate()), target)


def setup(app: Sphinx) -> dict[str, bool]:
    """Registers the extension."""
    app.connect("build-finished", copy_mathjax)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
