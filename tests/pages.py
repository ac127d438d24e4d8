"""A web page read back."""

import base64
import io
from html.parser import HTMLParser

import numpy as np
from matplotlib.image import imread


class Page(HTMLParser):
    """The elements of a page, each with its attributes and the text in it.

    Attributes:
        elements: ``(tag, attributes, text)`` in the order in which they begin.
        tables: of each table the text of its cells, a list a row.
    """

    VOID = ("meta", "img")

    def __init__(self, html):
        super().__init__()
        self.elements, self.tables, self._open = [], [], []
        self.feed(html)
        self.close()
        assert self._open == []  # every element is closed

    def handle_starttag(self, tag, attributes):
        element = [tag, dict(attributes), ""]
        self.elements.append(element)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        if tag not in self.VOID:
            self._open.append(element)

    def handle_endtag(self, tag):
        name, _, text = self._open.pop()
        assert name == tag
        if tag in ("td", "th"):
            self.tables[-1][-1].append(" ".join(text.split()))

    def handle_data(self, text):
        for element in self._open:
            element[2] += text

    def attributes(self, tag):
        return [attributes for name, attributes, _ in self.elements if name == tag]

    def texts(self, tag, **attributes):
        wanted = attributes.items()
        return [
            text for name, found, text in self.elements if name == tag and found.items() >= wanted
        ]

    def pixels(self):
        """The images as arrays of bytes ``[height, width, 3]``."""
        decoded = []
        for image in self.attributes("img"):
            head, _, data = image["src"].partition(",")
            assert head == "data:image/png;base64"
            values = imread(io.BytesIO(base64.b64decode(data)))[..., :3]
            decoded.append(np.rint(values * 255).astype(int))
        return decoded
