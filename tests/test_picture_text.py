import unicodedata
import warnings

import matplotlib.pyplot as plt
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib import font_manager

from vaetrain import picture_text
from vaetrain.picture_text import as_it_is, installed_fonts, legible, name_entries, one_line

CAT = "猫"
FAMILY = "A font of one character"


@pytest.fixture(autouse=True)
def _nothing_is_known_yet(monkeypatch):
    monkeypatch.setattr(picture_text, "_family_of", {})


@pytest.fixture
def no_other_fonts(monkeypatch):
    monkeypatch.setattr(picture_text, "installed_fonts", list)


def install(monkeypatch, file, letter, *, outline=True):
    """Write a font that has this letter alone, a square, and make it known to matplotlib."""
    pen = TTGlyphPen(None)
    if outline:
        pen.moveTo((100, 0))
        for corner in ((100, 800), (900, 800), (900, 0)):
            pen.lineTo(corner)
        pen.closePath()
    empty = TTGlyphPen(None).glyph()
    font = FontBuilder(1000, isTTF=True)
    font.setupGlyphOrder([".notdef", "letter"])
    font.setupCharacterMap({ord(letter): "letter"})
    font.setupGlyf({".notdef": empty, "letter": pen.glyph()})
    font.setupHorizontalMetrics({".notdef": (1000, 0), "letter": (1000, 100 if outline else 0)})
    font.setupHorizontalHeader(ascent=900, descent=-100)
    font.setupNameTable({"familyName": FAMILY, "styleName": "Regular"})
    font.setupOS2(usWeightClass=400)
    font.setupPost()
    font.save(file)
    monkeypatch.setattr(font_manager.fontManager, "ttflist", list(font_manager.fontManager.ttflist))
    font_manager.fontManager.addfont(file)


@pytest.fixture
def draw():
    """Draw a legend of these names; its pixels. Warnings, as of missing glyphs, are errors."""
    figures = []

    def pixels(names):
        figure, axis = plt.subplots(figsize=(3, 3), dpi=50, layout="constrained")
        figures.append(figure)
        handles = [axis.scatter([0], [0]) for _ in names]
        name_entries(figure.legend(handles, ["x"] * len(names), loc="outside right upper"), names)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            figure.canvas.draw()
        return figure, bytes(figure.canvas.buffer_rgba())

    yield pixels
    for figure in figures:
        plt.close(figure)


@pytest.mark.parametrize("name", ["Ba$$in", "A$^$B", "$_$", r"a\$b", "$\\undefined$", "_background_", "__", "кошка"])
def test_names_are_drawn_as_they_are(draw, name):
    assert legible({"class 0": name}) == [name]
    figure, pixels = draw([name])
    [legend] = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [name]
    assert all(text.get_visible() for text in legend.get_texts())
    assert pixels != draw([" "])[1]


def test_dollars_anywhere_are_no_mathematics(draw):
    figure, _ = draw(["a"])
    as_it_is(figure.suptitle("Ba$$in"))
    figure.canvas.draw()


def test_a_name_is_one_short_line():
    assert one_line("a\nb\t c\x00\x1b[31m\u2028d\u202e") == "a b c [31m d"
    assert one_line("❤\ufe0f \u00e9 e\u0301") == "❤ é é"
    assert one_line("x" * 40) == "x" * 40
    shortened = one_line("begin " + "x" * 1000 + " end")
    assert len(shortened) == 40
    assert shortened.startswith("begin xx")
    assert "…" in shortened
    assert shortened.endswith("xx end")
    assert len(one_line(CAT * 41)) == 20, "Chinese characters are twice as wide"
    assert len(one_line("a" + "\u0301\u0316" * 300)) <= 40, "marks pile up"


def test_the_number_stands_in_for_what_no_font_can_show(no_other_fonts, draw):
    names = ["cat", CAT, f"cat {CAT}", "", "\n\u200b", "\udcff", "\ue000", "\u0378", "\U000f0000"]
    shown = legible({f"class {label}": name for label, name in enumerate(names)})
    assert shown == ["cat", *(f"class {label}" for label in range(1, len(names)))]
    draw(shown)


def test_letters_come_from_an_installed_font_that_has_them(monkeypatch, tmp_path, draw):
    monkeypatch.setattr(font_manager.fontManager, "ttflist", _without(CAT))
    assert legible({"class 0": CAT}) == ["class 0"]
    monkeypatch.setattr(picture_text, "_family_of", {})
    install(monkeypatch, tmp_path / "cat.ttf", CAT)
    shown = legible({"class 0": f"cat {CAT}", "class 1": "dog"})
    assert shown == [f"cat {CAT}", "dog"]
    figure, pixels = draw(shown)
    cat, dog = figure.legends[0].get_texts()
    assert cat.get_fontfamily()[-1] == FAMILY
    assert FAMILY not in dog.get_fontfamily()
    assert pixels != draw(["cat  ", "dog"])[1]


def test_a_font_with_nothing_to_draw_is_not_taken(monkeypatch, tmp_path):
    monkeypatch.setattr(font_manager.fontManager, "ttflist", _without(CAT))
    install(monkeypatch, tmp_path / "blank.ttf", CAT, outline=False)
    assert FAMILY in {font.name for font in installed_fonts()}
    assert legible({"class 0": CAT}) == ["class 0"]


def test_fonts_that_are_really_installed(draw):
    has = {font.name: set(font_manager.get_font(font.fname).get_charmap()) for font in installed_fonts()}
    default = set(font_manager.get_font(font_manager.findfont(font_manager.FontProperties())).get_charmap())
    letters = [
        chr(code) for codes in has.values() for code in codes - default if unicodedata.category(chr(code))[0] == "L"
    ]
    if not letters:
        pytest.skip("no installed font has a letter that matplotlib's own lacks")
    shown = legible({"class 0": letters[0]})
    assert shown == letters[:1]
    draw(shown)


def test_fonts_are_not_searched_for_what_the_default_has(monkeypatch):
    monkeypatch.setattr(picture_text, "installed_fonts", lambda: pytest.fail("searched"))
    assert legible({"class 0": "Größe, мера, μέτρον"}) == ["Größe, мера, μέτρον"]


def test_fonts_are_searched_once_for_all_names(monkeypatch):
    searches = []
    monkeypatch.setattr(picture_text, "installed_fonts", lambda: searches.append(1) or [])
    names = {f"class {label}": chr(ord(CAT) + label) for label in range(50)}
    assert legible(names) == legible(names) == list(names)
    assert len(searches) == 1


def test_a_font_that_is_gone_is_passed_over(monkeypatch, tmp_path):
    monkeypatch.setattr(font_manager.fontManager, "ttflist", _without(CAT))
    install(monkeypatch, tmp_path / "cat.ttf", CAT)
    (tmp_path / "cat.ttf").unlink()
    assert legible({"class 0": CAT}) == ["class 0"]


def _without(letter):
    """The installed fonts that lack a letter, and the one that has a box for each."""
    return [
        font
        for font in font_manager.fontManager.ttflist
        if "Last Resort" in font.name or not font_manager.get_font(font.fname).get_char_index(ord(letter))
    ]
