"""report.html in Debian's Chromium, opened as a file: `make browser`. Screenshots: docs/_build/screenshots/reports."""

import csv
import json
import shutil

import pytest

from diffusion_jax.report import write_comparison, write_report
from helpers.browser import WIDTHS, checked_page, chromium, open_page, window
from helpers.paths import ROOT
from helpers.simulated_runs import launch, write_log, write_results, write_run

pytestmark = pytest.mark.browser

SCREENSHOTS = ROOT / "docs" / "_build" / "screenshots" / "reports"
EVIL = "<script>executed = 1</script><img src=x onerror='executed = 1'>"
MEASURED = {  # metrics of runs that are compared
    "good": {"frechet_distance": 3.0, "kernel_distance": 0.10, "kernel_distance_standard_error": 0.03},
    "equal": {"frechet_distance": 4.0, "kernel_distance": 0.14, "kernel_distance_standard_error": 0.02},
    "bad": {"frechet_distance": 5.0, "kernel_distance": 0.30, "kernel_distance_standard_error": 0.01},
}
REPORTS = ["complete", "long", "killed", "empty", "evil", "comparison", "ranked"]


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """{kind: the file}."""
    root = tmp_path_factory.mktemp("reports")
    write_run(root / "complete")
    write_log(root / "long", num_steps=800_000, log_every=100)
    write_log(root / "killed", launches=[launch(0, 600, 0, 100)])
    for name, values in MEASURED.items():
        write_run(root / name)
        path = root / name / "metrics.json"
        (record,) = json.loads(path.read_text())
        path.write_text(json.dumps([record | values]))
    write_log(root / "evil")
    write_results(root / "evil", classes=(EVIL, "<img src=x onerror=alert(1)>"))
    with (root / "evil" / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 1000, EVIL: 1.0, "=1+1": 2.0}) + "\n")
    changes = {
        "config.json": ("data", "data_dir", EVIL),
        "metrics.json": (0, EVIL, 1.0),
        "goodput.json": (0, "stopped_by", EVIL),
    }
    for name, (group, key, value) in changes.items():
        content = json.loads((root / "evil" / name).read_text())
        content[group][key] = value
        (root / "evil" / name).write_text(json.dumps(content))
    files = {kind: write_report(root / kind) for kind in REPORTS[:-2]}
    files["comparison"] = root / "comparison.html"
    write_comparison([root / name for name in ("complete", "killed", "long")], files["comparison"])
    files["ranked"] = root / "ranked.html"
    write_comparison([root / name for name in MEASURED], files["ranked"])
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
        assert page.locator(".charts > figure").count() == page.locator(".plot canvas").count()
        assert page.evaluate("window.executed") is None
        if kind == "evil":  # in curves, tables of metrics, launches and settings, and the environment
            assert page.locator("main").inner_text().count(EVIL) >= 5


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


@pytest.fixture
def opened(browser, reports):
    """Opens a report in a window of 1,400 x 900 pixels; a page must have no errors."""
    found = []
    with window(browser, "desktop", ("file:",), accept_downloads=True) as context:

        def open_report(kind):
            page, errors = open_page(context, reports[kind].as_uri())
            found.append(errors)
            return page

        yield open_report
        assert not any(found) and not context.requests


def test_the_first_screen_has_the_card_the_key_metric_and_samples(opened):
    page = opened("complete")
    places = [page.locator(f".card {name}").bounding_box() for name in (".result strong", ".verdict", "dl", "img")]
    assert all(place["y"] + place["height"] < 900 for place in places)
    assert places[-1]["x"] > 700 and page.locator("#curves").bounding_box()["y"] > places[-1]["y"]


def test_launches_and_the_environment_are_texts(opened):
    page = opened("complete")
    first = page.locator("#launches tbody tr").first.locator("th, td").all_inner_texts()
    assert first == ["2026-09-21 14:13:20 UTC", "00:16:40", "0", "600", "200", ""]  # 200 steps were lost
    assert "300.unreadable, 500.partial" in page.locator("#launches").inner_text()
    assert "jax 0.10.2" in page.locator("#environment").inner_text()


def titles(page):
    return page.locator(".axis-x").all_inner_texts()


def test_the_cursors_of_all_charts_move_together(opened):
    page = opened("complete")
    page.locator(".plot").first.focus()
    page.keyboard.press("Home")
    assert set(titles(page)) == {"training step: 50"}
    page.keyboard.press("ArrowRight")
    assert set(titles(page)) == {"training step: 100"}
    page.locator(".plot").nth(2).hover()
    (title,) = set(titles(page))
    assert title not in ("training step", "training step: 100")
    assert page.locator(".values").first.inner_text().startswith("loss 0.")
    page.mouse.move(5, 5)
    assert set(titles(page)) == {"training step"}


def test_the_axis_is_steps_examples_or_time(opened):
    page = opened("complete")
    axis = page.locator(".curve-controls select")
    first = {}
    for name in ("step", "examples", "time"):
        axis.select_option(name)
        page.locator(".plot").first.focus()
        page.keyboard.press("Home")
        first[name] = titles(page)[0]
    assert first == {
        "step": "training step: 50",
        "examples": "training examples: 3,200",
        "time": "training time (seconds): 5",
    }


def test_smoothing_shows_the_moving_average_beside_the_mean(opened):
    page = opened("complete")
    page.locator(".plot").first.focus()
    page.keyboard.press("Home")
    plain = page.locator(".values").first.inner_text()
    slider = page.locator(".curve-controls input")
    slider.evaluate("slider => { slider.value = 0.9; slider.dispatchEvent(new Event('input')); }")
    assert page.locator(".curve-controls output").inner_text() == "0.9"
    page.locator(".plot").first.focus()
    page.keyboard.press("Home")
    mean = plain.removeprefix("loss ")
    assert page.locator(".values").first.inner_text() == f"loss {mean}, smoothed {mean}"  # no bias towards 0
    page.keyboard.press("ArrowRight")
    mean, smoothed = page.locator(".values").first.inner_text().removeprefix("loss ").split(", smoothed ")
    assert float(smoothed) > float(mean)  # the loss falls


PLOTS = "[...document.querySelectorAll('.plot canvas')].map(canvas => canvas.toDataURL())"


def test_zoom_log_axis_lines_and_numbers(opened):
    page = opened("complete")
    before = page.evaluate(PLOTS)

    def wait_until_plots_are(compared):
        page.wait_for_function(f"before => {PLOTS}.every((plot, i) => plot {compared} before[i])", arg=before)

    page.get_by_role("button", name="Loss: zoom in").click()
    wait_until_plots_are("!==")
    page.get_by_role("button", name="Show everything").click()
    wait_until_plots_are("===")
    page.locator(".plot .u-over").first.scroll_into_view_if_needed()
    plot = page.locator(".plot .u-over").first.bounding_box()
    page.mouse.move(plot["x"] + 50, plot["y"] + 50)
    page.mouse.down()
    page.mouse.move(plot["x"] + 150, plot["y"] + 60)
    page.mouse.up()
    wait_until_plots_are("!==")
    page.locator(".plot .u-over").first.dblclick()
    wait_until_plots_are("===")
    for button in (page.get_by_role("button", name="Loss: logarithmic axis"), page.locator(".values button").first):
        pressed = button.get_attribute("aria-pressed")
        button.click()
        assert button.get_attribute("aria-pressed") != pressed and page.evaluate(PLOTS)[0] != before[0]
        button.click()
    page.locator("#curves summary").first.click()
    rows = page.locator("#curves details").first.locator("tbody tr")
    rows.nth(11).wait_for()
    assert rows.count() == 12


def test_the_numbers_of_the_curves_are_downloaded(opened):
    page = opened("evil")
    with page.expect_download() as download:
        page.get_by_role("button", name="Download CSV").click()
    assert download.value.suggested_filename == "evil_curves.csv"
    with open(download.value.path(), newline="") as file:
        rows = list(csv.DictReader(file))
    loss = [row for row in rows if row["quantity"] == "loss"]
    assert [row["step"] for row in loss] == [str(step) for step in range(50, 1001, 50)]
    assert loss[0].keys() >= {"run", "examples", "seconds", "mean", "lowest", "highest"}
    assert (loss[1]["examples"], loss[1]["seconds"]) == ("6400", "10")
    names = {row["quantity"] for row in rows}
    assert EVIL in names and "'=1+1" in names  # a spreadsheet would compute "=1+1"
    with page.expect_download() as download:
        page.get_by_role("button", name="Download JSON").click()
    with open(download.value.path()) as file:
        found = json.load(file)
    assert found["charts"][0]["series"][0]["mean"] == [float(row["mean"]) for row in loss]


def test_the_best_values_and_overlapping_errors_are_marked(opened):
    page = opened("ranked")
    rows = page.locator("#metrics tbody tr").all()
    rows = [row for row in rows if "±" in row.inner_text() and "digits:test" not in row.inner_text()]
    header = page.locator("#metrics thead th").all_text_contents()
    marks = {
        name: [
            row.locator("th, td").nth(header.index(f"{name}, lower is better")).locator(".mark").inner_text()
            for row in rows
        ]
        for name in ("Frechet distance", "kernel distance")
    }
    assert marks == {"Frechet distance": ["best", "", ""], "kernel distance": ["best", "errors overlap", ""]}
    boxes = page.locator("#metrics .interval i").evaluate_all(
        "all => all.map(each => each.getBoundingClientRect().width)"
    )
    assert max(boxes) > 10
