"""Text from users (class names, values of a sweep) in pictures: as it is, in one line, in letters that some font has.

matplotlib takes what stands between two `$` for mathematics, leaves out of legends what begins with an underscore, and draws
boxes for letters that its font lacks. A class may be called anything.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Mapping, Sequence

from matplotlib import font_manager
from matplotlib.font_manager import FontEntry
from matplotlib.legend import Legend
from matplotlib.text import Text

MAX_COLUMNS = 40
"""Width of a name, in columns of a terminal: a Chinese character takes two, and two columns of one in a picture."""

_family_of: dict[str, str | None] = {}
"""The font family that has a letter which the default font lacks, or None where no font has: each is looked for once."""


def legible(texts: Mapping[str, str], max_columns: int = MAX_COLUMNS) -> list[str]:
    """Each text as a picture can show it; its key, such as `class 3`, for one that is empty or in letters no font has."""
    lines = [one_line(text, max_columns) for text in texts.values()]
    _look_for({letter for line in lines for letter in line})
    return [
        line if line and all(_default_font_has(letter) or _family_of[letter] for letter in line) else stand_in
        for line, stand_in in zip(lines, texts, strict=True)
    ]


def one_line(text: str, max_columns: int = MAX_COLUMNS) -> str:
    """A text without control characters and line breaks, an ellipsis in the place of its middle if it is too wide.

    Composed (NFC), because letters are drawn one by one: file systems store é and 한 in pieces.
    """
    letters = (letter for letter in unicodedata.normalize("NFC", text) if not _is_unseen(letter))
    line = " ".join("".join(" " if unicodedata.category(letter) == "Cc" else letter for letter in letters).split())
    if sum(map(_columns, line)) <= max_columns:
        return line
    return f"{_start(line, max_columns // 2).rstrip()}…{_start(line[::-1], (max_columns - 1) // 2)[::-1].lstrip()}"


def as_it_is(*written: Text) -> None:
    """Draw texts without mathematics, in the default font and for letters that it lacks in others; call before drawing."""
    _look_for({letter for text in written for letter in text.get_text()})
    for text in written:
        text.set_parse_math(False)
        others = dict.fromkeys(family for letter in text.get_text() if (family := _family_of.get(letter)))
        if others:
            text.set_fontfamily([*text.get_fontfamily(), *others])


def name_entries(legend: Legend, names: Sequence[str]) -> None:
    """Give the entries of a legend their names, whatever these begin with; call before drawing."""
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set_text(name)
    as_it_is(*legend.get_texts())


def installed_fonts() -> list[FontEntry]:
    """One upright font of each family that matplotlib knows, of normal weight if there is one, in the order of trust."""
    manager = font_manager.fontManager
    fonts = sorted(
        manager.ttflist,
        key=lambda font: (font.style != "normal", manager.score_weight(font.weight, 400), font.name),
    )
    # It has a box for every letter there is, and comes with matplotlib and macOS.
    fonts = [font for font in fonts if "lastresort" not in font.name.replace(" ", "").lower()]
    return list({font.name: font for font in reversed(fonts)}.values())[::-1]


def _look_for(letters: Iterable[str]) -> None:
    """Note which family has each letter that the default font lacks; reads fonts only when there is one not noted yet."""
    wanted = {letter for letter in letters if letter not in _family_of and not _default_font_has(letter)}
    _family_of.update(dict.fromkeys(wanted))
    wanted = {letter for letter in wanted if unicodedata.category(letter) != "Co"}  # private: a font may mean anything
    for entry in installed_fonts() if wanted else ():
        found = {letter for letter in wanted if _has(entry.fname, letter)}
        _family_of.update(dict.fromkeys(found, entry.name))
        wanted -= found
        if not wanted:
            break


def _default_font_has(letter: str) -> bool:
    return letter == " " or _has(font_manager.findfont(font_manager.FontProperties()), letter)


def _has(file: str, letter: str) -> bool:
    """Whether a font has something to draw for a letter; one of coloured emoji may have an empty outline."""
    try:
        font = font_manager.get_font(file)
        return font.get_char_index(ord(letter)) != 0 and font.load_char(ord(letter)).width > 0
    except (OSError, RuntimeError):  # removed since matplotlib listed it, or FreeType cannot read it
        return False


def _is_unseen(letter: str) -> bool:
    """Whether it only says how others are drawn: joiners, directions, variation selectors (emoji or not)."""
    return unicodedata.category(letter) == "Cf" or "\ufe00" <= letter <= "\ufe0f"


def _columns(letter: str) -> int:
    return 2 if unicodedata.east_asian_width(letter) in "WF" else 1


def _start(text: str, max_columns: int) -> str:
    """As much of the start as fits."""
    used = 0
    for end, letter in enumerate(text):
        used += _columns(letter)
        if used > max_columns:
            return text[:end]
    return text
