"""Pages: everything inside one file, every text escaped, and tables, pictures and commands one can use."""

from __future__ import annotations

import base64
import hashlib
import io

import pytest
from PIL import Image

from html_document import Document
from vaetrain.report.page import (
    Section,
    absent,
    bullets,
    caution,
    code,
    fold,
    links,
    page,
    paragraph,
    picture,
    table,
    verdict,
)

HOSTILE = "</script><script>alert(1)</script> & \"quoted\" 'too'"


def test_every_text_is_text():
    body = "".join(
        (
            paragraph(HOSTILE), table((HOSTILE, "b"), [(HOSTILE, HOSTILE)], caption=HOSTILE),
            table(("a",), [(HOSTILE,)], caption=HOSTILE, fold=True), code(HOSTILE), verdict("holds", HOSTILE),
            absent(HOSTILE), caution(HOSTILE), bullets([HOSTILE]), fold(HOSTILE, ""),
        )
    )  # fmt: skip
    document = Document(page(HOSTILE, HOSTILE, [Section(HOSTILE, body)]))
    assert len(document.all("script")) == 2  # the page's own
    assert document.all("h1")[0].text == document.all("h2")[0].text == document.all("code")[0].text == HOSTILE
    assert document.text.count(HOSTILE) == 17
    assert document.all("title")[0].text == HOSTILE


def test_a_page_refers_to_nothing_and_forbids_itself_the_network():
    document = Document(page("t", "s", [Section("One", ""), Section("Two", "")]))
    assert document.references() == []
    [policy] = [meta.attributes["content"] for meta in document.all("meta") if "http-equiv" in meta.attributes]
    assert "default-src 'none'" in policy
    for script in document.all("script"):
        digest = base64.b64encode(hashlib.sha256(script.text.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy
    for word in ("http:", "https:", "@import", "@font-face", "fetch(", "XMLHttpRequest"):
        assert word not in page("t", "s", [])


def test_references_are_found():
    found = Document(
        '<style>a{background:url(x.png)}</style><img src="https://e/x.png"><a href="#here"></a>'
    ).references()
    assert found == ["https://e/x.png", "x.png"]


def test_the_contents_lead_to_every_section():
    sections = [Section("Curves", ""), Section("Curves", ""), Section("β", ""), Section("x", "", anchor="My run: 1")]
    document = Document(page("t", "s", sections))
    anchors = [link.attributes["href"] for link in document.all("a")]
    assert anchors == ["#curves", "#curves-2", "#section", "#my-run-1"]
    assert ["#" + section.attributes["id"] for section in document.all("section")] == anchors


def test_tables_have_headers_and_align_numbers():
    document = Document(
        table(
            ("name", "value", "text", "none"),
            [("a", "1,234.5", "x1", "–"), ("b_c", "−2.5·10⁻⁵ ± 0.1", "2", "")],
            caption="c",
        )
    )
    assert [head.attributes.get("scope") for head in document.all("th")] == ["col"] * 4 + ["row"] * 2
    kinds = [cell.attributes.get("class") for cell in document.all("td")]
    assert kinds == ["number", None, "number"] * 2
    assert document.all("caption")[0].text == "c"
    assert document.all("div")[0].attributes["aria-label"] == "c"
    with pytest.raises(ValueError, match="a row of 1 cells in a table of 2 columns"):
        table(("a", "b"), [("1",)])


def test_a_folded_table_says_how_long_it_is():
    document = Document(table(("a",), [("1",), ("2",)], caption="Packages", fold=True))
    assert document.all("summary")[0].text == "Packages 2 rows"
    assert len(document.all("details")) == 1


def test_pictures_are_inside_and_small_ones_keep_their_pixels(tmp_path):
    for name, size in (("small.png", (28, 28)), ("large.png", (900, 450))):
        Image.new("L", size, 128).save(tmp_path / name)
    [small] = Document(picture(tmp_path / "small.png", "A digit", width_px=140)).all("img")
    assert small.attributes["alt"] == "A digit"
    assert (small.attributes["width"], small.attributes["height"]) == ("140", "140")
    assert small.attributes["class"] == "pixelated"
    kind, content = small.attributes["src"].split(",")
    assert kind == "data:image/png;base64"
    with Image.open(io.BytesIO(base64.b64decode(content))) as image:
        assert image.size == (28, 28)
    [large] = Document(picture(tmp_path / "large.png", "Samples")).all("img")
    assert "class" not in large.attributes
    assert large.attributes["width"] == "900"


def test_a_picture_that_cannot_be_shown_is_a_sentence(tmp_path):
    assert "There is no picture none.png (Samples)" in picture(tmp_path / "none.png", "Samples")
    (tmp_path / "cut.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0")
    assert "The picture cut.png (&lt;Samples&gt;) cannot be read" in picture(tmp_path / "cut.png", "<Samples>")
    Image.new("L", (64, 64)).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:60])
    assert "cannot be read" in picture(tmp_path / "cut.png", "Samples")
    Image.new("L", (8, 8)).save(tmp_path / "x.bmp")
    assert "a format that browsers do not show" in picture(tmp_path / "x.bmp", "Samples")


@pytest.mark.parametrize("kind", ["holds", "partly", "fails"])
def test_a_verdict_is_said_in_words_too(kind):
    assert Document(verdict(kind, "As the lecture says.")).all("p")[0].text.split() == [
        {"holds": "✓", "partly": "≈", "fails": "✗"}[kind], kind, "As", "the", "lecture", "says.",
    ]  # fmt: skip


def test_links_lead_beside_the_page_and_nowhere_else():
    document = Document(
        page("t", "s", [Section("h", links([("runs/a b/report.html", "<a> report"), ("x.json", "x")]))])
    )
    assert [link.attributes["href"] for link in document.all("a")[1:]] == ["runs/a%20b/report.html", "x.json"]
    assert "<a> report · x" in document.text
    for elsewhere in ("https://example.org", "/etc/passwd", "javascript:alert(1)", "runs/../../x"):
        with pytest.raises(ValueError, match="does not lie beside"):
            links([(elsewhere, "x")])
