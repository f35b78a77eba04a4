"""report.html in Debian's Chromium, opened as a file: `make browser`. Screenshots: docs/_build/screenshots/reports."""

import shutil

import pytest

from diffusion_jax.report import write_comparison, write_report
from helpers.browser import WIDTHS, checked_page, chromium, open_page, window
from helpers.paths import ROOT
from helpers.simulated_runs import launch, write_log, write_results, write_run

pytestmark = pytest.mark.browser

SCREENSHOTS = ROOT / "docs" / "_build" / "screenshots" / "reports"
EVIL = '<script>alert("x")</script>'
REPORTS = ["complete", "long", "killed", "empty", "evil", "comparison"]


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """{kind: the file}."""
    root = tmp_path_factory.mktemp("reports")
    write_run(root / "complete")
    write_log(root / "long", num_steps=800_000, log_every=100)
    write_log(root / "killed", launches=[launch(0, 600, 0, 100)])
    write_log(root / "evil")
    write_results(root / "evil", classes=(EVIL, "<img src=x onerror=alert(1)>"))
    files = {kind: write_report(root / kind) for kind in REPORTS[:-1]}
    files["comparison"] = root / "comparison.html"
    write_comparison([root / "complete", root / "killed", root / "long"], files["comparison"])
    return files


@pytest.fixture(scope="module")
def browser():
    shutil.rmtree(SCREENSHOTS, ignore_errors=True)
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module", params=WIDTHS)
def context(request, browser):
    """A window; the screenshots of the phone have dark colors."""
    scheme = "dark" if request.param == "phone" else "light"
    with window(browser, request.param, ("file:",), color_scheme=scheme) as context:
        yield context


@pytest.mark.parametrize("kind", REPORTS)
def test_a_report_is_rendered_and_accessible(context, reports, kind):
    with checked_page(context, reports[kind].as_uri(), SCREENSHOTS / context.label / f"{kind}.png") as page:
        assert page.locator(".chart").count() == page.locator(".plot canvas").count()


def test_the_slider_shows_the_samples_of_other_steps(context, reports):
    page, errors = open_page(context, reports["complete"].as_uri())
    place = page.locator("#training-samples")
    caption, images = place.locator(".frame-caption"), place.locator("img")
    last = images.evaluate_all("images => images.map(image => image.src)")
    assert caption.inner_text() == "after 1,000 training steps (4 of 4)"
    place.locator("input").focus()
    page.keyboard.press("Home")
    assert caption.inner_text() == "after 250 training steps (1 of 4)"
    assert images.evaluate_all("images => images.map(image => image.src)") != last
    assert not errors
    page.close()
