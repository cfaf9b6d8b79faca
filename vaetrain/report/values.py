"""How the values of records are written for people, and nested ones laid flat."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from vaetrain.report.axis import superscript


def number_text(value: float | int, digits: int = 5) -> str:
    """A number for people: so many significant digits, or all of a whole number, and thousands set apart."""
    if not math.isfinite(value):
        return "–"
    size = abs(value)
    if value == int(value) and size < 1e15:
        text = f"{size:,.0f}"
    elif 1e-3 <= size < 1e7:
        text = f"{size:,.{max(0, digits - 1 - math.floor(math.log10(size)))}f}"
    else:
        mantissa, exponent = f"{size:.{min(digits, 4) - 1}e}".split("e")
        text = f"{mantissa}·10{superscript(int(exponent))}"
    return "−" + text if value < 0 else text


def inner(content: Any, name: str) -> Mapping[str, Any]:
    """The mapping under a name; empty when there is none, or something else."""
    value = content.get(name) if isinstance(content, Mapping) else None
    return value if isinstance(value, Mapping) else {}


def shown_value(value: Any) -> str:
    """A value of a record as text."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        return number_text(value)
    if isinstance(value, list) and all(
        isinstance(item, str | int | float) and not isinstance(item, bool) for item in value
    ):
        return ", ".join(item if isinstance(item, str) else number_text(item) for item in value) or "–"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def exact(value: Any) -> str:
    """A setting as one would type it: not rounded, no thousands set apart."""
    if isinstance(value, float):
        return number_text(value) if value != value else f"{value:g}" if float(f"{value:g}") == value else repr(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, list):
        return "[" + ", ".join(map(exact, value)) + "]"
    return shown_value(value)
