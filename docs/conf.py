"""Sphinx builds the pages: `python -m sphinx -W --keep-going -n -q -b html docs build/docs` (see launch/test.sh).

Pages are plain Markdown that GitHub shows as well. The sidebar is read from index.md: its headings and the pages that
they link to, so that a page which nobody links to from there fails the build.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from docutils import nodes

if TYPE_CHECKING:
    from sphinx.application import Sphinx

project = "raylign"
html_title = "raylign"
html_theme = "furo"
html_copy_source = False
html_static_path = ["_static"]
html_css_files = ["site.css"]
smartquotes = False  # quotes and dashes belong to commands and values
extensions = ["myst_parser"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3  # links such as math.md#policy-gradient, as GitHub has them
nitpicky = True


def add_toctree(app: Sphinx, name: str, source: list[str]) -> None:
    """Append the sidebar to index.md: a hidden table of contents per heading, of the pages linked below it."""
    if name != "index":
        return
    seen: set[str] = set()
    for part in source[0].split("\n## ")[1:]:
        caption, _, body = part.partition("\n")
        pages = [page for page in dict.fromkeys(re.findall(r"\]\(([\w/-]+)\.md\)", body)) if page not in seen]
        seen.update(pages)
        if pages:
            source[0] += "\n\n```{toctree}\n:hidden:\n:caption: " + "\n".join([caption, "", *pages]) + "\n```\n"


def link_papers(app: Sphinx, doctree: nodes.document, name: str) -> None:
    """Make a link of every arXiv:NNNN.NNNNN, or "paper NNNN.NNNNN", in prose."""
    for text in list(doctree.findall(nodes.Text)):
        parts = re.split(r"((?:arXiv:|paper )\d{4}\.\d{5})", text)
        if len(parts) > 1 and isinstance(text.parent, nodes.paragraph | nodes.emphasis | nodes.strong):
            addresses = [f"https://arxiv.org/abs/{part[-10:]}" if index % 2 else "" for index, part in enumerate(parts)]
            linked = [
                nodes.reference(part, part, refuri=address) if address else nodes.Text(part)
                for part, address in zip(parts, addresses, strict=True)
            ]
            text.parent.replace(text, linked)


def setup(app: Sphinx) -> dict[str, Any]:
    """Connect the sidebar and the links to papers."""
    app.connect("source-read", add_toctree)
    app.connect("doctree-resolved", link_papers)
    return {"parallel_read_safe": True}
