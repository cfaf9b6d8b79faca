"""Colours of fur and eyes, written as hexadecimal codes."""

from __future__ import annotations

from typing import Any, Literal

from vaetrain.data.sources.faces.anatomy import Coat
from vaetrain.data.sources.faces.drawing import Colour


def rgb(code: str) -> Colour:
    """A colour in [0, 1] from six hexadecimal digits."""
    red, green, blue = (round(byte / 255, 4) for byte in bytes.fromhex(code))
    return red, green, blue


def irises(*codes: str) -> tuple[Colour, ...]:
    """The eye colours a breed has."""
    return tuple(rgb(code) for code in codes)


def coat(
    base: str,
    light: str,
    dark: str,
    pattern: Literal["plain", "tabby", "tiger", "rosettes", "spots", "patches"] = "plain",
    pattern_strength: float = 0.0,
    *,
    patch: str | None = None,
    scale: float = 1.0,
    **strengths: float,
) -> Coat:
    """A coat from the hexadecimal codes of its colours; markings that are not named are absent."""
    named: dict[str, Any] = dict(pattern=pattern, pattern_strength=pattern_strength, pattern_scale=scale, **strengths)
    return Coat(base=rgb(base), light=rgb(light), dark=rgb(dark), patch=rgb(patch or dark), **named)
