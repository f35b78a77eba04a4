"""The documents name files, functions and headings that exist."""

import ast
import functools
import re

import pytest

from diffusion_jax.metrics import MEANINGS
from diffusion_jax.runs.logging import SCALARS
from helpers.paths import ROOT

NAMED = re.compile(r"`([\w./]+\.(?:py|pyi|toml|txt|md))(?::([A-Za-z_][\w.]*))?`")
COMPLETE = [ROOT / "docs" / "contributing" / "architecture.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md"]
# Pages about moving here name files of other projects.
GUIDES = [path for path in (ROOT / "docs").rglob("*.md") if path.parent.name != "moving" and path not in COMPLETE]


def file_of(name):
    """A file of the project; names without a project folder are relative to the package."""
    path = ROOT / "diffusion_jax" / name
    return path if path.is_file() else ROOT / name


@functools.cache
def defined_names(path):
    """A file's functions, classes, methods and constants; methods as Class.method."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{member.name}" for member in node.body if isinstance(member, ast.FunctionDef)}
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}
    return names


@pytest.mark.parametrize("document", [*COMPLETE, ROOT / "README.md", *GUIDES], ids=lambda path: path.name)
def test_every_file_and_function_that_a_document_names_exists(document):
    for file, name in NAMED.findall(document.read_text()):
        path = file_of(file)
        if "/" in file or document in COMPLETE:  # guides also name files that their readers write
            assert path.is_file(), f"{document.name} names {file}"
            assert not name or name in defined_names(path), f"{document.name} names {file}:{name}"


@pytest.mark.parametrize(
    "document", [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / ".github").rglob("*.md")]
)
def test_links_lead_to_files_and_headings(document):
    prose = re.sub(r"^```.*?^```", "", document.read_text(), flags=re.MULTILINE | re.DOTALL)
    for file, heading in re.findall(r"\]\(([^)#:\s]*)#?([^):\s]*)\)", prose):
        target = document.parent / file if file else document
        assert target.exists(), f"{document.name} links to {file}"
        if heading:
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in headings}
            assert heading in anchors, f"{document.name} links to {file}#{heading}"


# Former names of a quantity, and the name that every page and program uses.
ONE_NAME = {
    r"close share": "share of near copies",
    r"\bmemorized share": "share of near copies",
    r"share of copies": "share of near copies",
    r"loss_quarter|quartile loss": "loss_q1",
    r"examples_per_second|imgs?_per_sec": "images_per_second",
}


@pytest.mark.parametrize("document", [ROOT / "README.md", *GUIDES, *(ROOT / "benchmarks").glob("*.py")])
def test_a_quantity_has_one_name(document):
    text = document.read_text()
    for former, name in ONE_NAME.items():
        assert not re.search(former, text, re.IGNORECASE), f"{document.name} has {former}; use {name}"


def test_the_names_of_logged_numbers_are_those_of_the_report():
    text = (ROOT / "docs" / "reference" / "file_formats.md").read_text()
    rows = re.findall(
        r"^\| (`\w+`(?:, `\w+`)*) \| ([^|]*?) ?\|", text.split("## metrics.jsonl")[1].split("\n## ")[0], re.MULTILINE
    )
    named = {key: title for keys, title in rows for key in re.findall(r"\w+", keys)}
    assert {key: named.get(key) for key in SCALARS} == {key: scalar.chart for key, scalar in SCALARS.items()}


@pytest.mark.parametrize(
    "name",
    [
        MEANINGS["close_share"].name,
        SCALARS["loss_q1"].chart,
        SCALARS["images_per_second"].label,
        SCALARS["goodput"].chart,
    ],
)
def test_the_glossary_has_a_number_by_its_name(name):
    glossary = (ROOT / "docs" / "concepts" / "glossary.md").read_text()
    assert re.search(rf"^{name}\n: ", glossary, re.MULTILINE | re.IGNORECASE), name


def test_the_sidebar_has_the_groups_of_the_index_of_guides():
    """A link in the table may be to a heading; a page that two rows have is in the sidebar once."""
    text = (ROOT / "docs" / "guides" / "index.md").read_text()
    table, *trees = text.split("```{toctree}")
    rows = re.findall(r"^\| \*\*(\w+)\*\* |\((\w+)\.md\)", table, re.MULTILINE)
    groups = {"": []}
    for group, page in rows:
        groups.setdefault(group or list(groups)[-1], []).extend([page] * bool(page))
    captions = [re.search(r":caption: (\w+)", tree) for tree in trees]
    entries = [re.findall(r"^(\w+)$", tree, re.MULTILINE) for tree in trees]
    found = {caption[1].lower() if caption else "": pages for caption, pages in zip(captions, entries, strict=True)}
    assert found == groups and list(found) == list(groups)
