"""Opens pages in Debian's Chromium and checks requests, console messages and layout, for tests with the mark `browser`."""

import contextlib
import shutil

WIDTHS = {"phone": 390, "desktop": 1400}
_BROKEN_IMAGES = "[...document.images].filter(i => !i.complete || i.naturalWidth === 0).map(i => i.src)"
_CUT_OFF = """[...document.querySelectorAll('main pre, main mjx-container[display=true]')]
    .filter(e => e.scrollWidth > e.clientWidth + 1).map(e => e.textContent.slice(0, 80))"""
_BACKGROUND = "getComputedStyle(document.body).backgroundColor"
_EXCEEDS_WINDOW = "document.documentElement.scrollWidth - document.documentElement.clientWidth"


@contextlib.contextmanager
def chromium():
    from playwright.sync_api import sync_playwright

    path = shutil.which("chromium")
    assert path, "Chromium is not installed; on Debian: apt install chromium"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextlib.contextmanager
def window(browser, label, allowed, **options):
    """A browser context with the width WIDTHS[label]; `requests` collects requests to other addresses, which are not sent.

    allowed: prefixes of addresses that pages may load.
    """
    context = browser.new_context(viewport={"width": WIDTHS[label], "height": 900}, **options)
    context.requests = []

    def block(route):
        context.requests.append(route.request.url)
        route.abort()

    context.route(lambda url: not url.startswith((*allowed, "data:", "blob:")), block)
    context.label = label
    yield context
    context.close()


def open_page(context, url):
    """(page, the page's error messages), when everything is loaded and rendered."""
    page, errors = context.new_page(), []
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(url, wait_until="load")
    page.evaluate("window.MathJax?.startup?.promise")
    return page, errors


def _violations(page):
    """The serious violations that axe-core finds, each with the first elements."""
    from axe_playwright_python.sync_playwright import Axe

    found = Axe().run(page, options={"resultTypes": ["violations"]}).response["violations"]
    return [
        f"{violation['impact']} {violation['id']}: {node['html'][:200]}"
        for violation in found
        if violation["impact"] in ("serious", "critical")
        for node in violation["nodes"][:5]
    ]


@contextlib.contextmanager
def checked_page(context, url, screenshot):
    """A page without errors, requests to elsewhere, broken images, cut-off code; accessible with light and dark colors."""
    page, errors = open_page(context, url)
    try:
        page.evaluate("document.querySelectorAll('img[loading=lazy]').forEach(i => i.loading = 'eager')")
        page.wait_for_function("[...document.images].every(i => i.complete)")
        page.screenshot(path=screenshot, full_page=True)
        assert not errors
        assert not context.requests
        assert not page.evaluate(_BROKEN_IMAGES)
        assert page.evaluate(_EXCEEDS_WINDOW) <= 0
        assert not page.evaluate(_CUT_OFF)
        page.add_style_tag(content="* { transition: none !important }")  # axe would measure colors on their way
        background = None
        for colors in ("light", "dark"):
            page.emulate_media(color_scheme=colors)
            page.wait_for_function(f"before => {_BACKGROUND} !== before", arg=background)
            assert _violations(page) == [], colors
            background = page.evaluate(_BACKGROUND)
        page.emulate_media(color_scheme="null")
        yield page
    finally:
        context.requests.clear()
        page.close()
