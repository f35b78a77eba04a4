"""The built site in Debian's Chromium, with the widths of a phone and a desktop: `make browser`.

No page writes an error to the console, loads anything from another machine, or is wider than its window; pictures and
equations are rendered; the search finds functions; axe-core finds no serious violation. Screenshots:
docs/_build/screenshots.
"""

import functools
import http.server
import shutil
import threading

import pytest

from helpers.browser import WIDTHS, checked_page, chromium, open_page, window
from helpers.paths import ROOT

pytestmark = pytest.mark.browser

SITE = ROOT / "docs" / "_build" / "html"
SCREENSHOTS = ROOT / "docs" / "_build" / "screenshots"
PAGES = sorted(
    path.relative_to(SITE).as_posix()
    for path in SITE.rglob("*.html")
    if "_static" not in path.parts and not path.name.startswith("_")
)
# Equations that MathJax has not replaced, or shows as an error.
BROKEN_EQUATIONS = """[...document.querySelectorAll('.math')]
    .filter(e => !e.querySelector('mjx-container') || e.querySelector('mjx-merror, [data-mjx-error]'))
    .map(e => e.textContent.slice(0, 80))"""


class _Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def address():
    assert PAGES, "docs/_build/html has no pages; run `make docs`"
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Handler, directory=str(SITE)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()


@pytest.fixture(scope="module")
def browser():
    shutil.rmtree(SCREENSHOTS, ignore_errors=True)
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module", params=WIDTHS)
def context(request, browser, address):
    """A browser context; `requests` collects the pages' requests to other machines, which are not sent."""
    with window(browser, request.param, (address,)) as context:
        yield context


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_rendered_and_accessible(context, address, name):
    file = f"{name.removesuffix('.html').replace('/', '__')}.png"
    with checked_page(context, address + name, SCREENSHOTS / context.label / file) as page:
        assert not page.evaluate(BROKEN_EQUATIONS)


@pytest.mark.parametrize("words", ["q_posterior", "classifier_free"])
def test_the_search_finds_a_function(context, address, words):
    page, errors = open_page(context, f"{address}search.html?q={words}")
    page.wait_for_selector("#search-results li a", timeout=10_000)
    links = page.locator("#search-results li a").evaluate_all("links => links.map(link => link.href)")
    assert any(words in link for link in links), links
    assert not errors
    page.close()
