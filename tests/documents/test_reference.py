"""The generated reference pages equal the pages that the code writes now."""

import importlib.util

import pytest

from helpers.paths import ROOT


def write_reference():
    spec = importlib.util.spec_from_file_location("write_reference", ROOT / "docs" / "write_reference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", ["configuration.md", "command_line.md"])
def test_generated_pages_are_up_to_date(page):
    text = write_reference().PAGES[page]()
    assert (ROOT / "docs" / "reference" / page).read_text() == text, "run `make reference`"
