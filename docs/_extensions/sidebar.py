"""The sidebar: a caption above each group of pages, as in the table of contents; the theme leaves the captions out."""

from __future__ import annotations

from typing import Any

from bs4 import BeautifulSoup
from sphinx import addnodes
from sphinx.application import Sphinx


def _groups(app: Sphinx) -> dict[str, str]:
    """Returns {first page in a group: the group's caption}, for all groups that the site's first page does not list."""
    trees = (
        tree
        for page, toc in app.env.tocs.items()
        if page != app.config.root_doc
        for tree in toc.findall(addnodes.toctree)
    )
    return {tree["entries"][0][1]: tree["caption"] for tree in trees if tree["caption"] and tree["entries"]}


def _add_captions(app: Sphinx, page: str, template: str, context: dict[str, Any], doctree) -> None:
    """Wraps the theme's function that writes the sidebar."""
    generate = context.get("generate_toctree_html")
    if generate is None:
        return
    captions = {context["pathto"](first): caption for first, caption in _groups(app).items()}

    def with_captions(*args: Any, **options: Any) -> Any:
        soup = BeautifulSoup(str(generate(*args, **options)), "html.parser")
        for link in soup.select("li > a"):
            # The address of the page itself is "#".
            if caption := captions.get(link["href"], ""):
                item = soup.new_tag("li", attrs={"class": "toctree-caption"})
                item.string = caption
                link.parent.insert_before(item)
        return soup

    context["generate_toctree_html"] = with_captions


def setup(app: Sphinx) -> dict[str, bool]:
    """Registers the extension."""
    app.connect("html-page-context", _add_captions, priority=900)  # after the theme's
    return {"parallel_read_safe": True, "parallel_write_safe": True}
