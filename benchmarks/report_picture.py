"""Makes docs/images/report.png with Chromium: the card and two curves from a run's report.

    python main.py report runs/digits --output=report.html
    python benchmarks/report_picture.py report.html [--output=docs/images/report.png]

Needs the packages of `make docs` and Chromium. `make demo` creates the run.
"""

import argparse
import pathlib
import shutil

from PIL import Image
from playwright.sync_api import sync_playwright

WIDTH, SCALE = 1400, 0.8  # window width and scale; the picture is 1120 pixels wide
# Keeps only the title, the card and the first two charts.
HIDE = """
.skip, nav, main > section:not(#summary):not(#curves), .charts > figure:nth-child(n+3) { display: none !important; }
section { margin: .8rem 0 !important; }
body { padding-bottom: .5rem !important; }
"""


def main():
    """Opens the report and takes the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=pathlib.Path)
    parser.add_argument("--output", default="docs/images/report.png")
    options = parser.parse_args()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(
            viewport={"width": WIDTH, "height": 600}, device_scale_factor=SCALE, color_scheme="light"
        )
        page.goto(options.report.resolve().as_uri())
        page.add_style_tag(content=HIDE)
        page.screenshot(path=options.output, full_page=True)
        browser.close()
    with Image.open(options.output) as image:
        smaller = image.convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE)  # half the bytes
    smaller.save(options.output, optimize=True)


if __name__ == "__main__":
    main()
