"""An axis of a chart: from values to pixels, round ticks, and how they are written. Linear or logarithmic."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")

LARGEST, SMALLEST = 1e250, 1e-250
"""Between these the arithmetic of an axis neither overflows nor divides by zero."""

FAR = 1000.0
"""Lengths of an axis; no line is seen to bend there."""


@dataclass(frozen=True)
class Axis:
    """What part of the numbers is shown; `low` and `high` are decimal logarithms where `log`."""

    low: float
    high: float
    log: bool = False

    @classmethod
    def around(cls, values: Sequence[float], *, log: bool, padding: float) -> Axis:
        """An axis that holds all `values` (finite, and positive where `log`), with a share of its length as padding."""
        shown = [math.log10(value) for value in values] if log else list(values)
        low, high = min(shown), max(shown)
        if high - low <= max(
            1e-12 * max(abs(low), abs(high)), SMALLEST
        ):  # a single value has a neighbourhood all the same
            half = 0.1 * abs(low) if not log and abs(low) > SMALLEST else 0.5
            return cls(low - half, high + half, log)
        margin = padding * (high - low)
        return cls(low - margin, high + margin, log)

    def takes(self, value: float) -> bool:
        """Whether a value has a place on an axis of this kind."""
        return math.isfinite(value) and (value > SMALLEST or not self.log)

    def share(self, value: float) -> float:
        """Where a value lies: 0 at the lower end, 1 at the upper; what lies far beyond is brought nearer."""
        share = ((math.log10(value) if self.log else value) - self.low) / (self.high - self.low)
        return min(max(share, -FAR), FAR)

    def ticks(self, num: int) -> list[tuple[float, str]]:
        """Some `num` round values on the axis with their texts."""
        return self._log_ticks(num) if self.log and self.high - self.low >= 1 else self._linear_ticks(num)

    def _linear_ticks(self, num: int) -> list[tuple[float, str]]:
        low, high = (10**self.low, 10**self.high) if self.log else (self.low, self.high)
        step = round_step((high - low) / num)
        found = [number * step for number in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]
        return [(value, tick_text(value, step)) for value in found]

    def _log_ticks(self, num: int) -> list[tuple[float, str]]:
        decades = range(math.floor(self.low), math.floor(self.high) + 1)
        stride = max(1, math.floor((self.high - self.low) / num + 0.5))
        multiples = (1, 2, 5) if 3 * len(decades) <= 2 * num else (1,)
        found = [
            (multiple * 10.0**decade, power_text(decade) if multiple == 1 else tick_text(multiple * 10.0**decade, 10.0**decade))
            for decade in decades if decade % stride == 0
            for multiple in multiples
        ]  # fmt: skip
        return [(value, text) for value, text in found if self.low - 1e-9 <= math.log10(value) <= self.high + 1e-9]


def round_step(step: float) -> float:
    """The nearest of 1, 2, 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(step))
    return power * next((multiple for multiple, end in ((1, 1.41), (2, 3.16), (5, 7.07)) if step < end * power), 10)


def tick_text(value: float, step: float) -> str:
    """A tick with as many decimals as its step needs, and thousands set apart."""
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 1e7 or step < 1e-5:
        mantissa, exponent = f"{size:.3e}".split("e")
        text = f"{float(mantissa):g}·10{superscript(int(exponent))}"
    else:
        text = f"{size:,.{max(0, -math.floor(math.log10(step) + 1e-9))}f}"
    return "−" + text if value < 0 else text


def power_text(exponent: int) -> str:
    """A power of ten, in figures as long as these are short."""
    if -3 <= exponent <= 4:
        return tick_text(10.0**exponent, 10.0**exponent)
    return f"10{superscript(exponent)}"


def superscript(number: int) -> str:
    """A whole number as an exponent."""
    return str(number).translate(SUPERSCRIPTS)
