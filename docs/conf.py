"""How Sphinx builds the site: ``python -m sphinx -W docs build/site``."""

from __future__ import annotations

import os
import zlib
from pathlib import Path
from typing import Any

from pygments.lexers import TextLexer
from sphinx.application import Sphinx

import skdeepad

HERE = Path(__file__).parent
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

project = "skdeepad"
author = "The skdeepad developers"
copyright = author
version = release = skdeepad.__version__

extensions = [
    "myst_parser",
    "numpydoc",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.intersphinx",
    "sphinx_copybutton",
    "sphinx_design",
    "sphinx_gallery.gen_gallery",
]
exclude_patterns = ["_templates", "inventories"]
templates_path = ["_templates"]
nitpicky = False

# Markdown
myst_enable_extensions = ["colon_fence", "dollarmath", "html_image"]
myst_heading_anchors = 3

# documentation of the code
autosummary_generate = True
autodoc_typehints = "none"
numpydoc_show_class_members = False
numpydoc_xref_param_type = False
# all but: extended summaries, examples and "See Also" everywhere, summaries below the
# quotes, and no name for what a method returns
numpydoc_validation_checks = {"all", "ES01", "EX01", "GL01", "SA01", "SA04", "RT02"}


def write_inventory(name: str) -> str:
    """Write the inventory of a project that pages refer to, from its text.

    Builds have no network: ``inventories/NAME.txt`` lists the few objects that are
    needed, as ``name domain:role priority page title``.
    """
    text = (HERE / "inventories" / f"{name}.txt").read_text(encoding="utf-8")
    head = f"# Sphinx inventory version 2\n# Project: {name}\n# Version: \n"
    head += "# The remainder of this file is compressed using zlib.\n"
    target = HERE.parent / "build" / f"{name}.inv"
    target.parent.mkdir(exist_ok=True)
    target.write_bytes(head.encode() + zlib.compress(text.encode()))
    return str(target)


intersphinx_mapping = {
    name: (url, write_inventory(name))
    for name, url in {
        "sklearn": "https://scikit-learn.org/stable/",
        "torch": "https://docs.pytorch.org/docs/stable/",
    }.items()
}

# the gallery: scripts named plot_*.py, executed when the site is built
sphinx_gallery_conf = {
    "examples_dirs": str(HERE.parent / "examples"),
    "gallery_dirs": "gallery",
    "filename_pattern": r"/plot_",
    "ignore_pattern": r"^(?!plot_)",
    "backreferences_dir": "generated/backreferences",
    "doc_module": ("skdeepad",),
    "reference_url": {"skdeepad": None},
    "within_subsection_order": "FileNameSortKey",
    "show_memory": False,
    "min_reported_time": 0,
    "plot_gallery": os.environ.get("SKDEEPAD_GALLERY", "1") == "1",
    "remove_config_comments": True,
    "download_all_examples": False,
    "matplotlib_animations": False,
}

# the look
html_theme = "pydata_sphinx_theme"
html_title = "skdeepad"
html_logo = html_favicon = "_static/logo.svg"
html_context = {"default_mode": "auto"}  # light or dark, as the reader's system
html_static_path = ["_static"]
html_extra_path = ["llms.txt"]
html_css_files = ["site.css"]
html_theme_options = {
    "logo": {"text": "skdeepad"},
    "navbar_align": "left",
    "header_links_before_dropdown": 6,
    "show_toc_level": 2,
    "footer_start": ["copyright"],
    "footer_end": [],
    "secondary_sidebar_items": ["page-toc"],
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
}
html_sidebars = {"index": []}
html_show_sourcelink = False


def skip_foreign(
    app: Sphinx, what: str, name: str, member: Any, skip: bool, options: Any
) -> bool:
    """Leave out methods that scikit-learn and torch document."""
    home = getattr(member, "__module__", None) or ""
    return skip or (callable(member) and not home.startswith("skdeepad"))


def setup(app: Sphinx) -> None:
    """Add what extensions do not have."""
    app.add_lexer("mermaid", TextLexer)  # drawings are shown as their text
    app.connect("autodoc-skip-member", skip_foreign)
