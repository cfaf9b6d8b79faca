"""A run as one HTML file that needs nothing else: curves, pictures, scores, data, configuration and provenance.

python tools/report.py RUN [RUN ...]      of several runs their comparison, too
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from vaetrain.command_line import parse, user_errors
from vaetrain.files import replace_file
from vaetrain.report.document import report


@dataclass(frozen=True)
class ReportArguments:
    """Which runs, and where the page goes."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run directories; one in training is shown as far as it is."""

    out: Path | None = None
    """File to write; None: report.html in the first run."""


def main(arguments: ReportArguments) -> None:
    """Write the page."""
    if not arguments.runs:
        raise ValueError("name at least one run directory")
    content = report(arguments.runs).encode(errors="backslashreplace")  # a file's name may be no Unicode
    out = arguments.out or arguments.runs[0] / "report.html"
    if out.is_dir():
        raise ValueError(f"--out {out} is a folder; name a file, for example {out / 'report.html'}")
    out.parent.mkdir(parents=True, exist_ok=True)
    replace_file(out, content)
    print(f"report written to {out} ({len(content) / 1e6:.1f} MB)")


if __name__ == "__main__":
    ARGUMENTS = parse(ReportArguments, __doc__, flags=True)
    with user_errors():
        main(ARGUMENTS)
