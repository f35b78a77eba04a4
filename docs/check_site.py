"""Checks the built site: `python docs/check_site.py [docs/_build/html]`, the last step of `make docs`.

The script checks that every public name of a module and every example has an entry, that every link leads to an existing
file and anchor, that pages load nothing from another machine, and that no page with its scripts and styles exceeds 1 MB
compressed, without MathJax and fonts. If there are problems, the script prints all problems and exits with 1.
"""

from __future__ import annotations

import functools
import html.parser
import pathlib
import pkgutil
import sys
import urllib.parse
import zlib
from collections.abc import Iterator

ROOT = pathlib.Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "docs" / "_extensions")]

import api  # noqa: E402
import api_examples  # noqa: E402

import diffusion_jax  # noqa: E402

_MAX_BYTES = 1_000_000
_LOADED = {"script": "src", "img": "src", "iframe": "src", "link": "href", "source": "srcset", "video": "src"}


def public_modules() -> Iterator[str]:
    """Yields the modules of the package, without commands and experiments."""
    yield diffusion_jax.__name__
    for module in pkgutil.walk_packages(diffusion_jax.__path__, f"{diffusion_jax.__name__}."):
        if not any(part.startswith("_") for part in module.name.split(".")[1:]):
            yield module.name


def inventory(path: pathlib.Path) -> dict[str, set[str]]:
    """Reads the documented names in an objects.inv: {role, such as py:function: names}."""
    compressed = path.read_bytes().partition(b"zlib.\n")[2]
    found: dict[str, set[str]] = {}
    for line in zlib.decompress(compressed).decode().splitlines():
        name, role, *_ = line.rsplit(maxsplit=4)
        found.setdefault(role, set()).add(name)
    return found


def missing_names(site: pathlib.Path) -> list[str]:
    """Returns the public names of modules, and the functions of examples, that the site does not describe."""
    documented = set().union(
        *(names for role, names in inventory(site / "objects.inv").items() if role.startswith("py:"))
    )
    problems = []
    for name in public_modules():
        names = api.public_names(name)
        if name.partition(".")[2].split(".")[0] == "configs" or not names:
            continue
        if name not in documented and name != diffusion_jax.__name__:
            problems.append(f"no page has the module {name}; add it to a page of docs/reference/api")
        for member in names:
            page = api.page_of(name, member)
            submodule = f"{name}.{member}"
            if page.split(".")[0] == diffusion_jax.__name__ and not {f"{page}.{member}", submodule} & documented:
                problems.append(f"no page has {page}.{member}, a public name of {name}")
    for path in sorted(api_examples.FOLDER.glob("*.md")):
        names = [f"{diffusion_jax.__name__}.{path.stem}.{name}" for name in api_examples.sections(path)]
        problems += [f"no page has the example for {name}" for name in names if name not in documented]
    return problems


class _Page(html.parser.HTMLParser):
    """The links, anchors and loaded files of a page."""

    def __init__(self, path: pathlib.Path):
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.loaded: list[str] = []
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.anchors |= {value for name, value in attrs if name in ("id", "name") and value}
        if tag == "a" and values.get("href"):
            self.links.append(str(values["href"]))
        if tag in _LOADED and values.get(_LOADED[tag]) and values.get("rel") not in ("canonical", "next", "prev"):
            self.loaded.append(str(values[_LOADED[tag]]))


def large_pages(site: pathlib.Path, pages: dict[pathlib.Path, _Page]) -> list[str]:
    """Returns pages that exceed 1 MB compressed, with scripts and styles, and without MathJax, fonts and pictures."""
    problems, compressed = [], functools.cache(lambda path: len(zlib.compress(path.read_bytes())))
    for path, page in pages.items():
        names = {urllib.parse.urlsplit(address).path for address in page.loaded}
        files = {
            (path.parent / name).resolve() for name in names if name.endswith((".js", ".css")) and "mathjax" not in name
        }
        size = sum(map(compressed, filter(pathlib.Path.is_file, [path, *files])))
        if size > _MAX_BYTES:
            problems.append(
                f"{path.relative_to(site)} has {size / 1e6:.2f} MB compressed; at most {_MAX_BYTES / 1e6:g} MB"
            )
    return problems


def broken_links(site: pathlib.Path, pages: dict[pathlib.Path, _Page]) -> list[str]:
    """Returns links to missing files and anchors, and files that are loaded from another machine."""
    problems = []
    for path, page in pages.items():
        name = path.relative_to(site)
        for address in page.loaded:
            parts = urllib.parse.urlsplit(address)
            if parts.scheme not in ("", "data") or parts.netloc:
                problems.append(f"{name} loads {address}")
            elif parts.path and not (path.parent / urllib.parse.unquote(parts.path)).exists():
                problems.append(f"{name} loads {address}, which does not exist")
        for link in page.links:
            parts = urllib.parse.urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = path.parent.joinpath(urllib.parse.unquote(parts.path)).resolve() if parts.path else path
            if not target.is_file():
                problems.append(f"{name} links to {link}, which does not exist")
            elif (
                parts.fragment and target in pages and urllib.parse.unquote(parts.fragment) not in pages[target].anchors
            ):
                problems.append(f"{name} links to {link}, which has no such anchor")
    return problems


def main() -> None:
    """Prints every problem."""
    site = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "docs" / "_build" / "html").resolve()
    pages = {path: _Page(path) for path in site.rglob("*.html") if "_static" not in path.relative_to(site).parts}
    problems = missing_names(site) + broken_links(site, pages) + large_pages(site, pages)
    for problem in problems:
        print(problem, file=sys.stderr)
    print(f"{len(pages)} pages: {len(problems)} problems with public names, links, loaded files and sizes")
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    main()
