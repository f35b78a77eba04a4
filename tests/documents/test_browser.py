"""The built site in Debian's Chromium, with the widths of a phone and a desktop: `make browser`.

No page writes an error to the console, loads anything from another machine, or is wider than its window; pictures and
equations are rendered; the search finds functions, and the answers to common queries; axe-core finds no serious violation.
Screenshots: docs/_build/screenshots.
"""

import functools
import http.server
import shutil
import threading
import urllib.parse

import pytest

from helpers.browser import WIDTHS, checked_page, chromium, open_page, window
from helpers.paths import ROOT

pytestmark = pytest.mark.browser

SITE = ROOT / "docs" / "_build" / "html"
SCREENSHOTS = ROOT / "docs" / "_build" / "screenshots"
PAGES = sorted(
    path.relative_to(SITE).as_posix()
    for path in SITE.rglob("*.html")
    if not {"_static", "_modules"} & set(path.parts) and not path.name.startswith("_")
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


def test_a_sample_is_at_the_top_of_the_first_page(context, address):
    page, _ = open_page(context, address)
    box = page.locator("main img").first.bounding_box()
    assert box["y"] + box["height"] < 900
    page.close()


def search(context, address, words):
    """The addresses of the results, relative to the site, best first."""
    page, errors = open_page(context, f"{address}search.html?{urllib.parse.urlencode({'q': words})}")
    page.wait_for_selector("#search-results .search-summary:not(:empty)", timeout=60_000)
    links = page.locator("#search-results li > a").evaluate_all("links => links.map(link => link.href)")
    assert not errors
    page.close()
    return [link.removeprefix(address) for link in links]


@pytest.mark.parametrize("words", ["q_posterior", "classifier_free"])
def test_the_search_finds_a_function(context, address, words):
    links = search(context, address, words)
    assert any(words in link for link in links), links


# Queries of users, and the page that answers each.
ANSWERS = {
    "FID": "guides/evaluation",
    "EMA": "guides/choosing",
    "out of memory": "guides/speed_and_memory",
    "train on my photos": "guides/your_images",
    "resume": "guides/resume_and_faults",
    "my samples are noise": "guides/troubleshooting",
    "class labels": "guides/conditional",
    "guidance scale": "guides/conditional",
    "learning rate": "guides/choosing",
    "NaN loss": "guides/troubleshooting",
    "several GPUs": "guides/pods",
    "TPU pod": "guides/pods",
    "bucket": "guides/buckets",
    "own network": "guides/extending",
    "inpainting": "guides/editing",
    "super-resolution": "guides/conditional",
    "likelihood bits per dimension": "guides/likelihood",
    "faster sampling": "guides/speed_and_memory",
    "load diffusers weights": "guides/pretrained",
    "own data set arrays": "guides/arrays",
    "multi gpu": "guides/pods",
    "distributed training": "guides/pods",
    "SLURM": "guides/pods",
    "use my own unet": "guides/extending",
    "custom loss": "guides/writing_a_loss",
    "train on my own images": "guides/your_images",
    "custom dataset": "guides/your_images",
    "time series": "guides/arrays",
    "resume training": "guides/resume_and_faults",
    "How do I continue a run?": "guides/resume_and_faults",
    "finetune": "guides/fine_tuning",
    "LoRA": "guides/fine_tuning",
    "text to image": "guides/scope",
    "stable diffusion": "guides/scope",
    "latent diffusion": "guides/scope",
    "video": "guides/scope",
    "ControlNet": "guides/scope",
    "DiT": "guides/scope",
    "distillation": "guides/scope",
    "consistency model": "guides/pretrained",
    "huggingface": "guides/pretrained",
    "OOM": "guides/speed_and_memory",
    "gradient checkpointing": "guides/speed_and_memory",
    "mixed precision": "guides/speed_and_memory",
    "how can I sample faster": "guides/speed_and_memory",
    "wandb": "guides/operations",
    "tensorboard": "guides/operations",
    "conditional generation": "guides/conditional",
    "quickstart": "start/index",
    "CFG": "guides/conditional",
    "img2img": "guides/editing",
    "inverse problem": "guides/posterior",
    "which sampler": "guides/choosing",
    "blurry samples": "guides/troubleshooting",
    "overfitting": "guides/troubleshooting",
    "loss is not decreasing": "guides/troubleshooting",
}


@pytest.mark.parametrize("context", ["desktop"], indirect=True)
@pytest.mark.parametrize("words", ANSWERS)
def test_the_search_finds_the_answer_among_the_first_three(context, address, words):
    links = search(context, address, words)[:3]
    assert any(link.startswith(f"{ANSWERS[words]}.html") for link in links), links
