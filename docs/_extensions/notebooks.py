"""Notebooks: the cache of their outputs, and their .ipynb files for download and for Colab."""

from __future__ import annotations

import hashlib
import pathlib
import shutil

import jupytext
import nbformat
from docutils import nodes
from sphinx.application import Sphinx

_CLONE_INSTALL = '%pip install -q ".[train,ode]"  # in a clone of the repository'
_COLAB = "https://colab.research.google.com/github"


def cache_directory(root: pathlib.Path, build: pathlib.Path) -> pathlib.Path:
    """The folder of cached outputs for this library version; caches for other versions are deleted.

    The cache of myst-nb compares only the notebooks' cells, but their outputs also depend on the library.
    """
    digest = hashlib.sha256()
    for folder in ("diffusion_jax", "configs"):
        for path in sorted((root / folder).rglob("*.py")):
            digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    directory = build / "notebooks" / digest.hexdigest()[:16]
    for other in directory.parent.glob("*"):
        if other != directory:
            shutil.rmtree(other)
    return directory


def is_notebook(path: pathlib.Path) -> bool:
    """Whether a Markdown file is a notebook: its header has jupytext's description of the format."""
    text = path.read_text()
    return path.suffix == ".md" and text.startswith("---\n") and "jupytext:" in text.split("---\n")[1]


def install_command(repository_url: str) -> str:
    """The cell that installs the library before the other cells run."""
    return f'%pip install -q "diffusion-jax[train,ode] @ git+{repository_url}"' if repository_url else _CLONE_INSTALL


def write_ipynb(source: pathlib.Path, target: pathlib.Path, repository_url: str) -> None:
    """Writes a notebook without outputs, with an install cell before its first code."""
    notebook = jupytext.read(source)
    cells = [cell for cell in notebook.cells if "remove-cell" not in cell.metadata.get("tags", ())]
    first = next((i for i, cell in enumerate(cells) if cell.cell_type == "code"), len(cells))
    cells.insert(first, nbformat.v4.new_code_cell(install_command(repository_url)))
    for i, cell in enumerate(cells):
        cell["id"] = f"cell-{i}"  # random ids would make every build differ
    notebook.cells = cells
    target.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, target)


def _add_links(app: Sphinx, doctree: nodes.document) -> None:
    """Links under the title of a notebook's page: to its .ipynb file, and to Colab where the repository is known."""
    name = app.env.docname
    if not is_notebook(pathlib.Path(app.env.doc2path(name))):
        return
    line = nodes.paragraph(classes=["notebook-links"])
    link = '<a class="reference external" href="{}">{}</a>'
    file = name.rpartition("/")[2] + ".ipynb"
    line += nodes.raw("", link.format(file, "Download this page as a notebook"), format="html")
    repository = app.config.html_theme_options.get("repository_url", "").partition("//github.com/")[2]
    if repository:  # Colab opens notebooks of GitHub only
        address = f"{_COLAB}/{repository}/blob/gh-pages/{name}.ipynb"
        line += nodes.raw("", " · " + link.format(address, "Open in Colab"), format="html")
    section = next(iter(doctree.findall(nodes.section)), None)
    if section is not None:
        section.insert(1, line)


def _write_all(app: Sphinx, error: Exception | None) -> None:
    if error is not None or app.builder.format != "html":
        return
    url = app.config.html_theme_options.get("repository_url", "")
    for name in app.env.found_docs:
        path = pathlib.Path(app.env.doc2path(name))
        if is_notebook(path):
            write_ipynb(path, pathlib.Path(app.outdir, f"{name}.ipynb"), url)


def setup(app: Sphinx) -> dict[str, bool]:
    """Registers the extension."""
    app.connect("doctree-read", _add_links)
    app.connect("build-finished", _write_all)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
