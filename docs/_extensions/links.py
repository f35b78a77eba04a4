"""Links that pages need not write.

A public object's name links to the API entry, another project's object to that project's documentation (with DOCS_ONLINE=1),
and a document in the repository's root to the document's page. With DOCS_REPOSITORY_URL the commands that clone the
repository have its address.
"""

from __future__ import annotations

import os
import pathlib
import re

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.ext import intersphinx
from sphinx.util.nodes import make_refnode

PACKAGE = "diffusion_jax"
# Documents of the repository's root and the pages that include them.
PAGES = {
    "CONTRIBUTING.md": "contributing/index.md",
    "SECURITY.md": "contributing/security.md",
    "CHANGELOG.md": "contributing/changelog.md",
    "README.md": "index.md",
}
_LINK = re.compile(r"(\]\()([^)\s#]+)((?:#[^)\s]*)?\))")
_PLACEHOLDER = re.compile(r"REPOSITORY is the address of this repository\.\s?")
_NAME = re.compile(r"^([A-Za-z_][\w.]*)(\(.*\))?$", re.DOTALL)


def _rewrite_links(app: Sphinx, name: str, source: list[str]) -> None:
    """Links of a page to documents in the repository's root, which GitHub shows, become links to pages of the site."""
    _rewrite(app, source, pathlib.Path(app.srcdir, name).parent, name)


def _rewrite_included_links(app: Sphinx, path: pathlib.Path, _, source: list[str]) -> None:
    _rewrite(app, source, pathlib.Path(app.srcdir, path).parent, app.env.docname)


def _rewrite(app: Sphinx, source: list[str], folder: pathlib.Path, page: str) -> None:
    root = pathlib.Path(app.srcdir).parent
    here = pathlib.Path(app.srcdir, page).parent
    url = app.config.html_theme_options.get("repository_url", "")

    def replace(match: re.Match) -> str:
        start, target, end = match.groups()
        if "://" in target or target.startswith("mailto:"):
            return match[0]
        path = pathlib.Path(os.path.normpath(folder / target))
        if path.is_relative_to(root) and path.parent == root and path.name in PAGES:
            path = pathlib.Path(app.srcdir, PAGES[path.name])
        elif not path.exists():
            return match[0]
        elif url and not path.is_relative_to(app.srcdir):
            return f"{start}{url}/blob/main/{path.relative_to(root)}{end}"
        elif path.is_dir():
            return match[0]
        return f"{start}{os.path.relpath(path, here)}{end}"

    source[0] = _LINK.sub(replace, source[0])
    if url:
        source[0] = _PLACEHOLDER.sub("", source[0]).replace("git clone REPOSITORY ", f"git clone {url} ")


def _link_code(app: Sphinx, doctree: nodes.document, page: str) -> None:
    """Code such as `process.q_sample` becomes a link; in a docstring also the names of the same module and class."""
    objects = app.env.domains.python_domain.objects
    for literal in list(doctree.findall(nodes.literal)):
        if _is_inside(
            literal, nodes.reference, nodes.title, addnodes.pending_xref, nodes.label, addnodes.desc_signature
        ):
            continue
        match = _NAME.match(literal.astext())
        if match is None:
            continue
        module, own = _context(literal)
        target = match[1].removeprefix(f"{PACKAGE}.")
        for full in _candidates(target, module, own):
            if full in objects and full != own and not objects[full].aliased:
                entry = objects[full]
                link = make_refnode(app.builder, page, entry.docname, entry.node_id, literal.deepcopy(), full)
                literal.replace_self(link)
                break
        else:
            link = external_link(app, match[1], literal.deepcopy()) if "." in match[1] else None
            if link is not None:
                literal.replace_self(link)


def external_link(app: Sphinx, name: str, content: nodes.Element) -> nodes.Element | None:
    """A link to what another project's documentation calls `name`; None without DOCS_ONLINE=1 or such a name."""
    if "sphinx.ext.intersphinx" not in app.extensions:
        return None
    reference = addnodes.pending_xref("", refdomain="py", reftype="obj", reftarget=name)
    return intersphinx.missing_reference(app, app.env, reference, content)


def _candidates(target: str, module: str | None, own: str | None) -> list[str]:
    names = [f"{own}.{target}", f"{own.rpartition('.')[0]}.{target}"] if own else []
    names += [f"{module}.{target}"] if module else []
    if "." in target or module:
        names.append(f"{PACKAGE}.{target}")
    parent = module.rpartition(".")[0] if module else ""
    return names + ([f"{parent}.{target}"] if parent else [])


def _is_inside(node: nodes.Node, *kinds: type) -> bool:
    while node.parent is not None:
        node = node.parent
        if isinstance(node, kinds):
            return True
    return False


def _context(node: nodes.Node) -> tuple[str | None, str | None]:
    """The module and the object whose docstring holds a node."""
    while node.parent is not None:
        node = node.parent
        if isinstance(node, addnodes.desc):
            signature = node[0]
            module = signature.get("module")
            return module, f"{module}.{signature.get('fullname')}"
        if isinstance(node, nodes.section):
            modules = [name.removeprefix("module-") for name in node.get("ids", ()) if name.startswith("module-")]
            if modules:
                return modules[0], None
    return None, None


def setup(app: Sphinx) -> dict[str, bool]:
    """Registers the extension."""
    app.connect("source-read", _rewrite_links)
    app.connect("include-read", _rewrite_included_links)
    app.connect("doctree-resolved", _link_code)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
