"""The site: ``make docs``. Sphinx reads from the repository's root: pages link to examples and to the changelog."""

import re

from sphinx.application import Sphinx

project = "Tally"
copyright = "Tally's authors"  # noqa: A001 - Sphinx's name for it
root_doc = "docs/index"
include_patterns = ["*.md", "docs/**", "examples/**/*.md"]
exclude_patterns = ["examples/README.md"]  # a list for those who look at the folder
extensions = ["myst_parser", "sphinx_copybutton"]
myst_heading_anchors = 4
highlight_language = "none"  # what says no language is typed in a shell, or shown by it
html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_title = "Tally"
html_copy_source = False
html_show_copyright = html_show_sphinx = False

_PARTS = re.compile(r"^## (.+)\n((?:(?!## ).*\n?)*)", re.MULTILINE)
_LINKS = re.compile(r"\]\(([^)#:]+)\.md\)")


def _contents(app: Sphinx, page: str, text: list[str]) -> None:
    """The site's contents are what the lists of pages link to, under their headings: nothing is listed twice."""
    if page not in (root_doc, "docs/decisions/README"):
        return
    parts = _PARTS.findall(text[0]) or [("", text[0])]
    for heading, links in ((name, _LINKS.findall(body)) for name, body in parts):
        if links:
            caption = f":caption: {heading}\n" if heading else ""
            text[0] += f"\n```{{toctree}}\n:hidden:\n{caption}\n" + "\n".join(links) + "\n```\n"


def setup(app: Sphinx) -> None:
    app.connect("source-read", _contents)
