"""What a finding shows: tables and charts, as HTML for the page and, the tables, as Markdown for docs/results.md."""

from __future__ import annotations

from dataclasses import dataclass

from vaetrain.report.chart import Series, chart
from vaetrain.report.page import table


@dataclass(frozen=True)
class Table:
    """Texts in columns."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str = ""

    def html(self) -> str:
        """For the page."""
        return table(self.header, self.rows, caption=self.caption)

    def markdown(self) -> str:
        """For a document."""
        lines = [self.header, tuple("---" for _ in self.header), *self.rows]
        body = "\n".join(f"| {' | '.join(cell.replace('|', '·') for cell in line)} |" for line in lines)
        return f"{self.caption}\n\n{body}\n" if self.caption else f"{body}\n"


@dataclass(frozen=True)
class Chart:
    """Curves; the page alone has them."""

    title: str
    series: tuple[Series, ...]
    x: str
    y: str
    log_x: bool = False
    labels: tuple[str, ...] = ()
    log_y: bool = False

    def html(self) -> str:
        """For the page."""
        return chart(
            self.title, self.series, x=self.x, y=self.y, log_x=self.log_x, log_y=self.log_y, markers=True,
            labels=self.labels,
        )  # fmt: skip

    def markdown(self) -> str:
        """Nothing."""
        return ""


Exhibit = Table | Chart
