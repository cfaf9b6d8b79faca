"""An HTML document as its elements: every one closed, and what a browser would ask the network for."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from html.parser import HTMLParser

VOID = {"meta", "link", "img", "wbr", "br", "hr", "input", "col"}


@dataclass
class Element:
    """A tag with what it holds."""

    tag: str
    attributes: dict[str, str]
    texts: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(self.texts)


class Document(HTMLParser):
    """Elements in the order in which they open; AssertionError when one is not closed where it should be."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[Element] = []
        self.open: list[Element] = []
        self.feed(text)
        self.close()
        assert not self.open, f"not closed: {[element.tag for element in self.open]}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(Element(tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(self.elements[-1])

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(Element(tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open[-1].tag == tag, f"</{tag}> closes <{self.open[-1].tag}>"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        for element in self.open:
            element.texts.append(data)

    def all(self, tag: str, **attributes: str) -> list[Element]:
        """Elements of a tag with these attributes (class_ for class, of which one word is enough)."""
        return [
            element
            for element in self.elements
            if element.tag == tag
            and all(
                value in element.attributes.get(name.rstrip("_"), "").split() if name == "class_"
                else element.attributes.get(name) == value
                for name, value in attributes.items()
            )
        ]  # fmt: skip

    @property
    def text(self) -> str:
        """What one can read, without style and scripts."""
        hidden = {id(text) for element in self.elements if element.tag in ("style", "script") for text in element.texts}
        [body] = self.all("body")
        return "".join(text for text in body.texts if id(text) not in hidden)

    def references(self) -> list[str]:
        """What src, href and the like, and url() and @import of styles, refer to outside the file."""
        found = [
            value
            for element in self.elements
            for name, value in element.attributes.items()
            if name in ("src", "href", "srcset", "action", "data", "poster", "xlink:href", "background", "formaction")
        ]
        styles = [element.text for element in self.all("style")]
        styles += [element.attributes["style"] for element in self.elements if "style" in element.attributes]
        found += [match for style in styles for match in re.findall(r"url\(([^)]*)\)|@import", style)]
        return [value for value in found if not value.startswith(("data:", "#"))]
