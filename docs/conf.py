"""Sphinx configuration for the documentation site; `make docs` builds the site into docs/_build/html.

Optional environment variables; without them, pages link to nothing outside the site:

DOCS_ONLINE=1: adds cross-links to the documentation of jax, flax, optax and orbax, and downloads their indices.
DOCS_REPOSITORY_URL: address of the GitHub repository, for source links (by default to copies in the site), Colab links and
    the repository's address.
DOCS_BASE_URL: address where the site is published; adds the sitemap and canonical addresses.
"""

import os
import pathlib
import sys

DOCS = pathlib.Path(__file__).parent
ROOT = DOCS.parent
BUILD = DOCS / "_build"
sys.path[:0] = [str(ROOT), str(DOCS / "_extensions")]

from notebooks import cache_directory  # noqa: E402

import diffusion_jax  # noqa: E402

# Notebook kernels inherit these variables.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XDG_CACHE_HOME"] = str(BUILD / "cache")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(BUILD / "cache" / "jax"))
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))

REPOSITORY_URL = os.environ.get("DOCS_REPOSITORY_URL", "").rstrip("/")
BASE_URL = os.environ.get("DOCS_BASE_URL", "").rstrip("/")
ONLINE = os.environ.get("DOCS_ONLINE") == "1"

project = "diffusion_jax"
author = "the diffusion_jax authors"
project_copyright = ""
version = release = diffusion_jax.__version__
language = "en"

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx_design",
    "sphinx_copybutton",
    # In docs/_extensions.
    "api",
    "links",
    "mathjax_files",
    "notebooks",
    "sidebar",
]
exclude_patterns = ["_build", "_extensions", "reference/api/examples", "**/.*"]
nitpicky = True
show_warning_types = True
smartquotes = False  # which would change -- of a flag to a dash
highlight_language = "text"  # for blocks without a language

# API pages: every public name, with the signature from the source.
autodoc_default_options = {"members": True, "undoc-members": True, "special-members": "__call__"}
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
python_maximum_signature_line_length = 100
python_display_short_literal_types = True
add_module_names = False
toc_object_entries_show_parents = "hide"
napoleon_numpy_docstring = False

# Pages in MyST Markdown, and notebooks.
myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence", "deflist", "fieldlist", "attrs_inline", "attrs_block"]
myst_heading_anchors = 4
_description = "Denoising diffusion models in JAX: pure functions, a Flax U-Net, and training that resumes to the bit."
myst_html_meta = {
    "description lang=en": _description,
    "property=og:title": "diffusion_jax",
    "property=og:description": _description,
}
if BASE_URL:
    myst_html_meta["property=og:image"] = f"{BASE_URL}/_static/social.png"
myst_dmath_double_inline = True
nb_execution_mode = "cache"
nb_execution_cache_path = str(cache_directory(ROOT, BUILD))
nb_execution_timeout = 600  # seconds for a cell; notebooks should take less than two minutes on two idle cores
nb_execution_show_tb = True  # notebook errors are warnings, and `make docs` treats warnings as errors
nb_merge_streams = True
copybutton_selector = ":not(.highlight-output) > div.highlight > pre"  # no button on printed outputs
copybutton_exclude = ".linenos, .gp, .go"

# Pages work without a network: MathJax and its fonts are copied from a Python package.
mathjax_path = "mathjax/tex-chtml.js"
mathjax3_config = {
    "tex": {"macros": {"E": r"\mathbb{E}", "KL": r"\operatorname{KL}", "N": r"\mathcal{N}"}},
    "options": {"enableMenu": False},
}

html_theme = "sphinx_book_theme"
html_title = "diffusion_jax"
html_favicon = "_static/favicon.svg"
html_static_path = ["_static", "images/hero.webp", "images/hero.png", "images/social.png"]
html_css_files = ["site.css"]
html_js_files = ["site.js"]
html_search_scorer = str(DOCS / "_extensions" / "search_scorer.js")
html_domain_indices = False
html_copy_source = False
html_show_sourcelink = False
html_show_copyright = False
html_last_updated_fmt = None
html_context = {"default_mode": "auto"}
html_theme_options = {
    "use_download_button": False,
    "use_fullscreen_button": False,
    "navbar_persistent": [],
    "show_toc_level": 2,
    "home_page_in_toc": False,
    "show_navbar_depth": 1,
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
}
if REPOSITORY_URL:
    extensions.append("sphinx.ext.linkcode")
    html_theme_options |= {
        "repository_url": REPOSITORY_URL,
        "repository_provider": "github",  # also if the address is a mirror's
        "repository_branch": "main",
        "path_to_docs": "docs",
        "use_repository_button": True,
        "use_issues_button": True,
    }
else:
    extensions.append("sphinx.ext.viewcode")  # the source as pages of the site
if BASE_URL:
    extensions.append("sphinx_sitemap")
    html_baseurl = f"{BASE_URL}/"
    sitemap_url_scheme = "{link}"
    sitemap_show_lastmod = False
if ONLINE:
    extensions.append("sphinx.ext.intersphinx")
    intersphinx_mapping = {
        "python": ("https://docs.python.org/3", None),
        "numpy": ("https://numpy.org/doc/stable", None),
        "jax": ("https://docs.jax.dev/en/latest", None),
        "flax": ("https://flax.readthedocs.io/en/latest", None),
        "optax": ("https://optax.readthedocs.io/en/latest", None),
        "orbax": ("https://orbax.readthedocs.io/en/latest", None),
    }


def linkcode_resolve(domain: str, info: dict[str, str]) -> str | None:
    """Returns the address of an object's source in the repository."""
    import api

    place = api.source_lines(info["module"], info["fullname"])
    if place is None:
        return None
    path, first, last = place
    return f"{REPOSITORY_URL}/blob/main/{path.relative_to(ROOT)}#L{first}-L{last}"
