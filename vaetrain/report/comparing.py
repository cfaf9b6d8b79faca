"""Several runs held against each other: overlaid curves, what differs, results and pictures side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vaetrain.comparison import SECTIONS, Comparison, Result, shown
from vaetrain.report.curves import curves_of_runs
from vaetrain.report.gallery import gallery_of_runs
from vaetrain.report.page import Section, absent, bullets, subheading, table
from vaetrain.report.recorded import Recorded

TITLES = {
    "config": "Configuration", "data": "Data", "code": "Code", "packages": "Packages", "machine": "Machine",
    "results": "Results",
}  # fmt: skip
"""By section of a comparison."""


def comparison_sections(runs: Sequence[Recorded], labels: Sequence[str]) -> list[Section]:
    """The sections of a page that compares runs."""
    comparison, unreadable = _compare(runs)
    differences, results = "", ""
    if len(comparison.results) > 1:
        names = [label for label, recorded in zip(labels, runs, strict=True) if recorded.run.path not in unreadable]
        differences, results = _differences(comparison, names), _table(comparison, names, "results", all_rows=True)
    else:
        differences = absent("Fewer than two of these runs can be compared.")
        results = absent("Fewer than two of these runs can be compared.")
    faults = "".join(absent(f"{path} is left out: {reason}") for path, reason in unreadable.items())
    return [
        Section("Results side by side", faults + results, "results"),
        Section("Curves compared", curves_of_runs(runs, labels), "curves-compared"),
        Section("What differs", differences, "differences"),
        Section("Pictures compared", gallery_of_runs(runs, labels), "pictures-compared"),
    ]


def _compare(runs: Sequence[Recorded]) -> tuple[Comparison, dict[Path, str]]:
    """Of the runs that can be read in full; of the others why not."""
    results, unreadable = [], {}
    for recorded in runs:
        try:
            results.append(Result.read(recorded.run.path))
        except (OSError, ValueError, LookupError, TypeError) as error:
            unreadable[recorded.run.path] = (
                f"{type(error).__name__}: {error}" if isinstance(error, LookupError) else str(error)
            )
        except SystemExit:  # from the parser of configurations, which has told the terminal more
            unreadable[recorded.run.path] = "its config.yaml has keys or values that this vaetrain does not know."
    return Comparison(tuple(results)), unreadable


def _differences(comparison: Comparison, names: Sequence[str]) -> str:
    parts = [bullets([line[0].upper() + line[1:] for line in comparison.headline().splitlines()])]
    between = comparison.code_between(Path(__file__).parent)
    if between:
        parts.append(bullets([f"Code: {between}"]))
    for section in SECTIONS[:-1]:
        parts.append(_table(comparison, names, section, all_rows=False))
    return "".join(parts)


def _table(comparison: Comparison, names: Sequence[str], section: str, *, all_rows: bool) -> str:
    wanted = comparison.names(section) if all_rows else comparison.differing(section)
    rows = [(name, *map(shown, comparison.row(section, name))) for name in wanted]
    if not rows:
        return ""
    header = ("", *names)
    return table(header, rows) if all_rows else subheading(TITLES[section]) + table(header, rows, fold=False)
