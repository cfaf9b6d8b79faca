"""A chart as an HTML fragment: an inline SVG drawn here, so that it is read without JavaScript; chart.js zooms it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

from vaetrain.report.axis import LARGEST, Axis
from vaetrain.report.values import number_text
from vaetrain.runs.curves import without_outliers

WIDTH, HEIGHT = 720, 380
"""In SVG units; chart.js draws anew for the width that there is."""

TOP, RIGHT, BOTTOM = 26, 16, 42
"""Margins around the plot, for the name of y, the last tick and the name of x."""

NUM_COLOURS = 8
"""In page.css; further series are dashed."""


@dataclass(frozen=True)
class Series:
    """A line of a chart. What is not finite is left out and leaves a gap."""

    label: str
    points: tuple[tuple[float | int, float | int], ...]
    errors: tuple[float | int, ...] = ()
    """± on y, one for each point; empty for none."""

    def __post_init__(self) -> None:
        """Check that every point has its error; whole numbers become floats, and what no axis takes NaN."""
        if self.errors and len(self.errors) != len(self.points):
            raise ValueError(f"series {self.label} has {len(self.points)} points and {len(self.errors)} errors")
        object.__setattr__(self, "points", tuple((_drawable(x), _drawable(y)) for x, y in self.points))
        object.__setattr__(self, "errors", tuple(_drawable(error) if error >= 0 else math.nan for error in self.errors))

    def rounded(self) -> dict[str, object]:
        """What chart.js reads; null for what is not finite."""
        return {
            "label": self.label,
            "points": [[_rounded(x), _rounded(y)] for x, y in self.points],
            "errors": [_rounded(error) for error in self.errors],
        }


def chart(
    title: str,
    series: Sequence[Series],
    *,
    x: str,
    y: str,
    log_x: bool = False,
    log_y: bool = False,
    markers: bool = False,
    labels: Sequence[str] = (),
) -> str:
    """An HTML figure: title, legend whose entries show and hide a series, SVG, and a table of first, last and extreme values.

    `x` and `y` name the axes, with their units. `markers` puts a dot on every point; `labels` are written beside the points of
    the first series. Enormous first values are cut off at first, and a button shows them.
    """
    plot = _Plot.of(series, x=x, y=y, log_x=log_x, log_y=log_y, markers=markers, labels=labels)
    if plot is None:
        nothing = '<p class="absent">There is no finite value to draw.</p>'
        return f'<figure class="chart"><figcaption>{escape(title)}</figcaption>{nothing}</figure>\n'
    legend = "".join(
        f'<button type="button" class="entry s{number % NUM_COLOURS}" aria-pressed="true">{_swatch(number)}'
        f"<span>{escape(line.label)}</span></button>"
        for number, line in enumerate(series)
    )
    whole = '<button type="button" class="whole">Show all values</button>' if plot.is_clipped else ""
    return (
        f'<figure class="chart" data-chart="{escape(plot.to_json())}"><figcaption><span>{escape(title)}</span><span class="tools">'
        f'{whole}<button type="button" class="reset" hidden>Reset zoom</button></span></figcaption>'
        f'<div class="legend">{legend}</div>'
        f'<div class="box">{plot.svg(title)}<div class="tip" hidden></div></div>'
        f"{_numbers(series, x)}</figure>\n"
    )


@dataclass(frozen=True)
class _Plot:
    series: Sequence[Series]
    x: str
    y: str
    markers: bool
    labels: Sequence[str]
    axis_x: Axis
    axis_y: Axis
    whole_y: Axis
    """Of all values; `axis_y` may leave out enormous ones."""

    @classmethod
    def of(
        cls,
        series: Sequence[Series],
        *,
        x: str,
        y: str,
        log_x: bool,
        log_y: bool,
        markers: bool,
        labels: Sequence[str],
    ) -> _Plot | None:
        """None when there is nothing to draw."""
        kind_x, kind_y = Axis(0.0, 1.0, log_x), Axis(0.0, 1.0, log_y)
        places = [
            (place, value, error)
            for line in series
            for (place, value), error in zip(line.points, line.errors or [0.0] * len(line.points), strict=True)
            if kind_x.takes(place) and kind_y.takes(value)
        ]
        if not places:
            return None
        ends = [value + sign * error for _, value, error in places for sign in (-1, 1) if math.isfinite(error)]
        ends = [value for value in ends if kind_y.takes(value)] + [value for _, value, _ in places]
        common = ends if log_y else without_outliers(ends)
        return cls(
            series, x, y, markers, labels,
            Axis.around([place for place, _, _ in places], log=log_x, padding=0.04 if markers else 0.0),
            Axis.around(common, log=log_y, padding=0.05),
            Axis.around(ends, log=log_y, padding=0.05),
        )  # fmt: skip

    @property
    def is_clipped(self) -> bool:
        return self.axis_y != self.whole_y

    def to_json(self) -> str:
        """What chart.js draws from."""
        return json.dumps(
            {
                "series": [line.rounded() for line in self.series],
                "x": self.x, "y": self.y, "logX": self.axis_x.log, "logY": self.axis_y.log,
                "markers": self.markers, "labels": list(self.labels),
                "view": [self.axis_x.low, self.axis_x.high, self.axis_y.low, self.axis_y.high],
                "whole": [self.axis_x.low, self.axis_x.high, self.whole_y.low, self.whole_y.high],
            },
            separators=(",", ":"), allow_nan=False, ensure_ascii=False,
        )  # fmt: skip

    def svg(self, title: str) -> str:
        """The picture; chart.js makes the same elements."""
        ticks_x, ticks_y = self.axis_x.ticks(7), self.axis_y.ticks(6)
        left = 14 + 7 * max((len(text) for _, text in ticks_y), default=1)
        width, height = WIDTH - left - RIGHT, HEIGHT - TOP - BOTTOM
        parts = []
        for value, text in ticks_y:
            place = TOP + height * (1 - self.axis_y.share(value))
            parts.append(f'<path class="grid" d="M{left} {place:.1f}h{width}"/>')
            parts.append(f'<text class="tick y" x="{left - 8}" y="{place + 4:.1f}">{text}</text>')
        for value, text in ticks_x:
            place = left + width * self.axis_x.share(value)
            parts.append(f'<path class="grid" d="M{place:.1f} {TOP}v{height}"/>')
            parts.append(f'<text class="tick x" x="{place:.1f}" y="{TOP + height + 17}">{text}</text>')
        parts.append(f'<path class="frame" d="M{left} {TOP}v{height}h{width}"/>')
        parts.append(f'<text class="name y" x="0" y="13">{escape(self.y)}</text>')
        parts.append(f'<text class="name x" x="{left + width}" y="{HEIGHT - 6}">{escape(self.x)}</text>')
        lines = "".join(self._line(number, width, height) for number in range(len(self.series)))
        summary = escape(f"{title}: {self.y} over {self.x}; " + "; ".join(map(_describe, self.series)))
        return (
            f'<svg class="plot" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" tabindex="0" aria-label="{summary}">'
            f'{"".join(parts)}<svg class="area" x="{left}" y="{TOP}" width="{width}" height="{height}">{lines}</svg></svg>'
        )

    def _line(self, number: int, width: int, height: int) -> str:
        line = self.series[number]
        parts = []
        for run in self._runs(line):
            places = [
                (width * self.axis_x.share(line.points[i][0]), height * (1 - self.axis_y.share(line.points[i][1])))
                for i in run
            ]
            if len(places) > 1:
                path = "L".join(f"{left:.1f} {top:.1f}" for left, top in places)
                parts.append(f'<path class="line" {_dash(number)}d="M{path}"/>')
            for i, (left, top) in zip(run, places, strict=True):
                if line.errors and math.isfinite(line.errors[i]):
                    parts.append(self._error_bar(left, height, line.points[i][1], line.errors[i]))
                if self.markers or len(places) == 1:
                    parts.append(f'<circle class="dot" cx="{left:.1f}" cy="{top:.1f}" r="3.2"/>')
                if number == 0 and i < len(self.labels):
                    place, anchor = (left + 7, "start") if left < 0.85 * width else (left - 7, "end")
                    parts.append(
                        f'<text class="label" x="{place:.1f}" y="{top - 7:.1f}" text-anchor="{anchor}">'
                        f"{escape(self.labels[i])}</text>"
                    )
        return f'<g class="s{number % NUM_COLOURS}">{"".join(parts)}</g>'

    def _error_bar(self, left: float, height: int, value: float, error: float) -> str:
        low, high = value - error, value + error
        bottom = height * (1 - self.axis_y.share(low)) if self.axis_y.takes(low) else height
        top = height * (1 - self.axis_y.share(high))
        return f'<path class="error" d="M{left - 3:.1f} {top:.1f}h6m-3 0V{bottom:.1f}m-3 0h6"/>'

    def _runs(self, line: Series) -> Iterator[list[int]]:
        """Indices of neighbours that can be drawn, cut at every gap."""
        run: list[int] = []
        for i, (place, value) in enumerate(line.points):
            if self.axis_x.takes(place) and self.axis_y.takes(value):
                run.append(i)
            elif run:
                yield run
                run = []
        if run:
            yield run


def _numbers(series: Sequence[Series], x: str) -> str:
    """A table for those who do not see the picture."""
    head = "".join(f'<th scope="col">{name}</th>' for name in ("", "points", "first", "last", "lowest", "highest"))
    rows = []
    for line in series:
        values = [value for _, value in line.points if math.isfinite(value)]
        found = [values[0], values[-1], min(values), max(values)] if values else []
        cells = "".join(f'<td class="number">{number_text(value)}</td>' for value in (len(values), *found))
        rows.append(f'<tr><th scope="row">{escape(line.label)}</th>{cells}</tr>')
    return (
        f'<details class="numbers"><summary>Numbers</summary><div class="scroll" tabindex="0"><table><thead><tr>{head}'
        f"</tr></thead><tbody>{''.join(rows)}</tbody></table></div></details>"
    )


def _describe(line: Series) -> str:
    values = [value for _, value in line.points if math.isfinite(value)]
    if not values:
        return f"{line.label} has no values"
    return f"{line.label} from {number_text(values[0])} to {number_text(values[-1])}"


def _swatch(number: int) -> str:
    return f'<svg class="swatch" viewBox="0 0 22 10" aria-hidden="true"><path class="line" {_dash(number)}d="M1 5h20"/></svg>'


def _dash(number: int) -> str:
    dashes = ("", "6 4", "2 3", "8 3 2 3")[number // NUM_COLOURS % 4]
    return f'stroke-dasharray="{dashes}" ' if dashes else ""


def _rounded(value: float) -> float | None:
    return float(f"{value:.7g}") if math.isfinite(value) else None


def _drawable(value: float | int) -> float:
    return float(value) if abs(value) < LARGEST else math.nan
