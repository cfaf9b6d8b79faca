"""One HTML file that needs nothing else: its parts, each escaped, and the document around them with style and scripts inside."""

from __future__ import annotations

import base64
import hashlib
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from html import escape
from pathlib import Path
from typing import Literal
from urllib.parse import quote

from PIL import Image, UnidentifiedImageError

from vaetrain.files import inside, read_bytes

MEDIA_TYPES = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp", "GIF": "image/gif"}
"""Of pictures as Pillow names them; every browser shows these."""

MAX_PICTURE_BYTES = 16 << 20

SMALL_PICTURE_PX = 320
"""A picture no wider has pixels that one should see."""

LONG_TEXT = 28
"""Characters in a cell; a column with more may be broken, but not into a ribbon."""

NUMBER = re.compile(
    r"[-−+±~≈]?[\d.,]+(?:e[-+−]?\d+|·10[⁻⁰¹²³⁴⁵⁶⁷⁸⁹]+)?(?: ?[%×]| ± [\d.,]+(?:e[-+−]?\d+|·10[⁻⁰¹²³⁴⁵⁶⁷⁸⁹]+)?)?|[-–—]?|nan|inf|-inf"
)
"""What is aligned on the right, with the signs for “none”."""


@dataclass(frozen=True)
class Section:
    """A heading, which the table of contents names, and the HTML under it."""

    heading: str
    body: str
    anchor: str = ""
    """What a link to it ends in; empty: made from the heading."""


def page(title: str, subtitle: str, sections: Sequence[Section]) -> str:
    """The whole document. Title, subtitle and headings are text; bodies are HTML, as the functions below make it.

    The document forbids itself all requests and all scripts but its own two (Content-Security-Policy).
    """
    scripts = [_file("chart.js"), _file("page.js")]
    hashes = " ".join(
        f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for text in scripts
    )
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src {hashes}; base-uri 'none'"
    anchors = _anchors(sections)
    contents = "".join(
        f'<li><a href="#{anchor}">{escape(section.heading)}</a></li>'
        for section, anchor in zip(sections, anchors, strict=True)
    )
    body = "".join(
        f'<section id="{anchor}"><h2>{escape(section.heading)}</h2>\n{section.body}</section>\n'
        for section, anchor in zip(sections, anchors, strict=True)
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n<link rel="icon" href="data:,">\n'
        f"<title>{escape(title)}</title>\n<style>\n{_file('page.css')}</style>\n</head>\n<body>\n"
        f'<header><h1>{escape(title)}</h1>\n<p class="subtitle">{escape(subtitle)}</p></header>\n'
        f'<nav aria-label="Contents"><ol>{contents}</ol></nav>\n<main>\n{body}</main>\n'
        f"{''.join(f'<script>{text}</script>' for text in scripts)}\n</body>\n</html>\n"
    )


def paragraph(text: str) -> str:
    """A paragraph of plain text."""
    return f"<p>{escape(text)}</p>\n"


def bullets(texts: Sequence[str]) -> str:
    """A list of plain texts."""
    return f"<ul>{''.join(f'<li>{escape(text)}</li>' for text in texts)}</ul>\n"


def subheading(text: str) -> str:
    """A heading within a section."""
    return f"<h3>{escape(text)}</h3>\n"


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, caption: str = "", fold: bool = False) -> str:
    """A table of plain texts; columns of numbers are aligned on the right. `fold` leaves only the caption until it is opened."""
    for row in rows:
        if len(row) != len(header):
            raise ValueError(f"a row of {len(row)} cells in a table of {len(header)} columns: {list(row)}")
    kinds = [_kind_of_column([row[column] for row in rows]) for column in range(len(header))]

    def cell(text: str, column: int) -> str:
        if column == 0:
            return f'<th scope="row"{kinds[0]}>{_breakable(text)}</th>'
        return f"<td{kinds[column]}>{escape(text)}</td>"

    head = "".join(f'<th scope="col"{kind}>{_breakable(text)}</th>' for text, kind in zip(header, kinds, strict=True))
    body = "".join(f"<tr>{''.join(cell(text, column) for column, text in enumerate(row))}</tr>\n" for row in rows)
    title = f"<caption>{escape(caption)}</caption>" if caption and not fold else ""
    label = f' role="region" aria-label="{escape(caption)}"' if caption else ""
    whole = (
        f'<div class="scroll" tabindex="0"{label}><table>{title}<thead><tr>{head}</tr></thead>\n'
        f"<tbody>{body}</tbody></table></div>\n"
    )
    if not fold:
        return whole
    count = f"{len(rows):,} row{'' if len(rows) == 1 else 's'}"
    return f'<details><summary>{escape(caption or "Table")} <span class="count">{count}</span></summary>\n{whole}</details>\n'


def picture(file: Path, caption: str, *, width_px: int | None = None) -> str:
    """A picture inside the page with its caption, in its own size or that width, and never wider than the page.

    A click shows it in full. One that is missing or damaged is replaced by a sentence that says so.
    """
    try:
        content = read_bytes(inside(file.parent, file.name), MAX_PICTURE_BYTES, "draw it again")
        with Image.open(io.BytesIO(content)) as image:
            media_type, (width, height) = MEDIA_TYPES.get(image.format or ""), image.size
            image.verify()
    except FileNotFoundError:
        return absent(f"There is no picture {file.name} ({caption}).")
    except (OSError, SyntaxError, ValueError, UnidentifiedImageError, Image.DecompressionBombError):
        return absent(f"The picture {file.name} ({caption}) cannot be read.")
    if media_type is None:
        return absent(f"The picture {file.name} ({caption}) has a format that browsers do not show.")
    shown = width_px or width
    pixelated = ' class="pixelated"' if shown > width or width <= SMALL_PICTURE_PX else ""
    source = f"data:{media_type};base64,{base64.b64encode(content).decode()}"
    return (
        f'<figure class="picture"><button type="button" class="enlarge" title="Show in full">'
        f'<img{pixelated} src="{source}" alt="{escape(caption)}" width="{shown}" height="{round(height * shown / width)}">'
        f"</button><figcaption>{escape(caption)}</figcaption></figure>\n"
    )


def side_by_side(parts: Sequence[str]) -> str:
    """Fragments of HTML beside each other where there is room, under each other elsewhere."""
    return f'<div class="beside">{"".join(f"<div>{part}</div>" for part in parts)}</div>\n'


def columns(parts: Sequence[str]) -> str:
    """Short fragments of HTML, above all tables, from top to bottom in as many columns as there is room for."""
    return f'<div class="columns">{"".join(f"<div>{part}</div>" for part in parts)}</div>\n'


def code(text: str) -> str:
    """A command or a file, with a button that copies it."""
    return (
        f'<div class="code"><pre tabindex="0"><code>{escape(text)}</code></pre>'
        '<button type="button" class="copy">Copy</button></div>\n'
    )


def verdict(kind: Literal["holds", "partly", "fails"], text: str) -> str:
    """A badge with that word, and a sentence."""
    sign = {"holds": "✓", "partly": "≈", "fails": "✗"}[kind]
    badge = f'<span class="badge"><span aria-hidden="true">{sign}</span> {kind}</span>'
    return f'<p class="verdict {kind}">{badge} {escape(text)}</p>\n'


def caution(text: str) -> str:
    """A sentence that one should not miss."""
    return f'<p class="verdict caution"><span class="badge"><span aria-hidden="true">!</span> caution</span> {escape(text)}</p>\n'


def links(targets: Sequence[tuple[str, str]]) -> str:
    """Texts that lead to files beside the page: (path relative to it, text) each."""
    for path, _ in targets:
        if ":" in path or path.startswith("/") or ".." in path.split("/"):
            raise ValueError(f"{path} does not lie beside the page")
    parts = [f'<a href="{escape(quote(path))}">{escape(text)}</a>' for path, text in targets]
    return f"<p>{' · '.join(parts)}</p>\n"


def absent(text: str) -> str:
    """A sentence about something that is not there."""
    return f'<p class="absent">{escape(text)}</p>\n'


def fold(summary: str, body: str) -> str:
    """HTML that is shown when its summary, plain text, is opened."""
    return f"<details><summary>{escape(summary)}</summary>\n{body}</details>\n"


def _breakable(name: str) -> str:
    """Names of metrics and runs may be broken where they are put together."""
    return escape(name).replace("_", "_<wbr>")


def _kind_of_column(texts: Sequence[str]) -> str:
    if all(map(NUMBER.fullmatch, texts)):
        return ' class="number"'
    return ' class="long"' if max(map(len, texts)) > LONG_TEXT else ""


def _anchors(sections: Sequence[Section]) -> list[str]:
    found: list[str] = []
    for section in sections:
        wanted = re.sub(r"[^a-z0-9]+", "-", (section.anchor or section.heading).lower()).strip("-") or "section"
        anchor, number = wanted, 2
        while anchor in found:
            anchor, number = f"{wanted}-{number}", number + 1
        found.append(anchor)
    return found


@cache
def _file(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")
