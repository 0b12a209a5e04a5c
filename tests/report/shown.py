"""What a reader is shown: the parts of a page, the number that a cell names, whether a figure has anything on it."""

from __future__ import annotations

import base64
import io
from html.parser import HTMLParser

from matplotlib.image import imread

from raylign.report import plots


class Page(HTMLParser):
    """Tags, attributes, table cells as (data-key, text), and text of a page."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.cells: list[tuple[str, str]] = []
        self.text = ""
        self._is_in_cell = False
        self.feed(content)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag == "td" and (key := dict(attrs).get("data-key")):
            self.cells.append((key, ""))
            self._is_in_cell = True

    def handle_endtag(self, tag):
        self._is_in_cell = self._is_in_cell and tag != "td"

    def handle_data(self, data):
        self.text += data
        if self._is_in_cell:
            key, text = self.cells[-1]
            self.cells[-1] = (key, text + data)


def look_up(content, key: str):
    """The value at a dotted place of a JSON file."""
    for name in key.split("."):
        content = content[int(name)] if isinstance(content, list) else content[name]
    return content


def assert_drawn(figure) -> None:
    start, _, png = plots.to_data_uri(figure).partition(",")
    assert start == "data:image/png;base64"
    image = imread(io.BytesIO(base64.b64decode(png)), format="png")
    assert min(image.shape[:2]) > 100
    assert image[..., :3].std() > 0.01  # not one colour
